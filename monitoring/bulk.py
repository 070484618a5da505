"""Metrics that take many values in one call, and what keeps reports until many of them are added up together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from threading import Lock

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from streamkd.report import Report

MOST_WAITING = 64
"""Reports that wait at the most."""
MOST_NUMBERS = 500_000
"""Numbers in their largest parts, likewise: where these are large, fewer reports wait."""


class BulkHistogram(Collector):
    """Histograms of one name, which take many values in one call.

    Args:
        name: of the metric.
        text: its help.
        buckets: their upper edges.
        registry: which it joins.
        labels: name -> values; there is a histogram for each combination of these, the last label's changing fastest.
    """

    def __init__(
        self,
        name: str,
        text: str,
        buckets: Sequence[float],
        registry: CollectorRegistry,
        labels: Mapping[str, Sequence[str]],
    ) -> None:
        self._name, self._text = name, text
        self._labels, self._series = list(labels), list(product(*labels.values()))
        self._edges = np.array(buckets, dtype=np.float64)
        self._counts: NDArray[np.int64] = np.zeros((len(self._series), len(buckets) + 1), dtype=np.int64)
        self._sums = np.zeros(len(self._series))
        registry.register(self)

    def observe(self, values: ArrayLike, series: ArrayLike = 0) -> None:
        """Take in `values` `[m]`, each into the histogram at its index in `series`, `[m]` or one for all."""
        told = np.asarray(values, dtype=np.float64)
        which = np.broadcast_to(np.asarray(series, dtype=np.int64), told.shape)
        cells = which * self._counts.shape[1] + np.searchsorted(self._edges, told)
        self._counts += np.bincount(cells, minlength=self._counts.size).reshape(self._counts.shape)
        self._sums += np.bincount(which, told, minlength=len(self._sums))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Return the family, for the registry."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        edges = [str(float(edge)) for edge in self._edges] + ["+Inf"]
        totals = self._counts.cumsum(1).tolist()
        for labels, counts, total in zip(self._series, totals, self._sums.tolist(), strict=True):
            family.add_metric(labels, list(zip(edges, counts, strict=True)), total)
        yield family


class BulkSummary(Collector):
    """Sums and counts of several series, which take many values of each in one call.

    Args:
        name: of the metric.
        text: its help.
        registry: which it joins.
        labels: as for `BulkHistogram`.
    """

    def __init__(self, name: str, text: str, registry: CollectorRegistry, labels: Mapping[str, Sequence[str]]) -> None:
        self._name, self._text = name, text
        self._labels, self._series = list(labels), list(product(*labels.values()))
        self._counts: NDArray[np.int64] = np.zeros(len(self._series), dtype=np.int64)
        self._sums = np.zeros(len(self._series))
        registry.register(self)

    def observe(self, values: NDArray[np.float64]) -> None:
        """Take in `values` `[m, series]`, those that are finite: a sum that took in a NaN would be NaN for good."""
        known = np.isfinite(values)
        self._counts += known.sum(0)
        self._sums += values.sum(0, where=known)

    def collect(self) -> Iterator[SummaryMetricFamily]:
        """Return the family, for the registry."""
        family = SummaryMetricFamily(self._name, self._text, labels=self._labels)
        for labels, count, total in zip(self._series, self._counts.tolist(), self._sums.tolist(), strict=True):
            family.add_metric(labels, count, total)
        yield family


class Waiting(Collector):
    """Reports that were not added up yet: many together cost little more than one.

    It comes first in its registry, so that whoever reads that finds everything added up.

    Args:
        add_up: adds up reports, in order.
        registry: which it joins.
    """

    def __init__(self, add_up: Callable[[Sequence[Report]], None], registry: CollectorRegistry) -> None:
        self._add_up = add_up
        self._reports: list[Report] = []
        self._numbers = 0
        self._shape, self._each = (-1, -1), 0
        self._lock = Lock()  # the registry is read on another thread
        registry.register(self)

    def add(self, report: Report) -> None:
        """Keep a report until it is added up."""
        with self._lock:
            self._reports.append(report)
            shape = report.size, len(report.learned)
            if shape != self._shape:  # or else there are about as many numbers as in the report before
                self._shape = shape
                self._each = report.log_p.numel() + sum(update.parts.numel() for update in report.learned)
            self._numbers += self._each
            if len(self._reports) >= MOST_WAITING or self._numbers >= MOST_NUMBERS:
                self._hand_over()

    def collect(self) -> Iterator[Metric]:
        """Have added up what waits; there is no metric of it."""
        with self._lock:
            if self._reports:
                self._hand_over()
        return iter(())

    def _hand_over(self) -> None:
        reports, self._reports, self._numbers = self._reports, [], 0
        self._add_up(reports)

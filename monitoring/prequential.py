"""The honest score: every answer was given before its label was learned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamkd.report import SERVED, Report

NO_CHANGE = "no-change"
MAJORITY = "majority"
WINDOW = 1_000
"""Labelled records over which recent accuracy is taken."""


@dataclass(frozen=True, slots=True)
class Measures:
    """How well one predictor did. Shares are between 0 and 1, the kappas at most 1, log-loss in nats.

    Attributes:
        accuracy: share of right answers.
        balanced_accuracy: mean over the classes that occurred of the share found of each (Brodersen et al. 2010).
        cohen_kappa: accuracy beyond that of answers at random with the same frequencies (Cohen 1960).
        temporal_kappa: accuracy beyond that of the no-change baseline (Bifet et al. 2013).
        log_loss: None for the baselines, which give no probabilities.
    """

    accuracy: float
    balanced_accuracy: float
    cohen_kappa: float
    temporal_kappa: float
    log_loss: float | None


class Tally:
    """Counts of one run, for the served answer, each peer and two baselines.

    The baselines know what the peers know: within a batch, the last label (no-change) and the most frequent label so
    far (majority) are those of the batches before it.
    """

    def __init__(self) -> None:
        self.records = 0
        self.unlabelled = 0
        self.scored = 0
        self.confusion: dict[str, NDArray[np.int64]] = {}
        self.drifts: list[int] = []
        self.swaps: list[dict[str, Any]] = []
        self.recent: dict[str, Recent] = {}
        self._log_loss: dict[str, float] = {}
        self._last = 0
        self._frequencies = np.zeros(1, dtype=np.int64)

    def update(self, report: Report) -> None:
        """Take in one batch."""
        self.records += report.size
        self.unlabelled += report.unlabelled
        self.drifts += [alarm.record for alarm in report.drift]
        if report.swap is not None:
            swap = report.swap
            self.swaps.append(
                {
                    "record": self.scored + len(report.scored.y),
                    "before": swap.before,
                    "after": swap.after,
                    "reason": swap.reason,
                }
            )
        y = report.scored.y.cpu().numpy()
        if not len(y):
            return
        self.scored += len(y)
        for name, predicted in report.scored.predicted.items():
            self._count(name, y, predicted.cpu().numpy())
            loss = float(report.scored.log_loss[name].sum())
            self._log_loss[name] = self._log_loss.get(name, 0.0) + loss
        self._count(NO_CHANGE, y, np.full_like(y, self._last))
        self._count(MAJORITY, y, np.full_like(y, int(self._frequencies.argmax())))
        self._last = int(y[-1])
        more = np.bincount(y, minlength=len(self._frequencies))
        more[: len(self._frequencies)] += self._frequencies
        self._frequencies = more

    def _count(self, name: str, y: NDArray[np.int64], predicted: NDArray[np.int64]) -> None:
        if name not in self.confusion:
            self.confusion[name] = np.zeros((0, 0), dtype=np.int64)
            self.recent[name] = Recent()
        wider = int(max(y.max(), predicted.max())) + 1 - len(self.confusion[name])
        if wider > 0:  # tables are as large as the classes met, not as those that may come
            self.confusion[name] = np.pad(self.confusion[name], (0, wider))
        np.add.at(self.confusion[name], (y, predicted), 1)
        self.recent[name].update(y == predicted)

    def measures(self) -> Mapping[str, Measures]:
        """Return the measures of every predictor: the served answer first, then peers, then baselines."""
        baseline = _accuracy(self.confusion[NO_CHANGE]) if self.scored else 0.0
        names = sorted(self.confusion, key=lambda name: (name in {NO_CHANGE, MAJORITY}, name != SERVED))
        return {name: self._measure(name, baseline) for name in names}

    def _measure(self, name: str, no_change: float) -> Measures:
        table = self.confusion[name]
        accuracy, occurred = _accuracy(table), table.sum(1) > 0
        recall = np.diag(table)[occurred] / table.sum(1)[occurred]
        chance = float((table.sum(0) / self.scored) @ (table.sum(1) / self.scored))
        return Measures(
            accuracy=accuracy,
            balanced_accuracy=float(recall.mean()),
            cohen_kappa=_beyond(accuracy, chance),
            temporal_kappa=_beyond(accuracy, no_change),
            log_loss=self._log_loss[name] / self.scored if name in self._log_loss else None,
        )


class Recent:
    """Accuracy over the last `WINDOW` labelled records."""

    def __init__(self) -> None:
        self._hits = np.zeros(WINDOW, dtype=bool)
        self._count = 0

    def update(self, hits: NDArray[np.bool_]) -> None:
        """Take in which of some answers were right, in order."""
        slots = (self._count + np.arange(len(hits))) % WINDOW
        self._hits[slots[-WINDOW:]] = hits[-WINDOW:]
        self._count += len(hits)

    @property
    def accuracy(self) -> float:
        """Between 0 and 1; 0 before the first record."""
        return float(self._hits.sum()) / max(1, min(self._count, WINDOW))


def _accuracy(table: NDArray[np.int64]) -> float:
    return float(np.trace(table) / max(1, table.sum()))


def _beyond(accuracy: float, baseline: float) -> float:
    """Return the share of the baseline's errors that was avoided; 0 where the baseline makes none."""
    return (accuracy - baseline) / (1 - baseline) if baseline < 1 else 0.0

"""Reports as Prometheus metrics. Names here are promises: dashboards, alerts and scripts hang on them."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector
from torch import Tensor

from monitoring.health import STATES
from streamkd.lesson import Learned, agreement, means
from streamkd.report import SERVED, Report, Scored

MOST_WAITING = 64
"""Reports that wait to be added up."""
PHASES = ("predict", "score", "adapt", "recall", "learn", "remember", "checkpoint")
PARTS = ("hard", "soft", "total")
SWAP_REASONS = ("drift", "periodic")
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0)
RECORDS = (1, 4, 16, 64, 256, 1024, 4096)
PRIORITIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
AGES = (64, 256, 1024, 4096, 16384, 65536, 262144)
RECORD_AGES = (0.1, 1, 5, 15, 60, 300, 600, 1200, 3600, 10800, 86400)
DELAYS = (0.01, 0.1, 1, 10, 60, 600, 3600, 21600, 86400)


class Metrics:
    """All that Prometheus sees of one process, in a registry of its own.

    Every label set that can occur is there from the start, at zero, so that the first event is a rise.

    Args:
        peers: names, in order.
        sources: who teaches whom: every (teacher, student) that can occur.
        feed: name.
        reasons: for which records can be refused.
        resets: for which the feed's position can be lost.
        stages: at which its source can fail.
        detector, signal: what is watched for drift.
        version: of streamkd.
    """

    def __init__(
        self,
        *,
        peers: Sequence[str],
        sources: Sequence[tuple[str, str]],
        feed: str,
        reasons: Sequence[str],
        resets: Sequence[str] = (),
        stages: Sequence[str] = (),
        detector: str,
        signal: str,
        version: str,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client leaves it untyped
        self.registry = CollectorRegistry()
        self._waiting = Waiting(self._take_in, self.registry)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._define(peers)
        self.build.labels(version=version, python=platform.python_version(), torch=torch.__version__).set(1)
        self.reloaded.set(1)
        answering = [*peers, SERVED]
        self._evaluated = [self.evaluated.labels(peer=name) for name in answering]
        self._correct = [self.correct.labels(peer=name) for name in answering]
        actions = ("skipped", "rolled_back", "restarted")
        self._nonfinite = {(p, a): self.nonfinite.labels(peer=p, action=a) for p in peers for a in actions}
        self._last: Report | None = None
        self._show(peers, sources)
        self._swaps = {reason: self.swaps.labels(reason=reason) for reason in SWAP_REASONS}
        self._drifts = self.drifts.labels(detector=detector, signal=signal)
        self._last_drift = self.last_drift.labels(detector=detector, signal=signal)
        self._phase = {phase: self.step_duration.labels(phase=phase) for phase in PHASES}
        self._feed = feed
        self._feed_records = self.feed_records.labels(feed=feed)
        self._feed_connected = self.feed_connected.labels(feed=feed)
        self._feed_received = self.feed_received.labels(feed=feed)
        self._refused = {reason: self.dead_letters.labels(feed=feed, reason=reason) for reason in reasons}
        self.record_age = BulkHistogram(
            "streamkd_record_age_seconds",
            "How old records were when their batch had been learned.",
            RECORD_AGES,
            self.registry,
            labels={"feed": feed},
        )
        self._untimed = self.feed_errors.labels(feed=feed, stage="time", error_type="unreadable")
        self._unwritten = self.feed_errors.labels(feed=feed, stage="dead_letter", error_type="write")
        self._resets = {reason: self.resets.labels(feed=feed, reason=reason) for reason in resets}
        self._failed = {s: self.feed_errors.labels(feed=feed, stage=s, error_type="unreachable") for s in stages}
        self._saves = {result: self.saves.labels(result=result) for result in ("success", "failure")}
        self._restores = {result: self.restores.labels(result=result) for result in ("success", "fallback")}
        self._states = {state: self.state.labels(state=state) for state in STATES}
        self._unsound: dict[tuple[str, str], int] = {}
        self._joined = self._expired = 0
        self._seen_refused: dict[str, int] = {}
        self._seen_unwritten = 0
        self._seen_resets: dict[str, int] = {}
        self._seen_failed: dict[str, int] = {}

    def _define(self, peers: Sequence[str]) -> None:  # noqa: PLR0915 - a list, one statement a metric
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"streamkd_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"streamkd_{name}", text, labels, registry=self.registry)

        def summary(name: str, text: str, peer: str, *parts: str) -> BulkSummary:
            series = [(own, *part) for part in product(*[PARTS] * len(parts)) for own in peers]
            return BulkSummary(f"streamkd_{name}", text, (peer, *parts), series, self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"streamkd_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.build = gauge("build_info", "Versions, as labels; always 1.", "version", "python", "torch")
        self.state = gauge("state", "1 for the state that the process is in.", "state")
        self.reloaded = gauge("config_last_reload_successful", "1 if the configuration in force is the newest read.")
        self.feed_records = counter("feed_records_total", "Records received and decoded.", "feed")
        self.feed_connected = gauge("feed_connected", "1 while the feed can be read.", "feed")
        self.lag = gauge("feed_lag_records", "Records that wait in the source.", "feed", "partition")
        self.resets = counter("feed_position_resets_total", "Positions that the source had lost.", "feed", "reason")
        self.feed_received = gauge("feed_last_record_received_timestamp_seconds", "When the last record came.", "feed")
        self.feed_errors = counter("feed_errors_total", "Errors around the feed.", "feed", "stage", "error_type")
        self.dead_letters = counter("dead_letter_records_total", "Records that could not be used.", "feed", "reason")
        self.steps = counter("steps_total", "Batches that went through the engine.")
        self.trained = counter("trained_records_total", "Labelled records that were learned.")
        self.taught = counter("taught_records_total", "Records without a label, learned from the served answer.")
        self.batch_records = histogram("batch_records", "Records a batch.", RECORDS)
        self.step_duration = histogram("step_duration_seconds", "Time a batch took, by stage.", SECONDS, "phase")
        self.loss = summary("loss", "What updates minimised, in nats, by part.", "peer", "component")
        self.evaluated = counter("prequential_evaluated_total", "Answers that were scored.", "peer")
        self.correct = counter("prequential_correct_total", "Answers that were right.", "peer")
        self.served_weight = gauge("served_weight", "Share of a peer in the served answer.", "peer")
        self.gradient_norm = summary("gradient_norm", "Norm of the gradient before clipping.", "peer")
        self.nonfinite = counter("nonfinite_steps_total", "Updates with a gradient not finite.", "peer", "action")
        self.temperature = gauge("temperature", "How soft the lessons of a student are.", "peer")
        self.alpha = gauge("alpha", "Weight of the distillation from teacher to student.", "teacher", "student")
        self.divergence = summary("distill_divergence", "Divergence from the teachers, in nats.", "student")
        self.compared = counter("peer_compared_total", "Pairs of peers whose answers were compared.")
        self.agreed = counter("peer_agreed_total", "Pairs of peers that gave the same answer.")
        self.transfer = gauge(
            "transfer_efficiency", "Mutual information of the answers over the teacher's entropy.", "student"
        )
        self.capacity = gauge("capacity_ratio", "Capacity over the teacher's.", "student")
        self.teacher = gauge("teacher", "1 for the teacher in office.", "peer")
        self.swaps = counter("role_swaps_total", "Changes of the teacher in office.", "reason")
        self.drifts = counter("drift_detections_total", "Alarms.", "detector", "signal")
        self.last_drift = gauge(
            "drift_last_detection_timestamp_seconds", "When the last alarm rose.", "detector", "signal"
        )
        self.replay_size = gauge("replay_records", "Records in the memory.")
        self.replay_capacity = gauge("replay_capacity_records", "Records that the memory can hold.")
        self.replay_priority = BulkHistogram(
            "streamkd_replay_priority", "Priority of what was recalled.", PRIORITIES, self.registry
        )
        self.replay_age = BulkHistogram(
            "streamkd_replay_age_records", "Age of what was recalled, in records.", AGES, self.registry
        )
        self.pending = gauge("labels_pending", "Predictions that wait for their labels.")
        self.joined = counter("labels_joined_total", "Labels that came late and were joined.")
        self.expired = counter("labels_expired_total", "Predictions given up before their label came.")
        self.label_delay = BulkHistogram(
            "streamkd_label_delay_seconds", "Time from a prediction to its label.", DELAYS, self.registry
        )
        self.saves = counter("checkpoint_saves_total", "Attempts to save.", "result")
        self.save_duration = histogram("checkpoint_duration_seconds", "Time to save.", (0.01, 0.03, 0.1, 0.3, 1, 3, 10))
        self.save_size = gauge("checkpoint_size_bytes", "Size of the last checkpoint.")
        self.last_save = gauge("checkpoint_last_success_timestamp_seconds", "When the last checkpoint was whole.")
        self.uncovered = gauge("checkpoint_uncovered_records", "Records since the last checkpoint.")
        self.restores = counter("checkpoint_restores_total", "Restores at start.", "result")

    def observe(self, report: Report, *, now: float) -> None:
        """Take in one batch.

        Args:
            report: what happened.
            now: seconds since the epoch.
        """
        self._feed_records.inc(report.size)
        self._feed_received.set(now)
        self.steps.inc()
        self.trained.inc(report.trained)
        self.taught.inc(report.taught)
        self.batch_records.observe(report.size)
        for phase, seconds in report.seconds.items():
            self._phase[phase].observe(seconds)
        self._last = report
        self._observe_unsound(report)
        if report.drift:
            self._drifts.inc(len(report.drift))
            self._last_drift.set(now)
        if report.swap is not None:
            self._swaps[report.swap.reason].inc()
        self.replay_size.set(report.replay.size)
        self.replay_capacity.set(report.replay.capacity)
        self._waiting.add(report)
        self.pending.set(report.pending)
        self.joined.inc(report.joined - self._joined)
        self.expired.inc(report.expired - self._expired)
        self._joined, self._expired = report.joined, report.expired

    def _observe_unsound(self, report: Report) -> None:
        for name, counts in report.unsound.items():
            for action, count in counts.items():
                if more := count - self._unsound.get((name, action), 0):
                    self._nonfinite[name, action].inc(more)
                    self._unsound[name, action] = count

    def _take_in(self, seen: Sequence["Seen"]) -> None:
        """Add up what was told of several batches, all at once."""
        scored = [one.scored for one in seen]
        y = torch.cat([one.y for one in scored])
        right = torch.cat([one.answers for one in scored], 1) == y
        for evaluated, correct, count in zip(self._evaluated, self._correct, right.sum(1).tolist(), strict=True):
            evaluated.inc(len(y))
            correct.inc(count)
        self.replay_priority.observe(torch.cat([one.priorities for one in seen]).numpy())
        self.replay_age.observe(torch.cat([one.ages for one in seen]).numpy())
        trained = [one.learned for one in seen if one.learned]
        updates = list(chain.from_iterable(trained))
        agreed, compared = agreement(updates)
        self.agreed.inc(agreed)
        self.compared.inc(compared)
        if trained:
            sizes = [len(one) for one in trained]
            told = np.add.reduceat(means(updates), np.cumsum([0, *sizes[:-1]])) / np.array(sizes)[:, None, None]
            self.loss.observe(told[:, [0, 1, 3]].reshape(len(trained), -1))
            self.divergence.observe(told[:, 2])
            self.gradient_norm.observe(told[:, 4])

    def _show(self, peers: Sequence[str], sources: Sequence[tuple[str, str]]) -> None:
        """Let what changes with every batch be read off the last report whenever somebody asks."""

        def last(read: Callable[[Report], float]) -> Callable[[], float]:
            return lambda: 0.0 if self._last is None else read(self._last)

        for name in peers:
            for gauge, field in (
                (self.served_weight.labels(peer=name), "weight"),
                (self.temperature.labels(peer=name), "temperature"),
                (self.transfer.labels(student=name), "transfer_efficiency"),
                (self.capacity.labels(student=name), "capacity_ratio"),
            ):
                gauge.set_function(last(partial(_of_peer, name=name, field=field)))
            self.teacher.labels(peer=name).set_function(last(partial(_in_office, name=name)))
        for pair in sources:
            gauge = self.alpha.labels(teacher=pair[0], student=pair[1])
            gauge.set_function(last(partial(_listens, pair=pair)))

    def observe_times(self, times: Sequence[float], *, now: float) -> None:
        """Take in when the records of a batch that was learned came to be.

        What a label comes later is not in it: that is `label_delay`. Clocks differ, so a record may be from the future;
        it counts as new.

        Args:
            times: `[n]`, in seconds since the epoch, NaN for one that could not be read; or empty.
            now: likewise.
        """
        ages = now - np.array(times, dtype=np.float64)
        known = ages[np.isfinite(ages)]
        self.record_age.observe(known.clip(min=0))
        self._untimed.inc(len(ages) - len(known))

    def observe_refused(self, refused: Mapping[str, int], *, unwritten: int) -> None:
        """Take in how many records were refused so far, by reason, and attempts to write them down that failed."""
        self._unwritten.inc(unwritten - self._seen_unwritten)
        self._seen_unwritten = unwritten
        for reason, count in refused.items():
            self._refused[reason].inc(count - self._seen_refused.get(reason, 0))
            self._seen_refused[reason] = count

    def observe_feed(
        self, *, connected: bool, lag: Mapping[str, int], resets: Mapping[str, int], failures: Mapping[str, int]
    ) -> None:
        """Take in how the feed stands.

        Args:
            connected: whether its source can be read.
            lag: records that wait there, by partition.
            resets: positions lost so far, by reason.
            failures: of the source so far, by stage.
        """
        self._feed_connected.set(connected)
        for partition, records in lag.items():
            self.lag.labels(feed=self._feed, partition=partition).set(records)
        for reason, count in resets.items():
            self._resets[reason].inc(count - self._seen_resets.get(reason, 0))
        for stage, count in failures.items():
            self._failed[stage].inc(count - self._seen_failed.get(stage, 0))
        self._seen_resets, self._seen_failed = dict(resets), dict(failures)

    def observe_state(self, state: str) -> None:
        """Take in the state of the process; outside the loop, the feed is not being read."""
        for name, gauge in self._states.items():
            gauge.set(name == state)
        if state != "running":
            self._feed_connected.set(0)

    def observe_stage(self, seconds: float) -> None:
        """Take in for how long learning waited for a checkpoint: for a copy in memory, not for the disk."""
        self._phase["checkpoint"].observe(seconds)

    def observe_save(self, *, seconds: float, size: int, now: float) -> None:
        """Take in a checkpoint that was saved."""
        self._saves["success"].inc()
        self.save_duration.observe(seconds)
        self.save_size.set(size)
        self.last_save.set(now)

    def observe_failed_save(self) -> None:
        """Take in an attempt to save that failed."""
        self._saves["failure"].inc()

    def observe_restore(
        self, result: str, *, unsound: Mapping[tuple[str, str], int], joined: int, expired: int
    ) -> None:
        """Take in a restore: `success`, or `fallback` to an older checkpoint.

        What the engine has counted until then is where this process's counters start.
        """
        self._restores[result].inc()
        self._unsound, self._joined, self._expired = dict(unsound), joined, expired


def _of_peer(report: Report, *, name: str, field: str) -> float:
    value: float = getattr(report.peers[name], field)
    return value


def _in_office(report: Report, *, name: str) -> float:
    return float(report.teacher == name)


def _listens(report: Report, *, pair: tuple[str, str]) -> float:
    return report.alphas.get(pair, 0.0)


class BulkSummary(Collector):
    """Sums and counts of several series, which take many values of each in one call.

    Args:
        name: of the metric.
        text: its help.
        labels: their names.
        series: their values, for each series.
        registry: which it joins.
    """

    def __init__(
        self, name: str, text: str, labels: Sequence[str], series: Sequence[Sequence[str]], registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._labels, self._series = name, text, labels, series
        self._counts: NDArray[np.int64] = np.zeros(len(series), dtype=np.int64)
        self._sums = np.zeros(len(series))
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


@dataclass(frozen=True, slots=True)
class Seen:
    """What is kept of a report until it is added up: nothing that is as large as the records."""

    scored: Scored
    priorities: Tensor
    ages: Tensor
    learned: Sequence[Learned]


class Waiting(Collector):
    """Reports that were not added up yet: many together cost little more than one.

    It comes first in its registry, so that whoever reads that finds everything added up.

    Args:
        take_in: adds them up.
        registry: which it joins.
    """

    def __init__(self, take_in: Callable[[Sequence[Seen]], None], registry: CollectorRegistry) -> None:
        self._take_in = take_in
        self._seen: list[Seen] = []
        self._lock = Lock()  # the registry is read on another thread
        registry.register(self)

    def add(self, report: Report) -> None:
        """Keep what has to be added up."""
        learned = report.learned if report.trained else ()
        with self._lock:
            self._seen.append(Seen(report.scored, report.replay.priorities, report.replay.ages, learned))
            if len(self._seen) >= MOST_WAITING:
                self._add_up()

    def collect(self) -> Iterator[Metric]:
        """Add up what waits; there is no metric of it."""
        with self._lock:
            self._add_up()
        return iter(())

    def _add_up(self) -> None:
        if self._seen:
            self._take_in(self._seen)
            self._seen = []


class BulkHistogram(Collector):
    """A histogram that takes many values in one call; its labels, if it has any, have one value each."""

    def __init__(
        self,
        name: str,
        text: str,
        buckets: Sequence[float],
        registry: CollectorRegistry,
        *,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self._name, self._text = name, text
        self._labels = dict(labels or {})
        self._edges = np.array(buckets, dtype=np.float64)
        self._counts: NDArray[np.int64] = np.zeros(len(buckets) + 1, dtype=np.int64)
        self._sum = 0.0
        registry.register(self)

    def observe(self, values: NDArray[np.float64]) -> None:
        """Take in `values` `[m]`."""
        places = np.searchsorted(self._edges, values)
        self._counts += np.bincount(places, minlength=len(self._counts))
        self._sum += float(values.sum())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Return the family, for the registry."""
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        edges = [str(float(edge)) for edge in self._edges] + ["+Inf"]
        totals = self._counts.cumsum().tolist()
        family.add_metric(list(self._labels.values()), list(zip(edges, totals, strict=True)), self._sum)
        yield family

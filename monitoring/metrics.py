"""Reports as Prometheus metrics. Names here are promises: dashboards, alerts and scripts hang on them."""

import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, compress

import numpy as np
import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    ProcessCollector,
    disable_created_metrics,
)

from monitoring.bulk import BulkHistogram, BulkSummary, Waiting
from monitoring.health import STATES
from streamkd.lesson import Learned, agreement, means
from streamkd.report import SERVED, Report, Scored

STATE = "1 for the state that the process is in."
PHASES = ("predict", "score", "adapt", "recall", "learn", "remember", "checkpoint")
_SERIES = {phase: series for series, phase in enumerate(PHASES)}
PARTS = ("hard", "soft", "total")
SWAP_REASONS = ("drift", "periodic")
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0)
RECORDS = (1, 4, 16, 64, 256, 1024, 4096)
PRIORITIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
AGES = (64, 256, 1024, 4096, 16384, 65536, 262144)
RECORD_AGES = (0.1, 1, 5, 15, 60, 300, 600, 1200, 3600, 10800, 86400)
DELAYS = (0.01, 0.1, 1, 10, 60, 600, 3600, 21600, 86400)


def starting() -> CollectorRegistry:
    """Return what is told of a process that has no feed yet, and no engine."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    state = Gauge("streamkd_state", STATE, ["state"], registry=registry)
    for name in STATES:
        state.labels(state=name).set(name == "starting")
    return registry


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
        self._waiting = Waiting(self._add_up, self.registry)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._define(peers, feed)
        self.build.labels(version=version, python=platform.python_version(), torch=torch.__version__).set(1)
        self.reloaded.set(1)
        answering = [*peers, SERVED]
        self._evaluated = [self.evaluated.labels(peer=name) for name in answering]
        self._correct = [self.correct.labels(peer=name) for name in answering]
        actions = ("skipped", "rolled_back", "restarted")
        self._nonfinite = {(p, a): self.nonfinite.labels(peer=p, action=a) for p in peers for a in actions}
        self._last: Report | None = None
        self._received = 0.0
        self._show(peers, sources)
        self._swaps = {reason: self.swaps.labels(reason=reason) for reason in SWAP_REASONS}
        self._drifts = self.drifts.labels(detector=detector, signal=signal)
        self._last_drift = self.last_drift.labels(detector=detector, signal=signal)
        self._feed = feed
        self._feed_records = self.feed_records.labels(feed=feed)
        self._feed_connected = self.feed_connected.labels(feed=feed)
        self.feed_received.labels(feed=feed).set_function(lambda: self._received)
        self._refused = {reason: self.dead_letters.labels(feed=feed, reason=reason) for reason in reasons}
        self._untimed = self.feed_errors.labels(feed=feed, stage="time", error_type="unreadable")
        self._unwritten = {
            stage: self.feed_errors.labels(feed=feed, stage=stage, error_type="write")
            for stage in ("dead_letter", "predictions")
        }
        self._resets = {reason: self.resets.labels(feed=feed, reason=reason) for reason in resets}
        self._failed = {s: self.feed_errors.labels(feed=feed, stage=s, error_type="unreachable") for s in stages}
        self._saves = {result: self.saves.labels(result=result) for result in ("success", "failure")}
        self._restores = {result: self.restores.labels(result=result) for result in ("success", "fallback")}
        self._states = {state: self.state.labels(state=state) for state in STATES}
        self._unsound: dict[tuple[str, str], int] = {}
        self._joined = self._expired = 0
        self._seen_refused: dict[str, int] = {}
        self._seen_unwritten = dict.fromkeys(self._unwritten, 0)
        self._lag: dict[str, int] = {}
        self._seen_resets: dict[str, int] = {}
        self._seen_failed: dict[str, int] = {}

    def _define(self, peers: Sequence[str], feed: str) -> None:  # noqa: PLR0915 - a list, one statement a metric
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"streamkd_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"streamkd_{name}", text, labels, registry=self.registry)

        def summary(name: str, text: str, **labels: Sequence[str]) -> BulkSummary:
            return BulkSummary(f"streamkd_{name}", text, self.registry, labels)

        def histogram(name: str, text: str, buckets: Sequence[float], **labels: Sequence[str]) -> BulkHistogram:
            return BulkHistogram(f"streamkd_{name}", text, buckets, self.registry, labels)

        self.build = gauge("build_info", "Versions, as labels; always 1.", "version", "python", "torch")
        self.state = gauge("state", STATE, "state")
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
        self.step_duration = histogram("step_duration_seconds", "Time a batch took, by stage.", SECONDS, phase=PHASES)
        self.loss = summary("loss", "What updates minimised, in nats, by part.", component=PARTS, peer=peers)
        self.evaluated = counter("prequential_evaluated_total", "Answers that were scored.", "peer")
        self.correct = counter("prequential_correct_total", "Answers that were right.", "peer")
        self.served_weight = gauge("served_weight", "Share of a peer in the served answer.", "peer")
        self.gradient_norm = summary("gradient_norm", "Norm of the gradient before clipping.", peer=peers)
        self.nonfinite = counter("nonfinite_steps_total", "Updates with a gradient not finite.", "peer", "action")
        self.temperature = gauge("temperature", "How soft the lessons of a student are.", "peer")
        self.alpha = gauge("alpha", "Weight of the distillation from teacher to student.", "teacher", "student")
        self.divergence = summary("distill_divergence", "Divergence from the teachers, in nats.", student=peers)
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
        self.replay_priority = histogram("replay_priority", "Priority of what was recalled.", PRIORITIES)
        self.replay_age = histogram("replay_age_records", "Age of what was recalled, in records.", AGES)
        self.pending = gauge("labels_pending", "Predictions that wait for their labels.")
        self.joined = counter("labels_joined_total", "Labels that came late and were joined.")
        self.expired = counter("labels_expired_total", "Predictions given up before their label came.")
        self.record_age = histogram(
            "record_age_seconds", "How old records were when their batch had been learned.", RECORD_AGES, feed=[feed]
        )
        self.label_delay = histogram("label_delay_seconds", "Time from a prediction to its label.", DELAYS)
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
        if report.drift:
            self._last_drift.set(now)
        if report.size:  # a batch may hold late labels alone
            self._received = now
        self._last = report
        self._waiting.add(report)

    def _add_up(self, reports: Sequence[Report]) -> None:
        """Add up what was told of several batches, all at once."""
        sizes = [report.size for report in reports]
        self._feed_records.inc(sum(sizes))
        self.steps.inc(len(reports))
        trained = [report.trained for report in reports]
        self.trained.inc(sum(trained))
        self.taught.inc(sum(report.taught for report in reports))
        self.batch_records.observe(sizes)
        spent = [time for report in reports for time in report.seconds.values()]
        self.step_duration.observe(spent, [_SERIES[phase] for report in reports for phase in report.seconds])
        self._drifts.inc(sum(len(report.drift) for report in reports))
        for report in reports:
            if report.swap is not None:
                self._swaps[report.swap.reason].inc()
        self.replay_priority.observe(torch.cat([report.replay.priorities for report in reports]))
        self.replay_age.observe(torch.cat([report.replay.ages for report in reports]))
        self._add_up_scores([report.scored for report in reports])
        agreed, compared = agreement([update for report in reports for update in report.learned])
        self.agreed.inc(agreed)
        self.compared.inc(compared)
        self._add_up_updates(list(compress((report.learned for report in reports), trained)))
        self._add_up_counts(reports[-1])

    def _add_up_scores(self, scored: Sequence[Scored]) -> None:
        y = torch.cat([one.y for one in scored])
        right = torch.cat([one.answers for one in scored], 1) == y
        for evaluated, correct, count in zip(self._evaluated, self._correct, right.sum(1).tolist(), strict=True):
            evaluated.inc(len(y))
            correct.inc(count)

    def _add_up_updates(self, learned: Sequence[Sequence[Learned]]) -> None:
        """Of each batch, the mean of what its updates came to."""
        if not learned:
            return
        updates, sizes = list(chain.from_iterable(learned)), [len(one) for one in learned]
        told = np.add.reduceat(means(updates), np.cumsum([0, *sizes[:-1]])) / np.array(sizes)[:, None, None]
        self.loss.observe(told[:, [0, 1, 3]].reshape(len(learned), -1))  # part by part, as its series are
        self.divergence.observe(told[:, 2])
        self.gradient_norm.observe(told[:, 4])

    def _add_up_counts(self, last: Report) -> None:
        """What the engine itself counts, from its start."""
        for name, counts in last.unsound.items():
            for action, count in counts.items():
                self._nonfinite[name, action].inc(count - self._unsound.get((name, action), 0))
                self._unsound[name, action] = count
        self.joined.inc(last.joined - self._joined)
        self.expired.inc(last.expired - self._expired)
        self._joined, self._expired = last.joined, last.expired

    def _show(self, peers: Sequence[str], sources: Sequence[tuple[str, str]]) -> None:
        """Let what changes with every batch be read off the last report whenever somebody asks."""

        def last(read: Callable[[Report], float]) -> Callable[[], float]:
            return lambda: 0.0 if self._last is None else read(self._last)

        self.replay_size.set_function(last(lambda report: report.replay.size))
        self.replay_capacity.set_function(last(lambda report: report.replay.capacity))
        self.pending.set_function(last(lambda report: report.pending))
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

    def observe_refused(self, refused: Mapping[str, int], *, unwritten: int, now: float) -> None:
        """Take in what was refused.

        Args:
            refused: records so far, by reason.
            unwritten: attempts so far to write them down that failed.
            now: seconds since the epoch.
        """
        self._add_unwritten("dead_letter", unwritten)
        for reason, count in refused.items():
            if more := count - self._seen_refused.get(reason, 0):
                self._refused[reason].inc(more)
                self._received = now
        self._seen_refused = dict(refused)

    def observe_predictions(self, *, unwritten: int) -> None:
        """Take in how many attempts to write predictions failed so far."""
        self._add_unwritten("predictions", unwritten)

    def _add_unwritten(self, stage: str, count: int) -> None:
        self._unwritten[stage].inc(count - self._seen_unwritten[stage])
        self._seen_unwritten[stage] = count

    def observe_feed(
        self, *, connected: bool, lag: Mapping[str, int], resets: Mapping[str, int], failures: Mapping[str, int]
    ) -> None:
        """Take in how the feed stands.

        Args:
            connected: whether its source can be read.
            lag: records that wait there, by partition; one that is no longer told of has moved away, and none wait.
            resets: positions lost so far, by reason.
            failures: of the source so far, by stage.
        """
        self._feed_connected.set(connected)
        self._lag = {**dict.fromkeys(self._lag, 0), **lag}
        for partition, records in self._lag.items():
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
        # This series is written here alone, so a scrape that adds up the others meanwhile does it no harm.
        self.step_duration.observe([seconds], PHASES.index("checkpoint"))

    def observe_save(self, *, seconds: float, size: int, now: float) -> None:
        """Take in a checkpoint that was saved."""
        self._saves["success"].inc()
        self.save_duration.observe([seconds])
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

import math
import subprocess
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from stack import needs
from worlds import batches, engine, lively, world

from monitoring.bulk import MOST_NUMBERS, MOST_WAITING, Waiting
from monitoring.delays import LabelDelays
from monitoring.metrics import Metrics
from monitoring.prequential import Tally
from monitoring.trace import Trace
from runners.daemon import teaching_pairs
from runners.feeds import REASONS, RESETS, STAGES
from streamkd import UNLABELLED, Batch, Engine, Report
from streamkd.labels import Pending
from streamkd.lesson import agreement
from streamkd.report import peer_reports

GOLDEN = Path(__file__).parent / "golden" / "metrics.txt"


def metrics_of(made: Engine) -> Metrics:
    return Metrics(
        peers=made.cohort.names,
        sources=teaching_pairs(made),
        feed="file",
        reasons=REASONS,
        resets=RESETS,
        stages=STAGES,
        detector=made.drift.name,
        signal=made.drift.signal,
        version="0",
    )


def watched(made: Engine, *, late: bool = False) -> Metrics:
    metrics = metrics_of(made)
    for batch in batches(late=late):
        metrics.observe(made.step(batch), now=1000.0)
    return metrics


def families(text: str) -> list[str]:
    lines = [line.removeprefix("# TYPE ") for line in text.splitlines() if line.startswith("# TYPE streamkd_")]
    return sorted(lines)


def test_names_and_types_are_those_of_the_golden_list() -> None:
    """A renamed metric gives an empty panel and never an error; so a change here must be meant."""
    assert families(generate_latest(metrics_of(engine()).registry).decode()) == GOLDEN.read_text().splitlines()


def test_promtool_finds_nothing_to_complain_of() -> None:
    needs("promtool", "prometheus")
    text = generate_latest(watched(engine()).registry)
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_there_are_fewer_than_350_series() -> None:
    text = generate_latest(watched(engine()).registry).decode()
    assert len([line for line in text.splitlines() if line and not line.startswith("#")]) < 350


def test_every_series_is_there_before_the_first_event() -> None:
    def names(metrics: Metrics) -> set[str]:
        text = generate_latest(metrics.registry).decode()
        return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}

    assert names(watched(lively(), late=True)) == names(metrics_of(lively()))


def test_counters_add_up_to_what_the_reports_said() -> None:
    made = lively()
    metrics, reports = metrics_of(made), []
    for batch in batches(late=True):
        reports.append(made.step(batch))
        metrics.observe(reports[-1], now=1000.0)
        metrics.observe_refused({"width": len(reports)}, unwritten=0, now=1000.0)
    read = metrics.registry.get_sample_value
    assert read("streamkd_steps_total") == len(reports)
    assert read("streamkd_feed_records_total", {"feed": "file"}) == 1600
    assert read("streamkd_trained_records_total") == sum(report.trained for report in reports)
    assert read("streamkd_labels_joined_total") == reports[-1].joined
    assert read("streamkd_dead_letter_records_total", {"feed": "file", "reason": "width"}) == len(reports)
    agreed, compared = agreement([update for report in reports for update in report.learned])
    assert (read("streamkd_peer_agreed_total"), read("streamkd_peer_compared_total")) == (agreed, compared)
    for name in ("a", "served"):
        correct = sum(report.scored.correct[name] for report in reports)
        assert read("streamkd_prequential_correct_total", {"peer": name}) == correct
        evaluated = sum(report.trained for report in reports)
        assert read("streamkd_prequential_evaluated_total", {"peer": name}) == evaluated
    swaps = [read("streamkd_role_swaps_total", {"reason": reason}) or 0 for reason in ("drift", "periodic")]
    assert sum(swaps) == sum(report.swap is not None for report in reports) > 0
    in_office = {name: read("streamkd_teacher", {"peer": name}) for name in made.cohort.names}
    assert in_office == {name: float(name == reports[-1].teacher) for name in made.cohort.names}
    drawn = sum(len(report.replay.ages) for report in reports)
    assert read("streamkd_replay_age_records_count") == drawn
    assert read("streamkd_replay_age_records_bucket", {"le": "+Inf"}) == drawn
    assert read("streamkd_step_duration_seconds_count", {"phase": "learn"}) == len(reports)


def test_it_makes_no_difference_how_often_the_metrics_are_read() -> None:
    made = lively()
    often, once = metrics_of(made), metrics_of(made)
    for batch in batches(late=True):
        report = made.step(batch)
        for metrics in (often, once):
            metrics.observe(report, now=1000.0)
        generate_latest(often.registry)

    def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name.startswith("streamkd_")
        }

    told = read(once)
    assert read(often) == pytest.approx(told, rel=1e-6)
    assert told["streamkd_loss_count", "hard", "a"] > 0


def test_few_reports_wait_where_they_are_large() -> None:
    told: list[int] = []
    waiting = Waiting(lambda reports: told.append(len(reports)), CollectorRegistry())
    small = engine().step(batches()[0])
    large = small._replace(size=4 * small.size, log_p=torch.zeros(MOST_NUMBERS // 4, 1))
    for report, count in ((small, 3 * MOST_WAITING), (large, 12)):
        for _ in range(count):
            waiting.add(report)
    assert told == [MOST_WAITING] * 3 + [4] * 3


def test_a_batch_of_nothing_is_a_step_like_any_other() -> None:
    """A feed may move on without records, and records may be given up while none come."""
    made = engine()
    metrics = metrics_of(made)
    asked = batches()[0]
    unknown = torch.full_like(asked.y, UNLABELLED)
    metrics.observe(made.step(Batch(asked.x, unknown, tuple(map(str, range(len(asked)))))), now=1.0)
    generate_latest(metrics.registry)  # nothing waits any more
    for late in ({"0": UNLABELLED}, {"a stranger": 1}, {}):
        metrics.observe(made.step(Batch(asked.x[:0], asked.y[:0], late=late)), now=2.0)
    assert metrics.registry.get_sample_value("streamkd_steps_total") == 4
    assert metrics.registry.get_sample_value("streamkd_labels_expired_total") == 1


def test_what_waits_is_bounded_whatever_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 100_000
    monkeypatch.setattr("monitoring.bulk.MOST_NUMBERS", most)
    made, count = engine(pending=Pending(100_000)), 800
    x, y = world(count)
    names = [tuple(f"{step}-{row}" for row in range(count)) for step in range(20)]
    for ids in names:
        made.step(Batch(x, torch.full_like(y, UNLABELLED), ids))
    alone = [made.step(Batch(x[:0], y[:0], late=dict(zip(ids, y.tolist(), strict=True)))) for ids in names]

    def numbers(report: Report) -> int:
        return report.log_p.numel() + sum(update.parts.numel() for update in report.learned)

    assert sum(map(numbers, alone)) > 4 * most
    for first in (Batch(x[:0], y[:0]), Batch(x, torch.full_like(y, UNLABELLED)), Batch(x[:1], y[:1])):
        told: list[int] = []
        waiting = Waiting(lambda some: told.append(sum(map(numbers, some))), CollectorRegistry())  # noqa: B023
        for report in (made.step(first), *alone):
            waiting.add(report)
        assert 0 < max(told) < most + max(map(numbers, alone))


def test_of_peers_nothing_is_worked_out_until_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("streamkd.engine.peer_reports", lambda **given: asked.append("") or peer_reports(**given))
    made = lively()
    metrics, tally, trace = metrics_of(made), Tally(), Trace()
    for batch in batches():
        report = made.step(batch)
        metrics.observe(report, now=1.0)
        tally.update(report)
        trace.update(report, tally)
    assert not asked
    assert set(report.peers) == set(made.cohort.names)
    assert len(asked) == 1


def test_summaries_are_of_what_the_reports_said_of_each_peer() -> None:
    made = lively()
    metrics, reports = metrics_of(made), []
    for batch in batches():
        reports.append(made.step(batch))
        metrics.observe(reports[-1], now=1000.0)

    def told(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"streamkd_{name}_sum", labels)

    for peer in made.cohort.names:
        said = [report.peers[peer] for report in reports if report.trained]
        for part in ("hard", "soft", "total"):
            expected = sum(getattr(one, part) for one in said)
            assert told("loss", peer=peer, component=part) == pytest.approx(expected)
        assert told("gradient_norm", peer=peer) == pytest.approx(sum(one.gradient_norm for one in said))
        assert told("distill_divergence", student=peer) == pytest.approx(sum(one.divergence for one in said))


def test_ages_are_those_of_records_that_tell_and_the_future_is_new() -> None:
    metrics = metrics_of(engine())
    metrics.observe_times((990.0, 300.0, math.nan, 1001.0), now=1000.0)
    metrics.observe_times((), now=2000.0)

    def read(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"streamkd_{name}", {"feed": "file", **labels})

    assert [read("record_age_seconds_bucket", le=edge) for edge in ("0.1", "15.0", "+Inf")] == [1, 2, 3]
    assert read("record_age_seconds_sum") == 710
    assert read("feed_errors_total", stage="time", error_type="unreadable") == 1


def test_nothing_waits_in_a_partition_that_moved_away() -> None:
    metrics = metrics_of(engine())
    waiting: list[list[float | None]] = []
    for lag in ({"0": 5, "1": 100}, {"0": 3}, {"0": 2, "1": 7}):
        metrics.observe_feed(connected=True, lag=lag, resets={}, failures={})
        read = metrics.registry.get_sample_value
        waiting.append([read("streamkd_feed_lag_records", {"feed": "file", "partition": one}) for one in ("0", "1")])
    assert waiting == [[5, 100], [3, 0], [2, 7]]


def test_records_are_received_learned_or_refused_and_labels_that_come_late_are_none() -> None:
    made = engine()
    metrics = metrics_of(made)
    x, y = batches()[0].x, batches()[0].y
    names = tuple(str(row) for row in range(len(x)))
    received: list[float | None] = []

    def note() -> None:
        received.append(
            metrics.registry.get_sample_value("streamkd_feed_last_record_received_timestamp_seconds", {"feed": "file"})
        )

    metrics.observe(made.step(Batch(x, torch.full_like(y, UNLABELLED), ids=names)), now=1000.0)
    note()
    late = dict(zip(names, y.tolist(), strict=True))
    metrics.observe(made.step(Batch(x[:0], y[:0], late=late)), now=2000.0)
    metrics.observe_refused({}, unwritten=0, now=2000.0)
    note()
    for now in (3000.0, 4000.0):
        metrics.observe_refused({"width": 1}, unwritten=0, now=now)
        note()
    assert metrics.registry.get_sample_value("streamkd_labels_joined_total") == len(x)
    assert received == [1000, 1000, 3000, 3000]


def test_what_is_learned_without_a_label_is_counted_apart() -> None:
    made = engine()
    metrics = metrics_of(made)
    taught = 0
    for labelled in batches():
        half = torch.arange(len(labelled)) < len(labelled) // 2
        batch = Batch(labelled.x, torch.where(half, labelled.y, UNLABELLED))
        report = made.step(batch)
        metrics.observe(report, now=1000.0)
        taught += report.taught
    assert metrics.registry.get_sample_value("streamkd_taught_records_total") == taught > 0


def test_a_label_is_timed_from_its_prediction_and_what_was_given_up_is_not() -> None:
    def asked(*names: str, **late: int) -> Batch:
        return Batch(torch.zeros(len(names), 1), torch.full((len(names),), UNLABELLED), ids=names, late=late)

    delays = LabelDelays(capacity=2)
    assert delays.update(asked("a", "b"), now=10.0).tolist() == []
    assert delays.update(asked("c", before=1), now=12.0).tolist() == []
    assert delays.update(asked(a=0, b=0, c=1), now=15.0).tolist() == [5.0, 3.0]
    assert delays.update(asked(b=0), now=16.0).tolist() == []

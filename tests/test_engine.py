import pickle
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import CLASSES, batches, engine, lively, stored, world

from streamkd import (
    UNLABELLED,
    Batch,
    Distillation,
    DriftWatch,
    Engine,
    LabelRates,
    Peer,
    Pool,
    Recall,
    ReplayBuffer,
    Report,
    checkpoint,
)
from streamkd.drift import never
from streamkd.inputs import Raw
from streamkd.logits import UNSEEN, mask_unseen
from streamkd.models import mlp
from streamkd.report import LOG_FLOOR


def assert_same(one: Any, other: Any, path: str = "state") -> None:
    """Bit for bit, whatever the nesting."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{path}.{index}")
    else:
        assert one == other, path


def test_one_step_is_predict_join_score_adapt_recall_learn_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    tape: list[str] = []
    made = engine(recall=Recall(updates=1))
    made.step(batches()[0])

    def record(part: object, method: str, word: str) -> None:
        original = getattr(part, method)

        def taped(*arguments: Any, **options: Any) -> Any:
            tape.append(word)
            return original(*arguments, **options)

        monkeypatch.setattr(part, method, taped)

    record(made.cohort, "predict", "predict")
    record(made.pending, "join", "join")
    record(made.served, "update", "score")
    record(made.drift.detector, "update", "adapt")
    record(made.roles, "elect", "adapt: elect")
    record(made.replay, "sample", "recall")
    record(made.cohort, "learn", "learn")
    record(made.replay, "update", "remember: priorities")
    record(made.replay, "add", "remember: records")
    report = made.step(batches()[1])
    assert [word for word, before in zip(tape, ["", *tape], strict=False) if word != before] == [
        "predict",
        "join",
        "score",
        "adapt",
        "adapt: elect",
        "recall",
        "learn",
        "remember: priorities",
        "remember: records",
    ]
    assert list(report.seconds) == ["predict", "score", "adapt", "recall", "learn", "remember"]


def test_each_peer_is_scored_on_what_it_said_itself() -> None:
    made = lively()
    for batch in batches():
        report = made.step(batch)
        said = report.log_p[: len(made.cohort), torch.arange(len(batch)), batch.y].clamp(min=LOG_FLOOR)
        served = report.served[torch.arange(len(batch)), batch.y].log().clamp(min=LOG_FLOOR)
        assert torch.allclose(report.scored.losses, -torch.cat([said, served[None]]), atol=1e-5)


@pytest.mark.parametrize("cut", [23, 53, 71])
def test_a_run_cut_and_resumed_equals_an_unbroken_one(cut: int) -> None:
    torch.manual_seed(0)
    unbroken, stream = lively(), batches(late=True)
    before = [unbroken.step(batch) for batch in stream[:cut]]
    saved = stored(unbroken.state_dict())
    after = [unbroken.step(batch) for batch in stream[cut:]]
    torch.manual_seed(99)
    resumed = lively()
    resumed.load_state_dict(saved)
    again = [resumed.step(batch) for batch in stream[cut:]]
    assert_same(unbroken.state_dict(), resumed.state_dict())
    for one, other in zip(after, again, strict=True):
        assert torch.equal(one.served, other.served)
        assert one.peers == other.peers
        assert (one.teacher, one.swap, one.alphas) == (other.teacher, other.swap, other.alphas)
    # The law says something only if there was something to forget.
    assert any(report.swap for report in before)
    assert before[-1].pending
    assert before[-1].joined
    assert len(unbroken.replay) == 200
    if cut > 60:
        assert any(report.drift for report in before)


def test_every_batch_is_predicted_before_it_is_learned() -> None:
    made, stream = engine(), batches()
    for batch in stream[:5]:
        foretold = made.predict(batch.x)
        report = made.step(batch)
        assert torch.equal(report.served, foretold)
        assert torch.equal(report.scored.predicted["served"], foretold.argmax(1))


def test_predicting_changes_nothing() -> None:
    made, stream = engine(), batches()
    made.step(stream[0])
    before = stored(made.state_dict())
    made.predict(stream[1].x)
    assert_same(before, made.state_dict())


def test_a_drift_is_found_and_overcome() -> None:
    made = engine()
    reports = [made.step(batch) for batch in batches(3200)]
    accuracy = [report.scored.correct["served"] / report.trained for report in reports]
    assert sum(accuracy[90:100]) / 10 > 0.95
    assert accuracy[100] < 0.5
    assert sum(accuracy[-10:]) / 10 > 0.95
    found = [alarm.record for report in reports for alarm in report.drift]
    assert found
    assert all(1600 < record < 1800 for record in found)


def test_unlabelled_records_are_predicted_and_counted_and_can_be_left_to_teach_nothing() -> None:
    made, stream = engine(distillation=Distillation(unlabelled=0.0)), batches()
    for batch in stream[:10]:
        made.step(batch)
    weights = [p.clone() for peer in made.cohort.peers for p in peer.module.parameters()]
    x = stream[10].x
    report = made.step(Batch(x, torch.full((len(x),), UNLABELLED)))
    assert report.served.shape == (len(x), CLASSES)
    assert (report.size, report.unlabelled, report.trained) == (len(x), len(x), 0)
    assert made.records == 11 * 16
    now = [p for peer in made.cohort.peers for p in peer.module.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(weights, now, strict=True))


def test_a_late_label_is_scored_on_the_answer_given_when_asked() -> None:
    made, stream = engine(), batches()
    for batch in stream[:10]:
        made.step(batch)
    x, y = stream[10].x[:1], stream[10].y[:1]
    asked = made.step(Batch(x, torch.tensor([UNLABELLED]), ids=("q",)))
    said = asked.served.argmax(1)
    for batch in stream[55:75]:  # the other world: by now it would answer differently
        made.step(batch)
    assert made.predict(x).argmax(1) != said
    report = made.step(Batch(x[:0], y[:0], late={"q": int(y)}))
    assert torch.equal(report.scored.predicted["served"], said)
    assert report.trained == 1


def test_classes_that_were_never_seen_have_no_probability() -> None:
    made = engine()
    for batch in batches()[:20]:
        report = made.step(batch)
    assert report.classes == 3
    assert float(report.served[:, 3].abs().max()) == 0.0


def test_records_add_up() -> None:
    made, stream = engine(), batches(late=True)
    reports = [made.step(batch) for batch in stream]
    assert sum(report.size for report in reports) == reports[-1].records == 1600
    asked_later = sum(report.unlabelled for report in reports)
    in_time = sum(report.trained for report in reports) - reports[-1].joined
    assert in_time + asked_later == 1600
    assert reports[-1].joined + reports[-1].pending + reports[-1].expired == asked_later


def test_batches_of_one_and_of_all_are_learned() -> None:
    x, y = world(300)
    for size in (1, 300):
        peers = [Peer(str(i), partial(mlp, (5,), CLASSES, widths=(8,)), seed=i) for i in range(2)]
        made = Engine(peers, CLASSES)
        for start in range(0, 300, size):
            report = made.step(Batch(x[start : start + size], y[start : start + size]))
        assert report.updates == 2 * 300 // size if size == 1 else 2 * 10  # in parts of 32
        assert bool(report.served.isfinite().all())


@pytest.mark.parametrize("scheme", ["leader", "mutual", "ensemble", "average", "self", "static", "none"])
def test_every_scheme_learns_the_world(scheme: str) -> None:
    made = engine(distillation=Distillation(scheme=scheme))
    reports = [made.step(batch) for batch in batches(960)[:30]]
    assert sum(report.scored.correct["served"] for report in reports[-10:]) / 160 > 0.9
    taught = {pair for report in reports for pair in report.alphas}
    assert bool(taught) == (scheme != "none")


def test_a_peer_that_breaks_down_does_not_take_the_answer_with_it() -> None:
    made, stream = engine(), batches()
    for batch in stream[:20]:
        made.step(batch)
    with torch.no_grad():
        for weight in made.cohort.peers[0].module.parameters():
            weight.fill_(float("nan"))
    reports = [made.step(batch) for batch in stream[20:30]]
    assert all(bool(report.served.isfinite().all()) for report in reports)
    assert sum(report.scored.correct["served"] for report in reports) / 160 > 0.9
    assert reports[0].peers["a"].skipped == 2
    assert reports[-1].peers["b"].skipped == 0
    assert reports[-1].peers["a"].restarts == 1
    assert all(bool(weight.isfinite().all()) for weight in made.cohort.peers[0].module.parameters())


def test_what_is_done_about_a_drift_is_reported_and_fades() -> None:
    made = engine(distillation=Distillation(rate_boost=3.0, temperature_boost=2.0, effort_boost=2.0, boost_half_life=4))
    reports = [made.step(batch) for batch in batches()]
    (index,) = [index for index, report in enumerate(reports) if report.drift][:1]
    alarm, before = reports[index].drift[0], reports[index - 1]
    assert (alarm.reaction["rate_boost"], alarm.reaction["memory_window"]) == (3.0, 256)
    assert alarm.reaction["effort_boost"] == 2.0
    assert before.rate == pytest.approx(1)
    rates = [report.rate for report in reports[index : index + 12]]
    assert 1 < rates[-1] < 1.05
    assert rates == sorted(rates, reverse=True)
    assert reports[index].updates - before.updates == 4  # twice the usual two
    assert reports[-1].updates - reports[-2].updates == 2
    assert rates[0] == pytest.approx(1 + 2 * 0.5 ** (4 / 4))  # after the four updates of its own batch
    assert reports[index].peers["b"].temperature > before.peers["b"].temperature
    assert reports[index].replay.window < before.replay.window


def test_a_peer_alone_learns_and_has_nobody_to_learn_from() -> None:
    alone = Engine([Peer("alone", partial(mlp, (5,), CLASSES, widths=(16,)), seed=1)], CLASSES)
    reports = list(alone.run(batches(1600)[:50]))  # up to where the world changes
    assert all(not report.alphas and report.swap is None for report in reports)
    assert reports[0].accuracy < 0.9 < sum(report.scored.correct["served"] for report in reports[25:]) / 400


def hidden(batch: Batch, rows: slice, *, ids: bool = False) -> Batch:
    y = batch.y.clone()
    y[rows] = UNLABELLED
    return replace(batch, y=y, ids=batch.ids if ids else ())


def test_records_that_will_never_have_a_label_are_learned_from_the_served_answer_where_it_is_confident() -> None:
    stream = batches(640)
    made, alone = (engine(distillation=Distillation("none", unlabelled=u, confidence=0.6)) for u in (1.0, 0.0))
    for batch in stream[:20]:
        made.step(batch)
        alone.step(batch)
    for batch in stream[20:]:
        reports = [one.step(hidden(batch, slice(4, None))) for one in (made, alone)]
        confident = int((reports[0].served[4:].max(-1).values >= 0.6).sum())
        assert (reports[0].taught, reports[1].taught) == (confident, 0)
        assert [report.trained for report in reports] == [4, 4]
        assert len(made.replay) == len(alone.replay)
    assert checkpoint.digest(made.cohort.state_dict()) != checkpoint.digest(alone.cohort.state_dict())


def test_a_record_that_waits_for_its_label_is_not_taught() -> None:
    made = engine(distillation=Distillation(confidence=0.0))
    stream = batches(480)
    for batch in stream[:15]:
        made.step(batch)
    assert made.step(hidden(stream[15], slice(None), ids=True)).taught == 0
    assert made.step(hidden(stream[16], slice(1, None))).taught == 15


@pytest.mark.parametrize("known", [3, 20])
def test_of_a_large_batch_every_record_without_a_label_is_learned_from(known: int) -> None:
    made, (large,) = engine(recall=Recall(stride=8)), batches(64, size=64)
    for batch in batches(480)[:15]:
        made.step(batch)
    report = made.step(hidden(large, slice(known, None)))
    assert report.taught == 64 - known
    parts = -(-known // 8)
    lessons = [int((one.y == UNLABELLED).sum()) for one in report.learned]
    assert len(lessons) == 2 * parts
    assert sum(lessons) == 2 * report.taught  # each in both updates of its part


def test_going_back_to_a_state_of_the_same_process_is_going_back_in_all_of_it() -> None:
    made, stream = lively(), batches(1600)
    for batch in stream[:40]:
        made.step(batch)
    state, asked = made.state_dict(), stream[40].x
    said, digest = made.predict(asked), checkpoint.digest(state)
    for batch in stream[40:60]:
        made.step(replace(batch, y=(batch.y + 1) % CLASSES))
    assert not torch.equal(made.predict(asked), said)
    made.load_state_dict(state)
    assert torch.equal(made.predict(asked), said)
    assert checkpoint.digest(state) == digest


def test_arrays_are_learned_as_tensors_are() -> None:
    states = []
    for given in (lambda tensor: tensor, lambda tensor: tensor.numpy()):
        torch.manual_seed(0)
        made = engine()
        for batch in batches(160):
            made.step(Batch(given(batch.x), given(batch.y)))
        states.append(checkpoint.digest(made.state_dict()))
    assert states[0] == states[1]


@pytest.mark.parametrize("y", [torch.zeros(4, 1, dtype=torch.int64), torch.full((4,), 0.9)])
def test_labels_that_are_no_class_indices_are_refused(y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"give class indices, \[4\] integers"):
        Batch(torch.zeros(4, 2), y)


def test_a_report_goes_through_a_pickle() -> None:
    report = engine().step(batches(160)[0])
    again = pickle.loads(pickle.dumps(report))  # noqa: S301 - our own
    assert again.peers == dict(report.peers)
    assert torch.equal(again.served, report.served)


@pytest.mark.parametrize("wrong", [{"gate": "shut"}, {"scheme": "mutul"}])
def test_what_no_lesson_goes_by_is_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="there is no such one; use"):
        Distillation(**wrong)


def test_the_state_of_other_peers_is_refused() -> None:
    made, state = engine(), engine().state_dict()
    state["cohort"]["peers"].pop("b")
    with pytest.raises(ValueError, match="this is of the peers a, c, and not of a, b, c"):
        made.load_state_dict(state)


def test_a_report_keeps_the_labels_of_a_buffer_that_is_used_again() -> None:
    made, batch = engine(), batches(160)[0]
    report = made.step(batch)
    before = dict(report.scored.correct)
    batch.y.copy_((batch.y + 1) % CLASSES)
    assert report.scored.correct == before


def test_no_step_is_taken_where_no_label_came() -> None:
    made, stream = engine(), batches(480)
    for batch in stream[:15]:
        made.step(batch)
    before = made.guidance.updates
    unknown = made.step(hidden(stream[15], slice(None)))
    assert (unknown.taught, len(unknown.replay.ages), made.guidance.updates) == (0, 0, before)
    assert made.step(hidden(stream[16], slice(1, None))).taught == 15
    assert made.guidance.updates > before


def test_what_was_answered_is_counted_where_no_label_will_come() -> None:
    stream = batches(640)
    for unlabelled, ids, counted in ((1.0, False, True), (0.0, False, False), (1.0, True, False)):
        pool = Pool(6, LabelRates(CLASSES))
        made = engine(distillation=Distillation(unlabelled=unlabelled), pool=pool)
        for batch in stream[:20]:
            made.step(batch)
        before = checkpoint.digest(pool.state_dict())
        made.step(hidden(stream[20], slice(None), ids=ids))
        assert (checkpoint.digest(pool.state_dict()) != before) is counted


def test_where_nothing_of_a_batch_can_be_learned_it_is_told_and_learning_goes_on() -> None:
    made = engine(replay=ReplayBuffer(0), inputs=Raw())
    report = made.step(Batch(torch.full((4, 5), 3e38), torch.zeros(4, dtype=torch.int64)))
    assert [fault.row for fault in report.faults] == [0, 1, 2, 3]
    assert report.trained == 0
    x, y = world(16)
    assert made.step(Batch(x, y)).trained == 16


def test_a_report_that_is_read_later_tells_what_was_then() -> None:
    def told(report: Report) -> str:
        return repr((dict(report.peers), dict(report.alphas), report.trained, report.summary()))

    stream = batches(late=True)
    torch.manual_seed(0)
    read = lively()
    at_once = [told(read.step(batch)) for batch in stream]
    torch.manual_seed(0)
    made = lively()
    kept = [made.step(batch) for batch in stream]
    made.load_state_dict(stored(read.state_dict()))
    for batch in stream[:20]:
        made.step(batch)
    assert [told(report) for report in kept] == at_once
    assert any(report.swap for report in kept)
    assert any(report.drift for report in kept)


def test_reports_can_be_told_apart() -> None:
    made = engine()
    reports = [made.step(batch) for batch in batches(64)]
    assert len({*reports, *reports}) == len(reports) == 4
    assert reports.index(reports[3]) == 3
    with pytest.raises(AttributeError):
        reports[0].step = 7


def test_all_that_was_said_is_told_peers_first_then_averages_then_the_pool() -> None:
    made = engine(pool=Pool(6, LabelRates(CLASSES)))
    for batch in batches()[:20]:
        said = made.cohort.predict(made.inputs(batch.x)).masked_fill(~made.seen, UNSEEN).log_softmax(-1)
        report = made.step(batch)
        assert len(report.log_p) == 6 + len(LabelRates(CLASSES)) + 2
        assert torch.allclose(report.log_p[:6], said, atol=1e-5)


@pytest.mark.parametrize("pool", [None, Pool(4, LabelRates(CLASSES))])
@pytest.mark.parametrize("by_hand", [True, False])
def test_what_is_told_can_be_computed_with(pool: Pool | None, *, by_hand: bool) -> None:
    made = alike(pool=pool)
    made.cohort.by_hand = by_hand
    scale = torch.ones((), requires_grad=True)
    for batch in batches(64):
        report = made.step(batch)
        for one in (report.log_p, report.served, report.scored.losses, report.replay.priorities, made.predict(batch.x)):
            (one * scale).sum().backward()
            one.add_(0.0)
    assert scale.grad is not None


def test_two_engines_of_one_state_go_their_own_ways() -> None:
    made, feed = engine(), batches(640)
    for batch in feed[:20]:
        made.step(replace(batch, y=batch.y.clamp(max=1)))
    state = made.state_dict()
    before = deepcopy(state["cohort"]["peers"]["b"]["optimizer"])
    one, other = engine(), engine()
    for each in (one, other):
        each.load_state_dict(state)
    for batch in feed[20:]:  # a class is met that the state knows nothing of
        one.step(batch)
    assert int(state["seen"].sum()) == 2
    after = state["cohort"]["peers"]["b"]["optimizer"]
    for number, gathered in before["state"].items():
        assert all(torch.equal(value, after["state"][number][name]) for name, value in gathered.items())
    assert other.step(feed[20]).classes == 3


def test_inputs_that_carry_a_gradient_are_taken_as_they_are() -> None:
    x, y = world(16)
    assert engine().step(Batch(x.requires_grad_(), y)).trained == 16


OPTIMIZERS = {"sgd": partial(torch.optim.SGD, lr=0.1), "adam": partial(torch.optim.Adam, lr=0.01, fused=True)}


def alike(optimizer: str = "sgd", **parts: Any) -> Engine:
    """An engine of which nothing is left to autograd."""
    build = partial(mlp, (5,), CLASSES, widths=(8,))
    return Engine([Peer(name, build, OPTIMIZERS[optimizer], seed=1) for name in "ab"], CLASSES, **parts)


def test_it_comes_to_the_same_whether_autograd_could_follow_or_not() -> None:
    freely, followed = alike(), alike()
    assert freely.cohort.by_hand
    followed.cohort.by_hand = False
    for batch in batches(640):
        assert torch.equal(freely.step(batch).served, followed.step(batch).served)


def test_what_an_engine_leaves_behind_can_be_learned_from() -> None:
    made = alike()
    for peer in made.cohort.peers:  # so both are restarted
        for parameter in peer.module.parameters():
            parameter.data.fill_(torch.nan)
    reports = [made.step(batch) for batch in batches(640)]
    assert all(count["restarted"] for count in reports[-1].unsound.values())
    scale = torch.ones((), requires_grad=True)
    for told in (reports[-1].served, reports[-1].log_p):
        (scale * told).square().sum().backward()
    assert scale.grad is not None
    for peer in made.cohort.peers:
        peer.module(torch.ones(1, 5)).sum().backward()
        with torch.no_grad():
            for parameter in (*peer.module.parameters(), *peer.average.parameters()):
                parameter.add_(1.0)
    made.replay.add(torch.ones(1, 5), torch.zeros(1, dtype=torch.int64))


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in plain values."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_lasts_is_of_use_to_autograd(optimizer: str) -> None:
    made = alike(optimizer)
    for batch in batches(1600):
        made.step(batch)
    assert all(peer.good for peer in made.cohort.peers)
    assert not any(tensor.is_inference() for tensor in tensors(made.state_dict()))
    x = torch.ones(3, 5, requires_grad=True)
    made.cohort.peers[0].module(made.inputs(x)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_what_a_user_adds_may_differentiate() -> None:
    def differentiating(*_: Any) -> float:
        x = torch.ones((), requires_grad=True)
        (2 * x).backward()
        assert x.grad is not None
        return 1.0

    def changed(x: Tensor) -> Tensor:
        return x * differentiating()

    build = partial(mlp, (5,), CLASSES, widths=(8,))
    peers = [Peer(name, build, partial(torch.optim.SGD, lr=0.1), seed=1) for name in "ab"]
    rule = Distillation(burn_in=0, temperature=differentiating, alpha=differentiating)
    for augment in (None, changed):
        made = Engine(peers, CLASSES, distillation=rule, augment=augment)
        assert all(made.step(batch).trained for batch in batches(64))


def test_what_is_taught_brings_the_peers_together() -> None:
    made = engine(
        distillation=Distillation("none", burn_in=0, interpolate=0.0, doubt=0.0, unlabelled=10.0),
        drift=DriftWatch(never()),
    )
    made.replay = ReplayBuffer(0)
    stream = batches(480)
    for batch in stream[:2]:
        made.step(batch)
    batch = hidden(stream[2], slice(1, None))
    before = made.step(batch)
    after = mask_unseen(made.cohort.predict(made.inputs(batch.x))[:2], made.seen).log_softmax(-1)
    was, now = (
        torch.nn.functional.kl_div(said, before.served.expand(2, -1, -1), reduction="batchmean")
        for said in (before.log_p[:2], after)
    )
    assert float(now) < float(was)


def test_a_lesson_from_a_record_without_a_label_repeats_for_a_seed_and_is_chance_otherwise() -> None:
    def taught(seed: int) -> str:
        made = engine(distillation=Distillation("none", interpolate=0.5))
        torch.manual_seed(seed)
        for batch in batches(480):
            made.step(hidden(batch, slice(4, None)))
        return checkpoint.digest(made.cohort.state_dict())

    assert taught(1) == taught(1) != taught(2)


def test_where_every_record_has_a_label_nothing_is_drawn_for_those_without() -> None:
    stream = batches(480)
    learned = []
    for rule in (Distillation(), Distillation(unlabelled=0.0)):
        made = engine(distillation=rule)
        torch.manual_seed(3)
        for batch in stream:
            made.step(batch)
        learned.append(checkpoint.digest(made.state_dict()))
    assert learned[0] == learned[1]

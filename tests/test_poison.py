"""A poisoned record never reaches the weights, is named, and costs the others nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_commands import streamkd, table
from torch import Tensor, nn
from worlds import CLASSES, Droopy, batches, stored

from streamkd import UNLABELLED, Batch, Distillation, DriftWatch, Engine, Peer, ReplayBuffer
from streamkd.cohort import STUCK
from streamkd.drift import never
from streamkd.inputs import Raw
from streamkd.lesson import Lesson
from streamkd.models import mlp
from streamkd.peer import KEEP_EVERY
from streamkd.replay import Memories

POISON = 3e38
"""Finite, but five of them add up to infinity."""


class Fragile(nn.Module):
    """A model that breaks down on a record whose features add up to infinity, whatever its weights are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Answer."""
        total = x.sum(1, keepdim=True)
        logits: Tensor = self.model(x.clamp(-9, 9)) + (total - total)
        return logits


def fragile(*builds: Callable[[], nn.Module], **options: Any) -> Engine:
    peers = [
        Peer(f"peer {number}", lambda build=build: Fragile(build()), partial(torch.optim.SGD, lr=0.1), seed=number)
        for number, build in enumerate(builds)
    ]
    return Engine(peers, CLASSES, inputs=Raw(), drift=DriftWatch(never()), **options)


def plain() -> Engine:
    """Peers without chance or statistics that do not teach, so that weights depend on the records learned alone."""
    return fragile(*(partial(mlp, (5,), CLASSES, widths=(w,)) for w in (16, 8)), distillation=Distillation("none"))


def poisoned(batch: Batch, rows: set[int]) -> Batch:
    x = batch.x.clone()
    x[list(rows)] = POISON
    return replace(batch, x=x)


def weights(made: Engine) -> Tensor:
    return torch.cat([w.detach().flatten() for peer in made.cohort.peers for w in peer.module.parameters()])


@settings(deadline=None)
@given(rows=st.sets(st.integers(0, 15)))
def test_the_others_of_its_lesson_are_learned_as_if_it_had_not_been_there(rows: set[int]) -> None:
    made, undisturbed = plain(), plain()
    batch = poisoned(batches(16)[0], rows)
    lesson = Lesson(batch.x, batch.y, torch.full((16,), 1 / 16))
    others = [row for row in range(16) if row not in rows]
    options: Any = {"teacher": 0, "seen": torch.ones(CLASSES, dtype=torch.bool), "weights": torch.full((4,), 1 / 4)}
    (learned,) = made.cohort.learn([lesson], **options)
    if others:
        (alone,) = undisturbed.cohort.learn([lesson.rows(others)], **options)
        assert torch.equal(learned.losses[others], alone.losses)
        assert bool(learned.losses[sorted(rows)].isnan().all())
    assert set(learned.faulty) == rows
    assert torch.equal(weights(made), weights(undisturbed))


@settings(deadline=None, max_examples=20)
@given(rows=st.sets(st.integers(0, 15)))
def test_every_record_is_learned_and_remembered_or_named(rows: set[int]) -> None:
    made = plain()
    stream = batches(64)
    made.step(stream[0])
    report = made.step(poisoned(stream[1], rows))
    assert {fault.row for fault in report.faults} == rows
    assert report.trained == 16 - len(rows) == len(made.replay) - 16
    assert (report.size, report.unlabelled, len(report.scored.y)) == (16, 0, 16)
    assert bool(weights(made).isfinite().all())


@pytest.mark.parametrize("scheme", ["leader", "mutual", "ensemble", "average", "self"])
def test_it_is_found_among_peers_that_teach_one_another_with_batch_norm_and_dropout(scheme: str) -> None:
    made = fragile(Droopy, partial(mlp, (5,), CLASSES), Droopy, distillation=Distillation(scheme=scheme))
    stream = batches(960)
    for index, batch in enumerate(stream):
        report = made.step(poisoned(batch, {index % 16}) if index % 7 == 6 else batch)
        assert [fault.row for fault in report.faults] == ([index % 16] if index % 7 == 6 else [])
    for peer in made.cohort.peers:
        assert all(bool(value.isfinite().all()) for value in peer.module.state_dict().values())
        assert (peer.rollbacks, peer.restarts) == (0, 0)
    assert report.scored.correct["served"] > 13


def test_one_that_waited_for_its_label_is_found_when_the_label_comes() -> None:
    made = plain()
    first, second, *_ = batches(64)
    made.step(poisoned(replace(first, y=torch.full((16,), UNLABELLED)), {3}))
    report = made.step(replace(second, late={"2": 1, "3": 0}))
    assert [(fault.row, fault.y) for fault in report.faults] == [(None, 0)]
    assert report.trained == 17
    assert torch.equal(report.faults[0].x, torch.full((5,), POISON))


def test_a_memory_that_breaks_the_peers_is_not_drawn_again() -> None:
    made = plain()
    stream = batches(640)
    made.step(stream[0])
    made.replay.add(torch.full((1, 5), POISON), torch.tensor([0]))
    reports = [made.step(batch) for batch in stream[1:]]
    assert not any(report.faults for report in reports)
    assert float(made.replay.priorities[16]) == 0
    assert all(1 <= peer.skipped <= 2 for peer in made.cohort.peers)  # both draws of a batch may hold it
    assert bool(weights(made).isfinite().all())


def broken(made: Engine, index: int) -> None:
    with torch.no_grad():
        for weight in made.cohort.peers[index].module.parameters():
            weight.fill_(float("nan"))


def test_a_peer_that_broke_down_has_itself_to_blame_and_is_rolled_back_and_then_restarted() -> None:
    made = plain()
    stream = batches(KEEP_EVERY * 16)
    for batch in stream[: KEEP_EVERY // 2]:
        made.step(batch)
    peer = made.cohort.peers[1]
    good = {name: weight.clone() for name, weight in peer.module.state_dict().items()}
    broken(made, 1)
    rest = iter(stream[KEEP_EVERY // 2 :])
    for _ in range(STUCK // 2):
        assert made.step(next(rest)).faults == ()
    assert (peer.skipped, peer.rollbacks, peer.restarts) == (STUCK, 1, 0)
    assert all(torch.equal(weight, good[name]) for name, weight in peer.module.state_dict().items())
    broken(made, 1)
    for _ in range(STUCK // 2):
        made.step(next(rest))
    assert (peer.rollbacks, peer.restarts) == (1, 1)
    assert bool(weights(made).isfinite().all())


def test_while_a_peer_is_broken_a_poisoned_record_is_still_found_by_the_others() -> None:
    made = plain()
    stream = batches(160)
    made.step(stream[0])
    broken(made, 0)
    assert [fault.row for fault in made.step(poisoned(stream[1], {5})).faults] == [5]


def test_no_memory_is_no_hindrance() -> None:
    made = plain()
    made.replay = ReplayBuffer(0)
    reports = [made.step(poisoned(batch, {0, 15})) for batch in batches(160)]
    assert all([fault.row for fault in report.faults] == [0, 15] for report in reports)
    assert bool(weights(made).isfinite().all())


@pytest.mark.parametrize("delay", [0, 40])
def test_it_goes_to_the_dead_letters_as_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delay: int) -> None:
    monkeypatch.chdir(tmp_path)
    lines = table(Path("d.csv"), 200).read_text(encoding="utf-8").splitlines()
    lines[60] = "3e38,-3e38,3e38,3e38,class 1"
    Path("d.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs = ["feed.path=d.csv", "feed.label=y", "http.port=0", "inputs.standardise=false", f"labels.delay={delay}"]
    assert streamkd(monkeypatch, "run", "default", *(f"--set={pair}" for pair in pairs)) == 0
    (letter,) = [json.loads(line) for line in Path("dead-letters.jsonl").read_text(encoding="utf-8").splitlines()]
    assert letter["reason"] == "non_finite_step"
    if delay:
        assert json.loads(letter["raw"])["class"] in range(3)
    else:
        assert letter["raw"] == lines[60] + "\n"
        assert letter["batch_position"]["records"] == 64


class Silent(nn.Module):
    """A model whose loss is not finite on some records, though its gradient is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Answer."""
        logits: Tensor = self.model(x.clamp(-9, 9))
        return torch.where(x[:, :1] > 1e30, torch.nan, logits)


def test_a_loss_that_is_not_finite_is_found_though_its_gradient_is() -> None:
    peers = [Peer(name, lambda: Silent(mlp((5,), CLASSES)), seed=k) for k, name in enumerate("ab")]
    made = Engine(peers, CLASSES, inputs=Raw(), drift=DriftWatch(never()))
    stream = batches(64)
    made.step(stream[0])
    assert [fault.row for fault in made.step(poisoned(stream[1], {2, 9})).faults] == [2, 9]


class Normed(nn.Module):
    """A model that breaks down on a record of zeros, and on no other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Answer."""
        logits: Tensor = self.layer(x / x.norm(dim=1, keepdim=True))
        return logits


def test_a_record_that_looks_like_the_neutral_one_is_found_too() -> None:
    made = Engine([Peer(name, Normed, seed=k) for k, name in enumerate("ab")], CLASSES, inputs=Raw())
    stream = batches(64)
    made.step(stream[0])
    x = stream[1].x.clone()
    x[4] = 0
    assert [fault.row for fault in made.step(replace(stream[1], x=x)).faults] == [4]


def test_all_but_one_poisoned_leaves_one_to_learn_even_for_batch_norm() -> None:
    made = fragile(Droopy, Droopy)
    stream = batches(64)
    assert len(made.step(poisoned(stream[0], set(range(15)))).faults) == 15
    assert made.step(Batch(stream[1].x[:1], stream[1].y[:1])).trained == 1


@pytest.mark.slow
def test_peers_that_never_learn_end_the_work() -> None:
    made = plain()

    def go_on() -> None:
        for batch in batches(4_800):
            for index in range(2):
                broken(made, index)
            assert made.step(batch).trained == 0

    with pytest.raises(ArithmeticError, match="no peer has had a finite loss"):
        go_on()


def test_a_source_of_weights_is_the_teacher_if_it_is_well_and_another_if_not() -> None:
    made = fragile(*(partial(mlp, (5,), CLASSES, widths=(8,)) for _ in range(3)))
    first, second, third = made.cohort.peers
    third.stuck = STUCK
    made.cohort.mend(teacher=1)
    assert all(torch.equal(a, b) for a, b in zip(third.module.parameters(), second.module.parameters(), strict=True))
    third.stuck, second.stuck = STUCK, 1
    made.cohort.mend(teacher=1)
    assert all(torch.equal(a, b) for a, b in zip(third.module.parameters(), first.module.parameters(), strict=True))


def test_statistics_that_broke_down_are_not_kept_though_the_gradient_is_finite() -> None:
    peer = Peer("a", Droopy)
    peer.learn(torch.randn(8, 5)).logits.sum().backward()
    with torch.no_grad():
        next(iter(peer.module.buffers())).fill_(torch.inf)
    norm = float(peer.clip_gradient())
    assert norm == float("inf")
    peer.step(norm)
    assert all(bool(buffer.isfinite().all()) for buffer in peer.module.buffers())
    assert peer.skipped == 1


def test_weights_that_are_not_finite_are_not_kept_for_a_roll_back() -> None:
    peer = Peer("a", partial(mlp, (5,), CLASSES))
    for update in range(KEEP_EVERY):
        if update == KEEP_EVERY - 1:
            with torch.no_grad():
                next(iter(peer.module.parameters()))[0] = torch.nan
        peer.learn(torch.zeros(8, 5)).logits.sum().backward()
        peer.step(1.0)
    assert peer.good == {}


def test_a_roll_back_after_a_restore_goes_to_the_weights_that_were_kept_before() -> None:
    made = plain()
    stream = batches(KEEP_EVERY * 16)
    for batch in stream[: KEEP_EVERY // 2 + 4]:
        made.step(batch)
    good = {name: weight.clone() for name, weight in made.cohort.peers[0].good.items()}
    again = plain()
    again.load_state_dict(stored(made.state_dict()))
    again.cohort.peers[0].roll_back()
    state = again.cohort.peers[0].module.state_dict()
    assert good
    assert all(torch.equal(state[name], weight) for name, weight in good.items())


def test_a_record_without_a_label_that_breaks_an_update_costs_those_with_one_nothing() -> None:
    made = fragile(*(partial(mlp, (5,), CLASSES, widths=(w,)) for w in (16, 8)))
    for batch in batches(480):
        y = torch.where(torch.arange(16) < 4, UNLABELLED, batch.y)
        report = made.step(replace(poisoned(batch, {1}), y=y, ids=()))
        assert (report.faults, report.trained) == ((), 12)
    assert bool(weights(made).isfinite().all())


def test_what_broke_in_the_memory_is_not_drawn_again_and_its_priority_is_told() -> None:
    made, drawn = plain(), list[Tensor]()
    made.step(batches(16)[0])
    made.replay.add(torch.full((4, 5), POISON), torch.zeros(4, dtype=torch.int64))
    sample = made.replay.sample

    def recorded(n: int, window: int | None = None) -> Memories:
        recalled = sample(n, window)
        drawn.append(recalled.slots)
        return recalled

    made.replay.sample = recorded  # type: ignore[method-assign]
    for batch in batches(128)[1:]:
        report = made.step(batch)
        assert torch.equal(report.replay.priorities, made.replay.priorities_at(drawn[-1]))
    assert len(torch.cat(drawn).unique()) < len(torch.cat(drawn))  # some came twice
    assert not made.replay.priorities_at(torch.arange(16, 20)).any()
    assert not set(drawn[-1].tolist()) & {16, 17, 18, 19}

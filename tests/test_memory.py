"""A device whose memory is too small learns the same, in smaller parts."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stack import CLASSES, FEATURES, Build, lesson, same
from torch import Tensor, nn

from streamkd import UNLABELLED, Batch, Cohort, Distillation, Engine, Peer, ReplayBuffer
from streamkd.fitting import ALL, GROW_EVERY
from streamkd.lesson import Lesson
from streamkd.models import mlp
from streamkd.schedules import constant

RULE = Distillation(burn_in=0, alpha=constant(0.7), temperature=constant(2.0))


class Narrow(nn.Module):
    """Has room for so many rows at once."""

    def __init__(self, room: int, taken: list[int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.room, self.taken = room, taken

    def forward(self, x: Tensor) -> Tensor:
        """Answer, or say what a device says that is full."""
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(x)} rows")
        self.taken.append(len(x))
        logits: Tensor = self.layers(x)
        return logits


def cohort(room: int, taken: list[int] | None = None) -> Cohort:
    build: Build = partial(Narrow, room, [] if taken is None else taken)
    made = [Peer(str(i), build, partial(torch.optim.SGD, lr=0.2, momentum=0.5), clip=0.3, seed=i) for i in range(3)]
    return Cohort(made, RULE)


def some(seed: int, n: int) -> Lesson:
    """Records with and without a label."""
    made = lesson(seed, n)
    y = torch.where(torch.arange(n) % 4 == 1, UNLABELLED, made.y)
    return Lesson(made.x, y, made.weights * (1 + torch.arange(n) % 3), torch.full((n, CLASSES), 1 / CLASSES))


def learn(made: Cohort, number: int, n: int) -> Tensor:
    made.guidance.schedule(1, CLASSES)
    (told,) = made.learn(
        [some(number, n)], teacher=1, seen=torch.ones(CLASSES, dtype=torch.bool), weights=torch.full((6,), 1 / 6)
    )
    return torch.cat([told.losses[None], *told.parts, told.answers])


@settings(max_examples=40, deadline=None)
@given(room=st.integers(1, 40), n=st.integers(1, 40))
def test_a_full_device_learns_every_record_once_and_the_same(room: int, n: int) -> None:
    narrow, wide = cohort(room), cohort(ALL)
    for number in range(4):
        assert torch.allclose(learn(narrow, number, n), learn(wide, number, n), atol=1e-4)
    assert same(narrow, wide)
    assert [peer.taken for peer in narrow.peers if isinstance(peer, Peer)] == [4] * 3
    assert min(n, narrow.fitting.at_once) <= max(room, 1)


@pytest.mark.parametrize("at_once", [1, 5, 12])
def test_peers_side_by_side_learn_in_parts_what_they_learn_at_once(at_once: int) -> None:
    build = partial(mlp, (FEATURES,), CLASSES, widths=(8, 6), layer_norm=True)
    parts, whole = (Cohort([Peer(str(i), build, clip=0.3, seed=i) for i in range(3)], RULE) for _ in range(2))
    parts.fitting.at_once = at_once
    for number in range(6):
        assert torch.allclose(learn(parts, number, 12), learn(whole, number, 12), atol=1e-4)
    assert same(parts, whole)


def test_when_there_is_room_again_it_is_used() -> None:
    taken: list[int] = []
    made = cohort(10, taken)
    learn(made, 0, 40)
    assert made.fitting.at_once == 10
    for peer in made.peers:
        for model in (peer.module, peer.average):  # type: ignore[union-attr]
            model.room = 100  # type: ignore[union-attr, assignment]
    for number in range(4 * GROW_EVERY):
        made.guidance.schedule(1, CLASSES)
        learn(made, number, 40)
    assert made.fitting.at_once == ALL
    assert taken[-1] == 40


def test_one_record_too_large_for_the_device_is_told() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        learn(cohort(0), 0, 8)


def test_an_engine_on_a_full_device_scores_and_learns_every_record() -> None:
    made = Engine(cohort(7).peers, CLASSES, distillation=RULE, replay=ReplayBuffer(100))
    chance = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(16, FEATURES, generator=chance)
        report = made.step(Batch(x, (x[:, 0] > 0).long()))
        assert len(report.scored.y) == report.trained == 16
    assert made.cohort.fitting.at_once <= 7

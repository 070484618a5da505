"""A history learned in several passes: what a teacher gives, and what it leaves alone."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from worlds import CLASSES, Droopy, world

from streamkd import UNLABELLED, Peer
from streamkd.checkpoint import digest
from streamkd.models import mlp
from streamkd.protocols import PROTOCOLS, Course, Taught

RECORDS = 200


def course(seed: int = 0, *, labels: bool = True, **options: Any) -> Course:
    """The first half of the world, in which labels stay where they are."""
    x, y = (part[:RECORDS] for part in world(2 * RECORDS))
    seen = torch.tensor([True, True, True])
    return Course(x, y if labels else torch.full_like(y, UNLABELLED), seen, seed=seed, **options)


def peer(width: int = 8, seed: int = 1, *, droopy: bool = False) -> Peer:
    build = Droopy if droopy else partial(mlp, (5,), CLASSES, widths=(width,))
    return Peer("p", build, partial(torch.optim.SGD, lr=0.1, momentum=0.5), seed=seed)


def right(student: Peer, taken: Course) -> float:
    _, y = (part[:RECORDS] for part in world(2 * RECORDS))
    return float((taken.answers(student).argmax(-1) == y).float().mean())


@pytest.fixture
def teacher() -> Peer:
    made = peer(32, seed=9)
    course().learn(made, range(5))
    return made


@pytest.mark.parametrize("droopy", [False, True])
def test_with_no_weight_on_the_teacher_a_student_is_alone(teacher: Peer, *, droopy: bool) -> None:
    """Bit for bit, whatever was drawn by chance in between."""
    alone, taught, taken = peer(droopy=droopy), peer(droopy=droopy), course()
    taken.learn(alone, range(3))
    torch.rand(7)
    taken.learn(taught, range(3), alpha=0.0, taught=Taught(taken.answers(teacher)))
    assert digest(alone.state_dict()) == digest(taught.state_dict())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_teacher_is_not_changed_by_what_it_teaches(teacher: Peer, protocol: str) -> None:
    before, student, taken = digest(teacher.state_dict()), peer(), course()
    taught = Taught(taken.answers(teacher))
    for stage in PROTOCOLS[protocol](0.5):
        taken.learn(student, range(2), alpha=stage.alpha, taught=taught)
    assert digest(teacher.state_dict()) == before


def test_a_student_that_never_saw_a_label_learns_what_its_teacher_knows(teacher: Peer) -> None:
    student, taken = peer(), course(labels=False)
    before = right(student, taken)
    taken.learn(student, range(5), alpha=1.0, taught=Taught(taken.answers(teacher)))
    assert right(student, taken) > 0.95 > before
    untaught = peer()
    taken.learn(untaught, range(5))
    assert right(untaught, taken) == before


@settings(max_examples=25, deadline=None)
@given(temperature=st.floats(0.5, 20), seed=st.integers(0, 100))
def test_soft_labels_pull_as_their_cross_entropy_does(temperature: float, seed: int) -> None:
    """The protocol is published with the cross entropy; that of the teacher with itself has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    student, logits = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    divergence = Taught(logits, temperature).distance(student, logits, torch.zeros(6, dtype=torch.int64))
    softened = (logits / temperature).softmax(-1)
    entropy = -(softened * (student / temperature).log_softmax(-1)).sum(-1).mean() * temperature**2
    (one,) = torch.autograd.grad(divergence, student)
    (other,) = torch.autograd.grad(entropy, student)
    torch.testing.assert_close(one, other)


class Listening(nn.Module):
    """Notes which records it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Answer."""
        self.shown.append(x[:, 0].clone())
        logits: Tensor = self.layer(x)
        return logits


def shown(seed: int, passes: range) -> list[float]:
    """Return what a model is shown, in order."""
    made = Peer("l", Listening)
    course(seed).learn(made, passes)
    assert isinstance(made.module, Listening)
    return [value for part in made.module.shown for value in part.tolist()]


def test_each_pass_shows_every_record_once_in_an_order_of_its_own_that_the_seed_tells() -> None:
    first, second = shown(0, range(1)), shown(0, range(1, 2))
    assert sorted(first) == sorted(second) == sorted(course().x[:, 0].tolist())
    assert first != second
    assert first == shown(0, range(1))
    assert first != shown(1, range(1))
    assert first + second == shown(0, range(2))


def test_no_pass_changes_nothing() -> None:
    student = peer()
    before = digest(student.state_dict())
    course().learn(student, range(0))
    assert digest(student.state_dict()) == before


def test_it_is_told_of_every_record_that_was_learned() -> None:
    told: list[int] = []
    course(batch=48, told=told.append).learn(peer(), range(2))
    assert told == [48, 48, 48, 48, 8] * 2


@pytest.mark.parametrize("droopy", [False, True])
def test_records_that_break_an_update_are_found_and_the_others_learned(teacher: Peer, *, droopy: bool) -> None:
    student, taken = peer(droopy=droopy), course()
    taught = Taught(taken.answers(teacher))
    taken.x[[3, 50]] = torch.inf
    for alpha in (0.0, 0.5, 1.0):
        taken.faulty.clear()
        taken.learn(student, range(2), alpha=alpha, taught=taught)
        assert taken.faulty == {3, 50}
    assert student.skipped == 0
    assert all(bool(weight.isfinite().all()) for weight in student.module.state_dict().values())
    sound = [row for row in range(RECORDS) if row not in {3, 50}]
    assert float((student.predict(taken.x[sound]).logits[:, :3].argmax(-1) == taken.y[sound]).float().mean()) > 0.9


def test_a_peer_that_cannot_take_a_single_step_gives_up() -> None:
    taken = course()
    taken.x.fill_(torch.nan)
    with pytest.raises(ArithmeticError, match="p has had no finite loss"):
        taken.learn(peer(), range(1))


def test_classes_that_were_not_met_are_never_answered() -> None:
    student, taken = peer(), course()
    taken.learn(student, range(1))
    assert taken.answers(student).shape == (RECORDS, 3)
    assert float(student.predict(taken.x).logits.shape[1]) == CLASSES

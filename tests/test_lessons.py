from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamkd import UNLABELLED, Distillation, stream_classes
from streamkd.compiling import Function
from streamkd.fused import AT_ONCE, ROWS
from streamkd.inputs import Raw, Standardiser
from streamkd.labels import Answers
from streamkd.lessons import Lessons
from streamkd.replay import Memories

FEATURES, CLASSES = 3, 4
SEEN = torch.ones(CLASSES, dtype=torch.bool)


def answers(n: int, *, labelled: bool = True) -> Answers:
    y = torch.arange(n) % 2 if labelled else torch.full((n,), UNLABELLED)
    served = torch.rand(n, CLASSES).softmax(-1)
    return Answers(torch.randn(n, FEATURES), y, torch.zeros(2, n, CLASSES), served)


def memories(m: int) -> Memories:
    y = torch.arange(m) % CLASSES
    return Memories(torch.arange(m), torch.randn(m, FEATURES), y, torch.rand(m), torch.arange(m))


def scale() -> Standardiser:
    made = Standardiser()
    made.update(2 * torch.randn(100, FEATURES) + 1)
    return made


def doubled(x: Tensor) -> Tensor:
    return 2 * x


@settings(deadline=None)
@given(
    n=st.sampled_from([1, 2, 5, ROWS]),
    each=st.integers(0, 4),
    updates=st.integers(1, 4),
    open_=st.integers(0, 3),
    views=st.integers(0, 2),
    also=st.sets(st.sampled_from(["augmented", "present", "compiled"])),
)
def test_each_lesson_is_its_share_of_the_memories_then_the_batch_then_what_was_answered(
    *, n: int, each: int, updates: int, open_: int, views: int, also: set[str]
) -> None:
    augmented, present = "augmented" in also, "present" in also
    among = stream_classes.present if present else stream_classes.seen
    rule = Distillation(stream_classes=among, views=[lambda x: x + 1] * views, unlabelled=0.5, interpolate=0.0)
    inputs, batch, past = scale(), answers(n), memories(each * updates)
    untold = answers(open_, labelled=False) if open_ else None
    make = Lessons(inputs, doubled if augmented else None, rule, torch.device("cpu"), compiled="compiled" in also)
    asked: list[int] = []

    def noted(function: Function, operands: Sequence[Tensor]) -> Function:
        asked.append(len(operands))
        return function

    for one in make._quick.values():  # noqa: SLF001 - what would compile it
        one._compiler = noted  # noqa: SLF001 - likewise
    lessons = make(batch, past, untold, updates=updates, seen=SEEN)
    assert len(lessons) == updates
    assert bool(asked) is ("compiled" in also and each > 0 and n == ROWS and updates <= AT_ONCE and not augmented)
    for number, lesson in enumerate(lessons):
        own = slice(number * each, (number + 1) * each)
        raw = torch.cat([past.x[own], batch.x]) if each else batch.x
        parts: list[Tensor] = [inputs(doubled(raw) if augmented else raw)]
        parts += [inputs(untold.x)] if untold else []
        assert torch.equal(lesson.x, torch.cat(parts))
        known = each + n
        assert lesson.y.tolist() == [*past.y[own].tolist(), *batch.y.tolist(), *[UNLABELLED] * open_]
        assert torch.allclose(lesson.weights[:each], past.weights[own] / max(1, each))
        assert torch.allclose(lesson.weights[each:known], torch.full((n,), 1 / n))
        assert lesson.weights[known:].sum().item() == pytest.approx(0.5 if open_ else 0.0)
        assert (lesson.targets is None) is (untold is None)
        if present:
            met = torch.zeros(CLASSES, dtype=torch.bool).index_fill(0, batch.y, value=True)
            rows: Any = [*[SEEN] * each, *[met] * n, *[SEEN] * open_]
            assert lesson.among is not None
            assert torch.equal(lesson.among, torch.stack(rows))
        assert len(lesson.views) == views
        for harder, view in enumerate(lesson.views, start=1):
            assert torch.allclose(view[:known], inputs(raw + harder), atol=1e-5)


def test_chance_is_asked_anew_for_every_update() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    rule = Distillation(views=[noisy], interpolate=0.5)
    batch, past, untold = answers(6), memories(4), answers(5, labelled=False)
    for augment in (None, noisy):
        make = Lessons(scale(), augment, rule, torch.device("cpu"))
        one, other = make(batch, past, untold, updates=2, seen=SEEN)
        assert torch.equal(one.x[2:8], other.x[2:8]) is (augment is None)
        assert not torch.equal(one.x[8:], other.x[8:])
        assert not torch.isclose(one.views[0][2:8], other.views[0][2:8]).all(1).any()


def test_bytes_in_the_memory_and_other_numbers_since_are_each_taken_for_what_they_are() -> None:
    past = memories(2)
    past = replace(past, x=torch.tensor([[0, 51, 255]] * 2, dtype=torch.uint8))
    (lesson,) = Lessons(Raw(), None, Distillation(), torch.device("cpu"))(answers(1), past, None, updates=1, seen=SEEN)
    assert torch.allclose(lesson.x[:2], torch.tensor([0.0, 0.2, 1.0]))

"""Classes that come one after the other: asymmetric cross entropy, and distillation along a chain of harder views."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cohort import CLASSES, gradients, lawful, lesson_of_rows, networks, one_hot, plainly, tables
from torch import Tensor
from torch.nn import functional
from worlds import batches, engine, stored

from streamkd import Batch, Distillation, Engine, ReplayBuffer, views
from streamkd.config import build_engine
from streamkd.errors import ConfigError
from streamkd.lesson import Lesson, agreement, joined, means
from streamkd.schedules import constant
from streamkd.settings import EngineSettings, validate
from streamkd.stream_classes import present, seen

labels = st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=6)


def asymmetric(y: Sequence[int]) -> Lesson:
    """One row of a table for each record, as a batch of a stream whose labels are told apart among themselves."""
    plain = lesson_of_rows(y)
    return replace(plain, among=present(plain.y, CLASSES))


@lawful
@given(labels, st.integers(0, 100))
def test_labels_of_a_batch_give_absent_classes_no_gradient(y: list[int], seed: int) -> None:
    moved = gradients(tables(plainly("none"), seed=seed), asymmetric(y))
    absent = [k for k in range(CLASSES) if k not in y]
    assert torch.equal(moved[..., absent], torch.zeros_like(moved[..., absent]))
    if len(set(y)) == 1:
        assert torch.equal(moved, torch.zeros_like(moved))


@lawful
@given(labels, st.integers(0, 100))
def test_among_those_present_it_is_plain_cross_entropy(y: list[int], seed: int) -> None:
    met = sorted(set(y))
    cohort = tables(plainly("none"), seed=seed)
    p = cohort.predict(lesson_of_rows(y).x)[:3][..., met].softmax(-1)
    told = torch.tensor([met.index(label) for label in y])
    moved = gradients(cohort, asymmetric(y))[:, : len(y), met]
    assert torch.allclose(moved, p - functional.one_hot(told, len(met)), atol=1e-5)


@pytest.mark.parametrize("scheme", ["none", "leader", "mutual", "average", "self", "ensemble"])
def test_where_all_classes_are_present_nothing_differs(scheme: str) -> None:
    y = [2, 0, 1, 1]
    rule = plainly(scheme, 0.5, gate="better")
    one, other = gradients(tables(rule), asymmetric(y)), gradients(tables(rule), lesson_of_rows(y))
    assert torch.allclose(one, other, atol=1e-6)


def test_memories_are_told_apart_among_all_classes() -> None:
    memories, batch = lesson_of_rows([0, 1, 2]), lesson_of_rows([2, 2, 1])
    batch = replace(batch, x=batch.x + 3, among=present(batch.y, CLASSES))
    cohort = tables(plainly("none"))
    p = cohort.predict(memories.x)[:3].softmax(-1)
    moved = gradients(cohort, joined([memories, batch]))
    assert torch.allclose(moved[:, :3], p - one_hot(memories.y), atol=1e-5)
    assert torch.equal(moved[:, 3:, 0], torch.zeros(3, 3))


def test_distillation_compares_all_classes_whatever_the_labels_are_told_apart_among() -> None:
    y = [1, 2, 2, 1]
    soft = []
    for what in (asymmetric(y), lesson_of_rows(y)):
        taught, alone = (gradients(tables(plainly(scheme, cap=False)), what) for scheme in ("mutual", "none"))
        soft.append(taught - alone)
    assert soft[0][..., 0].abs().max() > 1e-2
    assert torch.allclose(*soft, atol=1e-5)


def in_views(y: Sequence[int], count: int) -> Lesson:
    """Each record in so many harder views, of which every one has a row of its own in the table."""
    plain = lesson_of_rows(y)
    return replace(plain, views=tuple(plain.x + (1 + number) * len(y) for number in range(count)))


@lawful
@given(labels, st.integers(0, 3), st.sampled_from([1.0, 4.0]), st.sampled_from([0.5, 4.0]))
def test_a_student_learns_its_teachers_answer_to_the_next_harder_view(
    y: list[int], harder: int, temperature: float, alpha: float
) -> None:
    rule = plainly("mutual", alpha, cap=False, temperature=constant(temperature))
    what, count = in_views(y, harder), 1 + harder
    cohort = tables(rule, rows=len(y) * count, peers=2)
    logits = cohort.predict(what.unrolled().x)[:2].view(2, count, len(y), CLASSES)
    leaf = logits.clone().requires_grad_()
    total = torch.zeros(())
    for student, teacher in ((0, 1), (1, 0)):
        for view in range(count):
            own, taught = leaf[student, view], logits[teacher, min(view + 1, harder)]
            total = total + functional.cross_entropy(own, what.y, reduction="sum")
            soft = functional.kl_div(
                (own / temperature).log_softmax(-1), (taught / temperature).softmax(-1), reduction="sum"
            )
            total = total + alpha * temperature**2 * soft
    (by_hand,) = torch.autograd.grad(total / count, leaf)
    moved = gradients(cohort, what).view_as(by_hand)
    assert torch.allclose(moved, by_hand, atol=1e-4)


@pytest.mark.parametrize("scheme", ["leader", "mutual", "self"])
def test_views_that_show_the_same_teach_the_same(scheme: str) -> None:
    rule = plainly(scheme, 0.5, gate="soft")
    cohort, other = networks(rule), networks(rule)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        x, y = torch.randn(5, 4, generator=generator), torch.randint(0, CLASSES, (5,), generator=generator)
        plain = Lesson(x, y, torch.full((5,), 0.2))
        told, again = (_learn(each, what) for each, what in ((cohort, plain), (other, replace(plain, views=(x, x)))))
        assert np.allclose(means([told])[0][3], means([again])[0][3], atol=1e-5)
        assert torch.allclose(told.losses, again.losses, atol=1e-5)
        assert torch.equal(told.answers, again.answers)
        assert agreement([told])[1] == agreement([again])[1]
    for one, two in zip(cohort.peers, other.peers, strict=True):
        weights = zip(one.state_dict()["module"].values(), two.state_dict()["module"].values(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in weights)


def _learn(cohort: Any, what: Lesson) -> Any:
    cohort.guidance.schedule(0, CLASSES)
    return cohort.learn([what], teacher=0, seen=torch.ones(CLASSES, dtype=torch.bool), weights=torch.full((6,), 1 / 6))[
        0
    ]


def test_lessons_keep_their_views_and_classes_when_they_are_joined_and_chosen_from() -> None:
    x, y = torch.arange(3.0)[:, None], torch.tensor([0, 1, 0])
    plain = Lesson(x, y, torch.ones(3))
    viewed = Lesson(x + 10, y, torch.ones(3), among=present(y, CLASSES), views=(x + 20, x + 30))
    both = joined([plain, viewed])
    assert [view[:, 0].tolist() for view in both.views] == [[0, 1, 2, 20, 21, 22], [0, 1, 2, 30, 31, 32]]
    assert both.among is not None
    assert both.among.tolist() == [[True] * CLASSES] * 3 + [[True, True, False]] * 3
    part = both.rows([0, 4])
    assert (part.x[:, 0].tolist(), part.views[1][:, 0].tolist()) == ([0, 11], [0, 31])
    whole = part.unrolled()
    assert whole.x[:, 0].tolist() == [0, 11, 0, 21, 0, 31]
    assert part.harder().tolist() == [2, 3, 4, 5, 4, 5]
    assert float(whole.weights.sum()) == pytest.approx(float(part.weights.sum()))
    assert joined([plain, plain]).among is None
    assert joined([plain, plain]).views == ()


def shaken(x: Tensor) -> Tensor:
    return x + 0.3 * torch.randn_like(x)


def incremental(**options: Any) -> Engine:
    rule = Distillation(scheme="mutual", gate="open", stream_classes=present, views=(shaken, shaken), **options)
    return engine(distillation=rule, replay=ReplayBuffer(100, seed=5))


def test_a_run_with_views_that_is_resumed_ends_where_an_unbroken_one_ends() -> None:
    torch.manual_seed(0)
    unbroken, every = incremental(), batches(480)
    for batch in every[:15]:
        unbroken.step(batch)
    saved = stored(unbroken.state_dict())

    def ended(learner: Engine) -> Tensor:
        for batch in every[15:]:
            learner.step(batch)
        return learner.predict(every[0].x)

    end = ended(unbroken)
    resumed = incremental()
    resumed.load_state_dict(saved)
    assert torch.equal(ended(resumed), end)


def test_what_is_asked_is_answered_as_it_came() -> None:
    shown: list[int] = []

    def counted(x: Tensor) -> Tensor:
        shown.append(len(x))
        return x

    rule = Distillation(views=(counted,))
    learner, first = engine(distillation=rule, replay=ReplayBuffer(0)), batches(16)[0]
    learner.predict(first.x)
    assert not shown
    learner.step(first)
    assert set(shown) == {len(first)}


def test_all_classes_met_are_the_default() -> None:
    assert Distillation().stream_classes is seen
    assert seen(torch.tensor([0]), CLASSES) is None


IMAGE = "{kind='cnn', channels=[4], width=8}"
SETTINGS = ["[[peers]]", "name = 'a'", f"model = {IMAGE}", "[[peers]]", "name = 'b'", f"model = {IMAGE}"]


def configured(distillation: str, shape: Sequence[int] = (1, 8, 8)) -> Engine:
    """Build what a configuration says."""
    model = "\n".join(SETTINGS) if len(shape) > 1 else "\n".join(SETTINGS).replace(IMAGE, "{kind='mlp'}")
    table = tomllib.loads(f"max_classes = 4\n[distillation]\n{distillation}\n{model}")
    return build_engine(validate(EngineSettings, table), shape)


@pytest.mark.parametrize(
    "named",
    [
        "['crop', {kind='RandAugment', num_ops=2}]",
        "['RandomResizedCrop', 'erase']",
    ],
)
def test_images_stay_bytes_in_every_view(named: str) -> None:
    made = configured(f"scheme = 'mutual'\nviews = {named}")
    x, y = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8), torch.arange(12) % 4
    for view in made.cohort.distillation.views:
        assert view(x).dtype == torch.uint8
        assert view(x).shape == x.shape
        assert view(x[:0]).shape == x[:0].shape
    assert all(isfinite(peer.total) for peer in made.step(Batch(x, y)).peers.values())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_values_of_a_table_are_lost_or_swapped_in_that_share(share: float) -> None:
    torch.manual_seed(0)
    x = torch.arange(5_000.0).view(1_000, 5)
    lost = views.missing(share=share)(x)
    assert torch.equal(lost[~lost.isnan()], x[~lost.isnan()])
    assert float(lost.isnan().float().mean()) == pytest.approx(share, abs=0.02)
    swapped = views.swapped(share=share)(x)
    assert float((swapped != x).float().mean()) == pytest.approx(share, abs=0.02)
    for column in range(5):
        assert set(swapped[:, column].tolist()) <= set(x[:, column].tolist())


@pytest.mark.parametrize(
    ("named", "shape", "said"),
    [
        ("['crops']", (1, 8, 8), "distillation.views.0.kind = 'crops': no such part; did you mean crop?"),
        ("['crop', 'RandomCrops']", (1, 8, 8), "did you mean RandomCrop?"),
        ("[{kind='RandomCrop', size=4}]", (1, 8, 8), "makes [2, 1, 4, 4]"),
        ("[{kind='missing', share=2.0}]", (5,), "distillation.views.0.share = 2.0"),
        ("['crop']", (5,), "distillation.views.0.kind = 'crop': no such part"),
    ],
)
def test_a_view_that_cannot_be_is_refused_by_name(named: str, shape: Sequence[int], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        configured(f"views = {named}", shape)

import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamkd import UNLABELLED, Output, losses
from streamkd.logits import mask_unseen
from streamkd.losses import (
    FLAT,
    Loss,
    Sum,
    decoupled_kd,
    dist,
    dml,
    hard_pseudo_label,
    jensen_shannon,
    kd,
    mse_logits,
    separate_temperatures,
    sharpness,
    soft_label,
    standardised,
)
from streamkd.parts import public_functions

LOSSES = list(public_functions(losses).values())
FROM_ONESELF_ZERO = [loss for loss in LOSSES if loss not in {hard_pseudo_label, soft_label}]
OF_PROBABILITIES = [loss for loss in LOSSES if loss is not mse_logits]

lawful = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**20)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 7))  # pairs, records, classes
warmth = st.floats(0.5, 20)


def logits(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_labels(n: int) -> Tensor:
    return torch.full((n,), UNLABELLED)


def said_of(loss: Loss, student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    temperature = torch.as_tensor(temperature, dtype=student.dtype)
    return loss(Output(student), Output(teacher), no_labels(student.shape[-2]), temperature)


def gradient_of(loss: Loss, student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(said_of(loss, leaf, teacher, temperature).sum(), leaf)
    return gradient


@lawful
@given(seeds, shapes, warmth)
def test_kd_from_oneself_is_zero_and_from_anyone_else_positive(
    seed: int, shape: tuple[int, int, int], temperature: float
) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    shifted = student + 3.0  # logits that differ by a constant are the same answer
    assert float(said_of(kd, student, shifted, temperature).abs().max()) < 1e-10
    assert float(gradient_of(kd, student, shifted, temperature).abs().max()) < 1e-10
    assert float(said_of(kd, student, teacher, temperature).min()) > 0


@lawful
@given(seeds, shapes, warmth)
def test_soft_label_is_kd_plus_the_entropy_of_the_teacher(
    seed: int, shape: tuple[int, int, int], temperature: float
) -> None:
    teacher = logits(*shape, seed=seed)
    q = (teacher / temperature).softmax(-1)
    entropy = -(q * q.log()).sum(-1) * temperature**2
    for student in (logits(*shape, seed=seed + 1), logits(*shape, seed=seed + 2)):
        difference = said_of(soft_label, student, teacher, temperature) - said_of(kd, student, teacher, temperature)
        assert torch.allclose(difference, entropy, rtol=1e-9)


@pytest.mark.parametrize("loss", FROM_ONESELF_ZERO)
@lawful
@given(seeds, shapes, warmth)
def test_from_oneself_there_is_nothing_to_learn(
    loss: Loss, seed: int, shape: tuple[int, int, int], temperature: float
) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    assert float(said_of(loss, student, student, temperature).abs().max()) < 1e-8
    assert float(gradient_of(loss, student, student, temperature).abs().max()) < 1e-6
    assert float(said_of(loss, student, teacher, temperature).min()) > -1e-12


@pytest.mark.parametrize("loss", OF_PROBABILITIES)
@lawful
@given(seeds, shapes, warmth, st.floats(-50, 50))
def test_a_constant_added_to_the_logits_changes_nothing(
    loss: Loss, seed: int, shape: tuple[int, int, int], temperature: float, constant: float
) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    expected = said_of(loss, student, teacher, temperature)
    assert torch.allclose(said_of(loss, student + constant, teacher - constant, temperature), expected, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@lawful
@given(seeds, shapes, warmth)
def test_the_order_of_the_classes_does_not_matter(
    loss: Loss, seed: int, shape: tuple[int, int, int], temperature: float
) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    order = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(seed))
    expected = said_of(loss, student, teacher, temperature)
    assert torch.allclose(said_of(loss, student[..., order], teacher[..., order], temperature), expected)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss is not sharpness])  # which holds its T fixed
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_that_of_finite_differences(loss: Loss, temperature: float) -> None:
    student, teacher = logits(2, 3, 4, seed=1).requires_grad_(), logits(2, 3, 4, seed=2)
    assert torch.autograd.gradcheck(lambda leaf: said_of(loss, leaf, teacher, temperature), (student,))


@lawful
@given(seeds, shapes, warmth)
def test_the_gradient_of_kd_is_the_difference_of_the_softened_answers_times_t(
    seed: int, shape: tuple[int, int, int], temperature: float
) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    assert torch.allclose(gradient_of(kd, student, teacher, temperature), expected, atol=1e-10)


@lawful
@given(seeds, shapes)
def test_the_gradient_of_kd_keeps_its_size_however_soft_the_lesson(seed: int, shape: tuple[int, int, int]) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    centred = student - student.mean(-1, keepdim=True) - (teacher - teacher.mean(-1, keepdim=True))
    limit = centred / shape[-1]
    for temperature in (1e4, 1e5):  # without T^2 the gradient would shrink a hundredfold between the two
        assert torch.allclose(gradient_of(kd, student, teacher, temperature), limit, atol=1e-2)


@pytest.mark.parametrize("loss", LOSSES)
def test_pairs_learn_in_one_call_what_each_learns_alone(loss: Loss) -> None:
    student, teacher = logits(3, 5, 4, seed=1), logits(3, 5, 4, seed=2)
    temperature = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    pairs = zip(student, teacher, temperature.flatten().tolist(), strict=True)
    alone = torch.stack([said_of(loss, *pair) for pair in pairs])
    assert torch.allclose(said_of(loss, student, teacher, temperature), alone)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
def test_logits_of_ten_thousand_give_finite_losses_and_gradients(loss: Loss, temperature: float) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]])
    teacher = torch.tensor([[-1e4, 1e4, 1e4], [1e4, -1e4, 0.0]])
    assert bool(said_of(loss, student, teacher, temperature).isfinite().all())
    assert bool(gradient_of(loss, student, teacher, temperature).isfinite().all())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_lesson_is_silent_on_classes_that_were_never_seen(loss: Loss, temperature: float) -> None:
    seen = torch.tensor([True, False, True, True, False])
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    leaf = student.clone().requires_grad_()
    masked = said_of(loss, mask_unseen(leaf, seen), mask_unseen(teacher, seen), temperature)
    (gradient,) = torch.autograd.grad(masked.sum(), leaf)
    assert int(gradient[:, ~seen].count_nonzero()) == 0
    # What is left is the lesson on the seen classes, as if there were no others.
    assert torch.allclose(masked, said_of(loss, student[:, seen], teacher[:, seen], temperature))
    assert torch.allclose(gradient[:, seen], gradient_of(loss, student[:, seen], teacher[:, seen], temperature))


def test_a_hard_pseudo_label_is_the_class_that_the_teacher_would_answer() -> None:
    student, teacher = logits(6, 4, seed=1), logits(6, 4, seed=2)
    expected = torch.nn.functional.cross_entropy(student, teacher.argmax(1), reduction="none")
    for temperature in (1.0, 4.0):
        assert torch.allclose(said_of(hard_pseudo_label, student, teacher, temperature), expected)


def test_kd_at_temperature_one_is_the_textbook_divergence() -> None:
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    # Teacher (1/2, 1/2), student (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3.
    assert float(said_of(kd, student, teacher, 1.0)) == pytest.approx(0.5 * math.log(4 / 3))


@lawful
@given(seeds, shapes, warmth)
def test_dml_is_kd_at_temperature_one(seed: int, shape: tuple[int, int, int], temperature: float) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    assert torch.equal(said_of(dml, student, teacher, temperature), said_of(kd, student, teacher, 1.0))


@lawful
@given(seeds, shapes, warmth, st.floats(0.25, 4))
def test_separate_temperatures_are_kd_where_they_are_the_same(
    seed: int, shape: tuple[int, int, int], temperature: float, factor: float
) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    both = partial(separate_temperatures, student_factor=factor, teacher_factor=factor)
    expected = said_of(kd, student, teacher, temperature * factor)
    assert torch.allclose(said_of(both, student, teacher, temperature), expected)
    # A student twice as sharp as its teacher has nothing to learn at twice its temperature.
    twice = partial(separate_temperatures, student_factor=2.0)
    assert float(said_of(twice, 2 * teacher, teacher, temperature).abs().max()) < 1e-9


@lawful
@given(seeds, shapes, warmth, st.floats(0.5, 4))
def test_answers_that_differ_in_sharpness_alone_are_the_same_at_their_own_temperatures(
    seed: int, shape: tuple[int, int, int], temperature: float, factor: float
) -> None:
    teacher = logits(*shape, seed=seed)
    scale = float(said_of(kd, teacher * factor, teacher, temperature).max()) + 1
    assert float(said_of(sharpness, teacher * factor, teacher, temperature).abs().max()) < 1e-3 * scale


def test_sharpness_gives_both_sides_their_temperature_where_they_are_as_sharp_as_each_other() -> None:
    student = logits(6, 4, seed=1)
    teacher = student[:, torch.tensor([1, 2, 3, 0])]
    assert torch.allclose(said_of(sharpness, student, teacher, 3.0), said_of(kd, student, teacher, 3.0))
    assert torch.allclose(gradient_of(sharpness, student, teacher, 3.0), gradient_of(kd, student, teacher, 3.0))


@lawful
@given(seeds, shapes, warmth, st.floats(0.2, 5))
def test_standardised_logits_have_no_scale_left(
    seed: int, shape: tuple[int, int, int], temperature: float, scale: float
) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    if shape[-1] == 2:  # no shape but the sign: the plain lesson
        expected = said_of(kd, student, teacher, temperature)
        assert torch.equal(said_of(standardised, student, teacher, temperature), expected)
    else:
        expected = said_of(standardised, student, teacher, temperature)
        assert torch.allclose(said_of(standardised, student, teacher * scale, temperature), expected, atol=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_lesson_of_a_batch_has_a_gradient_with_two_classes(loss: Loss) -> None:
    student, teacher = logits(4, 2, seed=1), logits(4, 2, seed=2)
    assert float(gradient_of(loss, student, teacher, 1.0).abs().max()) > 1e-3


@lawful
@given(seeds, shapes, warmth)
def test_kd_is_its_two_decoupled_parts(seed: int, shape: tuple[int, int, int], temperature: float) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    y = torch.randint(0, shape[-1], (shape[1],), generator=torch.Generator().manual_seed(seed))
    at = torch.tensor(temperature, dtype=torch.float64)

    def part(target: float, others: float) -> Tensor:
        return decoupled_kd(Output(student), Output(teacher), y, at, target=target, others=others)

    q = (teacher / temperature).softmax(-1).gather(-1, y.expand(shape[:2])[..., None])[..., 0]
    whole = said_of(kd, student, teacher, temperature)
    assert torch.allclose(part(1, 0) + (1 - q) * part(0, 1), whole, atol=1e-8)
    assert torch.allclose(part(3, 2), 3 * part(1, 0) + 2 * part(0, 1))
    if shape[-1] == 2:
        assert torch.allclose(part(1, 8), whole, atol=1e-8)


@lawful
@given(seeds, shapes)
def test_dist_hears_relations_and_not_their_strength(seed: int, shape: tuple[int, int, int]) -> None:
    teacher = logits(*shape, seed=seed)
    q = teacher.softmax(-1)
    milder = (0.3 * q + 0.7 / shape[-1]).log()  # the same rows, and columns, on another scale
    for along in (-1, -2):  # a pattern that is all but flat would be flat there
        spread = (q - q.mean(along, keepdim=True)).norm(dim=along)
        assume(not bool(((spread > FLAT) & (0.3 * spread < FLAT)).any()))
    assert float(said_of(dist, milder, teacher, 1.0).abs().max()) < 1e-8
    student = logits(*shape, seed=seed + 1)
    rows, columns = (partial(dist, between=b, within=w) for b, w in ((1.0, 0.0), (0.0, 1.0)))
    parts = [said_of(loss, student, teacher, 1.0) for loss in (rows, columns)]
    assert torch.allclose(sum(parts), said_of(dist, student, teacher, 1.0))
    for value in parts:  # 1 - r
        assert float(value.min()) + 1e-9 >= 0
        assert float(value.max()) <= 2 + 1e-9


def test_columns_of_dist_are_correlations_over_the_records() -> None:
    student, teacher = logits(7, 3, seed=1), logits(7, 3, seed=2)
    p, q = student.softmax(-1), teacher.softmax(-1)
    expected = torch.stack([1 - torch.corrcoef(torch.stack([p[:, k], q[:, k]]))[0, 1] for k in range(3)]).mean()
    said = said_of(partial(dist, between=0.0), student, teacher, 1.0)
    assert torch.allclose(said, expected.expand(7))


@lawful
@given(seeds, shapes)
def test_centred_logits_are_the_limit_of_kd_as_temperature_grows(seed: int, shape: tuple[int, int, int]) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    limit = said_of(partial(mse_logits, centred=True), student, teacher, 1.0)
    assert torch.allclose(said_of(kd, student, teacher, 1e5), limit, rtol=1e-2, atol=1e-3)


@lawful
@given(seeds, shapes, warmth)
def test_jensen_shannon_is_symmetric_and_bounded(seed: int, shape: tuple[int, int, int], temperature: float) -> None:
    student, teacher = logits(*shape, seed=seed, scale=20.0), logits(*shape, seed=seed + 1, scale=20.0)
    said = said_of(jensen_shannon, student, teacher, temperature)
    assert torch.allclose(said, said_of(jensen_shannon, teacher, student, temperature))
    assert float(said.max()) <= temperature**2 * math.log(2) + 1e-9


@lawful
@given(seeds, shapes, warmth, st.lists(st.floats(0, 5), min_size=1, max_size=4))
def test_a_sum_is_the_sum_of_its_weighted_parts(
    seed: int, shape: tuple[int, int, int], temperature: float, weights: list[float]
) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    parts = list(zip(weights, LOSSES, strict=False))
    expected = sum(weight * said_of(loss, student, teacher, temperature) for weight, loss in parts)
    assert torch.allclose(said_of(Sum(parts), student, teacher, temperature), expected)

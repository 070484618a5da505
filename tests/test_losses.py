import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamkd import UNLABELLED, Output
from streamkd.logits import mask_unseen
from streamkd.losses import Loss, hard_pseudo_label, kd, soft_label

LOSSES = [kd, hard_pseudo_label, soft_label]

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


@pytest.mark.parametrize("loss", LOSSES)
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

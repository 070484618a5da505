"""What a student's logits are to change by."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamkd.batch import Output
from streamkd.distillation import gated
from streamkd.lesson import Lesson
from streamkd.logits import UNSEEN
from streamkd.losses import Loss, kd

Array = NDArray[Any]


@dataclass(frozen=True, eq=False, slots=True)
class Pairs:
    """Who teaches whom now, and what the schedules said of it.

    Attributes:
        betas: `[peers, 1]`, the weights of the labels.
        teach: whether any alpha is more than 0.
        sources, students: `[pairs]`, indices.
        ends: `[2 * pairs]`, both of these, one after the other.
        alphas: `[pairs, 1]`, shared out among a student's teachers.
        portions: `[pairs, 1]`, the share of each among them.
        temperatures: `[pairs, 1]`.
        dealt: `[peers, pairs]`, 1 where the student of a pair is the peer, else 0.
    """

    betas: Tensor
    teach: bool
    sources: Tensor
    students: Tensor
    ends: Tensor
    alphas: Tensor
    portions: Tensor
    temperatures: Tensor
    dealt: Tensor


@np.errstate(divide="ignore", over="ignore", invalid="ignore")
def in_arrays(
    logits: Tensor, seen: Tensor, lesson: Lesson, pairs: Pairs, *, gate: str, cap: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Work out a plain lesson by `kd` at one temperature a pair: losses, the gradient at the logits, and the answers.

    The same as torch's operations come to one by one, in half the time: numpy goes through arrays as small as a
    stream's batches faster, above all with the classes first, where what is summed over them lies in whole rows.

    Args:
        logits: `[peers, m, classes]`, on the CPU.
        seen: `[classes]` bool; the others are ruled out.
        lesson: plain, see there.
        pairs: among the peers themselves.
        gate: see `Distillation`.
        cap: likewise.

    Returns:
        See `Learned.parts`; `[peers, m, classes]`, each example's share by its weight; `[peers, m]`. None where that
        takes a closer look: a label that is missing, or anything that is not finite.
    """
    x, y, met = logits.numpy().transpose(2, 0, 1).copy(), lesson.y.numpy(), seen.numpy()
    if not met.all():
        x[~met] = UNSEEN
    if y.min() < 0:
        return None
    log_p, gradient = _log_softmax(x - x.max(0))
    truth = y, slice(None), np.arange(len(y))
    parts = np.zeros((3, *x.shape[1:]), x.dtype)
    hard = np.negative(log_p[truth].T, out=parts[0])
    gradient[truth] -= 1
    gradient *= pairs.betas.numpy()
    if pairs.teach:
        temperatures, dealt, size = pairs.temperatures.numpy(), pairs.dealt.numpy(), len(pairs.students)
        ends = pairs.ends.numpy()
        log_p, p = _log_softmax(log_p[:, ends] / np.concatenate([temperatures, temperatures]))
        q, lesson_gradient = p[:, :size], p[:, size:]
        loss = (q * (log_p[:, :size] - log_p[:, size:])).sum(0) * (temperatures * temperatures)
        lesson_gradient -= q
        charged = hard[ends]
        weights = _gated(gate, charged[size:], charged[:size]) * pairs.alphas.numpy()
        lesson_gradient *= weights * temperatures
        # What a student hears of several teachers adds up.
        np.matmul(dealt, weights * loss, out=parts[1])
        np.matmul(dealt, pairs.portions.numpy() * loss, out=parts[2])
        taught = dealt @ lesson_gradient
        if cap:  # cut to the length of the label's gradient, record by record
            taught *= np.minimum(_length(gradient) / np.maximum(_length(taught), TINY), 1)
        gradient += taught
    if not math.isfinite(parts.sum()):
        return None
    gradient *= lesson.weights.numpy()
    back = np.ascontiguousarray(gradient.transpose(1, 2, 0))
    return torch.from_numpy(parts), torch.from_numpy(back), torch.from_numpy(x.argmax(0))


def _gated(gate: str, student: Array, teacher: Array) -> Array:
    """Return the weight of each lesson, see `distillation.gated`."""
    return teacher < student if gate == "better" else gated(gate, *map(torch.from_numpy, (student, teacher))).numpy()


def _log_softmax(x: Array) -> tuple[Array, Array]:
    """Return log-probabilities, written over `x`, and probabilities; along the first dimension some `x` is about 0."""
    p = np.exp(x)
    total = p.sum(0)
    p /= total
    x -= np.log(total)
    return x, p


def _length(x: Array) -> Array:
    """Return the length of each vector along the first dimension."""
    lengths: Array = np.sqrt((x * x).sum(0))
    return lengths


def with_gradient(
    loss: Loss, student: Tensor, teacher: Tensor, y: Tensor, *, temperature: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a loss, and the gradient at the student's logits of its sum weighted by `weights` `[..., n]`.

    That of `kd` is written out, T (softmax(student / T) - softmax(teacher / T)); others are left to autograd.
    """
    if loss is not kd:
        leaf = student.detach().requires_grad_()
        said = loss(Output(leaf), Output(teacher), y, temperature)
        (gradient,) = torch.autograd.grad((weights * said).sum(), leaf)
        return said.detach(), gradient
    log_q = (teacher / temperature[..., None]).log_softmax(-1)
    log_p = (student / temperature[..., None]).log_softmax(-1)
    q = log_q.exp()
    said = torch.linalg.vecdot(q, log_q - log_p) * (temperature * temperature)
    return said, log_p.exp_().sub_(q).mul_((weights * temperature)[..., None])


def slope(loss: Loss, student: Tensor, teacher: Tensor, y: Tensor, *, temperature: Tensor) -> Tensor:
    """Return the derivative of the mean loss by ln T, `[...]`, for `temperature` `[..., 1]`."""
    with torch.enable_grad():
        log_t = temperature.log().requires_grad_()
        said = loss(Output(student.detach()), Output(teacher), y, log_t.exp())
        if not said.requires_grad:  # a loss in which the temperature plays no part
            return torch.zeros_like(temperature[..., 0])
        (gradient,) = torch.autograd.grad(said.mean(-1).sum(), log_t)
    return gradient[..., 0]


TINY = 1e-12
"""A gradient is taken to be this long at least where another is cut to its length."""

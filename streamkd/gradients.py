"""What the logits of every peer are to change by, worked out for a lesson."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import vector_norm

from streamkd import stream_classes
from streamkd.batch import Output, labelled
from streamkd.distillation import gated
from streamkd.guidance import Guidance, Pairs
from streamkd.lesson import Lesson
from streamkd.logits import UNSEEN, cross_entropy, labels_loss, mask_unseen
from streamkd.losses import Loss, kd
from streamkd.peer import Peer
from streamkd.river_peer import RiverPeer
from streamkd.schedules import Curriculum

Array = NDArray[Any]
TINY = 1e-12
"""A gradient is taken to be this long at least where another is cut to its length."""


@dataclass(frozen=True, eq=False, slots=True)
class Correction:
    """What a lesson tells every peer.

    Attributes:
        parts: `[3, peers, m]`, see `Learned`.
        gradient: at the logits `[peers, m, classes met]`, each example's share by its weight.
        answers: `[peers, m]`, class indices.
        hints: of students that learn from features, a loss with its gradient.
        sound: whose loss is finite, `[peers]` bool; None where all are.
    """

    parts: Tensor
    gradient: Tensor
    answers: Tensor
    hints: dict[int, Tensor] = field(default_factory=dict)
    sound: Tensor | None = None


class Gradients:
    """Works lessons out: what every peer loses by its labels and its teachers, and the gradient of that.

    Args:
        guidance: who listens to whom, how much and how softly. What schedules follow of a lesson is noted there.
        peers: in order.
        averages: answers `[m, ...]` by the peers' averages, among the first classes: `[peers, m, classes]`.
        features: what each peer's model told beside its logits when it last learned, `[m, ...]`, or None.
    """

    def __init__(
        self,
        guidance: Guidance,
        peers: Sequence[Peer | RiverPeer],
        averages: Callable[[Tensor, int], Tensor],
        features: Callable[[], list[Tensor | None]],
    ) -> None:
        self._guidance = guidance
        self._rule = guidance.rule
        self._peers = peers
        self._averages = averages
        self._features = features
        self.plain = self._by_itself()

    def _by_itself(self) -> bool:
        """Whether a lesson can be worked out in one go, for nothing in it has to be looked at on the way."""
        rule, capacity = self._rule, self._guidance.capacity
        by_itself = rule.per_record is None and rule.features is None and not isinstance(rule.temperature, Curriculum)
        labels = rule.stream_classes is stream_classes.seen and not rule.views
        return rule.loss is kd and by_itself and labels and not (capacity is not None and capacity.online)

    def __call__(self, logits: Tensor, lesson: Lesson, *, seen: Tensor, weights: Tensor) -> Correction:
        """Work one lesson out.

        Args:
            logits: `[peers, m, classes met]`, of all examples of the lesson unrolled.
            lesson: as it is asked for, with its views.
            seen: bool, which of the first classes were met so far; all others are ruled out.
            weights: `[2 * peers]`, of the members in the served answer.
        """
        rule, pairs, told = self._rule, self._guidance.prepared(logits.device), None
        if self.plain and lesson.plain and logits.is_cpu and (rule.by_peers or not pairs.teach):
            told = in_arrays(logits, seen, lesson, pairs, gate=rule.gate, cap=rule.cap)
        return told or self._in_tensors(logits, lesson, pairs, seen=seen, weights=weights)

    def _in_tensors(self, logits: Tensor, asked: Lesson, pairs: Pairs, *, seen: Tensor, weights: Tensor) -> Correction:
        """Work any lesson out, by torch's operations."""
        leaf, lesson = mask_unseen(logits, seen), asked.unrolled()
        hard, gradient, p = labels_loss(_among(leaf, lesson.among), lesson.y)
        gradient = gradient * pairs.betas[..., None]
        parts = hard.new_zeros(3, *hard.shape)
        parts[0] = hard
        if pairs.teach:
            harder = asked.harder() if asked.views else None
            soft_gradient = self._distil(leaf, parts, lesson, pairs, seen=seen, weights=weights, harder=harder)
            if self._rule.cap:  # cut to the length of the label's gradient, record by record
                room = vector_norm(gradient, dim=-1) / vector_norm(soft_gradient, dim=-1).clamp_(min=TINY)
                soft_gradient *= room.clamp_(max=1.0)[..., None]
            gradient += soft_gradient
        hints: dict[int, Tensor] = {}
        if self._guidance.feature_weights:
            hints, told = self._hints(hard, lesson)
            parts[1] += told
        if lesson.targets is not None:  # the gradient of KL(target || answer) where there is no label
            gradient = torch.where(labelled(lesson.y)[:, None], gradient, p - lesson.targets)
        self._guidance.measure(p, lesson.y, self._features)
        # A loss that is not finite may have a gradient that is.
        found = Correction(
            parts, gradient * lesson.weights[:, None], leaf.argmax(-1), hints, sound=parts[0].sum(1).isfinite()
        )
        if not asked.views:
            return found
        # What is told of an example is the mean over its views; its answer, that to it as it came.
        shape = (1 + len(asked.views), len(asked))
        return replace(found, parts=parts.reshape(3, -1, *shape).mean(2), answers=found.answers[:, : len(asked)])

    def _distil(
        self,
        logits: Tensor,
        parts: Tensor,
        lesson: Lesson,
        pairs: Pairs,
        *,
        seen: Tensor,
        weights: Tensor,
        harder: Tensor | None,
    ) -> Tensor:
        """The gradient of distillation at the logits `[peers, m, classes]`; its losses are added to the `parts`."""
        hard = parts[0]
        taught, charged = self._taught(logits, hard, lesson, pairs, seen=seen, weights=weights)
        if harder is not None:
            taught, charged = taught[:, harder], charged[:, harder]
        gate = self._rule.weighed(hard[pairs.students], charged)
        sound = taught.isfinite().all(-1)  # a teacher that broke down teaches nothing
        taught, gate = torch.where(sound[..., None], taught, 0.0), gate.nan_to_num(0.0) * sound
        # A student of several teachers hears their mean (1 / (P - 1) in deep mutual learning).
        weights = gate * pairs.alphas
        student = logits[pairs.students]
        temperature = pairs.temperatures
        if self._rule.per_record is not None:
            temperature = self._rule.per_record(Output(student), Output(taught), lesson.y, temperature)
        loss, gradient = with_gradient(
            self._rule.loss, student, taught, lesson.y, temperature=temperature, weights=weights
        )
        if isinstance(self._rule.temperature, Curriculum):
            slopes = slope(self._rule.loss, student, taught, lesson.y, temperature=pairs.temperatures)
            shares = slopes.nan_to_num(0.0) * pairs.portions[:, 0]  # a student that broke down has none
            self._guidance.slopes = shares.new_zeros(len(self._peers)).index_add_(0, pairs.students, shares).tolist()
        parts[1].index_add_(0, pairs.students, weights * loss)
        parts[2].index_add_(0, pairs.students, loss * pairs.portions)
        return torch.zeros_like(logits).index_add_(0, pairs.students, gradient)

    def _hints(self, hard: Tensor, lesson: Lesson) -> tuple[dict[int, Tensor], Tensor]:
        """What each student is to learn from features: a loss with its gradient; and `[peers, m]`, weighted."""
        compared, features = self._rule.features, self._features()
        students = [student for _, student in self._guidance.feature_weights]
        hints: dict[int, Tensor] = {}
        told = torch.zeros_like(hard)
        for (source, student), weight in self._guidance.feature_weights.items():
            own, taught, peer = features[student], features[source], self._peers[student]
            if not weight or own is None or taught is None or compared is None or not isinstance(peer, Peer):
                continue
            taught = taught.detach()
            gate = (
                self._rule.weighed(hard[student], hard[source]) * labelled(lesson.y) * weight / students.count(student)
            )
            if not bool(taught.isfinite().all()):  # a teacher that broke down teaches nothing
                continue
            loss = compared(peer.adapt(self._peers[source].name, own, taught), taught)
            told[student] += gate * loss.detach()
            hints[student] = hints.get(student, 0) + (lesson.weights * gate * loss).sum()
        return hints, told

    @torch.no_grad()
    def _taught(
        self, logits: Tensor, hard: Tensor, lesson: Lesson, pairs: Pairs, *, seen: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each pair's teacher: its logits `[pairs, m, classes]`, and what the labels charge it with, `[pairs, m]`."""
        if self._rule.by_peers:
            return logits[pairs.sources], hard[pairs.sources]
        averages = mask_unseen(self._averages(lesson.x, len(seen)), seen)
        members = torch.cat([logits, averages])
        log_p = members.log_softmax(-1) + weights.to(logits).log()[:, None, None]
        served = log_p.nan_to_num(nan=UNSEEN).logsumexp(0)
        taught = torch.cat([members, served[None]])[pairs.sources]
        return taught, cross_entropy(_among(taught, lesson.among), lesson.y)


def _among(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Rule all but these classes out, for the labels' loss alone."""
    return logits if classes is None else mask_unseen(logits, classes)


@np.errstate(divide="ignore", over="ignore", invalid="ignore")
def in_arrays(logits: Tensor, seen: Tensor, lesson: Lesson, pairs: Pairs, *, gate: str, cap: bool) -> Correction | None:
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
        None where that takes a closer look: a label that is missing, or anything that is not finite.
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
    return Correction(torch.from_numpy(parts), torch.from_numpy(back), torch.from_numpy(x.argmax(0)))


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

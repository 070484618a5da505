"""Offline protocols: a history learned in several passes, by a teacher first, and by its students from it.

A student minimises alpha * soft + (1 - alpha) * hard, where soft is what it learns from the teacher and hard the cross
entropy with the labels (Hinton et al. 2015). Every stage of every protocol is that with an alpha of its own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from streamkd.batch import Output, labelled
from streamkd.cohort import STUCK
from streamkd.faults import at_fault
from streamkd.lesson import Lesson
from streamkd.logits import cross_entropy, mask_unseen
from streamkd.losses import Loss, kd
from streamkd.peer import Peer
from streamkd.river_peer import RiverPeer

LABELS = "labels"
ANSWERED_AT_ONCE = 1_024
"""Records that a teacher answers together."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of what a student goes through.

    Attributes:
        name: says what it learns from.
        alpha: the weight of what the teacher says; the labels weigh 1 - alpha.
    """

    name: str
    alpha: float


def three_stage(alpha: float) -> tuple[Stage, ...]:  # noqa: ARG001 - all protocols are asked alike
    """The teacher has learned the labels; a student learns the teacher's softened answers, and then the labels."""
    return Stage("soft", 1.0), Stage(LABELS, 0.0)


def static(alpha: float) -> tuple[Stage, ...]:
    """The teacher has learned the labels and stays as it is; a student learns both at once (Hinton et al. 2015)."""
    return (Stage("soft + labels", alpha),)


PROTOCOLS: dict[str, Callable[[float], tuple[Stage, ...]]] = {"three_stage": three_stage, "static": static}
"""By name: what a student goes through, given the alpha that the user wants where both are learned at once."""


@dataclass(frozen=True, eq=False, slots=True)
class Taught:
    """What a teacher says of every record of a course, and how students are held to it.

    Attributes:
        logits: `[n, classes met]`.
        temperature: at which both are compared.
        loss: of the functions of `losses`. With `kd` a student's gradient is that of T^2 times the cross entropy with
            the softened answers: the two differ by the entropy of the answers, which is the teacher's own.
    """

    logits: Tensor
    temperature: float = 4.0
    loss: Loss = kd

    def distance(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Return what a student loses on average, from the logits of both, `[m, classes met]`."""
        temperature = student.new_full((1, 1), self.temperature)
        return self.loss(Output(student[None]), Output(teacher[None]), y, temperature).mean()


class Course:
    """A history as it is learned: pass after pass, each in an order of its own, which is the same for all.

    Args:
        x: `[n, ...]`, ready for the models.
        y: `[n]`, class indices; `UNLABELLED` where there is none. Teachers are heard on such records, too.
        seen: `[classes met]`, bool; all others are ruled out.
        batch: records an update.
        seed: of the orders, and of what models draw by chance.
        told: called after each update with the number of its records.

    Attributes:
        faulty: rows of records on which alone an update was not finite.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        seen: Tensor,
        *,
        batch: int = 16,
        seed: int = 0,
        told: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.x, self.y, self.seen = x, y, seen.to(x.device)
        self.faulty: set[int] = set()
        self._batch, self._seed, self._told = batch, seed, told

    def learn(self, peer: Peer, passes: Sequence[int], *, alpha: float = 0.0, taught: Taught | None = None) -> None:
        """Let a peer learn for some passes, at a rate that falls to nothing; without a teacher, from the labels.

        Records on which alone an update is not finite are left out of it, and gathered in `faulty`.

        Args:
            peer: the student.
            passes: their numbers: a student that goes on after pass 4 is at pass 5.
            alpha: the weight of what is taught.
            taught: by whom.

        Raises:
            ArithmeticError: the peer breaks down whatever it is shown.
        """
        left = updates = len(passes) * -(-len(self.y) // self._batch)
        for number in passes:
            for rows in self._orders(number):
                targets = None if taught is None or not alpha else taught.logits[rows]
                lesson = Lesson(self.x[rows], self.y[rows], self.x.new_ones(len(rows)), targets)
                backward = partial(self._backward, peer, alpha=alpha, taught=taught)
                norm = backward(lesson)
                if not math.isfinite(norm):
                    norm, faulty = _without_faulty(peer, lesson, backward)
                    self.faulty.update(rows[faulty].tolist())
                peer.step(norm, rate=left / updates)
                left -= 1
                if peer.stuck >= STUCK:
                    raise ArithmeticError(f"{peer.name} has had no finite loss and gradient for {STUCK} updates")
                self._told(len(rows))

    def _backward(self, peer: Peer, lesson: Lesson, *, alpha: float, taught: Taught | None) -> float:
        """Bring a peer its gradient, clipped; return the norm before, NaN where the loss is not finite."""
        logits = self._masked(peer.learn(lesson.x).logits)
        loss = cross_entropy(logits, lesson.y).sum() / labelled(lesson.y).sum().clamp(min=1)
        if taught is not None and lesson.targets is not None:
            soft = taught.distance(logits, lesson.targets, lesson.y)
            loss = soft if alpha == 1 else alpha * soft + (1 - alpha) * loss
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        norm = float(peer.clip_gradient())
        # A loss that is not finite may have a gradient that is.
        return norm if math.isfinite(float(loss.detach())) else math.nan

    def absorb(self, peer: RiverPeer) -> None:
        """Let a peer that learns record by record have all that have a label, once, in the order of time."""
        for start in range(0, len(self.y), self._batch):
            rows = slice(start, start + self._batch)
            known = labelled(self.y[rows])
            peer.absorb(self.x[rows][known], self.y[rows][known])
            self._told(len(known))

    def answers(self, peer: Peer | RiverPeer) -> Tensor:
        """Return what a peer says of every record now, `[n, classes met]` logits."""
        return torch.cat([self._masked(peer.predict(part).logits) for part in torch.split(self.x, ANSWERED_AT_ONCE)])

    def _orders(self, number: int) -> Iterator[Tensor]:
        """Deal all records out by chance, once; what models draw meanwhile is the pass's own, too."""
        with torch.random.fork_rng():
            torch.manual_seed(self._seed * 1_000_003 + number)
            yield from torch.split(torch.randperm(len(self.y)).to(self.x.device), self._batch)

    def _masked(self, logits: Tensor) -> Tensor:
        return mask_unseen(logits[:, : len(self.seen)], self.seen)


def _without_faulty(peer: Peer, lesson: Lesson, backward: Callable[[Lesson], float]) -> tuple[float, list[int]]:
    """Find the examples at fault, and bring a peer the gradient of the others; return its norm, and those at fault."""

    def broken(part: Lesson, _: int) -> bool:
        peer.discard()
        return not math.isfinite(backward(part))

    faulty = at_fault(lesson, [0], broken)
    peer.discard()
    kept = [row for row in range(len(lesson)) if row not in faulty]
    return (backward(lesson.rows(kept)) if kept else math.nan), faulty

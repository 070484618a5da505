"""What one update learns from, and what it did."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamkd.batch import UNLABELLED


@dataclass(frozen=True, eq=False, slots=True)
class Lesson:
    """What one update learns from.

    Attributes:
        x: `[m, ...]`, ready for the models.
        y: `[m]`, class indices, or `UNLABELLED`.
        weights: `[m]`.
        targets: `[m, classes met]`, probabilities, for examples without a label; rows of the others are passed over.
            None where every example has a label.
        among: `[m, classes met]` bool, the classes that the loss of an example's label is over; None for all of them.
        views: of the same examples, each `[m, ...]` and harder than the one before; the first is harder than `x`.
    """

    x: Tensor
    y: Tensor
    weights: Tensor
    targets: Tensor | None = None
    among: Tensor | None = None
    views: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.y.shape[0]

    @property
    def plain(self) -> bool:
        """Whether there are labels and nothing else to learn from, over all classes, and no views."""
        return self.targets is None and self.among is None and not self.views

    def unrolled(self) -> "Lesson":
        """Return `x` and all views as examples of their own, one view after the other; together they weigh as much."""
        if not self.views:
            return self
        count = 1 + len(self.views)
        return Lesson(
            torch.cat([self.x, *self.views]),
            self.y.repeat(count),
            self.weights.repeat(count) / count,
            None if self.targets is None else self.targets.repeat(count, 1),
            None if self.among is None else self.among.repeat(count, 1),
        )

    def harder(self) -> Tensor:
        """Return for every example of `unrolled` the index of its next harder view; that of the hardest is its own."""
        last = len(self.views) * len(self)
        index = torch.arange(last + len(self), device=self.y.device)
        return torch.where(index < last, index + len(self), index)

    def rows(self, rows: Sequence[int]) -> "Lesson":
        """Return the chosen examples."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.y.device)
        targets = None if self.targets is None else self.targets[index]
        among = None if self.among is None else self.among[index]
        views = tuple(view[index] for view in self.views)
        return Lesson(self.x[index], self.y[index], self.weights[index], targets, among, views)

    def split(self, size: int) -> "list[Lesson]":
        """Return the same in parts of at most `size` examples, in order; one at least."""
        if len(self) <= size:
            return [self]
        return [self.rows(range(first, min(first + size, len(self)))) for first in range(0, len(self), size)]


def joined(parts: Sequence[Lesson]) -> Lesson:
    """Put lessons one after the other.

    In those without targets every example has a label; one without views looks the same in all of them.
    """
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:
        return parts[0]
    x = torch.cat([part.x for part in parts])
    y = torch.cat([part.y for part in parts])
    weights = torch.cat([part.weights for part in parts])
    if all(part.plain for part in parts):
        return Lesson(x, y, weights)
    count = max(len(part.views) for part in parts)
    return Lesson(
        x,
        y,
        weights,
        _filled([part.targets for part in parts], parts, 0.0),
        _filled([part.among for part in parts], parts, True),  # noqa: FBT003 - a filling
        tuple(torch.cat([part.views[number] if part.views else part.x for part in parts]) for number in range(count)),
    )


def _filled(rows: Sequence[Tensor | None], parts: Sequence[Lesson], value: float) -> Tensor | None:
    """Put `[m, classes met]` of all parts one after the other, `value` for those that have none; None if none has."""
    given = next((each for each in rows if each is not None), None)
    if given is None:
        return None
    like = [
        given.new_full((len(part), given.shape[1]), value) if each is None else each
        for each, part in zip(rows, parts, strict=True)
    ]
    return torch.cat(like)


@dataclass(frozen=True, eq=False, slots=True)
class Learned:
    """What one update did.

    Its tensors are to be read: where no update is left to autograd, they are torch's inference tensors, which cannot be
    changed in place or differentiated through; a `clone()` of one can.

    Attributes:
        y, weights: `[m]`, labels and weights of the examples that it learned from.
        losses: `[m]`, hard loss of each example, the mean over peers, before the step; NaN for one at fault.
        parts: `[3, peers, m]`, of those that were learned: hard losses; weighted distillation, as it is before it is
            capped; and distillation loss from the teachers, unweighted.
        answers: `[peers, m]`, class indices.
        betas: `[peers, 1]`, the weight of the labels.
        norms: one a peer, of the gradient before clipping; NaN where the loss is not finite.
        faulty: rows of examples that were left out, because an update on one of them alone is not finite.
    """

    y: Tensor
    weights: Tensor
    losses: Tensor
    parts: Tensor
    answers: Tensor
    betas: Tensor
    norms: Sequence[float]
    faulty: tuple[int, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether every peer has a gradient to step along."""
        return all(map(isfinite, self.norms))


@np.errstate(over="ignore", invalid="ignore")
def means(updates: Sequence[Learned]) -> NDArray[np.float64]:
    """Tell of one update or more, in figures; what is not finite is told as it is.

    Returns:
        `[updates, 5, peers]`: mean hard loss, distillation weighted and unweighted, what was minimised, as it is before
        distillation is capped, and the norm of its gradient.
    """
    sizes = [one.parts.shape[2] for one in updates]
    starts = np.cumsum([0, *sizes[:-1]])
    parts, betas = _beside([one.parts for one in updates], 2), _beside([one.betas for one in updates], 1)
    labels, weights = _beside([one.y for one in updates]), _beside([one.weights for one in updates])
    told = np.empty((5, parts.shape[1], len(updates)))
    np.add.reduceat(parts, starts, 2, out=told[:3])
    told[0] /= np.maximum(np.add.reduceat(labels != UNLABELLED, starts, dtype=np.int64), 1)
    told[1:3] /= sizes
    told[3] = np.add.reduceat((np.repeat(betas, sizes, 1) * parts[0] + parts[1]) * weights, starts, 1)
    told[4] = np.array([one.norms for one in updates]).T
    return told.transpose(2, 0, 1)


def agreement(updates: Sequence[Learned]) -> tuple[int, int]:
    """Return how many pairs of peers gave a record the same answer, and how many such pairs there were."""
    if not updates:
        return 0, 0
    answers = _beside([one.answers for one in updates], 1)
    same = [int(np.count_nonzero(one == other)) for one, other in combinations(answers, 2)]
    return sum(same), len(same) * answers.shape[1]


def _beside(parts: Sequence[Tensor], along: int = 0) -> NDArray[Any]:
    """Put what several updates did side by side; all of it leaves its device at once."""
    return torch.cat(list(parts), along).cpu().numpy()


def side_by_side(lesson: Lesson, parts: Sequence[Learned]) -> Learned:
    """Tell of one update that was made ready in parts, which share their norms."""
    return replace(
        parts[0],
        y=lesson.y,
        weights=lesson.weights,
        losses=torch.cat([part.losses for part in parts]),
        parts=torch.cat([part.parts for part in parts], 2),
        answers=torch.cat([part.answers for part in parts], 1),
    )

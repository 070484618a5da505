"""How much of what the teacher knows has reached its students."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Classes = NDArray[np.int64]
TINY = 1e-6
"""A teacher of less entropy than this, in nats, is taken for one that always answers the same."""


class TransferEfficiency:
    """eta = I(argmax p_T; argmax p_S) / H(argmax p_T), over the latest answers.

    The answers are kept, and counted when somebody asks: a record costs the same however many classes there are.

    Args:
        peers: how many.
        window: how many records are looked at; fewer after a change of teacher, which begins anew.
    """

    def __init__(self, peers: int, window: int = 1_000) -> None:
        self.window = window
        self.teacher = 0
        self._begin(np.zeros((peers, 0), np.int64))

    def _begin(self, answers: Classes) -> None:
        peers, self._end = answers.shape
        self._first = 0
        self._answers = np.empty((peers, 2 * self.window), np.int64)
        self._answers[:, : self._end] = answers

    @property
    def answers(self) -> Classes:
        """`[peers, records]`, the latest; what was returned once does not change any more."""
        return self._answers[:, max(self._first, self._end - self.window) : self._end]

    def update(self, answers: Tensor, teacher: int) -> None:
        """Take in the answers `[peers, n]` (class indices)."""
        if teacher != self.teacher:
            self.teacher, self._first = teacher, self._end
        said = answers.cpu().numpy()[:, -self.window :]
        if self._end + said.shape[1] > self._answers.shape[1]:
            self._begin(self.answers)
        end = self._end + said.shape[1]
        self._answers[:, self._end : end] = said
        self._end = end

    @property
    def values(self) -> list[float]:
        """See `efficiencies`."""
        return efficiencies(self.answers, self.teacher)

    def state_dict(self) -> dict[str, Any]:
        """Return the answers that count."""
        return {"answers": torch.from_numpy(self.answers.copy()), "teacher": self.teacher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.teacher = state["teacher"]
        self._begin(state["answers"].numpy())


def efficiencies(answers: Classes, teacher: int) -> list[float]:
    """Return eta of each peer from answers `[peers, records]`, class indices.

    1 where an answer tells the teacher's, as its own does, and 0 where it says nothing of it; 0 as well, not NaN, for
    all of a teacher that always answers the same.
    """
    known = _entropy(answers[teacher])
    if known <= TINY:
        return [0.0] * len(answers)
    pairs = answers[teacher] * (answers.max() + 1) + answers
    shared = [known + _entropy(own) - _entropy(both) for own, both in zip(answers, pairs, strict=True)]
    return [min(1.0, max(0.0, one / known)) for one in shared]


def _entropy(values: Classes) -> float:
    """In nats; of nothing, 0."""
    counts = np.unique(values, return_counts=True)[1]
    shares = counts / max(1, len(values))
    return -float(shares @ np.log(shares))

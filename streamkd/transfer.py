"""How much of what the teacher knows has reached its students."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TINY = 1e-6
"""A teacher of less entropy than this, in nats, is taken for one that always answers the same."""


class TransferEfficiency:
    """eta = I(argmax p_T; argmax p_S) / H(argmax p_T), from a table of answers that forgets exponentially.

    1 when the student's answer tells the teacher's, 0 when it says nothing of it; 0 as well, not NaN, for a teacher
    that always answers the same.

    Args:
        peers: how many.
        gamma: how much of the table a record leaves standing.
    """

    def __init__(self, peers: int, gamma: float = 0.998) -> None:
        self.gamma = gamma
        self.tables = np.zeros((peers, 2, 2))  # [student, teacher's answer, student's answer]
        self.teacher = 0

    def update(self, answers: Tensor, teacher: int) -> None:
        """Take in the answers `[peers, n]` (class indices); a new teacher starts a new table."""
        if teacher != self.teacher:
            self.teacher = teacher
            self.tables = np.zeros_like(self.tables)
        said = answers.cpu().numpy()
        wider = int(said.max()) + 1 - self.tables.shape[1] if said.size else 0
        if wider > 0:  # a class that was never answered before
            self.tables = np.pad(self.tables, ((0, 0), (0, wider), (0, wider)))
        peers, classes, _ = self.tables.shape
        cells = np.arange(peers)[:, None] * classes**2 + said[teacher] * classes + said
        new = np.bincount(cells.ravel(), minlength=self.tables.size).reshape(self.tables.shape)
        self.tables = self.gamma ** said.shape[1] * self.tables + new

    @property
    def values(self) -> list[float]:
        """See `efficiencies`."""
        return efficiencies(self.tables)

    def state_dict(self) -> dict[str, Any]:
        """Return the table."""
        return {"tables": torch.from_numpy(self.tables), "teacher": self.teacher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.tables, self.teacher = state["tables"].numpy(), state["teacher"]


def efficiencies(tables: NDArray[np.float64]) -> list[float]:
    """Return eta of each table `[peers, teacher's answer, student's answer]`, between 0 and 1.

    The teacher's own is 1 where its answers vary.
    """
    cells, rows, columns = tables.reshape(len(tables), -1), tables.sum(2), tables.sum(1)
    counts = np.concatenate([cells, rows, columns], 1)
    terms = counts * np.log(np.maximum(counts, 1e-300))
    ends = (0, cells.shape[1], cells.shape[1] + rows.shape[1])
    # With n counts in all, an entropy is ln n - (sum of count ln count) / n.
    total = np.maximum(rows.sum(1), 1e-300)
    both, teachers, students = np.log(total) - (np.add.reduceat(terms, ends, 1) / total[:, None]).T
    return [
        min(1.0, max(0.0, (one + other - joint) / one)) if one > TINY else 0.0
        for joint, one, other in zip(both.tolist(), teachers.tolist(), students.tolist(), strict=True)
    ]

"""How much of what the teacher knows has reached its students."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
        self.tables = torch.zeros(peers, 2, 2)  # [student, teacher's answer, student's answer]
        self.teacher = 0

    def update(self, answers: Tensor, teacher: int) -> None:
        """Take in the answers `[peers, n]` (class indices); a new teacher starts a new table."""
        if teacher != self.teacher:
            self.teacher = teacher
            self.tables.zero_()
        answers = answers.cpu()
        wider = int(answers.max()) + 1 - self.tables.shape[1] if answers.numel() else 0
        if wider > 0:  # a class that was never answered before
            self.tables = functional.pad(self.tables, (0, wider, 0, wider))
        peers, classes, _ = self.tables.shape
        cells = torch.arange(peers)[:, None] * classes**2 + answers[teacher] * classes + answers
        self.tables *= self.gamma ** answers.shape[1]
        self.tables.view(-1).index_add_(0, cells.flatten(), torch.ones(cells.numel()))

    @property
    def values(self) -> Tensor:
        """`[peers]`, between 0 and 1; the teacher's own is 1 where its answers vary."""
        joint = self.tables / self.tables.sum((1, 2), keepdim=True).clamp(min=1e-12)
        teacher, student = joint.sum(2), joint.sum(1)
        entropy = _entropy(teacher)
        information = entropy + _entropy(student) - _entropy(joint.flatten(1))
        return torch.where(entropy > TINY, information / entropy.clamp(min=TINY), 0.0).clamp(0, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the table."""
        return {"tables": self.tables, "teacher": self.teacher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.tables, self.teacher = state["tables"].clone(), state["teacher"]


def _entropy(p: Tensor) -> Tensor:
    entropies: Tensor = torch.special.entr(p).sum(-1)
    return entropies

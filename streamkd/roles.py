"""Who is the teacher: an index over a fixed list of peers, moved on evidence."""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

_EVIDENCE = ("mass", "gains", "correct", "squares")


@dataclass(frozen=True, slots=True)
class Swap:
    """The teacher in office changed.

    Attributes:
        before, after: indices of peers.
        reason: `drift` or `periodic`.
    """

    before: int
    after: int
    reason: str


class Election:
    """Re-elects the teacher by recent log-loss, with a margin, so that it does not flap.

    The evidence is D, the discounted mean over labelled records of log p_challenger(y) - log p_teacher(y), and
    z = D / sqrt(V / n_eff). A peer whose accuracy is above `bar` of the teacher's is a candidate (the published bar);
    it takes over at z > `confidence` and D > `margin`, or at z > `confidence_drift` while the world drifts.

    Args:
        peers: how many.
        rule: `tested`, as above; `mission`, the bar alone, as published (it lets a worse peer take over, and back);
            `never`.
        gamma: how much of the evidence a labelled record leaves standing.
        every: updates between elections.
        tenure, tenure_drift: least updates in office, in calm and while the world drifts.
    """

    def __init__(
        self,
        peers: int,
        *,
        rule: str = "tested",
        gamma: float = 0.998,
        every: int = 16,
        bar: float = 0.95,
        margin: float = 0.005,
        confidence: float = 2.33,
        confidence_drift: float = 1.28,
        tenure: int = 64,
        tenure_drift: int = 8,
    ) -> None:
        self.rule = rule
        self.gamma = gamma
        self.every = every
        self.bar = bar
        self.margin = margin
        self.confidence = confidence
        self.confidence_drift = confidence_drift
        self.tenure = tenure
        self.tenure_drift = tenure_drift
        self.teacher = 0
        self.in_office = 0
        self.since_election = 0
        self.mass = np.zeros(2)  # sums of the weights and of their squares
        self.gains = np.zeros(peers)
        self.correct = np.zeros(peers)
        self.squares = np.zeros((peers, peers))  # of the differences between two peers' gains

    def update(self, log_p: Tensor, correct: Tensor) -> None:
        """Take in what `[peers, n]` log-probability each gave to the truth, and whether it was right."""
        n = log_p.shape[1]
        weights = self.gamma ** np.arange(n - 1, -1, -1, dtype=np.float64)
        past = self.gamma**n
        gains, right = log_p.double().cpu().numpy(), correct.double().cpu().numpy()
        differences = gains[:, None] - gains
        self.mass = past ** np.arange(1, 3) * self.mass + [weights.sum(), np.square(weights).sum()]
        self.gains = past * self.gains + gains @ weights
        self.correct = past * self.correct + right @ weights
        self.squares = past * self.squares + np.square(differences) @ weights

    def elect(self, updates: int, *, drifting: bool, at_once: bool = False) -> Swap | None:
        """Let `updates` more optimizer steps have passed; return the swap, if there is one.

        Args:
            updates: steps since the last call.
            drifting: the world is changing: less evidence and less time in office suffice.
            at_once: do not wait for the next regular election.
        """
        self.in_office += updates
        self.since_election += updates
        if self.since_election < self.every and not at_once:
            return None
        self.since_election = 0
        if self.in_office < (self.tenure_drift if drifting else self.tenure):
            return None
        challenger = self._challenger(drifting=drifting)
        if challenger is None:
            return None
        before, self.teacher, self.in_office = self.teacher, challenger, 0
        return Swap(before, challenger, "drift" if drifting else "periodic")

    def _challenger(self, *, drifting: bool) -> int | None:
        candidates = self.correct > self.bar * self.correct[self.teacher]
        candidates[self.teacher] = False
        if self.rule == "never" or not bool(candidates.any()) or not float(self.mass[0]):
            return None
        best = int(np.where(candidates, self.gains, -np.inf).argmax())
        if self.rule == "mission":
            return best
        mean = float((self.gains[best] - self.gains[self.teacher]) / self.mass[0])
        variance = float(self.squares[best, self.teacher] / self.mass[0]) - mean**2
        effective = float(self.mass[0] ** 2 / self.mass[1])
        z = mean / sqrt(max(variance, 1e-12) / effective)
        proved = z > self.confidence_drift if drifting else z > self.confidence and mean > self.margin
        return best if proved else None

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher in office and the evidence."""
        return {
            "teacher": self.teacher,
            "in_office": self.in_office,
            "since_election": self.since_election,
            **{name: torch.from_numpy(getattr(self, name)) for name in _EVIDENCE},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value.numpy() if name in _EVIDENCE else value)

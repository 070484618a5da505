"""Who is the teacher: an index over a fixed list of peers, moved on evidence.

A rule names the challenger who is to take over, if any. Each function below makes one from its options.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from streamkd.bandit import Bandit

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
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


class Rule(Protocol):
    """Says who takes over."""

    def __call__(self, roles: "Election", candidates: NDArray[np.bool_], *, drifting: bool) -> int | None:
        """Choose among the candidates `[peers]`, of whom there is one at least; None leaves the teacher in office."""


def tested() -> Rule:
    """A candidate takes over on a paired test of recent log-losses, with a margin, so that roles do not flap.

    The evidence is D, the discounted mean over labelled records of log p_challenger(y) - log p_teacher(y), and
    z = D / sqrt(V / n_eff). The candidate of the smallest loss takes over at z > `roles.confidence` and
    D > `roles.margin`, or at z > `roles.confidence_drift` while the world drifts.
    """

    def challenger(roles: "Election", candidates: NDArray[np.bool_], *, drifting: bool) -> int | None:
        best = roles.best(candidates)
        mean = float((roles.gains[best] - roles.gains[roles.teacher]) / roles.mass[0])
        variance = float(roles.squares[best, roles.teacher] / roles.mass[0]) - mean**2
        effective = float(roles.mass[0] ** 2 / roles.mass[1])
        z = mean / sqrt(max(variance, 1e-12) / effective)
        proved = z > roles.confidence_drift if drifting else z > roles.confidence and mean > roles.margin
        return best if proved else None

    return challenger


def mission() -> Rule:
    """An accuracy above 0.95 (`roles.bar`) of the teacher's suffices (the articles that streamkd follows).

    The candidate of the smallest loss takes over, though it be worse than the teacher; and back.
    """
    return lambda roles, candidates, *, drifting: roles.best(candidates)  # noqa: ARG005 - the protocol's


def never() -> Rule:
    """The first peer teaches for ever."""
    return lambda roles, candidates, *, drifting: None  # noqa: ARG005 - the protocol's


def bandit(
    *,
    gain: Weight = 1.0,
    divergence: Weight = 0.1,
    energy: Weight = 0.1,
    exploration: Weight = 0.2,
    gamma: Share = 0.95,
    costs: tuple[float, ...] = (),
) -> Rule:
    """The candidate of the highest reward, by a linear bandit that forgets, D-LinUCB (Russac et al. 2019).

    A term in office is worth gain * (change of the students' accuracy) + divergence * KL(p_T || p_S)
    - energy * (operations a record, as a share of the costliest peer's); what is known of a candidate are its accuracy,
    its divergence from the others and its cost (the state and the reward of the articles that streamkd follows). A term
    is at least `roles.every` updates, and `roles.tenure` after a swap.

    Args:
        gain: weight of the accuracy.
        divergence: weight of the divergence, in nats.
        energy: weight of the operations.
        exploration: how much uncertainty about a candidate is worth.
        gamma: what a term leaves standing of what was known: worlds change.
        costs: of the peers; measured.
    """
    return Bandit(gain=gain, divergence=divergence, energy=energy, exploration=exploration, gamma=gamma, costs=costs)


class Election:
    """Re-elects the teacher from time to time.

    A peer whose accuracy is above `bar` of the teacher's is a candidate (the published bar).

    Args:
        peers: how many.
        rule: chooses among the candidates; `tested` by default.
        gamma: how much of the evidence a labelled record leaves standing.
        every: updates between elections.
        tenure, tenure_drift: least updates in office, in calm and while the world drifts.
    """

    def __init__(
        self,
        peers: int,
        *,
        rule: Rule | None = None,
        gamma: float = 0.998,
        every: int = 16,
        bar: float = 0.95,
        margin: float = 0.005,
        confidence: float = 2.33,
        confidence_drift: float = 1.28,
        tenure: int = 64,
        tenure_drift: int = 8,
    ) -> None:
        self.rule = rule or tested()
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

    def update(self, log_p: Tensor, correct: Tensor, answers: Tensor | None = None) -> None:
        """Take in what `[peers, n]` log-probability each gave to the truth, and whether it was right.

        Args:
            log_p: as above.
            correct: likewise.
            answers: `[peers, n, classes]`, all the log-probabilities, for a bandit.
        """
        if answers is not None and isinstance(self.rule, Bandit):
            self.rule.hear(answers, correct)
        past, mass, weights = _discounts(self.gamma, log_p.shape[1])
        gains = log_p.numpy().astype(np.float64)
        differences = gains[:, None] - gains
        self.mass = np.array([past, past**2]) * self.mass + mass
        self.gains = past * self.gains + gains @ weights
        self.correct = past * self.correct + correct.numpy() @ weights
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
        if not bool(candidates.any()) or not float(self.mass[0]):
            return None
        return self.rule(self, candidates, drifting=drifting)

    def best(self, candidates: NDArray[np.bool_]) -> int:
        """Return the candidate `[peers]` of the smallest recent loss."""
        return int(np.where(candidates, self.gains, -np.inf).argmax())

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher in office and the evidence."""
        return {
            "teacher": self.teacher,
            "in_office": self.in_office,
            "since_election": self.since_election,
            "rule": self.rule.state_dict() if isinstance(self.rule, Bandit) else {},
            **{name: torch.from_numpy(getattr(self, name)) for name in _EVIDENCE},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, value in state.items():
            if name != "rule":
                setattr(self, name, value.numpy() if name in _EVIDENCE else value)
        if isinstance(self.rule, Bandit) and state["rule"]:  # or else another rule was in force
            self.rule.load_state_dict(state["rule"])


@lru_cache(maxsize=8)
def _discounts(gamma: float, n: int) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """What `n` records leave standing of the past, the sums of their weights and of the squares, and the weights."""
    weights = gamma ** np.arange(n - 1, -1, -1, dtype=np.float64)
    return gamma**n, np.array([weights.sum(), np.square(weights).sum()]), weights

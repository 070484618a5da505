"""A teacher chosen by what having it in office was worth: a linear bandit that forgets."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from streamkd.roles import Election

Array = NDArray[np.float64]
_TERM = ("heard", "correct", "divergences", "before", "moment", "squares", "target")


class Bandit:
    """D-LinUCB over the peers; see `roles.bandit`.

    What is known of peer a when it may take office is x_a = (which peer it is; its accuracy, the mean divergence
    KL(p_a || p_j) from the others, its cost). With V = I + sum of g^k x x^T, W = I + sum of g^2k x x^T and
    theta = V^-1 sum of g^k x r over past terms (k terms ago, reward r), the peer of the highest
    x^T theta + exploration * sqrt(x^T V^-1 W V^-1 x) is chosen.

    Args:
        gain: weight of the change of the students' accuracy over a term.
        divergence: weight of the mean KL(p_teacher || p_student), in nats.
        energy: weight of the teacher's cost.
        exploration: how much uncertainty is worth.
        gamma: g, what a term leaves standing of what was known.
        costs: of each peer, as shares of the largest; none by default.
    """

    def __init__(
        self,
        *,
        gain: float,
        divergence: float,
        energy: float,
        exploration: float,
        gamma: float,
        costs: Sequence[float] = (),
    ) -> None:
        self.gain, self.divergence, self.energy = gain, divergence, energy
        self.exploration, self.gamma = exploration, gamma
        self.costs = np.asarray(costs, dtype=np.float64)
        self.heard = np.zeros(1)  # records of this term
        self.correct = self.before = np.zeros(0)  # of them by each peer; accuracies of the term before
        self.divergences = np.zeros((0, 0))  # [peer, from peer], sums
        self.moment = self.squares = np.zeros((0, 0))  # V and W, less I
        self.target = np.zeros(0)
        self._context: Array | None = None  # of the teacher in office, when it was chosen

    def hear(self, log_p: Tensor, correct: Tensor) -> None:
        """Take in the answers `[peers, n, classes]` to labelled records, and whether they were right, `[peers, n]`."""
        size, n = correct.shape
        if not len(self.correct):
            self._begin(size)
        p = log_p.double().exp()
        own = (p * log_p).sum((1, 2))
        crossed = torch.einsum("ank,bnk->ab", p, log_p.double())
        self.heard = self.heard + n
        self.correct = self.correct + correct.double().sum(1).numpy()
        apart = (own[:, None] - crossed).clamp(min=0)
        self.divergences = self.divergences + apart.nan_to_num(0.0).numpy()  # a peer that broke down says nothing

    def __call__(self, roles: "Election", candidates: NDArray[np.bool_], *, drifting: bool) -> int | None:  # noqa: ARG002 - the protocol's
        """Close the term of the teacher in office, learn from it, and choose the next; see `roles.Rule`."""
        if not float(self.heard[0]):
            return None
        accuracies, divergences = self.correct / self.heard, self._mean_divergences()
        if self._context is not None:
            self.learn(self._context, self.reward(roles.teacher))
        self.before, self.heard = accuracies, np.zeros(1)
        self.correct, self.divergences = np.zeros_like(self.correct), np.zeros_like(self.divergences)
        contexts = np.column_stack([np.eye(len(accuracies)), accuracies, divergences, self._shares(len(accuracies))])
        allowed = candidates.copy()
        allowed[roles.teacher] = True
        chosen = int(np.where(allowed, self.worth(contexts), -np.inf).argmax())
        self._context = contexts[chosen]
        return None if chosen == roles.teacher else chosen

    def reward(self, teacher: int) -> float:
        """What the term so far was worth: gain of the students' accuracy, divergence from them, energy spent."""
        students = np.arange(len(self.correct)) != teacher
        gained = (self.correct / self.heard - self.before)[students].mean() if students.any() else 0.0
        apart, cost = self._mean_divergences()[teacher], self._shares(len(students))[teacher]
        return float(self.gain * gained + self.divergence * apart - self.energy * cost)

    def learn(self, context: Array, reward: float) -> None:
        """Take in the reward of a term."""
        square = np.outer(context, context)
        self.moment = self.gamma * self.moment + square
        self.squares = self.gamma**2 * self.squares + square
        self.target = self.gamma * self.target + reward * context

    def worth(self, contexts: Array) -> Array:
        """Return the upper bound of what each of the contexts `[n, d]` is worth."""
        inverse = np.linalg.inv(self.moment + np.eye(len(self.moment)))
        spread = inverse @ (self.squares + np.eye(len(self.squares))) @ inverse
        bound = np.sqrt(np.einsum("nd,de,ne->n", contexts, spread, contexts))
        worth: Array = contexts @ (inverse @ self.target) + self.exploration * bound
        return worth

    def _begin(self, peers: int) -> None:
        width = peers + 3
        self.correct, self.before = np.zeros(peers), np.zeros(peers)
        self.divergences = np.zeros((peers, peers))
        self.moment, self.squares, self.target = np.zeros((width, width)), np.zeros((width, width)), np.zeros(width)

    def _mean_divergences(self) -> Array:
        others = max(1, len(self.correct) - 1)
        means: Array = self.divergences.sum(1) / others / self.heard
        return means

    def _shares(self, peers: int) -> Array:
        return self.costs if len(self.costs) else np.zeros(peers)

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, and what was heard of this term."""
        context = None if self._context is None else torch.from_numpy(self._context)
        return {"context": context, **{name: torch.from_numpy(getattr(self, name)) for name in _TERM}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._context = None if state["context"] is None else state["context"].numpy()
        for name in _TERM:
            setattr(self, name, state[name].numpy())

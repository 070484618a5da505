"""The served answer: all members asked, those believed that were right of late."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamkd.report import LOG_FLOOR


class Served:
    """Members weighted by their discounted log-loss: the exponentially weighted forecaster with a memory.

    W_m <- gamma ** B * W_m + sum of log max(p_m(y), FLOOR) over the B labelled records; the weights are softmax(W)
    mixed with a floor spread evenly (Sahoo et al. 2018), so that no member is ever out of hearing. With gamma = 1 and
    no floor the total log-loss is at most the best member's plus ln(members) (Vovk 1990).

    Args:
        members: how many.
        gamma: how much of the past a labelled record leaves standing; 0.99 is a window of about 100.
        gamma_drift: likewise for `drift_batches` batches after an alarm.
        floor: the share of the weight that is spread evenly; 1 makes it a plain mean.
        averages: whether the second half of the members, the peers' averages, is heard.
    """

    def __init__(
        self,
        members: int,
        *,
        gamma: float = 0.99,
        gamma_drift: float = 0.98,
        drift_batches: int = 64,
        floor: float = 0.01,
        averages: bool = True,
    ) -> None:
        self.gamma = gamma
        self.gamma_drift = gamma_drift
        self.drift_batches = drift_batches
        self.floor = floor
        self.voices = members if averages else members // 2
        self.alert = 0  # batches for which the shorter memory is still in force
        self._score(torch.zeros(members, dtype=torch.float64))

    def _score(self, scores: Tensor) -> None:
        self.scores = scores
        weights = (1 - self.floor) * scores[: self.voices].softmax(0) + self.floor / self.voices
        self.weights = functional.pad(weights, (0, len(scores) - self.voices))  # adding up to 1

    def answer(self, log_p: Tensor) -> Tensor:
        """Mix the members' log-probabilities `[members, n, classes]` into the served probabilities `[n, classes]`.

        A member that says anything not finite weighs nothing; if none is left, every class is as likely.
        """
        p = log_p.exp()
        answer = _mixed(self.weights, p)
        if math.isfinite(float(answer.sum())):
            return answer
        sound = p.isfinite().flatten(1).all(1)
        if not bool(sound.any()):
            return torch.full_like(p[0], 1 / p.shape[-1])
        heard = sound.cpu()
        weights = self.weights[heard]
        if not float(weights.sum()):  # without a floor, those who broke down may have had all of it
            weights = self.scores[heard].softmax(0)
        return _mixed(weights / weights.sum(), p[sound])

    def update(self, log_p: Tensor) -> None:
        """Learn from the log-probabilities `[members, n]` that each gave to what turned out to be true."""
        gamma = self.gamma_drift if self.alert else self.gamma
        gains = log_p.double().nan_to_num(float("-inf")).clamp(min=LOG_FLOOR).sum(1)
        self._score(gamma ** log_p.shape[1] * self.scores + gains.cpu())
        self.alert = max(0, self.alert - 1)

    def shorten(self) -> None:
        """Forget faster for a while: the world has changed."""
        self.alert = self.drift_batches

    def state_dict(self) -> dict[str, Any]:
        """Return the scores."""
        return {"scores": self.scores, "alert": self.alert}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._score(state["scores"])
        self.alert = state["alert"]


def _mixed(weights: Tensor, p: Tensor) -> Tensor:
    """Add up `[members, n, classes]`, each with its weight; einsum does the same at ten times the overhead."""
    return (weights.to(p) @ p.flatten(1)).view(p.shape[1:])

"""The served answer: all members asked, those believed that were right of late."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamkd.report import LOG_FLOOR

Array = NDArray[np.float64]


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

    Attributes:
        weights: `[members]`, adding up to 1.
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
        self._score(np.zeros(members))

    def _score(self, scores: Array) -> None:
        self._scores = scores
        heard = (1 - self.floor) * _softmax(scores[: self.voices]) + self.floor / self.voices
        self._weights = heard if self.voices == len(scores) else np.append(heard, np.zeros(len(scores) - self.voices))
        self.weights = torch.from_numpy(self._weights)

    def answer(self, log_p: Tensor) -> Tensor:
        """Mix the members' log-probabilities `[members, n, classes]` into the served probabilities `[n, classes]`.

        A member that says anything not finite weighs nothing; if none is left, every class is as likely.
        """
        p = np.exp(log_p.numpy())
        answer = _mixed(self._weights, p)
        if math.isfinite(answer.sum()):
            return torch.from_numpy(answer)
        sound = np.isfinite(p).all((1, 2))
        if not sound.any():
            return torch.full(log_p.shape[1:], 1 / log_p.shape[-1], dtype=log_p.dtype)
        weights = self._weights[sound]
        if not weights.sum():  # without a floor, those who broke down may have had all of it
            weights = _softmax(self._scores[sound])
        return torch.from_numpy(_mixed(weights / weights.sum(), p[sound]))

    def update(self, log_p: Tensor) -> None:
        """Learn from the log-probabilities `[members, n]` that each gave to what turned out to be true."""
        gamma = self.gamma_drift if self.alert else self.gamma
        said = log_p.numpy().astype(np.float64)
        gains = np.fmax(said, LOG_FLOOR).sum(1)
        self._score(gamma ** log_p.shape[1] * self._scores + gains)
        self.alert = max(0, self.alert - 1)

    def shorten(self) -> None:
        """Forget faster for a while: the world has changed."""
        self.alert = self.drift_batches

    def state_dict(self) -> dict[str, Any]:
        """Return the scores."""
        return {"scores": torch.from_numpy(self._scores), "alert": self.alert}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._score(state["scores"].numpy())
        self.alert = state["alert"]


def _mixed(weights: Array, p: NDArray[Any]) -> NDArray[Any]:
    """Add up `[members, n, classes]`, each with its weight."""
    mixed: NDArray[Any] = weights.astype(p.dtype).dot(p.reshape(len(p), -1)).reshape(p.shape[1:])
    return mixed


def _softmax(scores: Array) -> Array:
    # Of so few numbers Python's own are the quicker.
    said: list[float] = scores.tolist()
    highest = max(said)
    weights = [math.exp(score - highest) for score in said]
    return np.array(weights) / sum(weights)

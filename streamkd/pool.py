"""A second opinion on the members: a product of what they say, to powers that are learned."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamkd.logits import UNSEEN
from streamkd.served import Served

FAINTEST = -8.0
"""The log-probability under which an opinion is not heard: no single source may rule a class out."""

LEAST = 1e-6
"""No class is taken for rarer than this."""

STRIDE = 16
"""Records that a step of the coefficients counts at most: gradient descent breaks down where steps are too long."""


class LabelRates:
    """How common each class has been of late: a source that knows the classes alone, and no inputs.

    Labels are counted, and apart from them the answers to records that will never have a label: where labels are
    scarce it is the answers that tell what the last few records were. Until one is counted, all classes are as common.

    Args:
        classes: how many.
        memories: one source for each: the share of the past that a labelled record leaves standing.
        answered: likewise for a record that was answered and will never have a label.
    """

    def __init__(
        self,
        classes: int,
        memories: Sequence[float] = (0.9, 0.98, 0.998),
        answered: Sequence[float] = (0.9, 0.98, 0.998),
    ) -> None:
        self.memories = (*memories, *answered)
        self._rates = np.full((len(self.memories), classes), 1 / classes)
        self._labels, self._answers = slice(len(memories)), slice(len(memories), None)

    def __len__(self) -> int:
        return len(self.memories)

    @property
    def rates(self) -> Tensor:
        """`[memories, classes]`, each adding up to 1, those of the labels first."""
        return torch.from_numpy(self._rates)

    def log_p(self, seen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Answer every record alike: log-probabilities `[memories, classes]` among the first ones, where `seen`."""
        rates = np.maximum(self._rates[:, : len(seen)], LEAST)
        log_p: NDArray[np.float64] = np.full_like(rates, UNSEEN)
        met = seen.any()  # before one is, all may come
        shares = rates * seen if met else rates
        np.log(shares / shares.sum(1)[:, None], out=log_p, where=seen if met else True)
        return log_p

    def update(self, y: Tensor) -> None:
        """Count the labels `y` `[n]`, in the order in which they came."""
        self._count(y, self._labels)

    def assume(self, y: Tensor) -> None:
        """Count the classes `y` `[n]` that were answered where no label will come, in the order of the records."""
        self._count(y, self._answers)

    def _count(self, y: Tensor, rows: slice) -> None:
        rates, (past, shares) = self._rates.copy(), _counted(self.memories[rows], len(y))
        rates[rows] *= past
        np.add.at(rates[rows].T, y.numpy(), shares)
        self._rates = rates

    def state_dict(self) -> dict[str, Any]:
        """Return the rates."""
        return {"rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._rates = state["rates"].numpy()


class Pool:
    """The log-linear pool of opinions (Genest and Zidek 1986): q ~ exp(sum of c_s log p_s), with c learned online.

    A mixture can be no surer than its members, and cannot put right an error that they share; this can: coefficients
    that add up to more than 1 sharpen, and a negative one takes out of an opinion what another has already said.
    Each step is one of gradient descent on the pool's own log-loss, so the coefficients follow the stream (stacking,
    Wolpert 1992). They start as the mean of the members, with nothing for the other sources.

    The pool gives its answer beside the members' mixture, and what is served is weighed between the two.

    Args:
        members: sources that count from the start; of them, those after the first `voices` are not heard.
        rates: sources that have to earn it, after the members.
        rate: of learning, a record.
        voices: all members, unless given.
    """

    def __init__(self, members: int, rates: LabelRates, *, rate: float = 0.002, voices: int | None = None) -> None:
        self.rates = rates
        self.rate = rate
        self._mute = slice(members if voices is None else voices, members)
        self._coefficients = np.zeros(members + len(rates), np.float32)
        self._coefficients[:members] = 1 / (voices or members)
        self.verdict = Served(2, gamma=0.998)

    def serve(self, log_p: Tensor, mixture: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return all that `update` has to know of an answer, and the answer, as probabilities `[n, classes]`.

        Args:
            log_p: `[members, n, classes]`, what the members say.
            mixture: `[n, classes]`, the probabilities that they come to without the pool.
            seen: `[classes]` bool, of the first classes; the others are ruled out.

        Returns:
            Log-probabilities `[members + rates + 2, n, classes]`, last of all those of the mixture and of the pool.
        """
        members, met = log_p.numpy(), seen.numpy()
        said = np.empty((len(self._coefficients) + 2, *members.shape[1:]), members.dtype)
        said[: len(members)] = members
        said[len(members) : -2] = self.rates.log_p(met)[:, None]
        said[-2] = np.log(np.maximum(mixture.numpy(), _TINY))
        opinions = self._heard(said[:-2])
        logits = (self._coefficients @ opinions.reshape(len(opinions), -1)).reshape(said.shape[1:])
        if not met.all():  # a class that was never seen stays impossible, whatever is left of it above
            logits[:, ~met] = UNSEEN
        said[-1] = torch.from_numpy(logits).log_softmax(-1).numpy()
        return torch.from_numpy(said), self.verdict.answer(torch.from_numpy(said[-2:]))

    @property
    def learned(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that `serve` goes by: coefficients, class rates, and the weights of mixture and pool."""
        return self.coefficients, self.rates.rates, self.verdict.weights

    def pooled(self, log_p: Tensor, mixture: Tensor, seen: Tensor, *learned: Tensor) -> tuple[Tensor, Tensor]:
        """Do what `serve` does, for a compiler: by what is given alone, of numbers that are finite, some class met."""
        coefficients, rates, weights = learned
        shares = rates[:, : len(seen)].clamp(min=LEAST) * seen
        known = (shares / shares.sum(1, keepdim=True)).log().clamp(min=UNSEEN).to(log_p)
        said = torch.cat([log_p, known[:, None].expand(-1, *mixture.shape)])
        heard = said.clamp(min=FAINTEST)
        heard[self._mute] = 0.0
        logits = (coefficients[:, None, None] * heard).sum(0).masked_fill(~seen, UNSEEN)
        both = torch.stack([mixture.clamp(min=_TINY).log(), logits.log_softmax(-1)])
        return torch.cat([said, both]), (weights.to(both)[:, None, None] * both.exp()).sum(0)

    def update(self, log_p: Tensor, y: Tensor) -> None:
        """Learn from what `serve` returned of records that turned out to be of the classes `y` `[n]`."""
        said, truth, rows = log_p.numpy(), y.numpy(), np.arange(len(y))
        self.verdict.update(torch.from_numpy(said[-2:, rows, truth]))
        error = -np.exp(said[-1])
        error[rows, truth] += 1
        opinions = self._heard(said[:-2])
        gradient = opinions.reshape(len(opinions), -1) @ error.ravel()
        step = np.float32(self.rate * min(1, STRIDE / max(1, len(y))))
        self._coefficients = self._coefficients + step * gradient.astype(np.float32)
        self.rates.update(y)

    def assume(self, log_p: Tensor) -> None:
        """Count what `serve` returned of records that will never have a label, as if it were true.

        It is the members' answer that is counted: the pool's own, which follows these rates, would confirm itself.
        """
        self.rates.assume(log_p[-2].argmax(-1))

    @property
    def coefficients(self) -> Tensor:
        """`[members + rates]`, the power of each source."""
        return torch.from_numpy(self._coefficients)

    def shorten(self) -> None:
        """Weigh mixture and pool by the latest records for a while: the world has changed."""
        self.verdict.shorten()

    def _heard(self, log_p: NDArray[Any]) -> NDArray[Any]:
        """Opinions, none of them below the faintest; who says anything that is not a number has none."""
        opinions: NDArray[Any] = np.maximum(log_p, FAINTEST)
        if math.isnan(opinions.sum()):
            opinions[np.isnan(opinions).any((1, 2))] = 0.0
        if self._mute.start < self._mute.stop:
            opinions[self._mute] = 0.0
        return opinions

    def state_dict(self) -> dict[str, Any]:
        """Return the coefficients, the label rates, and what decides between pool and mixture."""
        return {
            "coefficients": self.coefficients,
            "rates": self.rates.state_dict(),
            "verdict": self.verdict.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._coefficients = state["coefficients"].numpy()
        self.rates.load_state_dict(state["rates"])
        self.verdict.load_state_dict(state["verdict"])


@lru_cache(maxsize=4)
def _counted(memories: tuple[float, ...], n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What `n` records leave standing of the past `[memories, 1]`, and what each of them counts `[n, memories]`."""
    each = np.array(memories)[:, None]
    shares: NDArray[np.float64] = (1 - each) * each ** np.arange(n - 1, -1, -1)
    return each**n, shares.T


_TINY = 1e-30

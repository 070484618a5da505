"""What a peer is capable of, in a number: the C in every schedule that compares a student's with its teacher's.

Each function makes a measure from its options. What is fixed is measured once; the rest is estimated from what peers
say of the records they learn, and needs `Tapped` models, whose features are averaged over positions. Only ratios are
ever used, so that units do not matter.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from streamkd.batch import labelled
from streamkd.taps import plain, positions

Share = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Horizon = Annotated[float, Field(ge=1, allow_inf_nan=False)]

REFRESH = 16
"""Updates between two looks at the spectra, which cost far more than what is noted at every update."""


class Capacity(Protocol):
    """A measure, over the peers of a cohort."""

    online: bool
    """Whether it wants to be told of every update."""

    values: list[float]
    """One a peer; 0 for what is not known."""

    def start(self, models: Sequence[nn.Module | None], x: Tensor) -> None:
        """Measure the models, given a record `x` `[1, ...]`; None for what is no torch model."""

    def update(self, p: Tensor, y: Tensor, features: Sequence[Tensor | None]) -> None:
        """Take in the probabilities `[peers, n, classes]` that were given to records of labels `y`, and features."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that was estimated."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


class Fixed:
    """A measure of the architecture."""

    online = False

    def __init__(self, measure: Callable[[nn.Module, Tensor], float]) -> None:
        self._measure = measure
        self.values: list[float] = []

    def start(self, models: Sequence[nn.Module | None], x: Tensor) -> None:
        """See `Capacity`."""
        self.values = [0.0 if model is None else self._measure(plain(model), x) for model in models]

    def update(self, p: Tensor, y: Tensor, features: Sequence[Tensor | None]) -> None:
        """See `Capacity`."""

    def state_dict(self) -> dict[str, Any]:
        """See `Capacity`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Capacity`."""


@dataclass(slots=True)
class Tally:
    """Exponential means over the records of one peer.

    Attributes:
        mass: what they weigh together.
        fisher: of ||p - y||^2 * (||h||^2 + 1).
        mean: of the features h, `[d]`.
        second: of h h^T, `[d, d]`.
    """

    mass: float
    fisher: float
    mean: Tensor
    second: Tensor

    def update(self, errors: Tensor, h: Tensor, horizon: float) -> None:
        """Take in squared errors `[n]` and features `[n, d]`; nothing, where what is made of them is not finite."""
        fisher, second = float((errors * (h.square().sum(1) + 1)).mean()), h.T @ h / len(h)
        if not (math.isfinite(fisher) and bool(second.isfinite().all())):
            return
        past = (1 - 1 / horizon) ** len(h)
        self.mass = past * self.mass + (1 - past)
        share = (1 - past) / self.mass
        self.fisher += share * (fisher - self.fisher)
        self.mean = self.mean.to(h).lerp(h.mean(0), share)
        self.second = self.second.to(h).lerp(second, share)

    def spectrum(self) -> Tensor:
        """Return the shares of the variance along the principal components, the largest first; none without any."""
        eigenvalues = torch.linalg.eigvalsh(self.second - torch.outer(self.mean, self.mean)).flip(0).clamp(min=0)
        total = eigenvalues.sum()
        shares: Tensor = eigenvalues / total if float(total) > 0 else eigenvalues[:0]
        return shares


class Estimated:
    """A measure of what was learned.

    Args:
        measure: from the tallies of the peers that have one, a value each.
        horizon: of the means, in records.
    """

    online = True

    def __init__(self, measure: Callable[[list[Tally]], list[float]], horizon: float) -> None:
        self._measure, self._horizon = measure, horizon
        self.values: list[float] = []
        self._tallies: dict[int, Tally] = {}
        self._updates = 0

    def start(self, models: Sequence[nn.Module | None], x: Tensor) -> None:  # noqa: ARG002 - as every measure's
        """See `Capacity`."""
        self.values = [0.0] * len(models)

    @torch.no_grad()
    def update(self, p: Tensor, y: Tensor, features: Sequence[Tensor | None]) -> None:
        """See `Capacity`."""
        known = labelled(y)
        if not bool(known.any()):
            return
        errors = (p[:, known] - functional.one_hot(y[known], p.shape[-1])).square().sum(-1)
        for peer, told in enumerate(features):
            if told is None:
                continue
            h = positions(told.detach())[known].mean(1)
            if peer not in self._tallies:
                width = h.shape[1]
                self._tallies[peer] = Tally(0.0, 0.0, h.new_zeros(width), h.new_zeros(width, width))
            self._tallies[peer].update(errors[peer], h, self._horizon)
        if self._updates % REFRESH == 0:
            measured = [peer for peer, tally in self._tallies.items() if tally.mass]
            for peer, value in zip(measured, self._measure([self._tallies[i] for i in measured]), strict=True):
                self.values[peer] = value
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """See `Capacity`."""
        return {
            "values": list(self.values),
            "updates": self._updates,
            "tallies": [[peer, t.mass, t.fisher, t.mean, t.second] for peer, t in self._tallies.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Capacity`."""
        self.values, self._updates = list(state["values"]), state["updates"]
        self._tallies = {peer: Tally(*rest) for peer, *rest in state["tallies"]}


def parameters() -> Capacity:
    """How many parameters there are, frozen ones included (Hinton et al. 2015)."""
    return Fixed(lambda model, _: float(sum(p.numel() for p in model.parameters())))


def flops() -> Capacity:
    """Floating-point operations for one record, counted by torch on a dry run (the articles that streamkd follows)."""
    return Fixed(_count)


def fisher(horizon: Horizon = 2_000.0) -> Capacity:
    """Trace of the empirical Fisher matrix of the last layer, E ||p - y||^2 (||h||^2 + 1) (Kirkpatrick et al. 2017).

    In closed form, without a backward pass: how strongly the records still pull at the layer, h its input and the 1
    its bias's. It falls as a peer comes to know its world.

    Args:
        horizon: records that the mean looks back on.
    """
    return Estimated(lambda tallies: [tally.fisher for tally in tallies], horizon)


def dimension(share: Share = 0.95, horizon: Horizon = 2_000.0) -> Capacity:
    """How many principal components explain 95 % of the features' variance (the articles that streamkd follows).

    From a running covariance; an update costs n d^2 for n records of d features, and now and then d^3.

    Args:
        share: of the variance.
        horizon: records that the covariance looks back on.
    """
    return Estimated(lambda tallies: [_components(tally, share) for tally in tallies], horizon)


def rank(horizon: Horizon = 2_000.0) -> Capacity:
    """Effective rank exp(H), H the entropy of the eigenvalues' shares of the features' covariance (Roy, Vetterli 2007).

    As `dimension`, without a threshold: between 1 and the width.

    Args:
        horizon: records that the covariance looks back on.
    """
    return Estimated(lambda tallies: [_rank(tally) for tally in tallies], horizon)


def three_c(
    fisher_weight: Weight = 0.6, dimension_weight: Weight = 0.4, share: Share = 0.95, horizon: Horizon = 2_000.0
) -> Capacity:
    """3C: 0.6 * Fisher trace + 0.4 * dimension, each over its mean in the cohort (the articles that streamkd follows).

    The published sum adds unlike units, of which the larger one decides alone; as shares of the means they count as
    weighed, and an average peer scores the sum of the weights.

    Args:
        fisher_weight: of `fisher`.
        dimension_weight: of `dimension`.
        share: as for `dimension`.
        horizon: records that both look back on.
    """

    def score(tallies: list[Tally]) -> list[float]:
        traces = _standardised([tally.fisher for tally in tallies])
        widths = _standardised([_components(tally, share) for tally in tallies])
        return [fisher_weight * f + dimension_weight * d for f, d in zip(traces, widths, strict=True)]

    return Estimated(score, horizon)


def _count(model: nn.Module, x: Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415 - it imports all of Triton

    training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    model.train(training)
    return float(counter.get_total_flops())


def _components(tally: Tally, share: float) -> float:
    reached = tally.spectrum().cumsum(0)
    return float(max(1, int((reached < share - 1e-6).sum()) + 1)) if len(reached) else 1.0


def _rank(tally: Tally) -> float:
    shares = tally.spectrum()
    return float((-torch.special.xlogy(shares, shares).sum()).exp())


def _standardised(values: list[float]) -> list[float]:
    mean = sum(values) / max(1, len(values))
    return [value / mean if mean > 0 else 1.0 for value in values]

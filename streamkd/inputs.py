"""Raw inputs on their way to the models: missing values filled in, scales made alike."""

from typing import Any

import torch
from torch import Tensor

SHARE = 0.1
"""By which one value may lengthen the sum of squares."""
FEW = 32
"""Records from which nothing is said yet about what is far out."""


class Standardiser:
    """Running mean and variance of each feature (Welford 1962, in Chan's batched form, 1979).

    A missing value (NaN) is replaced by the running mean, so it becomes zero. What lies further out than
    `clip` standard deviations is clipped. So that no single value can spoil the scale for long, one that lies far
    out is moved in before it is learned from: it may lengthen the sum of squares by a tenth. A scale that really
    changes is followed all the same, by a tenth a record. Images `[n, channels, h, w]` have one mean a channel.

    Args:
        clip: in standard deviations.
        horizon: in records; older ones are forgotten exponentially, so that a sensor which drifts for
            years keeps a scale of its own time.
    """

    def __init__(self, clip: float = 8.0, horizon: int = 100_000) -> None:
        self.clip = clip
        self.horizon = horizon
        # Double precision: sums of squares of large raw values cancel badly in single.
        self.count = torch.zeros(0, dtype=torch.float64)
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.square = torch.zeros(0, dtype=torch.float64)  # sum of squared distances from the mean
        self._derive()

    def update(self, x: Tensor) -> None:
        """Learn from the raw inputs `x` `[n, features, ...]`."""
        if not len(x):
            return
        values = _by_feature(x).double().cpu()  # [features, m]
        if not len(self.mean):
            self.count, self.mean, self.square = values.new_zeros(3, len(values)).unbind()
        known = torch.isfinite(values)  # an infinity in the sums would never leave them
        values = torch.clamp(values, *self._believable())
        count = known.sum(1)
        mean = torch.where(known, values, 0).sum(1) / count.clamp(min=1)
        square = torch.where(known, values - mean[:, None], 0).square().sum(1)
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * count / total.clamp(min=1)
        self.square = self.square + square + delta.square() * self.count * count / total.clamp(min=1)
        forget = (self.horizon / total.clamp(min=1)).clamp(max=1)
        self.count, self.square = total * forget, self.square * forget
        self._derive()

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` standardised, clipped, and without missing values."""
        if len(self.mean):
            shape = (1, -1) + (1,) * (x.dim() - 2)
            # Single precision comes after centring: a column of time stamps would lose its seconds before it.
            x = (x - self._centre.view(shape).to(x)) * self._scale.view(shape).to(x)
        return torch.nan_to_num(x.float(), nan=0.0).clamp(-self.clip, self.clip)

    def _believable(self) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest value `[features, 1]` that the scale is learned from."""
        longest = (self.clip**2 / self.count.clamp(min=1)).clamp(min=SHARE)
        reach = (self.square * longest).sqrt()
        reach = torch.where((self.count >= FEW) & (self.square > 0), reach, torch.inf)
        return (self.mean - reach)[:, None], (self.mean + reach)[:, None]

    def state_dict(self) -> dict[str, Any]:
        """Return all that was learned."""
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.count, self.mean, self.square = state["count"], state["mean"], state["square"]
        self._derive()

    def _derive(self) -> None:
        variance = self.square / self.count.clamp(min=1)
        # A feature that never varied says nothing, and must not be blown up when it first does.
        scale = torch.where(variance > 0, variance.clamp(min=1e-24).rsqrt(), 1.0)
        self._centre, self._scale = self.mean, scale


def _by_feature(x: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(x.shape[1], -1)


class Raw:
    """Inputs passed on as they are, for models that bring their own scaling; missing values become zero."""

    def update(self, x: Tensor) -> None:
        """Learn nothing."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` without missing values."""
        return torch.nan_to_num(x.float(), nan=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: nothing is learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing."""

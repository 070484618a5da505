"""Raw inputs on their way to the models: missing values filled in, scales made alike."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

SHARE = 0.1
"""By which one record may lengthen the sum of squares."""
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
        self._learned(*np.zeros((3, 0)))

    def update(self, x: Tensor) -> None:
        """Learn from the raw inputs `x` `[n, features, ...]`."""
        if not len(x):
            return
        if not len(self._mean):
            self._learned(*np.zeros((3, x.shape[1])))
        count, mean, square = (_of_bytes if x.dtype == torch.uint8 else _of_numbers)(x, *self._believable)
        places = x.shape[2:].numel()  # of an image, each of which counts as that share of a record
        count, square = count / places, square / places
        total = self._count + count
        share = count / np.maximum(total, 1)
        delta = mean - self._mean
        square = self._square + square + delta * delta * self._count * share
        forget = np.minimum(self.horizon / np.maximum(total, 1), 1)
        self._learned(total * forget, self._mean + delta * share, square * forget)

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` standardised, clipped, and without missing values."""
        return self.scaled(x, *self.scale(x))

    def scaled(self, x: Tensor, *scale: Tensor) -> Tensor:
        """Return `x` as above, by a `scale`; of what was learned this knows nothing else."""
        if scale:
            # Single precision comes after centring: a column of time stamps would lose its seconds before it.
            x = x if x.is_floating_point() else x.float()
            centre, factor = scale
            x = (x - centre).mul_(factor)
        return torch.nan_to_num(x.float(), nan=0.0).clamp_(-self.clip, self.clip)

    def scale(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the centre of inputs like `x`, and what to multiply by then; nothing before any was learned."""
        if not len(self._mean):
            return ()
        dtype = x.dtype if x.is_floating_point() else torch.float32
        like = (x.dim(), dtype, x.device)
        if like not in self._ready:
            with torch.inference_mode(mode=False):  # whoever asks next may want a gradient
                columns = torch.from_numpy(np.array([self._mean, self._scale])).to(x.device, dtype)
                self._ready[like] = columns.view(2, 1, -1, *[1] * (x.dim() - 2)).unbind()
        return self._ready[like]

    @property
    def count(self) -> Tensor:
        """`[features]`, how many records were learned, those that were forgotten taken off."""
        return torch.from_numpy(self._count)

    @property
    def mean(self) -> Tensor:
        """`[features]`."""
        return torch.from_numpy(self._mean)

    @property
    def square(self) -> Tensor:
        """`[features]`, the sum of squared distances from the mean."""
        return torch.from_numpy(self._square)

    def state_dict(self) -> dict[str, Any]:
        """Return all that was learned."""
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._learned(*(state[name].numpy() for name in ("count", "mean", "square")))

    def _learned(self, count: Array, mean: Array, square: Array) -> None:
        """Scale by what was learned, `[features]` each."""
        # Double precision: sums of squares of large raw values cancel badly in single.
        self._count, self._mean, self._square = count, mean, square
        spread = np.sqrt(square / np.maximum(count, 1))
        varies = spread > 0
        # A feature that never varied says nothing, and must not be blown up when it first does.
        self._scale = np.where(varies, 1 / np.maximum(spread, 1e-12), 1.0)
        self._ready: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, ...]] = {}
        # The least and the greatest value that the scale is learned from.
        longest = spread * np.sqrt(np.maximum(self.clip**2, SHARE * count))
        reach = np.where(varies & (count >= FEW), longest, np.inf)
        self._believable = (mean - reach)[:, None], (mean + reach)[:, None]


def _of_numbers(x: Tensor, least: Array, most: Array) -> tuple[Array | float, Array, Array]:
    """Return count, mean and sum of squared distances from it, of each feature, of what is known, moved in."""
    values = x.double().cpu().numpy().swapaxes(0, 1).reshape(x.shape[1], -1)  # numpy is the quicker one on so little
    known = np.isfinite(values)  # an infinity in the sums would never leave them
    values = np.minimum(np.maximum(values, least), most)
    if known.all():
        mean = values.sum(1) / values.shape[1]
        return float(values.shape[1]), mean, np.square(values - mean[:, None]).sum(1)
    count = known.sum(1)
    mean = values.sum(1, where=known) / np.maximum(count, 1)
    return count, mean, np.square(values - mean[:, None]).sum(1, where=known)


def _of_bytes(x: Tensor, least: Array, most: Array) -> tuple[Array | float, Array, Array]:
    """Likewise of pixels, which are counted: there are 256 values only, and many pixels."""
    count = torch.stack([torch.bincount(values, minlength=256) for values in _by_feature(x)]).double().cpu().numpy()
    values, total = np.clip(np.arange(256.0), least, most), count.sum(1)
    mean = (values * count).sum(1) / total
    return total, mean, (np.square(values - mean[:, None]) * count).sum(1)


def _by_feature(x: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(x.shape[1], -1)


class Raw:
    """Inputs passed on as they are, for models that bring their own scaling; missing values become zero.

    Pixels, which are bytes, go from 0 to 1, as torchvision's models take them.
    """

    def update(self, x: Tensor) -> None:
        """Learn nothing."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` without missing values."""
        return self.scaled(x)

    def scale(self, x: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002 - as it is asked for
        """Return nothing: nothing is learned."""
        return ()

    def scaled(self, x: Tensor) -> Tensor:
        """Return `x` as above."""
        return x.float() / 255 if x.dtype == torch.uint8 else torch.nan_to_num(x.float(), nan=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: nothing is learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing."""

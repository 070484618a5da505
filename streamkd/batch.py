"""The values that flow: what comes in, and what a model says of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

UNLABELLED = -100
"""The class index of a record whose label is not known (yet): torch's own ignore index."""


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Records in the order they arrived, and labels that arrived for earlier ones.

    Arrays are taken for tensors.

    Attributes:
        x: `[n, ...]`, float; NaN marks a missing value. Images may be bytes (uint8) `[n, channels, h, w]`, and are kept
            as such by all that waits and remembers.
        y: `[n]`, class indices; `UNLABELLED` where the label is not known.
        ids: one name a record, or empty. Only a record with an id can be given its label later.
        late: id -> class index, for records of earlier batches that were waiting in `Pending`; `UNLABELLED` for one
            that is to wait no longer.
        position: where the feed stands after this batch; opaque to the engine.
        raw: the records as they came, or empty; for the dead letters, should one turn out to be unusable.
        times: when each record came to be, in seconds since the epoch, NaN where that is not known; or empty.
    """

    x: Tensor
    y: Tensor
    ids: tuple[str, ...] = ()
    late: Mapping[str, int] = field(default_factory=dict)
    position: Mapping[str, Any] = field(default_factory=dict)
    raw: tuple[bytes, ...] = ()
    times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            if not isinstance(given := getattr(self, name), Tensor):
                object.__setattr__(self, name, torch.as_tensor(given))
        if self.y.dim() != 1 or self.y.is_floating_point():
            raise ValueError(
                f"labels of {self.y.dtype} and shape {list(self.y.shape)}: give class indices, [{len(self.x)}] integers"
            )
        if {len(self.y), len(self.ids or self.x), len(self.times or self.x)} != {len(self.x)}:
            raise ValueError(
                f"a batch of {len(self.x)} records has {len(self.y)} labels, {len(self.ids)} ids and "
                f"{len(self.times)} times: give one label a record (UNLABELLED where unknown), and one id and one time "
                "a record or none"
            )

    def __len__(self) -> int:
        return self.x.shape[0]


@dataclass(frozen=True, eq=False, slots=True)
class Output:
    """What a model says of a batch.

    Attributes:
        logits: `[..., n, classes]`; leading dimensions, where there are any, count pairs of peers.
        features: `[n, width]`, `[n, positions, width]` or `[n, channels, h, w]`, of one layer, where it is told.
    """

    logits: Tensor
    features: Tensor | None = None

    def detach(self) -> "Output":
        """Return the same output, cut off from its gradient: a teacher's."""
        features = None if self.features is None else self.features.detach()
        return Output(self.logits.detach(), features)


def labelled(y: Tensor) -> Tensor:
    """Return which of the labels `y` `[n]` are known, `[n]` bool."""
    return y != UNLABELLED

"""Cells into records, and records into batches: what every feed that reads columns has in common."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from runners.feeds.blocks import Block
from runners.feeds.classes import ClassMap
from runners.feeds.decode import Columns
from streamkd.batch import UNLABELLED, Batch
from streamkd.errors import CheckpointError, ConfigError


@dataclass(frozen=True, eq=False, slots=True)
class Records:
    """Records decoded, one or many.

    Attributes:
        features: `[n, width]` float64.
        labels: class indices; `UNLABELLED` where one is not known.
        raw: their bytes as they came.
        ids: their names; empty strings where records have none.
        times: when they came to be, in seconds since the epoch; NaN where that is not known.
    """

    features: np.ndarray
    labels: Sequence[int]
    raw: Sequence[bytes]
    ids: Sequence[str]
    times: Sequence[float]

    def __len__(self) -> int:
        return len(self.raw)


class Decoder:
    """Knows what the columns are for and which classes were met, and holds both against a checkpoint's.

    Args:
        columns: of the feed.
        classes: numbers the labels.
        shape: of one record; empty for vectors.
        where: the setting that names the feed and its value, for messages.

    Raises:
        ConfigError: the shape does not fit the columns.
    """

    def __init__(self, columns: Columns, classes: ClassMap, *, shape: tuple[int, ...] = (), where: str) -> None:
        self.columns = columns
        self.classes = classes
        self.shape = shape or (columns.width,)
        self._where = where
        if math.prod(self.shape) != columns.width:
            raise ConfigError(
                f"feed.shape = {list(self.shape)}: {math.prod(self.shape)} numbers, and a record has "
                f"{columns.width}; leave it out for records that are vectors"
            )

    def record(
        self, cells: Mapping[str, object], raw: bytes, classes: ClassMap | None = None, *, sent: float = math.nan
    ) -> Records:
        """Return one record; its label is numbered by `classes`, where they are not to be the feed's own.

        `sent` is the source's own time of it, for records that do not tell.

        Raises:
            RefusedError: it cannot be used.
        """
        features, name = self.columns.features(cells), self.columns.id_of(cells)
        label = self.columns.label_of(cells)
        index = UNLABELLED if label is None else (classes or self.classes).index(label)
        return Records(
            features[None], (index,), (raw,), (name,), (self.columns.time_of(cells) if self.columns.time else sent,)
        )

    def rows(self, block: Block, rows: slice) -> Records:
        """Return some of the records of a block, for whose labels there is room."""
        labels = [UNLABELLED if label is None else self.classes.index(label) for label in block.labels[rows]]
        return Records(block.features[rows], labels, block.raw[rows], block.ids[rows], block.times[rows])

    def batch(self, parts: Sequence[Records], position: Mapping[str, Any]) -> Batch:
        """Return records as a batch; none of them make an empty one."""
        raw = _joined(part.raw for part in parts)
        times = _joined(part.times for part in parts)
        timed = self.columns.time or not all(map(math.isnan, times))
        x = np.concatenate([part.features for part in parts]) if parts else np.empty((0, self.columns.width))
        return Batch(
            torch.from_numpy(x).reshape(len(raw), *self.shape),
            torch.tensor(_joined(part.labels for part in parts), dtype=torch.int64),
            ids=_joined(part.ids for part in parts) if self.columns.id else (),
            position=position,
            raw=raw,
            times=times if timed else (),
        )

    def state(self) -> dict[str, Any]:
        """Return what a position has to carry: columns, and the classes met so far."""
        return {"features": self.columns.names, "label": self.columns.label, "classes": list(self.classes.labels)}

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go on with a checkpoint's classes.

        Raises:
            CheckpointError: columns or classes are not those that were being learned.
        """
        features, label = self.columns.names, self.columns.label
        if position["features"] != features:
            missing = [name for name in position["features"] if name not in features]
            new = [name for name in features if name not in position["features"]]
            raise CheckpointError(
                f"{self._where}: its columns are not those of the checkpoint "
                f"(gone: {missing or 'none'}; new: {new or 'none'}; order counts): start with an empty "
                "checkpoint.directory, or name the new columns in feed.ignore"
            )
        if position["label"] != label:
            raise CheckpointError(
                f"feed.label = {label!r}: it was {position['label']!r} when the checkpoint was made; give it back, "
                "or start afresh with another checkpoint.directory"
            )
        self.classes.restore(position["classes"])

    def describe(self) -> dict[str, Any]:
        """Return columns and what is known of the labels."""
        return {
            "label": self.columns.label or "(none in the record)",
            "id": self.columns.id or "(none)",
            "time": self.columns.time or "(none in the record)",
            "numeric": list(self.columns.numeric),
            "categorical": list(self.columns.categorical),
            "classes": list(self.classes.labels),
        }


def _joined(parts: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(chain.from_iterable(parts))

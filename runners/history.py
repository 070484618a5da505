"""A history: the records of a feed that ends, all of them in memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runners.feeds import Feed
from runners.session import Session
from streamkd.batch import Batch, labelled
from streamkd.errors import ConfigError


@dataclass(frozen=True, eq=False, slots=True)
class History:
    """Records in the order they came.

    Attributes:
        x: `[n, ...]`, raw.
        y: `[n]`, class indices; `UNLABELLED` where there is none.
        known: what the feed knows of its records, see `known`.
    """

    x: Tensor
    y: Tensor
    known: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.y)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one record."""
        return tuple(self.x.shape[1:])

    def parted(self, holdout: float) -> tuple["History", "History"]:
        """Return the earlier records, and the last `holdout` of them all.

        Raises:
            ConfigError: the earlier ones have not two classes, or the later ones no label, or none that was learned.
        """
        first = len(self) - round(holdout * len(self))
        earlier, later = self._rows(slice(first)), self._rows(slice(first, None))
        met = sorted({*earlier.y[labelled(earlier.y)].tolist()})
        if len(met) < 2:  # noqa: PLR2004 - what there is to tell apart
            found = f"{self._name(met[0])} is the only class" if met else "no record has a label"
            raise ConfigError(
                f"feed.label: {found} in the {len(earlier):,} records to be learned; two classes are needed: "
                "name the label's column, or give a longer history"
            )
        if len(later) and not bool(labelled(later.y).any()):
            raise ConfigError(
                f"--holdout {holdout}: none of the last {len(later):,} records has a label to be measured by; "
                "give a larger share, or 0 to measure nothing"
            )
        if len(later) and not bool(torch.isin(later.y[labelled(later.y)], torch.tensor(met)).any()):
            raise ConfigError(
                f"--holdout {holdout}: no class of the last {len(later):,} records is in the {len(earlier):,} before "
                "them, so no answer could be right; give a smaller share, 0 to measure nothing, or, of images, "
                "feed.order = 'shuffled'"
            )
        return earlier, later

    def _rows(self, rows: slice) -> "History":
        return History(self.x[rows], self.y[rows], self.known)

    def _name(self, index: int) -> str:
        names = self.known["classes"]
        return repr(names[index]) if index < len(names) else f"{index}"


def known(feed: Feed) -> dict[str, Any]:
    """Return what a feed knows of its records: their shape, the columns in order, the classes by index."""
    description = feed.describe()
    classes = description.get("classes")
    return {
        "shape": list(feed.shape),
        "columns": [*description.get("numeric", []), *description.get("categorical", [])],
        "classes": list(classes) if isinstance(classes, (list, tuple)) else [],
    }


def read(running: Session, told: Callable[[float], None]) -> History:
    """Read a feed to its end, and let its engine alone.

    Args:
        running: started; its feed has labels with its records.
        told: called now and then with the share that was read.

    Raises:
        StreamkdError: with the exit code of the process.
    """
    batches: list[Batch] = []
    while (batch := running.poll()) is not None:
        running.dead_letters.accepted(len(batch))
        batches.append(batch)
        if len(batches) % 64 == 0:
            told(running.feed.progress() or 0.0)
    told(1.0)
    return History(
        torch.cat([batch.x for batch in batches]),
        torch.cat([batch.y for batch in batches]),
        known(running.feed),
    )

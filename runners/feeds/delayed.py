"""Labels that come later than their records: question first, answer after, as in a running system."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from runners.feeds import Feed
from streamkd.batch import UNLABELLED, Batch


class Delayed:
    """A feed whose labels are withheld until `delay` more records were given (after river's simulated delay).

    Records without ids are numbered in order of arrival. Where an id comes again while its label is withheld, the
    earlier record gets none: only the later one waits under it. After the last record come the labels still withheld.

    Args:
        feed: the records, with their labels.
        delay: in records, at least 1.
    """

    def __init__(self, feed: Feed, delay: int) -> None:
        self.name = feed.name
        self.shape = feed.shape
        self.capabilities = feed.capabilities
        self._feed = feed
        self._delay = delay
        self._given = 0
        self._withheld: OrderedDict[str, tuple[int, int]] = OrderedDict()  # id -> number of the record, its label
        self._inner: Mapping[str, Any] = {}

    def poll(self, records: int) -> Batch | None:
        """Return the next records without labels, and the labels that have become due."""
        batch = self._feed.poll(records)
        if batch is None and not self._withheld:
            return None
        x = batch.x if batch is not None else torch.zeros(0, *self.shape)
        labels = batch.y.tolist() if batch is not None else []
        self._inner = batch.position if batch is not None else self._inner
        earlier, self._given = self._given, self._given + len(labels)
        numbers = range(earlier, self._given)
        ids = batch.ids if batch is not None and batch.ids else tuple(map(str, numbers))
        for name, number, y in zip(ids, numbers, labels, strict=True):
            self._withheld.pop(name, None)
            if y != UNLABELLED:
                self._withheld[name] = number, y
        # An answer comes after its question, and so with a later batch, however short the delay.
        due = min(self._given - self._delay, earlier) if batch is not None else self._given
        late: dict[str, int] = {}
        while self._withheld and len(late) < max(records, len(labels)):
            name, (number, y) = next(iter(self._withheld.items()))
            if number >= due:
                break
            late[name] = y
            del self._withheld[name]
        unknown = torch.full((len(labels),), UNLABELLED)
        raw, times = (batch.raw, batch.times) if batch is not None else ((), ())
        return Batch(x, unknown, ids=ids, late=late, position=self.position(), raw=raw, times=times)

    def position(self) -> dict[str, Any]:
        """Return the position of the records, and the labels withheld."""
        withheld = [[name, number, y] for name, (number, y) in self._withheld.items()]
        return {"feed": dict(self._inner), "given": self._given, "withheld": withheld}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on after the batch that carried `position`."""
        self._feed.seek(position["feed"])
        self._inner = position["feed"]
        self._given = position["given"]
        self._withheld = OrderedDict((name, (number, y)) for name, number, y in position["withheld"])

    def adopt(self, classes: Sequence[str]) -> None:
        """Number these labels first."""
        self._feed.adopt(classes)

    @property
    def connected(self) -> bool:
        """Whether the feed can be read now."""
        return self._feed.connected

    @property
    def resets(self) -> Mapping[str, int]:
        """How often the feed lost its position."""
        return self._feed.resets

    @property
    def failures(self) -> Mapping[str, int]:
        """How often its source failed."""
        return self._feed.failures

    def lag(self) -> Mapping[str, int]:
        """Return how many records wait in the source."""
        return self._feed.lag()

    def progress(self) -> float | None:
        """Return how much of the records was given."""
        return self._feed.progress()

    def commit(self, position: Mapping[str, Any]) -> None:
        """Tell the feed."""
        self._feed.commit(position["feed"])

    def describe(self) -> Mapping[str, Any]:
        """Return what the feed tells of itself, and the delay."""
        return {**self._feed.describe(), "label delay": self._delay}

    def close(self) -> None:
        """Close the feed."""
        self._feed.close()

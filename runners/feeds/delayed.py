"""Labels that come later than their records: question first, answer after, as in a running system."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from runners.feeds import Feed
from streamkd.batch import UNLABELLED, Batch


class Delayed:
    """A feed whose labels are withheld until `delay` more records were given (after river's simulated delay).

    Records get ids in order of arrival. After the last record come the labels still withheld.

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
        self._withheld: deque[tuple[int, int]] = deque()
        self._inner: Mapping[str, Any] = {}

    def poll(self, records: int) -> Batch | None:
        """Return the next records without labels, and the labels that have become due."""
        batch = self._feed.poll(records)
        if batch is None and not self._withheld:
            return None
        x = batch.x if batch is not None else torch.zeros(0, *self.shape)
        labels = batch.y.tolist() if batch is not None else []
        self._inner = batch.position if batch is not None else self._inner
        ids = range(self._given, self._given + len(labels))
        earlier, self._given = self._given, self._given + len(labels)
        self._withheld.extend((name, y) for name, y in zip(ids, labels, strict=True) if y != UNLABELLED)
        # An answer comes after its question, and so with a later batch, however short the delay.
        due = min(self._given - self._delay, earlier) if batch is not None else self._given
        late: dict[str, int] = {}
        while self._withheld and self._withheld[0][0] < due and len(late) < max(records, len(labels)):
            name, y = self._withheld.popleft()
            late[str(name)] = y
        unknown = torch.full((len(labels),), UNLABELLED)
        raw, times = (batch.raw, batch.times) if batch is not None else ((), ())
        return Batch(x, unknown, ids=tuple(map(str, ids)), late=late, position=self.position(), raw=raw, times=times)

    def position(self) -> dict[str, Any]:
        """Return the position of the records, and the labels withheld."""
        return {"feed": dict(self._inner), "given": self._given, "withheld": [list(pair) for pair in self._withheld]}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on after the batch that carried `position`."""
        self._feed.seek(position["feed"])
        self._inner = position["feed"]
        self._given = position["given"]
        self._withheld = deque((name, y) for name, y in position["withheld"])

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

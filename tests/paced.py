"""A feed for tests: the drifting stream at a steady pace, with a record now and then that cannot be used."""

import time
from dataclasses import replace

from runners.feeds import DeadLetter, Refuse
from runners.feeds.drifting import DriftingFeed
from streamkd.batch import Batch

EVERY = 500
"""Records between two that are refused."""
LATE = 7.0
"""Seconds between an event and its record."""


class Paced(DriftingFeed):
    """Gives no more than `pace` records a second."""

    def __init__(self, records: int, pace: float, refuse: Refuse) -> None:
        super().__init__(records, seed=0)
        self._pace = pace
        self._refuse = refuse
        self._began = time.monotonic()

    def poll(self, records: int) -> Batch | None:
        """Return the next records when it is their time."""
        time.sleep(max(0.0, self._began + self._given / self._pace - time.monotonic()))
        if self._given // EVERY < (self._given + records) // EVERY:
            self._refuse(DeadLetter("width", "2 cells", b"1,2\n", {"record": self._given}))
        batch = super().poll(records)
        return batch and replace(batch, times=(time.time() - LATE,) * len(batch))


def feed(*, records: int, pace: float, refuse: Refuse) -> Paced:
    """Make one; for `feed.kind`."""
    return Paced(records, pace, refuse)

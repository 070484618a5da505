"""A feed for tests: the drifting stream when its time has come, with a record now and then that cannot be used."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from runners.feeds import DeadLetter, Refuse
from runners.feeds.drifting import FEATURES, DriftingFeed
from streamkd.batch import Batch

EVERY = 500
"""Records between two that are refused."""
LATE = 7.0
"""Seconds between an event and its record."""


class Paced(DriftingFeed):
    """Gives no more than `pace` records a second, the first when there is a file `gate`; never ends."""

    def __init__(self, records: int, pace: float, gate: Path, refuse: Refuse) -> None:
        super().__init__(records, seed=0)
        self._pace = pace
        self._gate = gate
        self._refuse = refuse
        self._began = 0.0

    def poll(self, records: int) -> Batch:
        """Return the next records when it is their time; none before the first, nor after the last."""
        if not self._began and not self._gate.exists():
            return self._nothing()
        self._began = self._began or time.monotonic()
        time.sleep(max(0.0, self._began + self._given / self._pace - time.monotonic()))
        if self._given == self.records:
            return self._nothing()
        if self._given // EVERY < (self._given + records) // EVERY:
            self._refuse(DeadLetter("width", "2 cells", b"1,2\n", {"record": self._given}))
        batch = super().poll(records)
        assert batch is not None
        return replace(batch, times=(time.time() - LATE,) * len(batch))

    def _nothing(self) -> Batch:
        return Batch(torch.empty(0, FEATURES), torch.empty(0, dtype=torch.int64), position=self.position())


def feed(*, records: int, pace: float, gate: Path, refuse: Refuse) -> Paced:
    """Make one; for `feed.kind`."""
    return Paced(records, pace, gate, refuse)

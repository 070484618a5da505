"""Messages of several partitions, brought into one order."""

from collections import deque
from collections.abc import Collection, Mapping
from typing import Any


class Merge:
    """Messages of several partitions in the order of their time stamps, and within a partition in its own.

    One is given only when every partition has one to compare it with, or none at all. So what was there when reading
    began comes in the same order every time.

    Args:
        offsets: of the next message, by partition.
    """

    def __init__(self, offsets: Mapping[int, int]) -> None:
        self.offsets = dict(offsets)
        self.lost: set[int] = set()
        self._queues: dict[int, deque[Any]] = {partition: deque() for partition in offsets}
        self._ended: set[int] = set()

    def add(self, message: Any) -> None:
        """Take in a message."""
        if message.partition() in self._queues:
            self._queues[message.partition()].append(message)
            self._ended.discard(message.partition())

    def end(self, partition: int) -> None:
        """Take in that a partition has no more for now."""
        self._ended.add(partition)

    def drop(self, partitions: Collection[int]) -> None:
        """Forget partitions, and what waits of them."""
        for partition in partitions:
            for known in (self.offsets, self._queues):
                known.pop(partition, None)

    @property
    def ready(self) -> bool:
        """Whether it is known which message comes next."""
        queues = self._queues
        return any(queues.values()) and all(queue or number in self._ended for number, queue in queues.items())

    def take(self, most: int) -> list[Any]:
        """Return up to `most` messages."""
        taken: list[Any] = []
        while len(taken) < most and self.ready:
            first = min(filter(None, self._queues.values()), key=lambda queue: queue[0].timestamp()[1])
            message = first.popleft()
            self.offsets[message.partition()] = message.offset() + 1
            taken.append(message)
        return taken

    @property
    def drained(self) -> bool:
        """Whether no partition has any."""
        return all(not queue and number in self._ended for number, queue in self._queues.items())

    def waiting(self, partition: int) -> int:
        """Return how many of a partition wait here."""
        return len(self._queues.get(partition, ()))

    def exhausted(self, partition: int) -> bool:
        """Say whether all of a partition was given."""
        return partition in self._ended and not self._queues[partition]

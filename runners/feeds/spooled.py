"""Sources that give what they have only once, read from a spool on the local disk."""

import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from threading import Condition
from typing import Protocol

from runners.feeds import REPLAYABLE
from runners.feeds.spool import Spool
from runners.feeds.stream import Message, Place, PositionLostError, Start

QUIET_SECONDS = 0.2
"""After which nothing more is taken to be under way just now."""


class Inlet(Protocol):
    """What fills a spool."""

    @property
    def ended(self) -> bool:
        """Whether nothing will come any more."""

    def listen(self, spool: Spool) -> None:
        """Begin to take in, or begin again after a failure.

        Raises:
            UnreachableError: there is nothing to listen to.
        """

    def fill(self, spool: Spool) -> bool:
        """Called where the spool has been read to its end; say whether more has come.

        Raises:
            UnreachableError: nothing can come.
        """

    def close(self) -> None:
        """Let go."""


class Spooled:
    """What comes is on the disk before it is learned, and stays there until it is in two checkpoints.

    Args:
        inlet: fills the spool.
        spool: the lines.
        unwrap: makes a payload of a line.
    """

    def __init__(self, inlet: Inlet, spool: Spool, unwrap: Callable[[bytes], bytes] = bytes) -> None:
        self.capabilities = REPLAYABLE
        self._inlet, self._spool, self._unwrap = inlet, spool, unwrap
        self._place: Place = spool.first()
        self._read = 0

    @property
    def lag(self) -> Mapping[str, int]:
        """Lines that were written and not read yet."""
        return {"0": self._spool.written - self._read}

    @property
    def ended(self) -> bool:
        """Whether the inlet has ended; what is in the spool was read then."""
        return self._inlet.ended

    def open(self, place: Place | None, start: Start) -> Place:
        """Stand after a line of the spool."""
        if place is not None and not self._spool.has(place):
            raise PositionLostError("trimmed", f"segment {place['segment']} of the spool is not as it was")
        ends = {"earliest": self._spool.first, "latest": self._spool.last}
        self._place = ends[start]() if place is None else {**place}
        self._read = self._spool.number(self._place)
        self._inlet.listen(self._spool)
        return self._place

    def peek(self, most: int) -> Sequence[bytes]:
        """Return the oldest payloads of the spool."""
        self._inlet.fill(self._spool)
        oldest = islice(self._spool.lines(self._spool.first()), most)
        return [self._unwrap(line) for line, _ in oldest if line.strip()]

    def read(self, most: int) -> Sequence[Message]:
        """Return the next payloads; more is asked for only where the spool has none."""
        messages: list[Message] = []
        while not messages:
            place = self._place
            for line, place in islice(self._spool.lines(self._place), most):
                self._read += 1
                if line.strip():
                    messages.append(Message(self._unwrap(line), place, place))
            moved, self._place = place != self._place, place
            if not moved and not self._inlet.fill(self._spool):
                break
        return messages

    def commit(self, place: Place) -> None:
        """Release what is safe; what cannot be removed now is when the next checkpoint is there."""
        with suppress(OSError):
            self._spool.release(place)

    def close(self) -> None:
        """Close the inlet and the spool."""
        try:
            self._inlet.close()
        finally:
            self._spool.close()


class Arrivals:
    """Tells the reader of a spool that something was written to it, by another thread.

    Args:
        quiet: seconds after which nothing more is taken to be under way.
    """

    def __init__(self, quiet: float = QUIET_SECONDS) -> None:
        self._quiet = quiet
        self._changed = Condition()
        self._count, self._heard = 0, 0
        self._latest = 0.0

    def note(self, come: int = 1) -> None:
        """Say that something has come, or that it may come any moment now."""
        with self._changed:
            self._count += come
            self._latest = time.monotonic()
            self._changed.notify()

    def wait(self) -> bool:
        """Say whether anything has come since the last call; wait for it only while things are coming."""
        with self._changed:
            while self._count == self._heard:
                left = self._latest + self._quiet - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            self._heard = self._count
            return True


def as_line(payload: bytes) -> bytes:
    """Return any payload as a line."""
    return b64encode(payload) + b"\n"


def from_line(line: bytes) -> bytes:
    """Return the payload of a line that `as_line` made."""
    return b64decode(line)

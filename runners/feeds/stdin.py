"""Lines of standard input: at most once, or from a spool, where each is learned exactly once."""

import os
import select
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from runners.feeds import NONE, Capabilities, Refuse
from runners.feeds.formats import decoder
from runners.feeds.spool import Spool
from runners.feeds.spooled import Spooled
from runners.feeds.stream import Message, Place, Start, StreamFeed, UnreachableError, open_stream, reading

CHUNK = 1 << 16
"""Bytes that are taken from the pipe at once; more stay with whoever writes them."""


class Pipe:
    """Lines as they come, without waiting; what was taken and not learned is gone with the process."""

    def __init__(self, descriptor: int) -> None:
        self.capabilities = Capabilities(replayable=False, promise="at most once")
        self.lag: Mapping[str, int] = NONE
        self.ended = False
        self._descriptor = descriptor
        self._rest = self._kept = b""
        self._spool: Spool | None = None
        self._lines: deque[bytes] = deque()
        self._taken = 0

    def open(self, place: Place | None, start: Start) -> Place:  # noqa: ARG002 - a pipe has one end only
        """Stand where the pipe stands."""
        self._taken = place["taken"] if place is not None else 0
        return {"taken": self._taken}

    def peek(self, most: int) -> Sequence[bytes]:
        """Return the lines that have come, and keep them."""
        self._fill()
        return list(islice(self._lines, most))

    def read(self, most: int) -> Sequence[Message]:
        """Return the lines that have come."""
        if len(self._lines) < most:
            self._fill()
        messages = []
        for _ in range(min(most, len(self._lines))):
            self._taken += 1
            messages.append(Message(self._lines.popleft(), {"taken": self._taken}, {"line": self._taken}))
        return messages

    def take(self) -> bytes:
        """Return the bytes that have come; none where there are none now."""
        if self.ended or not select.select([self._descriptor], [], [], 0)[0]:
            return b""
        data = os.read(self._descriptor, CHUNK)
        self.ended = not data
        return data

    def fill(self, spool: Spool) -> bool:
        """Move what has come to a spool, and no more where it cannot be written; say whether anything has."""
        self._kept = self._kept or self.take()
        come, before = bool(self._kept), spool.bytes_written
        try:
            spool.append(self._kept)
            if self.ended:
                spool.end_line()
        except OSError as error:
            raise UnreachableError(f"the spool cannot be written: {error}") from error
        finally:
            self._kept = self._kept[spool.bytes_written - before :]
        return come

    def _fill(self) -> None:
        *lines, self._rest = (self._rest + self.take()).split(b"\n")
        if self.ended and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        self._lines.extend(line for line in lines if line.strip())

    def commit(self, place: Place) -> None:
        """Do nothing: a pipe gives nothing again."""

    def listen(self, spool: Spool) -> None:
        """Do nothing but remember where to: a pipe is there."""
        self._spool = spool

    def close(self) -> None:
        """Write what was taken and could not be written; leave standard input open, as it is not ours.

        Raises:
            OSError: it still cannot be.
        """
        if self._kept and self._spool is not None:
            try:
                self.fill(self._spool)
            except UnreachableError as error:
                raise OSError(f"{len(self._kept)} bytes of standard input are lost: {error}") from error


def stdin(
    *,
    spool: Path | None = None,
    format: Literal["json", "csv"] = "json",  # noqa: A002 - the user's word for it
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ",",
    descriptor: int | None = None,
    max_classes: int,
    refuse: Refuse,
    **options: Any,
) -> StreamFeed:
    """Read standard input, a record a line, to its end.

    Args:
        spool: a folder in which lines are kept until they are in two checkpoints; left out, a crash costs what was
            read since the last one.
        format: of a line: a JSON object, or a row of CSV, without a header.
        delimiter: of CSV.
        descriptor: of the pipe; standard input, unless given.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be used.
        options: those of `runners.feeds.stream.Reading`.

    Raises:
        FeedError: no record came in time.
        ConfigError: a setting does not fit.
    """
    settings = reading(options)
    pipe = Pipe(sys.stdin.fileno() if descriptor is None else descriptor)
    return open_stream(
        Spooled(pipe, Spool(spool)) if spool is not None else pipe,
        decoder(format, columns=settings.columns, delimiter=delimiter),
        settings,
        about={"kind": "stdin", "key": "kind", "stream": "stdin", "address": "kind", "at": "stdin"},
        max_classes=max_classes,
        refuse=refuse,
    )

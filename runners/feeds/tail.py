"""A file that grows: followed line by line, and through its rotation."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal
from zlib import crc32

from pydantic import Field

from runners.feeds import NONE, REPLAYABLE, Refuse
from runners.feeds.formats import decoder
from runners.feeds.stream import (
    Message,
    Place,
    PositionLostError,
    Start,
    StreamFeed,
    UnreachableError,
    open_stream,
    reading,
)
from streamkd.errors import ConfigError

HEAD = 256
"""First bytes of a file by which it is known again, beside its inode, which another file may get."""


class Tail:
    """The lines of a file, of those it was before it was rotated, and of those that will take its place.

    Rotation by renaming is followed: `log` becomes `log.1`, is read to its end, and then the new `log` from its start.
    A file that is cut (copytruncate) may lose lines between the copy and the cut; it is told as a lost position.

    Args:
        path: where the newest file is.
        header: whether the first line of every file is none of the records.
    """

    def __init__(self, path: Path, *, header: bool) -> None:
        self.capabilities = REPLAYABLE
        self.lag: Mapping[str, int] = NONE
        self.ended = False
        self._path, self._header = path, header
        self._file: BinaryIO | None = None

    def open(self, place: Place | None, start: Start) -> Place:
        """Stand after a line, in whichever file it is now."""
        self.close()
        try:
            if place is not None:
                self._file = self._find(place)
                self._file.seek(place["offset"])
            else:
                self._file = self._path.open("rb")
                if start == "latest":
                    self._file.seek(_last_newline(self._file))
            return self._place(self._file)
        except OSError as error:
            raise UnreachableError(error.strerror or str(error)) from error

    def peek(self, most: int) -> Sequence[bytes]:
        """Return the first lines of the newest file."""
        try:
            with self._path.open("rb") as file:
                if self._header:
                    file.readline()
                lines = [file.readline() for _ in range(most)]
        except OSError as error:
            raise UnreachableError(error.strerror or str(error)) from error
        return [line for line in lines if line.endswith(b"\n") and line.strip()]

    def read(self, most: int) -> Sequence[Message]:
        """Return the next whole lines."""
        messages: list[Message] = []
        while len(messages) < most and (line := self._line()) is not None:
            place = self._place(self._opened)
            if line.strip() and not (self._header and place["offset"] == len(line)):
                messages.append(Message(line, place, {"offset": place["offset"] - len(line)}))
        return messages

    @property
    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = self._path.open("rb")
        return self._file

    def _line(self) -> bytes | None:
        """Return the next line; at the end of a file that was rotated away, the first of the one after it."""
        file = self._opened
        offset = file.tell()
        line = file.readline()
        if line.endswith(b"\n"):
            return line
        if os.fstat(file.fileno()).st_size < offset:
            raise PositionLostError("recreated", f"the file was cut to fewer than the {offset} bytes that were read")
        following = self._following(file)
        if following is None:
            file.seek(offset)  # the rest of the line is still being written
            return None
        line += file.readline()
        file.close()
        self._file = following.open("rb")
        return line or self._line()

    def _following(self, file: BinaryIO) -> Path | None:
        """Return the file that was begun after this one was rotated away."""
        there = self._siblings()
        inodes = [path.stat().st_ino for path in there]
        inode = os.fstat(file.fileno()).st_ino
        after = inodes.index(inode) + 1 if inode in inodes else len(there) - 1
        return there[after] if after < len(there) and there[-1] == self._path else None

    def _siblings(self) -> list[Path]:
        """Return the file and those rotated away, the oldest first."""
        rotated = [path for path in self._path.parent.glob(f"{self._path.name}.*") if path.suffix != ".gz"]
        ages = sorted(rotated, key=lambda path: path.stat().st_mtime_ns)
        return [*ages, self._path] if self._path.exists() else ages

    def _find(self, place: Place) -> BinaryIO:
        for path in self._siblings():
            file = path.open("rb")
            if os.fstat(file.fileno()).st_ino == place["inode"]:
                size = os.fstat(file.fileno()).st_size
                if size >= place["offset"] and crc32(file.read(min(HEAD, place["offset"]))) == place["head"]:
                    return file
                file.close()
                raise PositionLostError(
                    "recreated", f"the file is not the one of which {place['offset']} bytes were read"
                )
            file.close()
        if not self._path.exists():
            raise UnreachableError("No such file or directory")
        raise PositionLostError("trimmed", "the file that was being read is gone, and with it what was not read of it")

    def _place(self, file: BinaryIO) -> Place:
        offset = file.tell()
        return {
            "inode": os.fstat(file.fileno()).st_ino,
            "offset": offset,
            "head": crc32(os.pread(file.fileno(), min(HEAD, offset), 0)),
        }

    def commit(self, place: Place) -> None:
        """Do nothing: a file waits for nobody."""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _last_newline(file: BinaryIO) -> int:
    """Return the place after the last whole line."""
    size = file.seek(0, os.SEEK_END)
    for end in range(size, 0, -HEAD):
        file.seek(max(0, end - HEAD))
        at = file.read(min(HEAD, end)).rfind(b"\n")
        if at >= 0:
            return max(0, end - HEAD) + at + 1
    return 0


def tail(
    path: Path,
    *,
    format: Literal["json", "csv"] = "json",  # noqa: A002 - the user's word for it
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ",",
    max_classes: int,
    refuse: Refuse,
    **options: Any,
) -> StreamFeed:
    """Follow a file as it grows, a record a line.

    Args:
        path: where the newest file is; those rotated away are beside it, with a suffix more.
        format: of a line: a JSON object, or a row of CSV. Unless `columns` are given, the first line of every file of
            CSV names them.
        delimiter: of CSV.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be used.
        options: those of `runners.feeds.stream.Reading`.

    Raises:
        FeedError: there is no such file, or no record came in time.
        ConfigError: a setting does not fit.
    """
    settings = reading(options)
    header = format == "csv" and not settings.columns
    if header:
        settings = settings.model_copy(update={"columns": _header(path, delimiter)})
    return open_stream(
        Tail(path, header=header),
        decoder(format, columns=settings.columns, delimiter=delimiter),
        settings,
        about={"kind": "tail", "key": "path", "stream": str(path), "address": "path", "at": str(path)},
        max_classes=max_classes,
        refuse=refuse,
    )


def _header(path: Path, delimiter: str) -> tuple[str, ...]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = tuple(name.strip() for name in file.readline().split(delimiter))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"feed.path = {str(path)!r}: its first line cannot be read: {error}") from None
    return names

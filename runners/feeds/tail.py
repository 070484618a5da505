"""A file that grows: followed line by line, and through its rotation."""

import errno
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from glob import escape
from gzip import GzipFile
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, cast

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
UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file can end with, a compressed one in particular."""


class Sibling(NamedTuple):
    """A file, as it was when those beside it were looked up.

    Attributes:
        path: that it had.
        stat: of the file.
    """

    path: Path
    stat: os.stat_result

    def open(self) -> BinaryIO:
        """Open it, and what was compressed as what it was.

        Raises:
            FileNotFoundError: it has another name now.
        """
        file = cast("BinaryIO", GzipFile(self.path)) if self.path.suffix == ".gz" else self.path.open("rb")
        if os.fstat(file.fileno()).st_ino != self.stat.st_ino:
            file.close()
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return file


class Tail:
    """The lines of a file, of those it was before it was rotated, and of those that will take its place.

    Rotation by renaming is followed: `log` becomes `log.1` or `log-20261121`, perhaps compressed by gzip; it is read to
    its end, and then what was begun after it, up to the new `log`. Where it is gone, and others were rotated away after
    it, nobody knows what was between: that is told as a lost position. So is a file that is cut (copytruncate), which
    may lose lines between the copy and the cut.

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
        try:
            if place is not None:
                self._stand(self._find(place).open(), place["offset"])
            else:
                file = self._path.open("rb")
                self._stand(file, _last_newline(file) if start == "latest" else 0)
            return self._place()
        except UNREADABLE as error:
            raise _unreadable(error) from error

    def peek(self, most: int) -> Sequence[bytes]:
        """Return the first lines of the newest file."""
        try:
            with self._path.open("rb") as file:
                if self._header:
                    file.readline()
                lines = [file.readline() for _ in range(most)]
        except OSError as error:
            raise _unreadable(error) from error
        return [line for line in lines if line.endswith(b"\n") and line.strip()]

    def read(self, most: int) -> Sequence[Message]:
        """Return the next whole lines."""
        messages: list[Message] = []
        try:
            self._check()
            while len(messages) < most and (line := self._line()) is not None:
                place = self._place()
                if line.strip() and not (self._header and place["offset"] == len(line)):
                    messages.append(Message(line, place, {"offset": place["offset"] - len(line)}))
        except FileNotFoundError:
            pass  # files are being renamed just now: the next call finds them
        except UNREADABLE as error:
            raise _unreadable(error) from error
        except PositionLostError:
            if not messages:  # else it is told by the next call
                raise
        return messages

    @property
    def _opened(self) -> BinaryIO:
        return self._file or self._stand(self._path.open("rb"))

    def _stand(self, file: BinaryIO, offset: int = 0) -> BinaryIO:
        """Leave the file that is open for another, and return that."""
        self.close()
        self._file = file
        file.seek(0)
        self._head = file.read(min(HEAD, offset))
        file.seek(max(0, offset - HEAD))
        self._last = file.read(min(HEAD, offset))
        return file

    def _check(self) -> None:
        """Hold what was read last against what is there now; a file that was cut may have grown beyond it again."""
        file, last = self._opened, self._last
        offset = file.tell()
        if not isinstance(file, GzipFile) and os.pread(file.fileno(), len(last), offset - len(last)) != last:
            raise PositionLostError("recreated", f"the file was cut, or written anew, since {offset} bytes were read")

    def _line(self) -> bytes | None:
        """Return the next line; at the end of a file that was rotated away, the first of the one after it."""
        file = self._opened
        offset = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(offset)  # the rest of the line may still be being written
            following = self._following(file)
            line = file.readline() if following else b""  # again: some may have come before it was rotated away
            if not line.endswith(b"\n"):
                file.seek(offset)
                if following is None:
                    return None
                self._stand(following.open())
                return line or self._line()
        self._head += line[: HEAD - len(self._head)]
        self._last = line
        return line

    def _following(self, file: BinaryIO) -> Sibling | None:
        """Return the file that was begun after this one was rotated away, once it has anything.

        Until then, whoever writes may not have noticed, and still be writing to this one.
        """
        held, newest = os.fstat(file.fileno()), self._path.stat()  # one look, as long as nothing was rotated
        if newest.st_ino == held.st_ino:
            return None
        there = _siblings(self._path)
        if not there or there[-1].path != self._path:
            return None
        at = _index(there, self._place())
        if at is None:
            if any(one.stat.st_mtime_ns > held.st_mtime_ns for one in there[:-1]):
                raise PositionLostError("trimmed", "the file that was being read is gone, and perhaps some after it")
            at = len(there) - 2
        return next((one for one in there[at + 1 :] if one.stat.st_size), None)

    def _find(self, place: Place) -> Sibling:
        there = _siblings(self._path)
        at = _index(there, place)
        if at is not None:
            return there[at]
        if not self._path.exists():
            raise UnreachableError("No such file or directory")
        if any(one.stat.st_ino == place["inode"] for one in there):
            raise PositionLostError("recreated", f"the file is not the one of which {place['offset']} bytes were read")
        raise PositionLostError("trimmed", "the file that was being read is gone, and with it what was not read of it")

    def _place(self) -> Place:
        file = self._opened
        return {"inode": os.fstat(file.fileno()).st_ino, "offset": file.tell(), "head": zlib.crc32(self._head)}

    def commit(self, place: Place) -> None:
        """Do nothing: a file waits for nobody."""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _unreadable(error: Exception) -> UnreachableError:
    return UnreachableError(getattr(error, "strerror", None) or str(error))


def _siblings(path: Path) -> list[Sibling]:
    """Return a file and those rotated away, whose names have a number or a date more, the oldest first."""
    before: list[tuple[Path, int]] | None = None
    while True:  # until it is the same twice: one that is renamed meanwhile may not be seen at all
        with suppress(FileNotFoundError):
            there = _look(path)
            now = [(one.path, one.stat.st_ino) for one in there]
            if now == before:
                return there
            before = now


def _look(path: Path) -> list[Sibling]:
    beside = path.parent.glob(f"{escape(path.name)}[.-][0-9]*")
    rotated = {one for one in beside if one.is_file()}
    packing = {one.with_name(f"{one.name}.gz") for one in rotated}
    ages = sorted((Sibling(one, one.stat()) for one in rotated - packing), key=lambda one: one.stat.st_mtime_ns)
    return [*ages, Sibling(path, path.stat())] if path.exists() else ages


def _index(there: Sequence[Sibling], place: Place) -> int | None:
    """Return which of the files has a place: the one it was taken in, or else what it was compressed to since."""
    found = [at for at, one in enumerate(there) if one.stat.st_ino == place["inode"] and _has(one, place)]
    if not found and place["offset"]:
        found = [at for at, one in enumerate(there) if one.path.suffix == ".gz" and _has(one, place)]
    return found[0] if len(found) == 1 else None


def _has(one: Sibling, place: Place) -> bool:
    """Say whether a file begins as the one that a place was taken in, and has a line that ends there."""
    offset = place["offset"]
    try:
        with one.open() as file:
            if zlib.crc32(file.read(min(HEAD, offset))) != place["head"]:
                return False  # before a place in what is compressed is looked for, which takes long
            file.seek(max(0, offset - 1))
            return not offset or file.read(1) == b"\n"
    except FileNotFoundError:
        raise
    except UNREADABLE:
        return False


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
        path: where the newest file is; those rotated away are beside it, with a number or a date more
            (`log.1`, `log-20261121.gz`).
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
        # Where the newest was begun just now, one that was rotated away tells.
        written = next((one for one in reversed(_siblings(path)) if one.stat.st_size), None)
        with written.open() if written else path.open("rb") as file:
            names = tuple(name.strip() for name in file.readline().decode("utf-8-sig").split(delimiter))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"feed.path = {str(path)!r}: its first line cannot be read: {error}") from None
    return names

"""Lines of a file, plain or gzip, with their places: streamed, so that size costs no memory."""

import gzip
import io
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, cast
from zlib import crc32

from streamkd.errors import FeedError

AT_ONCE = 1 << 17
"""Bytes of a file that are held in memory."""
LONGEST = 1 << 20
"""A line of more bytes than this is refused: a feed that lost its newlines must not fill the memory."""
_DAMAGE = (EOFError, OSError, zlib.error)


@dataclass(frozen=True, slots=True)
class Line:
    """One line.

    Attributes:
        raw: its bytes, newline included; cut at LONGEST.
        number: in the file, the first being 1.
        offset: in the file as it is after decompression, of its first byte.
        end: of the byte after its last.
    """

    raw: bytes
    number: int
    offset: int
    end: int

    @property
    def too_long(self) -> bool:
        """Whether part of the line was thrown away."""
        return self.end - self.offset > len(self.raw)


class Lines:
    """A file's lines, one after the other, some of which may be given back to be read again."""

    def __init__(self, path: Path) -> None:
        try:
            if path.exists() and not path.is_file():
                raise FeedError(f"feed.path = {str(path)!r}: not a file; name a file")
            self._raw = cast("BufferedReader", path.open("rb", buffering=AT_ONCE))
            self._size = path.stat().st_size
            self._file = _decompressed(self._raw)
        except OSError as error:
            raise FeedError(f"feed.path = {str(path)!r}: {error.strerror or error}; check the path") from None
        self._returned: deque[Line] = deque()
        self._broken = False
        self._damage = ""
        self._last: Line | None = None
        self.number = 1
        self.offset = 0

    def next(self) -> Line | None:
        """Return the next line; None at the end, or where the file breaks off."""
        line = self._returned.popleft() if self._returned else self._read()
        if line is not None:
            self._last = line
            self.number, self.offset = line.number + 1, line.end
        return line

    def damage(self) -> str:
        """Return why a compressed file breaks off here, once; empty where it simply ends."""
        damage, self._damage = self._damage, ""
        return damage

    def ready(self) -> bytes:
        """Return whole lines that lie ready in memory, and stay before them; empty where there is none."""
        if self._returned or self._broken:
            return b""
        try:
            ready = self._file.peek()
        except _DAMAGE as error:
            self._broken, self._damage = True, str(error)
            return b""
        return ready[: ready.rfind(b"\n") + 1]

    def pass_over(self, lines: Sequence[bytes]) -> None:
        """Go on after the first of the lines that lie `ready`."""
        sizes = list(map(len, lines))
        end = self.offset + sum(sizes)
        self._file.seek(end)
        self.number, self.offset = self.number + len(lines), end
        self._last = Line(lines[-1], self.number - 1, end - sizes[-1], end)

    def give_back(self, lines: list[Line], last: Line | None) -> None:
        """Put lines back in front, so that `last` is the one that was read last."""
        self._returned.extendleft(reversed(lines))
        self._last = last
        if lines:
            self.number, self.offset = lines[0].number, lines[0].offset

    def place(self) -> dict[str, int]:
        """Return where the next line starts, with a checksum of the line before it."""
        last = self._last or Line(b"", 0, 0, 0)
        return {
            "offset": self.offset,
            "line": self.number,
            "last_offset": last.offset,
            "last_bytes": len(last.raw),
            "last_crc32": crc32(last.raw),
        }

    def find(self, place: Mapping[str, int]) -> None:
        """Go to where `place` was taken.

        Raises:
            FeedError: the file is not the one it was, or the line before has grown since.
        """
        try:
            self._file.seek(place["last_offset"])
            raw = self._file.read(place["last_bytes"])
            self.seek(place["offset"], place["line"])
        except _DAMAGE as error:
            raise FeedError(f"feed.path: cannot go back to byte {place['offset']}: {error}") from None
        rest = b"" if raw.endswith(b"\n") or not raw else self._file.readline(LONGEST)
        if crc32(raw) != place["last_crc32"] or rest.strip():
            raise FeedError(
                f"feed.path: line {place['line'] - 1} is not what it was when the checkpoint was made; give back the "
                "file as it was, or start afresh with another checkpoint.directory"
            )
        self._last = Line(raw, place["line"] - 1, place["last_offset"], place["offset"])
        self.offset += len(rest)

    def seek(self, offset: int, number: int) -> None:
        """Go to a line by its place; in a compressed file all before it is read again."""
        self._returned.clear()
        self._broken, self._damage = False, ""
        self._file.seek(offset)
        self.offset, self.number = offset, number

    @property
    def progress(self) -> float:
        """How much of the file was read, 0 to 1; in a compressed file, of its compressed bytes."""
        return min(1.0, self._raw.tell() / max(1, self._size))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._raw.close()

    def _read(self) -> Line | None:
        if self._broken:
            return None
        try:
            raw = self._file.readline(LONGEST)
            size = len(raw)
            while size >= LONGEST and not raw.endswith(b"\n"):
                rest = self._file.readline(LONGEST)
                size += len(rest)
                if not rest or rest.endswith(b"\n"):
                    break
        except _DAMAGE as error:
            self._broken, self._damage = True, str(error)
            return None
        return Line(raw, self.number, self.offset, self.offset + size) if raw else None


class _Inflated(io.RawIOBase):
    """What a gzip file holds, up to where it is damaged.

    gzip itself loses what it has read of a request when the damage comes in the middle of it.
    """

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file
        self._damage: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        filled = 0
        while filled < len(into) and self._damage is None:
            try:
                data = self._file.read1(len(into) - filled)
            except _DAMAGE as error:
                self._damage = error
                break
            if not data:
                break
            into[filled : filled + len(data)] = data
            filled += len(data)
        if self._damage is not None and not filled:
            raise self._damage
        return filled

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._damage = None
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file, plain or gzip, for reading."""
    with path.open("rb") as raw, closing(_decompressed(raw)) as file:
        yield file


def _decompressed(raw: BufferedReader) -> BufferedReader:
    """Read a file by what it holds, not by what it is called."""
    compressed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return BufferedReader(_Inflated(gzip.GzipFile(fileobj=raw)), AT_ONCE) if compressed else raw

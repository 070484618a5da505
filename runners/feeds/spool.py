"""A log of lines on the local disk, in segments: for sources that give what they have only once."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from runners.folders import sole
from streamkd.errors import ConfigError

MOST_BYTES = 1 << 30
SEGMENT_BYTES = 16 << 20


class Spool:
    """Lines are appended at one end, and taken away at the other, a segment at a time.

    Args:
        directory: for the segments; all other processes are kept off it.
        most_bytes: of all segments, before it is full.
        segment_bytes: of a segment before the next one is begun.
        whole: whether lines are appended whole. Then one that a kill cut short was answered for to nobody, and is taken
            away; else it is ended, lest the next become part of it.

    Attributes:
        written: lines that this process appended.
        bytes_written: likewise; where an append fails, of which only some segments have theirs.

    One thread may append while another reads and prunes.

    Raises:
        ConfigError: it cannot be made, or another process has it.
    """

    def __init__(
        self,
        directory: Path,
        most_bytes: int = MOST_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
        *,
        whole: bool = False,
    ) -> None:
        self.written = self.bytes_written = 0
        self._directory, self._most_in_all = directory, most_bytes
        self._most = min(segment_bytes, most_bytes // 4)
        self._lock = Lock()
        self._sole = sole(directory, key="feed.spool", does="takes records in")
        self._released: Mapping[str, Any] | None = None
        try:
            self._number = max(self._numbers(), default=1)
            self._file = self._path(self._number).open("ab", buffering=0)
            self._sync_directory()
            self._size = sum(self._path(number).stat().st_size for number in self._numbers())
            if whole:
                self._drop_rest()
            else:
                self.end_line()
        except OSError as error:
            self._sole.close()
            raise ConfigError(f"feed.spool = {str(directory)!r}: {error.strerror or error}; name another") from None

    def end_line(self) -> None:
        """End a line that was cut short, by a kill or at the end of the source, lest the next become part of it."""
        if self._rest():
            self.append(b"\n")

    def _drop_rest(self) -> None:
        """Take away a line that was cut short."""
        rest = self._rest()
        self._cut(self._file.tell() - rest)
        self._size -= rest

    def _rest(self) -> int:
        """Return how many bytes come after the last whole line."""
        with self._path(self._number).open("rb") as file:
            rest = 0
            for line in file:
                rest = 0 if line.endswith(b"\n") else len(line)
            return rest

    def _cut(self, size: int) -> None:
        self._file.truncate(size)
        self._file.seek(size)

    def append(self, data: bytes) -> None:
        """Write bytes, and return when they are on the disk; a segment ends where a line does."""
        with self._lock:
            while data:
                cut = data.find(b"\n", max(0, self._most - self._file.tell())) + 1
                self._write(data[: cut or None])
                if not cut:
                    return
                self._next_segment()
                data = data[cut:]

    def _write(self, data: bytes) -> None:
        """Write bytes; what a full disk took of them is taken back."""
        before = self._file.tell()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):
                self._cut(before)
            raise
        self._size += len(data)
        self.bytes_written += len(data)
        self.written += data.count(b"\n")

    def _next_segment(self) -> None:
        following = self._path(self._number + 1).open("ab", buffering=0)
        self._file.close()
        self._number, self._file = self._number + 1, following
        self._sync_directory()

    def has_room(self) -> bool:
        """Say whether more may come, or should wait until some is released; of what was, all goes that is in the way.

        The last segment never goes, whatever its size.
        """
        if self._crowded and self._released is not None:
            self.prune(self._released)
        return not self._crowded

    @property
    def _crowded(self) -> bool:
        return self._size >= self._most_in_all and len(self._numbers()) > 1

    def first(self) -> dict[str, int]:
        """Return the place of the oldest line."""
        return {"segment": min(self._numbers()), "offset": 0}

    def last(self) -> dict[str, int]:
        """Return the place after the newest line."""
        return {"segment": self._number, "offset": self._file.tell()}

    def has(self, place: Mapping[str, Any]) -> bool:
        """Say whether what comes after a place is still there."""
        path = self._path(place["segment"])
        return path.exists() and place["offset"] <= path.stat().st_size

    def number(self, place: Mapping[str, Any]) -> int:
        """Return the number of the line before a place; `written` is the newest's, and 0 the last found at start."""
        with self._lock:
            after = 0
            for segment in range(place["segment"], self._number + 1):
                with self._path(segment).open("rb") as file:
                    file.seek(place["offset"] if segment == place["segment"] else 0)
                    while chunk := file.read(1 << 20):
                        after += chunk.count(b"\n")
            return self.written - after

    def lines(self, place: Mapping[str, Any]) -> Iterator[tuple[bytes, dict[str, int]]]:
        """Give each whole line after a place, with the place after it."""
        segment, offset = place["segment"], place["offset"]
        while segment <= self._number:
            with self._lock:  # what is not yet on the disk may be taken back
                end = self._file.tell() if segment == self._number else self._path(segment).stat().st_size
            with self._path(segment).open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n") or offset + len(line) > end:
                        return
                    offset += len(line)
                    yield line, {"segment": segment, "offset": offset}
            segment, offset = segment + 1, 0

    def release(self, place: Mapping[str, Any]) -> None:
        """Take note that what comes before a place is in a checkpoint, and remove what was in the one before it, too.

        So whoever falls back by one checkpoint finds what came after it, as far as there is room for it.
        """
        before, self._released = self._released, place
        if before is not None:
            self.prune(before)

    def prune(self, place: Mapping[str, Any]) -> None:
        """Remove the segments that end before a place."""
        with self._lock:
            for number in self._numbers():
                if number < place["segment"]:
                    self._size -= self._path(number).stat().st_size
                    self._path(number).unlink()

    def close(self) -> None:
        """Close the segment, and let others have the directory."""
        self._file.close()
        self._sole.close()

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self._directory.glob("*.lines") if path.stem.isdecimal())

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:012}.lines"

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

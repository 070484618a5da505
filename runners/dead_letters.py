"""Records that could not be used: kept with their reason, never dropped."""

import json
import logging
import os
import sys
from base64 import b64encode
from collections import Counter, deque
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

from runners.feeds import DeadLetter
from runners.folders import can_be_written
from streamkd.errors import ConfigError, short

if TYPE_CHECKING:
    from runners.settings import DeadLetterSettings


MOST_UNWRITTEN = 10_000
"""Refused records that wait for a disk that is full."""


class DeadLetters:
    """A file of JSON lines, made when the first record is refused, and rotated.

    Each has `time`, `feed`, `reason`, `detail`, where it stood (`line` and `offset` in a file) and `raw`, the record
    as it came; where it is not UTF-8, what is not is escaped in it, and `raw_base64` has all its bytes.

    One that cannot be written, on a full disk for one, is kept and tried again with the next. Until it is written no
    checkpoint may pass it (`flush` raises), so that a run that ends before reads it once more.

    Args:
        settings: where, how large, and which share of the records may be refused.
        feed: its kind.

    Raises:
        ConfigError: the file cannot be written.

    Attributes:
        counts: records refused so far, by reason.
        failures: attempts to write that failed.
        failure: why the last one did; empty once all are written.
    """

    def __init__(self, settings: "DeadLetterSettings", feed: str) -> None:
        probe(settings.path)
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self.failures = 0
        self.failure = ""
        self._unwritten: deque[str] = deque()
        self._feed = feed
        self._recent: deque[bool] = deque(maxlen=settings.window)
        self._file = RotatingFileHandler(
            settings.path, maxBytes=settings.max_bytes, backupCount=settings.keep, encoding="utf-8", delay=True
        )
        self._file.handleError = self._fail  # type: ignore[method-assign]  # what logging says to override

    def __call__(self, letter: DeadLetter) -> None:
        """Write one record down and count it.

        Raises:
            ConfigError: too large a share of the latest records was refused, or too many could not be written.
        """
        self.counts[letter.reason] += 1
        entry = {
            "time": datetime.now(UTC).isoformat(),
            "feed": self._feed,
            "reason": letter.reason,
            "detail": letter.detail,
            **letter.place,
            **_readable(letter.raw),
        }
        self._unwritten.append(json.dumps(entry))
        self._write()
        if len(self._unwritten) > MOST_UNWRITTEN:
            raise ConfigError(
                f"dead_letters.path = {str(self.settings.path)!r}: {len(self._unwritten)} refused records could not be "
                f"written ({self.failure}); make room, or name another file"
            )
        self._recent.append(True)
        refused, most = sum(self._recent), self.settings.max_share
        if len(self._recent) == self.settings.window and refused > most * self.settings.window:
            raise ConfigError(
                f"dead_letters.max_share = {most}: {refused} of the last {self.settings.window} records could not be "
                f"used, the latest because of {letter.detail}; mend the feed's settings, or raise the share"
            )

    def accepted(self, records: int) -> None:
        """Take in that so many records could be used."""
        self._recent.extend([False] * records)

    @property
    def total(self) -> int:
        """How many records were refused."""
        return self.counts.total()

    def flush(self) -> None:
        """Bring every record to the disk.

        Raises:
            OSError: it could not be.
        """
        self._write()
        if self._unwritten:
            raise OSError(self.failure)
        if self._file.stream is not None:
            os.fsync(self._file.stream.fileno())

    def close(self) -> None:
        """Close the file, if it was needed."""
        self._write()
        with suppress(OSError):
            self._file.close()

    def _write(self) -> None:
        """Write what waits, up to the first that cannot be written."""
        while self._unwritten:
            self.failure = ""
            self._write_line(self._unwritten[0])
            if self.failure:
                self.failures += 1
                return
            self._unwritten.popleft()

    def _write_line(self, line: str) -> None:
        path = self.settings.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            record = logging.makeLogRecord({"msg": "%s", "args": (line,)})
            rotate = self._file.shouldRollover(record)
            if rotate and self._file.stream is not None:
                os.fsync(self._file.stream.fileno())  # it will not be seen again
            before = path.stat().st_size if path.exists() and not rotate else 0
        except OSError as error:
            self.failure = f"{path}: {error.strerror}"
            return
        self._file.handle(record)
        if self.failure:
            with suppress(OSError):
                self._file.close()  # what its buffer holds still waits here
            with suppress(OSError):
                os.truncate(path, min(before, path.stat().st_size))  # no half of a line

    def _fail(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - the handler's
        """Remember why a record could not be written: a full disk must not stop the learning."""
        self.failure = f"{self.settings.path}: {sys.exception()}"


def _readable(raw: bytes) -> dict[str, str]:
    """Return a record as text, and where it is none, all of its bytes beside."""
    try:
        return {"raw": raw.decode()}
    except UnicodeDecodeError:
        return {"raw": raw.decode(errors="backslashreplace"), "raw_base64": b64encode(raw).decode()}


def probe(path: Path) -> None:
    """Find out whether the file could be written, without making it.

    Raises:
        ConfigError: it could not.
    """
    if not can_be_written(path) or path.is_dir():
        raise ConfigError(f"dead_letters.path = {short(str(path))}: cannot be written; name a file that can")

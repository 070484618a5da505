"""Records that could not be used: kept with their reason, never dropped."""

import json
import logging
import os
import sys
from collections import Counter, deque
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

from runners.feeds import DeadLetter
from streamkd.errors import ConfigError

if TYPE_CHECKING:
    from runners.settings import DeadLetterSettings


class DeadLetters:
    """A file of JSON lines, made when the first record is refused, and rotated.

    Each has `time`, `feed`, `reason`, `detail`, where it stood (`line` and `offset` in a file) and `raw`, the record
    as it came, with bytes that are not UTF-8 escaped.

    Args:
        settings: where, how large, and which share of the records may be refused.
        feed: its kind.

    Raises:
        ConfigError: the file cannot be written.

    Attributes:
        counts: records refused so far, by reason.
        failure: what went wrong when one was last written; empty if nothing did.
    """

    def __init__(self, settings: "DeadLetterSettings", feed: str) -> None:
        probe(settings.path)
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self.failure = ""
        self._feed = feed
        self._recent: deque[bool] = deque(maxlen=settings.window)
        self._file = RotatingFileHandler(
            settings.path, maxBytes=settings.max_bytes, backupCount=settings.keep, encoding="utf-8", delay=True
        )
        self._file.handleError = self._fail  # type: ignore[method-assign]

    def __call__(self, letter: DeadLetter) -> None:
        """Write one record down and count it.

        Raises:
            ConfigError: too large a share of the latest records was refused.
        """
        self.counts[letter.reason] += 1
        entry = {
            "time": datetime.now(UTC).isoformat(),
            "feed": self._feed,
            "reason": letter.reason,
            "detail": letter.detail,
            **letter.place,
            "raw": letter.raw.decode("utf-8", errors="backslashreplace"),
        }
        self.settings.path.parent.mkdir(parents=True, exist_ok=True)
        self._file.handle(logging.makeLogRecord({"msg": "%s", "args": (json.dumps(entry),)}))
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
        """Bring what was written to the disk."""
        if self._file.stream is not None:
            try:
                self._file.flush()
                os.fsync(self._file.stream.fileno())
            except OSError as error:
                self.failure = f"{self.settings.path}: {error.strerror}"

    def close(self) -> None:
        """Close the file, if it was needed."""
        with suppress(OSError):  # told already, by `flush`
            self._file.close()

    def _fail(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - the handler's
        """Remember why a record could not be written: a full disk must not stop the learning."""
        self.failure = f"{self.settings.path}: {sys.exception()}"


def probe(path: Path) -> None:
    """Find out whether the file could be written, without making it.

    Raises:
        ConfigError: it could not.
    """
    try:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        target = path if path.exists() else folder
        writable = not path.is_dir() and folder.is_dir() and os.access(target, os.W_OK) and "\0" not in str(path)
    except OSError:  # no file system has room for such a name
        writable = False
    if not writable:
        raise ConfigError(f"dead_letters.path = {str(path)!r}: cannot be written; name a file that can")

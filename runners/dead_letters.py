"""Records that could not be used: kept with their reason, never dropped."""

import json
import os
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from runners.feeds import DeadLetter
from streamkd.errors import ConfigError


class DeadLetters:
    """A file of JSON lines, made when the first record is refused.

    Each has `time`, `feed`, `reason`, `detail`, where it stood (`line` and `offset` in a file) and `raw`, the record
    as it came, with bytes that are not UTF-8 escaped.

    Raises:
        ConfigError: the file cannot be written.

    Attributes:
        counts: records refused so far, by reason.
        failure: what went wrong when one was last written; empty if nothing did.
    """

    def __init__(self, path: Path, feed: str) -> None:
        probe(path)
        self.path = path
        self.failure = ""
        self.counts: Counter[str] = Counter()
        self._feed = feed
        self._file: IO[str] | None = None

    def __call__(self, letter: DeadLetter) -> None:
        """Write one record down and count it."""
        self.counts[letter.reason] += 1
        entry = {
            "time": datetime.now(UTC).isoformat(),
            "feed": self._feed,
            "reason": letter.reason,
            "detail": letter.detail,
            **letter.place,
            "raw": letter.raw.decode("utf-8", errors="backslashreplace"),
        }
        try:
            self._opened().write(json.dumps(entry) + "\n")
        except OSError as error:  # counted all the same: a full disk must not stop the learning
            self.failure = f"{self.path}: {error.strerror}"

    @property
    def total(self) -> int:
        """How many records were refused."""
        return self.counts.total()

    def flush(self) -> None:
        """Bring what was written to the disk."""
        if self._file is not None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                self.failure = f"{self.path}: {error.strerror}"

    def close(self) -> None:
        """Close the file, if it was needed."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _opened(self) -> IO[str]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        return self._file


def probe(path: Path) -> None:
    """Find out whether the file could be written, without making it.

    Raises:
        ConfigError: it could not.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    target = path if path.exists() else folder
    if path.is_dir() or not folder.is_dir() or not os.access(target, os.W_OK):
        raise ConfigError(f"dead_letters.path = {str(path)!r}: cannot be written; name a file that can")

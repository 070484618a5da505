"""Records that could not be used: kept with their reason, never dropped."""

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from runners.feeds import DeadLetter
from streamkd.errors import ConfigError


class DeadLetters:
    """A file of JSON lines, made when the first record is refused.

    Each has `time`, `feed`, `reason`, `detail`, where it stood (`line` and `offset` in a file) and `raw`, the record
    as it came, with bytes that are not UTF-8 escaped.
    """

    def __init__(self, path: Path, feed: str) -> None:
        self.path = path
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
        self._opened().write(json.dumps(entry) + "\n")

    @property
    def total(self) -> int:
        """How many records were refused."""
        return self.counts.total()

    def flush(self) -> None:
        """Bring what was written to the disk."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the file, if it was needed."""
        if self._file is not None:
            self._file.close()

    def _opened(self) -> IO[str]:
        if self._file is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8", buffering=1)
            except OSError as error:
                raise ConfigError(
                    f"dead_letters.path = {str(self.path)!r}: cannot be written: {error.strerror}; name a file that can"
                ) from None
        return self._file

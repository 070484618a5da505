"""The streams that benchmarks are run on: files of the user's, or a made-up one."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.eval_command import kind_of
from runners.settings import Configuration, load
from streamkd.batch import Batch

MADE_UP = 20_000
"""Records of the made-up stream, where no number is given."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream, and how it is given; plain values, so that it can be sent to another process.

    Attributes:
        path: of the file; None for the made-up stream of `runners.feeds.drifting`.
        label: column that holds the labels.
        batch: records predicted before any of their labels is learned.
        records: it ends with the batch in which that many are reached; None: at its own end.
    """

    path: Path | None
    label: str | None
    batch: int
    records: int | None

    @property
    def name(self) -> str:
        """The file's name up to the first dot."""
        return "made-up" if self.path is None else self.path.name.partition(".")[0]

    def configuration(
        self, source: str = "default", overrides: Sequence[str] = (), **extra: str | float
    ) -> Configuration:
        """Return a configuration that learns this stream, on one thread.

        Args:
            source: a file, or the name of a shipped configuration.
            overrides: `key.path=value` each.
            extra: top-level settings, the seed for one.

        Raises:
            ConfigError: a setting is wrong.
        """
        feed: dict[str, Any] = {"feed.kind": "drifting", "feed.records": max(100, self.records or MADE_UP)}
        if self.path is not None:
            feed = {"feed.path": str(self.path), "feed.label": self.label, "feed.kind": kind_of(self.path)}
        return load(source, overrides, {**feed, "batch": self.batch, "threads": 1, **extra})

    def read(self) -> "Records":
        """Read it whole; records that cannot be used are left out.

        Raises:
            StreamkdError: it cannot be read, or no record of it has a label.
        """
        batches: list[Batch] = []
        count = 0
        with closing(self.configuration().open_feed(lambda _: None)) as feed:
            while (self.records is None or count < self.records) and (batch := feed.poll(self.batch)) is not None:
                batches += [batch] if len(batch) else []
                count += len(batch)
            return Records(self, tuple(feed.shape), batches, count)


@dataclass(frozen=True, eq=False, slots=True)
class Records:
    """A stream that was read: its batches in order, the `shape` of one record, and how many there are."""

    stream: Stream
    shape: tuple[int, ...]
    batches: Sequence[Batch]
    count: int

    @property
    def classes(self) -> int:
        """How many classes occur, at least 2."""
        return max(2, 1 + max(int(batch.y.max()) for batch in self.batches))


def streams(data: Sequence[Path], *, label: str | None, batch: int, records: int | None) -> list[Stream]:
    """Return a stream for each file; the made-up one for none."""
    return [Stream(path, label, batch, records) for path in data or (None,)]

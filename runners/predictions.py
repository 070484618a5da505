"""What was answered goes out: a line for each record, safe before the feed's position is."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from runners.feeds.stream import FIRST_WAIT, LONGEST_WAIT
from runners.folders import can_be_written
from streamkd.batch import Batch
from streamkd.errors import ConfigError, reason
from streamkd.report import Report

KINDS = {
    "none": "runners.predictions:nowhere",
    "jsonl": "runners.predictions:json_lines",
    "redis": "runners.sinks:redis_entries",
    "nats": "runners.sinks:nats_messages",
    "kafka": "runners.sinks:kafka_records",
    "mqtt": "runners.sinks:mqtt_publications",
}
"""Where predictions can go, by `predictions.kind`."""
MOST_WAITING = 100_000
"""Predictions that wait for a sink that takes none; then learning waits for it, too."""
AT_ONCE = 1_000
"""Predictions that a sink is given at once."""
REST = 4
"""A sink that is long in failing is left alone for so many times as long, that learning has most of the time."""


class Sink(Protocol):
    """Takes lines, in order."""

    def put(self, lines: Sequence[str]) -> None:
        """Append lines, all or none of them.

        Raises:
            OSError: they could not be appended; they will come again.
        """

    def sync(self) -> None:
        """Make sure that what was put is safe.

        Raises:
            OSError: it could not be made sure.
        """

    def close(self) -> None:
        """Let go."""


class Predictions:
    """Writes what was answered to each record: JSON objects of these keys.

    `record`: its number in the run, the first being 1. `id`: where records have one. `step`: of the models that
    answered. `class`: the likeliest label; null while none was met. `probabilities`: label -> probability, of the
    labels met so far.

    A sink that fails, whatever it raises, does not stop the learning: predictions wait, and no checkpoint passes them.
    It is tried again after a wait that grows. What it took and did not acknowledge in time it gets once more, and a run
    that was killed predicts what it had learned since its last checkpoint once more; `record` tells such doubles.

    Args:
        sink: takes the lines.
        clock: reads seconds; any origin will do.

    Attributes:
        failures: attempts to write that failed.
        failure: why the last of them did.
    """

    def __init__(self, sink: Sink, clock: Callable[[], float] = time.monotonic) -> None:
        self._sink, self._clock = sink, clock
        self._waiting: deque[str] = deque()
        self._wait, self._next_try = FIRST_WAIT, -math.inf
        self.failures = 0
        self.failure = ""

    def __len__(self) -> int:
        """Return how many wait for the sink."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether so many wait that learning is to wait, too."""
        return len(self) >= MOST_WAITING

    def write(self, batch: Batch, report: Report, describe: Callable[[], Mapping[str, Any]]) -> None:
        """Write the answers to a batch.

        Args:
            batch: the records.
            report: of the step that they made.
            describe: the feed's, which knows what the class indices stand for.
        """
        if isinstance(self._sink, Nowhere) or not len(batch):
            return
        labels = _labels(describe(), report.served.shape[1])
        first = report.records - len(batch) + 1
        for row, answer in enumerate(report.served[:, : len(labels)].tolist()):
            line = {
                "record": first + row,
                **({"id": batch.ids[row]} if batch.ids else {}),
                "step": report.step - 1,
                "class": labels[answer.index(max(answer))] if labels else None,
                "probabilities": {label: round(p, 6) for label, p in zip(labels, answer, strict=False)},
            }
            self._waiting.append(json.dumps(line))
        self.catch_up(len(batch))

    def catch_up(self, more: int = 0) -> None:
        """Give the sink some of what waits, unless it failed a moment ago.

        Args:
            more: that came just now: so many beside, or what waits would never become less.
        """
        if self._waiting and self._clock() >= self._next_try:
            with suppress(OSError):
                self._put(AT_ONCE + more)

    def flush(self) -> None:
        """Make sure that every prediction is safe.

        Raises:
            OSError: one is not.
        """
        self._put(len(self))
        with self._tried():
            self._sink.sync()

    def _put(self, most: int) -> None:
        while most > 0 and self._waiting:
            lines = list(islice(self._waiting, min(most, AT_ONCE)))
            with self._tried():
                self._sink.put(lines)
            most -= len(lines)
            for _ in lines:
                self._waiting.popleft()

    @contextmanager
    def _tried(self) -> Iterator[None]:
        """Remember what comes of an attempt, and when to make the next one."""
        began = self._clock()
        try:
            yield
        except Exception as error:
            now = self._clock()
            self._next_try = now + max(self._wait, REST * (now - began))
            self._wait = min(2 * self._wait, LONGEST_WAIT)
            self.failures += 1
            self.failure = str(error) if isinstance(error, OSError) else reason(error)
            raise OSError(self.failure) from error
        self._wait = FIRST_WAIT

    def close(self) -> None:
        """Let go of the sink."""
        with suppress(Exception):  # what it has not taken by now is predicted once more by the next run
            self._sink.close()


class Nowhere:
    """Nobody wants to know."""

    def put(self, lines: Sequence[str]) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def nowhere() -> Nowhere:
    """Write no predictions."""
    return Nowhere()


class Lines:
    """A file, made with the first prediction, a line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def put(self, lines: Sequence[str]) -> None:
        """Append lines; what a full disk took of them is taken back."""
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        data = "".join(f"{line}\n" for line in lines).encode()
        before = os.fstat(self._descriptor).st_size
        written = 0
        try:
            written = os.write(self._descriptor, data)
        finally:
            if written < len(data):
                with suppress(OSError):
                    os.truncate(self._descriptor, before)
        if written < len(data):
            raise OSError(f"{self._path}: {written} of {len(data)} bytes could be written")

    def sync(self) -> None:
        """Bring them to the disk."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        descriptor, self._descriptor = self._descriptor, None  # closed twice, its number may be another file's
        if descriptor is not None:
            os.close(descriptor)


def json_lines(path: Path) -> Lines:
    """Append predictions to a file.

    Args:
        path: of the file.

    Raises:
        ConfigError: it cannot be written.
    """
    if not can_be_written(path) or path.is_dir():
        raise ConfigError(f"predictions.path = {str(path)!r}: cannot be written; name a file that can")
    return Lines(path)


def _labels(description: Mapping[str, Any], classes: int) -> list[str]:
    """Return what class indices stand for; where a feed has no labels of its own, their numbers."""
    labels = description.get("classes")
    return list(labels) if isinstance(labels, list) else [str(index) for index in range(classes)]

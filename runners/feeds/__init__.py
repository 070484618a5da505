"""Where batches come from. A feed is one file here, or a `module:Name` of one's own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

from streamkd.batch import Batch

KINDS = {
    "csv": "runners.feeds.files:text_file",
    "jsonl": "runners.feeds.files:text_file",
    "redis": "runners.feeds.redis_streams:redis_stream",
    "nats": "runners.feeds.jetstream:jetstream",
    "kafka": "runners.feeds.kafka:kafka",
    "mqtt": "runners.feeds.mqtt:mqtt",
    "http": "runners.feeds.http_push:http",
    "tail": "runners.feeds.tail:tail",
    "stdin": "runners.feeds.stdin:stdin",
    "parquet": "runners.feeds.rows:table_file",
    "arrow": "runners.feeds.rows:table_file",
    "iterable": "runners.feeds.rows:iterable",
    "drifting": "runners.feeds.drifting:drifting",
    "npz": "runners.feeds.images:npz",
    "images": "runners.feeds.images:image_folder",
    "torchvision": "runners.feeds.images:torchvision",
}
"""The feeds that ship with streamkd, by `feed.kind`."""
STREAMS = ("redis", "nats", "kafka", "mqtt", "http", "tail", "stdin")
"""Those among them whose columns are, unless given, the keys of the first records that are found there."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that could not be used, and why.

    Attributes:
        reason: one of `REASONS`.
        detail: names the column and the value.
        raw: the record as it came.
        place: where it stands in the feed, e.g. its line.
    """

    reason: str
    detail: str
    raw: bytes
    place: Mapping[str, Any]


REASONS = (
    "encoding",
    "malformed",
    "width",
    "not_a_number",
    "not_finite",
    "no_label_column",
    "too_many_classes",
    "unknown_class",
    "non_finite_step",
    "too_long",
    "truncated",
    "no_id",
    "no_record",
)

Refuse = Callable[[DeadLetter], None]
Promise = Literal["effectively once", "at least once", "at most once"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a feed can do.

    Attributes:
        replayable: it gives the same records again from any position, so that a checkpoint's position is all it needs.
        promise: how often a record reaches the state that is saved. `effectively once`: a run killed at any moment ends
            where an undisturbed one ends. `at least once`: after a crash, what was not committed comes again.
    """

    replayable: bool
    promise: Promise


REPLAYABLE = Capabilities(replayable=True, promise="effectively once")
RESETS = ("trimmed", "recreated", "acknowledged")
"""Why a position can be lost: retention took the records after it, or they are of another stream altogether; or it is
that of a checkpoint before a damaged one, and a source that keeps the position itself was told of the later one."""
STAGES = ("read", "commit")
"""At which a source can fail."""
NONE: Mapping[str, int] = MappingProxyType({})
"""No resets, no failures, no partitions: of a feed that is always there."""


class Feed(Protocol):
    """Gives records in order, and can say and find again where it stands.

    A position is a mapping of plain values. It is opaque to everyone but the feed, is stored inside the checkpoint, and
    carries all that decoding needs to go on as before (the classes met so far, for one).

    A source that goes away while the feed is read is no error: `poll` gives empty batches, `connected` is false, and
    the feed tries again by itself, waiting longer every time. `runners.feeds.conformance` has the laws that feeds keep.
    With `read_ahead` it is polled by another thread than the one that opened it, never by two at once.

    Attributes:
        name: for metrics.
        shape: of one record.
        capabilities: what it promises.
        connected: whether the source can be read now.
        resets: how often its position was lost, by reason, one of `RESETS`.
        failures: how often the source failed, by stage, one of `STAGES`.
    """

    name: str
    shape: tuple[int, ...]
    capabilities: Capabilities

    @property
    def connected(self) -> bool:
        """Whether the source can be read now."""

    @property
    def resets(self) -> Mapping[str, int]:
        """How often its position was lost, by reason."""

    @property
    def failures(self) -> Mapping[str, int]:
        """How often the source failed, by stage."""

    def lag(self) -> Mapping[str, int]:
        """Return how many records wait in the source, by partition; empty where that is not known."""

    def poll(self, records: int) -> Batch | None:
        """Return up to `records` records; an empty batch when there is nothing yet, None at the end."""

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on after the batch that carried `position`."""

    def adopt(self, classes: Sequence[str]) -> None:
        """Number these labels first, in this order, before anything is polled; needed where `describe` tells classes.

        Raises:
            CheckpointError: all labels are given, and are others.
        """

    def progress(self) -> float | None:
        """Return how much of the feed was given, 0 to 1; None where it has no end."""

    def commit(self, position: Mapping[str, Any]) -> None:
        """Tell the source that everything up to `position` is safe in a checkpoint."""

    def describe(self) -> Mapping[str, Any]:
        """Return what a user wants to see of the feed: its columns, its classes."""

    def close(self) -> None:
        """Let go of the source."""

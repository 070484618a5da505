"""Where batches come from. A feed is one file here, or a `module:Name` of one's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from streamkd.batch import Batch

KINDS = {
    "csv": "runners.feeds.files:text_file",
    "jsonl": "runners.feeds.files:text_file",
    "drifting": "runners.feeds.drifting:drifting",
}
"""The feeds that ship with streamkd, by `feed.kind`."""


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
)

Refuse = Callable[[DeadLetter], None]


class Feed(Protocol):
    """Gives records in order, and can say and find again where it stands.

    A position is a mapping of plain values. It is opaque to everyone but the feed, is stored inside the checkpoint, and
    carries all that decoding needs to go on as before (the classes met so far, for one).
    """

    name: str
    shape: tuple[int, ...]

    def poll(self, records: int) -> Batch | None:
        """Return up to `records` records; an empty batch when there is nothing yet, None at the end."""

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on after the batch that carried `position`."""

    def progress(self) -> float | None:
        """Return how much of the feed was given, 0 to 1; None where it has no end."""

    def commit(self, position: Mapping[str, Any]) -> None:
        """Tell the source that everything up to `position` is safe in a checkpoint."""

    def describe(self) -> Mapping[str, Any]:
        """Return what a user wants to see of the feed: its columns, its classes."""

    def close(self) -> None:
        """Let go of the source."""

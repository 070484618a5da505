"""Rows that are all there: Parquet and Arrow files, river's datasets, any iterable of (x, y)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from runners.feeds import NONE, REPLAYABLE, Feed, Refuse
from runners.feeds.formats import Cells, imported
from runners.feeds.stream import Message, Place, PositionLostError, Start, StreamFeed, open_stream, reading
from streamkd.errors import ConfigError, FeedError, reason
from streamkd.parts import imported as named
from streamkd.parts import make
from streamkd.settings import Part

ROWS = 1_024
"""Rows of a table that are decoded at once."""
MakeRows = Callable[[int], Iterator[Cells]]
"""Returns the rows from the given one on."""


class Rows:
    """Rows by their number.

    Args:
        rows: makes them.
        total: how many there are; None where that is not known.
    """

    def __init__(self, rows: MakeRows, total: int | None) -> None:
        self.capabilities = REPLAYABLE
        self.lag: Mapping[str, int] = NONE
        self.ended = False
        self._make, self._total = rows, total
        self._row = 0
        self._rows: Iterator[Cells] = iter(())

    def open(self, place: Place | None, start: Start) -> Place:
        """Stand after a row."""
        if place is not None and place["total"] != self._total:
            raise PositionLostError("recreated", f"it had {place['total']} rows, and now has {self._total}")
        self._row = place["row"] if place is not None else self._total or 0 if start == "latest" else 0
        self._rows = self._make(self._row)
        self.ended = False
        self._count()
        return {"row": self._row, "total": self._total}

    def peek(self, most: int) -> Sequence[Cells]:
        """Return the first rows."""
        return list(islice(self._make(0), most))

    def read(self, most: int) -> Sequence[Message]:
        """Return the next rows."""
        messages = []
        for cells in islice(self._rows, most):
            self._row += 1
            messages.append(Message(cells, {"row": self._row, "total": self._total}, {"row": self._row}))
        self.ended = len(messages) < most
        self._count()
        return messages

    def _count(self) -> None:
        if self._total is not None:
            self.lag = {"0": self._total - self._row}

    def commit(self, place: Place) -> None:
        """Do nothing: a table waits for nobody."""

    def close(self) -> None:
        """Let go of the rows."""
        self._rows = iter(())


def table_file(path: Path, *, kind: str, image: str = "", max_classes: int, refuse: Refuse, **options: Any) -> Feed:
    """Read a table of columns.

    Args:
        path: of the file.
        kind: `parquet`, or `arrow` for what Arrow calls its file format, also known as Feather.
        image: column of images, where records are such; `runners.feeds.images.image_column` has the options then.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be used.
        options: those of `runners.feeds.stream.Reading`.

    Raises:
        FeedError: it cannot be read.
        ConfigError: a setting does not fit.
    """
    if image:
        images = Part.model_validate({**options, "kind": "runners.feeds.images:image_column", "image": image})
        given = {"path": path, "kind": kind, "max_classes": max_classes, "refuse": refuse}
        feed: Feed = make(images, {}, "feed", **given)
        return feed
    settings = reading(options)
    pyarrow = imported("pyarrow.dataset", "arrow", f"feed.kind = {kind!r}")
    try:
        data = pyarrow.dataset(str(path), format=kind)
        total: int = data.count_rows()
    except (OSError, ValueError) as error:  # of which Arrow's own errors are
        raise FeedError(f"feed.path = {str(path)!r}: {reason(error)}; check the path") from None

    def rows(first: int) -> Iterator[Cells]:
        for batch in data.scanner(batch_size=ROWS, use_threads=False).to_batches():
            if first < batch.num_rows:
                yield from batch.slice(first).to_pylist()
            first = max(0, first - batch.num_rows)

    about = {"kind": kind, "key": "path", "stream": str(path), "address": "path", "at": str(path)}
    source = Rows(rows, total)
    return open_stream(source, no_payload, settings, about=about, max_classes=max_classes, refuse=refuse)


def iterable(
    source: str,
    *,
    label: str = "y",
    arguments: Mapping[str, Any] | None = None,
    max_classes: int,
    refuse: Refuse,
    **options: Any,
) -> StreamFeed:
    """Read an iterable of (x, y), as river's datasets are; x is a mapping of features, or a sequence of numbers.

    Args:
        source: `module:Name` of what makes it, e.g. `river.datasets:Phishing`; each call gives the same again.
        label: what the label is called among the features.
        arguments: of the call.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be used.
        options: those of `runners.feeds.stream.Reading`.

    Raises:
        FeedError: it cannot be made.
        ConfigError: there is no such thing, or a setting does not fit.
    """
    settings = reading({"label": label, **options})
    make = named(source, "feed.source")

    def rows(first: int) -> Iterator[Cells]:
        for pair in islice(make(**(arguments or {})), first, None):
            x, y = pair
            features = x if isinstance(x, Mapping) else {f"x{place}": value for place, value in enumerate(x)}
            yield {**{str(name): value for name, value in features.items()}, label: y}

    about = {"kind": "iterable", "key": "source", "stream": source, "address": "source", "at": source}
    try:
        return open_stream(Rows(rows, None), no_payload, settings, about=about, max_classes=max_classes, refuse=refuse)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"feed.source = {source!r}: is not an iterable of (x, y): {reason(error)}") from error


def no_payload(_: bytes) -> Sequence[Cells]:
    """Return nothing: these cells came apart."""
    return ()

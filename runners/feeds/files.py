"""CSV and JSON lines, plain or gzip, read as streams."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from runners.feeds import NONE, REPLAYABLE, DeadLetter, Refuse
from runners.feeds.blocks import Block, ReadBlock, csv_blocks, json_blocks
from runners.feeds.classes import ClassMap
from runners.feeds.decode import Columns, RefusedError, assign
from runners.feeds.lines import Line, Lines
from runners.feeds.records import Decoder, Records
from streamkd.batch import UNLABELLED, Batch
from streamkd.errors import ConfigError, FeedError

LONGEST_RECORD = 100
"""A quoted cell may hold newlines; a record over more lines than this is a quote that was never closed."""
Name = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]
Names = Annotated[tuple[Name, ...], BeforeValidator(lambda value: [value] if isinstance(value, (str, int)) else value)]
MOST_REFUSED = 1_000
"""Records refused in a row before the feed comes up for air."""
FIRST_KEYS = 1_000
"""Lines of a file of JSON objects whose keys are its columns."""
FIRST_LOOK = 10_000
"""Records that are looked at before a feed is taken for readable and labelled."""

_NO_NUMBER = (
    "Name columns of text in feed.categorical or feed.ignore, one of dates in feed.time, and cells that mean "
    "'not known' in feed.missing"
)
ADVICE = {
    "not_a_number": _NO_NUMBER,
    "not_finite": _NO_NUMBER,
    "unknown_class": "Name all labels in feed.classes, or leave it out: they are numbered as they appear then",
}
"""What to do about a file of which no record can be used, by the reason of the first."""


class FileFeed:
    """The records of one file, in order; made by `text_file`.

    Attributes:
        read_block: what reads many lines at once; what it does not read is read line by line.
    """

    def __init__(
        self,
        path: Path,
        lines: Lines,
        reader: "Csv | JsonLines",
        decoder: Decoder,
        refuse: Refuse,
    ) -> None:
        self.name = "file"
        self.capabilities = REPLAYABLE
        self.connected = True
        self.resets = self.failures = NONE
        self.path = path
        self.shape = decoder.shape
        self._lines = lines
        self._reader = reader
        self._decoder = decoder
        self._refuse = refuse
        self._records = 0
        self.read_block: ReadBlock = reader.blocks(decoder.columns)
        self._block: Block | None = None
        self._row = 0  # of the block, to be given next
        self._one_by_one = 0  # up to this byte
        self._place = lines.place()
        self._look()

    def poll(self, records: int) -> Batch | None:
        """Return the next `records` usable records; fewer, or none, where many are refused; None at the end."""
        found: list[Records] = []
        wanted, refused = records, 0
        while (
            wanted
            and refused < MOST_REFUSED
            and (read := self._ahead(wanted) or self._next(self._decoder.classes)) is not None
        ):
            if isinstance(read, DeadLetter):
                self._refuse(read)
                refused += 1
            else:
                found.append(read)
                wanted -= len(read)
            if isinstance(read, Records) or read.reason == "too_long" or read.raw.endswith(b"\n"):  # else it may grow
                self._place = self._lines.place()
        if not found and not refused:
            return None
        self._records += records - wanted
        return self._decoder.batch(found, self.position())

    def position(self) -> dict[str, Any]:
        """Return where the next record starts, and the classes met before it."""
        return {
            "path": str(self.path),
            **self._place,
            "records": self._records,
            **self._decoder.state(),
        }

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on where `position` was taken.

        Raises:
            CheckpointError: columns or classes are not those that were being learned.
            FeedError: the file is not the one it was.
        """
        self._decoder.restore(position)
        self._block, self._one_by_one = None, 0
        self._lines.find(position)
        self._place = self._lines.place()
        self._records = position["records"]

    def adopt(self, classes: Sequence[str]) -> None:
        """Number these labels first.

        Raises:
            CheckpointError: all labels are given, and are others.
        """
        self._decoder.classes.restore(classes)

    def progress(self) -> float:
        """Return how much of the file was read, 0 to 1."""
        return self._lines.progress

    def lag(self) -> Mapping[str, int]:
        """Return nothing: what a file still holds is told by `progress`."""
        return NONE

    def commit(self, position: Mapping[str, Any]) -> None:
        """Do nothing: a file waits for nobody."""

    def describe(self) -> dict[str, Any]:
        """Return path, columns and what is known of the labels."""
        return {"path": str(self.path), **self._decoder.describe()}

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _look(self) -> None:
        """Refuse a file of which nothing can be used, or in which no record has a label."""
        offset, number = self._lines.offset, self._lines.number
        classes = deepcopy(self._decoder.classes)
        refused: list[DeadLetter] = []
        usable = 0
        while usable + len(refused) < FIRST_LOOK and (found := self._next(classes)) is not None:
            if isinstance(found, DeadLetter):
                refused.append(found)
                continue
            usable += 1
            if found.labels != (UNLABELLED,):
                self._lines.seek(offset, number)
                return
        path = f"feed.path = {str(self.path)!r}"
        if usable and (not self._decoder.columns.label or self._lines.next() is not None):
            self._lines.seek(offset, number)
            return  # so long a file may have labels further down; until then it is predicted and counted
        if usable:
            raise ConfigError(
                f"feed.label = {self._decoder.columns.label!r}: none of the first {usable} records has a label there; "
                "name the column that holds the labels"
            )
        if not refused:
            raise FeedError(f"{path}: there is no record in it")
        raise ConfigError(
            f"{path}: none of its first {len(refused)} records can be used; line {refused[0].place['line']}: "
            f"{refused[0].detail}. {ADVICE.get(refused[0].reason, 'Mend the file, or name another')}"
        )

    def _ahead(self, most: int) -> Records | None:
        """Take records from the lines that were read at once; None where the next one is to be read by itself."""
        if self._block is None and self._lines.offset >= self._one_by_one:
            ready = self._lines.ready()
            block = self.read_block(ready) if ready else None
            if block is not None and self._decoder.classes.takes(label for label in block.labels if label is not None):
                self._block, self._row = block, 0
            else:
                self._one_by_one = self._lines.offset + len(ready)
        if self._block is None:
            return None
        rows = self._decoder.rows(self._block, slice(self._row, self._row + most))
        self._lines.pass_over(rows.raw)
        self._row += len(rows)
        if self._row == len(self._block):
            self._block = None
        return rows

    def _next(self, classes: ClassMap) -> Records | DeadLetter | None:
        """Read one record, or say why it cannot be used; None at the end."""
        lines = self._reader.take(self._lines)
        if not lines:
            damage = self._lines.damage()
            place = {"line": self._lines.number, "offset": self._lines.offset}
            return DeadLetter("truncated", f"the file breaks off: {damage}", b"", place) if damage else None
        try:
            return self._decode(lines, classes)
        except RefusedError as error:
            if error.reason in {"malformed", "width"}:
                # A quote that was never closed has swallowed what follows: only its own line is at fault.
                self._lines.give_back(lines[1:], last=lines[0])
                del lines[1:]
            place = {"line": lines[0].number, "offset": lines[0].offset}
            return DeadLetter(error.reason, error.detail, b"".join(line.raw for line in lines), place)

    def _decode(self, lines: list[Line], classes: ClassMap) -> Records:
        if lines[0].too_long:
            raise RefusedError("too_long", f"a line of {lines[0].end - lines[0].offset} bytes")
        try:
            text = b"".join(line.raw for line in lines).decode()
        except UnicodeDecodeError as error:
            raise RefusedError("encoding", f"not UTF-8: {error.reason} at byte {error.start}") from None
        return self._decoder.record(self._reader.cells(text), b"".join(line.raw for line in lines), classes)


class Csv:
    """Comma-separated values (RFC 4180), the first line naming the columns."""

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter
        self._header: list[str] = []

    def columns(self, lines: Lines, path: Path) -> list[str]:
        """Read the header."""
        first = lines.next()
        while first is not None and not first.raw.strip():
            first = lines.next()
        if first is None:
            raise _nothing(lines, path)
        at = f"feed.path = {str(path)!r}"
        if first.too_long:
            raise FeedError(
                f"{at}: its first line, the header, has {first.end - first.offset} bytes; is it a CSV file?"
            )
        try:
            text = first.raw.decode("utf-8-sig")
            if "\0" in text:
                raise FeedError(f"{at}: there are NUL bytes in its first line; convert the file to UTF-8")
            self._header = [name.strip() for name in self._split(text)]
        except UnicodeDecodeError as error:
            raise FeedError(
                f"{at}: its first line is not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8"
            ) from None
        except RefusedError as error:
            raise FeedError(
                f"{at}: its first line is not a CSV header ({error.detail}); a header is one line, closed by a newline"
            ) from None
        return self._header

    def blocks(self, columns: Columns) -> ReadBlock:
        """Return what reads many records at once."""
        return csv_blocks(self._header, columns, self._delimiter)

    def take(self, lines: Lines) -> list[Line]:
        """Take the lines of one record: several, where a quoted cell holds newlines; blank lines are no records."""
        taken: list[Line] = []
        quotes = 0
        while len(taken) < LONGEST_RECORD:
            line = lines.next()
            if line is None:
                break
            if not taken and not line.raw.strip():
                continue
            taken.append(line)
            quotes += line.raw.count(b'"')
            if quotes % 2 == 0:
                break
        return taken

    def cells(self, text: str) -> dict[str, object]:
        """Split one record into its cells."""
        cells = self._split(text)
        if len(cells) != len(self._header):
            raise RefusedError("width", f"{len(cells)} cells, and the header has {len(self._header)}")
        return dict(zip(self._header, cells, strict=True))

    def _split(self, text: str) -> list[str]:
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            raise RefusedError("malformed", f"not CSV: {error}") from None
        if len(rows) != 1:
            raise RefusedError("malformed", f"not CSV: {len(rows)} records in one")
        return rows[0]


class JsonLines:
    """One JSON object a line; the columns are the keys of the first `FIRST_KEYS` lines, in order of appearance."""

    def columns(self, lines: Lines, path: Path) -> list[str]:
        """Read the keys of the first objects, and stay before them."""
        passed: list[Line] = []
        names: dict[str, None] = {}
        while len(passed) < FIRST_KEYS and (line := lines.next()) is not None:
            passed.append(line)
            with suppress(UnicodeDecodeError, RefusedError):
                names |= dict.fromkeys(self.cells(line.raw.decode("utf-8-sig")))
        if not any(line.raw.strip() for line in passed):
            raise _nothing(lines, path)
        if not names:
            raise FeedError(
                f"feed.path = {str(path)!r}: there is no JSON object with a key in its first {len(passed)} lines; "
                "write one object a line, or set feed.kind = 'csv'"
            )
        lines.give_back(passed, last=None)
        return list(names)

    def blocks(self, columns: Columns) -> ReadBlock:
        """Return what reads many records at once."""
        return json_blocks(columns)

    def take(self, lines: Lines) -> list[Line]:
        """Take the next line that is not blank."""
        while (line := lines.next()) is not None:
            if line.raw.strip():
                return [line]
        return []

    def cells(self, text: str) -> dict[str, object]:
        """Read one object."""
        try:
            value = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise RefusedError("malformed", f"not JSON: {error}") from None
        if not isinstance(value, dict):
            raise RefusedError("malformed", f"a JSON {type(value).__name__}, not an object")
        return value


def _nothing(lines: Lines, path: Path) -> FeedError:
    damage = lines.damage()
    found = f"breaks off before its first record: {damage}; fetch it again" if damage else "the file is empty"
    return FeedError(f"feed.path = {str(path)!r}: {found}")


def text_file(
    path: Path,
    *,
    kind: str,
    label: Name,
    id: Name = "",  # noqa: A002 - the user's word for it
    time: Name = "",
    categorical: Names = (),
    ignore: Names = (),
    buckets: Annotated[int, Field(ge=2, le=65_536)] = 16,
    missing: Names = ("",),
    delimiter: Annotated[str, Field(min_length=1, max_length=1, pattern=r'[^"\r\n]')] = ",",
    shape: tuple[Annotated[int, Field(ge=1)], ...] = (),
    classes: Names = (),
    labels_only: bool = False,
    max_classes: int,
    refuse: Refuse,
) -> FileFeed:
    """Read a file, plain or gzip: CSV with a header, or JSON objects, one a line.

    Args:
        path: of the file.
        kind: `csv` or `jsonl`.
        label: column with the label; where its cell is empty the label is not known. Empty (""): records come without.
        id: column with the record's name, by which its label can come later.
        time: column that tells when the record came to be: seconds since the epoch, or ISO 8601.
        categorical: columns of text, hashed into `buckets` features each.
        ignore: columns to leave out.
        buckets: features a categorical column.
        missing: cells that mean "not known", as an empty one does; such a feature is imputed by its running mean.
        delimiter: of CSV.
        shape: of one record, for images written as rows of pixels: [channels, height, width].
        classes: all labels that there are, in the order of their indices; a record with another one is refused. Left
            out, labels are numbered as they appear.
        labels_only: the records are labels of another feed's: of an id and a label.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be used.

    Raises:
        FeedError: the file cannot be read, or there is no record in it.
        ConfigError: a column is not there, no record has a label, or none can be used.
    """
    reader = Csv(delimiter) if kind == "csv" else JsonLines()
    lines = Lines(path)
    with ExitStack() as unless_it_fits:
        unless_it_fits.callback(lines.close)
        columns = assign(
            reader.columns(lines, path),
            where=str(path),
            label=label,
            id=id,
            time=time,
            categorical=categorical,
            ignore=ignore,
            buckets=buckets,
            missing=missing,
            labels_only=labels_only,
        )
        decoder = Decoder(columns, ClassMap(max_classes, classes), shape=shape, where=f"feed.path = {str(path)!r}")
        feed = FileFeed(path, lines, reader, decoder, refuse)
        unless_it_fits.pop_all()
        return feed

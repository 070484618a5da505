"""Many lines of a file at once: what is plain is read by numpy or orjson, and anything unusual is left alone.

What a block comes to is what its lines come to one by one. A block in which one line might not (a quote, a blank line,
a number that is none, a label for which there is no room) is not read here at all, so that every refusal has its reason
from one place, `runners.feeds.files`.
"""

import io
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from types import NoneType

import numpy as np
import orjson

from runners.feeds.decode import MAX_FLOAT32, Columns, RefusedError, moment

SURE_FLOAT = float(1 << 53)
"""JSON's integers past 64 bits come as floats from orjson, so a large float may have been written as something else."""

SAME_CELLS = 1_024
"""Different cells of text, labels above all, that are read but once."""


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Records decoded, but for the numbers of their labels.

    Attributes:
        features: `[n, width]` float64.
        labels: as they are written; None where one is not known.
        raw: their lines.
        ids: their names; empty strings where records have none.
        times: when they came to be, in seconds since the epoch; NaN where that is not known.
    """

    features: np.ndarray
    labels: Sequence[str | None]
    raw: Sequence[bytes]
    ids: Sequence[str]
    times: Sequence[float]

    def __len__(self) -> int:
        return len(self.raw)


ReadBlock = Callable[[bytes], Block | None]
"""Takes whole lines; returns None where they are to be read one by one."""
ReadCell = Callable[[str], float]


def line_by_line(_: bytes) -> None:
    """Read no block, whatever it is."""


def csv_blocks(header: Sequence[str], columns: Columns, delimiter: str) -> ReadBlock:
    """Return what reads blocks of CSV in which nothing is quoted.

    Args:
        header: names of all columns, in order.
        columns: what they are for.
        delimiter: between cells.
    """
    numeric = [header.index(name) for name in columns.numeric]
    words = [name for name in (columns.label, columns.id, columns.time, *columns.categorical) if name]
    places = [header.index(name) for name in words]
    known = lru_cache(SAME_CELLS)(columns.known)
    hashed = lru_cache(SAME_CELLS)(columns.hashed)
    mark, plain = delimiter.encode(), not any(map(_is_number, columns.missing))

    def read(raw: bytes) -> Block | None:
        lines = _lines(raw)
        if lines is None or b'"' in raw or b"\0" in raw or {line.count(mark) for line in lines} != {len(header) - 1}:
            return None
        with suppress(ValueError, RefusedError):  # of Unicode's errors, too, the root is ValueError
            load = partial(_load, raw.decode(), delimiter=delimiter, rows=len(lines))
            numbers = _numbers(load, numeric, columns, plain=plain)
            cells = dict(zip(words, load(places, dtype=object).T.tolist(), strict=True))
            texts = [[hashed(name, cell) for cell in cells[name]] for name in columns.categorical]
            return Block(
                np.concatenate([numbers, *texts], axis=1),
                list(map(known, cells[columns.label])) if columns.label else [None] * len(lines),
                lines,
                [columns.id_of({columns.id: cell}) for cell in cells[columns.id]] if columns.id else [""] * len(lines),
                list(map(moment, cells[columns.time])) if columns.time else [math.nan] * len(lines),
            )
        return None

    return read


def json_blocks(columns: Columns) -> ReadBlock:
    """Return what reads blocks of JSON objects whose numbers are numbers.

    Args:
        columns: what the keys are for.
    """
    words = [name for name in (columns.label, columns.id, *columns.categorical) if name]

    def read(raw: bytes) -> Block | None:
        lines = _lines(raw)
        if lines is None:
            return None
        with suppress(ValueError, OverflowError, RefusedError):  # of orjson's errors, too, the root is ValueError
            objects = list(map(orjson.loads, lines))
            if set(map(type, objects)) != {dict} or not all(
                _sure(cells.get(name)) for name in words for cells in objects
            ):
                return None
            given = [list(map(cells.get, columns.numeric)) for cells in objects]
            if not set(map(type, chain.from_iterable(given))) <= {int, float, NoneType}:
                return None
            numbers = np.array(given, dtype=np.float64).reshape(len(lines), len(columns.numeric))
            if (np.abs(numbers) > MAX_FLOAT32).any():
                return None
            texts = [[columns.hashed(name, cells.get(name)) for cells in objects] for name in columns.categorical]
            return Block(
                np.concatenate([numbers, *texts], axis=1),
                list(map(columns.label_of, objects)),
                lines,
                list(map(columns.id_of, objects)),
                list(map(columns.time_of, objects)) if columns.time else [math.nan] * len(lines),
            )
        return None

    return read


def _lines(raw: bytes) -> list[bytes] | None:
    """Split into lines; None where one is blank, or is two by another reckoning."""
    lines = raw.splitlines(keepends=True)
    return None if len(lines) != raw.count(b"\n") or any(map(bytes.isspace, lines)) else lines


def _load(
    text: str, columns: Sequence[int], *, delimiter: str, rows: int, dtype: type = float, read: ReadCell | None = None
) -> np.ndarray:
    """Return some columns of CSV, `[rows, columns]`."""
    if not columns:
        return np.empty((rows, 0))
    return np.loadtxt(
        io.StringIO(text, newline=""),
        dtype=dtype,
        comments=None,
        delimiter=delimiter,
        converters=read,
        usecols=columns,
        ndmin=2,
    )


def _numbers(load: Callable[..., np.ndarray], places: Sequence[int], columns: Columns, *, plain: bool) -> np.ndarray:
    """Return the columns of numbers; where a cell is missing, or might be though it is a number, cell by cell."""
    if plain:
        with suppress(ValueError):
            numbers = load(places)
            if (np.abs(numbers) <= MAX_FLOAT32).all():
                return numbers
    return load(places, read=partial(columns.number, ""))


def _sure(cell: object) -> bool:
    """Whether the text of a cell of JSON is what was written."""
    return not isinstance(cell, float) or abs(cell) < SURE_FLOAT


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True

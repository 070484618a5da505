"""Cells into numbers: columns numeric or hashed, values missing, values refused."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from zlib import crc32

import numpy as np

from streamkd.errors import ConfigError, short

MAX_FLOAT32 = float(np.finfo(np.float32).max)
YEAR_2000, YEAR_10000 = 946_684_800.0, 253_402_300_800.0
"""In seconds since the epoch. What is earlier is a counter or a clock never set; what is later, milliseconds."""


class RefusedError(Exception):
    """A record cannot be used.

    Args:
        reason: one of `runners.feeds.REASONS`.
        detail: names the column and the value.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Columns:
    """What each column of a feed is for.

    A numeric column is one feature. A categorical one is `buckets` features, of which the one that its text hashes to
    is 1 (Weinberger et al. 2009), so new values need no new weights.

    Attributes:
        label: the column that holds the label; empty where records come without.
        numeric, categorical: names of columns, in order.
        buckets: features a categorical column.
        missing: cells that mean "not known", the empty one among them.
        id: the column that holds the record's name; empty where there is none.
        time: the column that tells when the record came to be; empty where there is none.
    """

    label: str
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    buckets: int
    missing: frozenset[str]
    id: str = ""
    time: str = ""

    @property
    def names(self) -> list[str]:
        """The columns that are learned from, in the order of their features."""
        return [*self.numeric, *self.categorical]

    @property
    def width(self) -> int:
        """Features a record."""
        return len(self.numeric) + len(self.categorical) * self.buckets

    def features(self, cells: Mapping[str, object]) -> np.ndarray:
        """Return `[width]` float64, NaN where a value is missing.

        Raises:
            RefusedError: a cell is not a finite number.
        """
        numbers = self._numbers([cells.get(name) for name in self.numeric])
        if not self.categorical:
            return numbers
        return np.concatenate([numbers, *(self.hashed(name, cells.get(name)) for name in self.categorical)])

    def hashed(self, name: str, value: object) -> np.ndarray:
        """Return the features of one categorical cell, `[buckets]`; all of them NaN where it is missing."""
        if self._unknown(value):
            return np.full(self.buckets, np.nan)
        features = np.zeros(self.buckets)
        features[crc32(f"{name}={value}".encode(errors="surrogatepass")) % self.buckets] = 1
        return features

    def _numbers(self, cells: Sequence[object]) -> np.ndarray:
        """Read all numbers at once; where anything about one of them is unusual, one by one."""
        try:
            numbers = np.array([float(cell) for cell in cells])  # type: ignore[arg-type]  # what is no number raises
            usual = bool((np.abs(numbers) <= MAX_FLOAT32).all())
        except (TypeError, ValueError, OverflowError):
            usual = False
        if usual and not any(type(cell) is str and ("_" in cell or cell.strip() in self.missing) for cell in cells):
            return numbers
        return np.array([self.number(name, cell) for name, cell in zip(self.numeric, cells, strict=True)])

    def number(self, name: str, cell: object) -> float:
        """Return the number in a cell of column `name`; NaN where it is missing.

        Raises:
            RefusedError: it is not a finite number.
        """
        if self._unknown(cell):
            return math.nan
        try:
            value = _parsed(cell)
        except (ValueError, TypeError):
            raise RefusedError("not_a_number", f"column {name!r}: {short(cell)} is not a number") from None
        except OverflowError:
            value = math.inf
        if not abs(value) <= MAX_FLOAT32:
            raise RefusedError("not_finite", f"column {name!r}: {short(cell)} is not a finite 32-bit number")
        return value

    def _unknown(self, cell: object) -> bool:
        return cell is None or (isinstance(cell, str) and cell.strip() in self.missing)

    def label_of(self, cells: Mapping[str, object]) -> str | None:
        """Return the label as it is written; None where it is not known."""
        if not self.label:
            return None
        if self.label not in cells:
            raise RefusedError("no_label_column", f"there is no {self.label!r} in the record")
        label = cells[self.label]
        if isinstance(label, (dict, list)):
            raise RefusedError("malformed", f"column {self.label!r}: {short(label)} is not a label")
        if isinstance(label, float) and not math.isfinite(label):
            raise RefusedError("not_finite", f"column {self.label!r}: {label} is not a label")
        return self.known(label)

    def known(self, cell: object) -> str | None:
        """Return the text of a cell; None where it means that nothing is known."""
        return None if self._unknown(cell) else str(cell).strip()

    def id_of(self, cells: Mapping[str, object]) -> str:
        """Return the name of the record; empty where records have none."""
        if not self.id:
            return ""
        cell = cells.get(self.id)
        name = self.known(cell)
        if name is None or isinstance(cell, (dict, list)):
            raise RefusedError("no_id", f"column {self.id!r}: {short(cell)} is no id")
        return name

    def time_of(self, cells: Mapping[str, object]) -> float:
        """Return when the record came to be, in seconds since the epoch; NaN where that cannot be read.

        It is only watched, so no record is refused for it.
        """
        return moment(cells.get(self.time))


def moment(cell: object) -> float:
    """Return seconds since the epoch of a number of them or of a date in ISO 8601, in UTC unless it says; or NaN."""
    try:
        seconds = _parsed(cell)
    except (ValueError, TypeError, OverflowError):
        try:
            read = datetime.fromisoformat(str(cell).strip())
        except ValueError:
            return math.nan
        seconds = (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
    return seconds if YEAR_2000 <= seconds < YEAR_10000 else math.nan


def assign(
    present: Sequence[str],
    *,
    where: str,
    key: str = "path",
    id: str = "",  # noqa: A002 - the user's word for it
    time: str = "",
    label: str,
    categorical: Sequence[str],
    ignore: Sequence[str],
    buckets: int,
    missing: Sequence[str],
    labels_only: bool = False,
) -> Columns:
    """Decide what each column that is `present` is for.

    Args:
        present: names of the columns, in order.
        where: the file or stream, for messages.
        key: the setting that names it, likewise.
        id: the user's setting, and likewise the others.
        time: column that tells when the record came to be; empty where there is none.
        label: column with the label; empty where labels come by another way.
        categorical: columns of text.
        ignore: columns to leave out.
        buckets: features a categorical column.
        missing: cells that mean "not known"; an empty one always does.
        labels_only: all columns but the label's, the id's and the time's are left out.

    Raises:
        ConfigError: a column is named twice or is not there, or no column is left to learn from.
    """
    doubles = sorted({name for name in present if list(present).count(name) > 1})
    if doubles:
        raise ConfigError(f"feed.{key} = {where!r}: two columns are called {short(doubles[0])}; rename one")
    single = {"label": label, "id": id, "time": time}
    named: dict[str, Sequence[str]] = {setting: [name] if name else [] for setting, name in single.items()}
    named |= {"categorical": categorical, "ignore": ignore}
    for setting, names in named.items():
        for name in names:
            if name not in present:
                close = get_close_matches(name, present, n=1)
                hint = (
                    f"did you mean {short(close[0])}?"
                    if close
                    else f"there are {_listed(present)}{_suspicion(present)}"
                )
                raise ConfigError(f"feed.{setting} = {short(name)}: no such column in {where!r}; {hint}")
    uses: dict[str, str] = {}
    for setting in (*single, "ignore", "categorical"):
        twice = next((name for name in named[setting] if name in uses), None)
        if twice is not None:
            raise ConfigError(f"feed.{setting} = {twice!r}: feed.{uses[twice]} has it, too; name it in one of them")
        uses |= dict.fromkeys(named[setting], setting)
    left = [name for name in present if uses.get(name, "categorical") == "categorical" and not labels_only]
    columns = Columns(
        label,
        tuple(name for name in left if name not in categorical),
        tuple(name for name in left if name in categorical),
        buckets,
        frozenset({"", *missing}),
        id,
        time,
    )
    if not columns.width and not labels_only:
        raise ConfigError(f"feed.{key} = {where!r}: no column is left to learn from; there are {_listed(present)}")
    return columns


def _suspicion(present: Sequence[str]) -> str:
    """Say what a header that was not split as meant looks like."""
    if present and present[0].startswith("{"):
        return "; that looks like JSON: set feed.kind = 'jsonl'"
    apart = next((mark for mark in ";\t|" if len(present) == 1 and mark in present[0]), None)
    return f"; set feed.delimiter = {json.dumps(apart)}" if apart else ""


def _parsed(cell: object) -> float:
    if isinstance(cell, str) and "_" in cell:
        raise ValueError(cell)  # Python would read 1_000 as a number, which nobody's data means
    return float(cell)  # type: ignore[arg-type]  # what is no number raises


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(short(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")

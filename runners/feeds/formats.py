"""Payloads of messages into cells: JSON, a row of CSV, msgpack, Arrow. Files have readers of their own."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from runners.feeds.decode import RefusedError
from streamkd.errors import ConfigError

Cells = Mapping[str, object]
Decode = Callable[[bytes], Sequence[Cells]]
"""Returns the records of one payload; raises RefusedError where it cannot be used."""
FormatName = Literal["json", "csv", "msgpack", "arrow"]


def decoder(name: FormatName, *, columns: Sequence[str] = (), delimiter: str = ",") -> Decode:
    """Return what takes payloads of a format apart.

    Args:
        name: of the format.
        columns: of a row of CSV, in order; there is no header in a message.
        delimiter: likewise.

    Raises:
        ConfigError: the columns are missing, or a library is.
    """
    if name == "csv":
        return _csv(columns, delimiter)
    return {"json": lambda: _json, "msgpack": _msgpack, "arrow": _arrow}[name]()


def imported(name: str, extra: str, key: str) -> Any:
    """Import a client library.

    Raises:
        ConfigError: it is not installed.
    """
    from importlib import import_module  # noqa: PLC0415 - used here only

    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"{key}: needs {error.name or name}; pip install 'streamkd[{extra}]'") from None


def _json(payload: bytes) -> Sequence[Cells]:
    try:
        value = json.loads(_text(payload))
    except (ValueError, RecursionError) as error:
        raise RefusedError("malformed", f"not JSON: {error}") from None
    return [_mapping(value, "JSON")]


def _csv(columns: Sequence[str], delimiter: str) -> Decode:
    if not columns:
        raise ConfigError(
            "feed.columns: missing; a message of CSV has no header, so name all its columns in order, the label's and "
            "the id's included"
        )

    def decode(payload: bytes) -> Sequence[Cells]:
        try:
            rows = list(csv.reader(_text(payload).splitlines(keepends=True), delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise RefusedError("malformed", f"not CSV: {error}") from None
        if len(rows) != 1:
            raise RefusedError("malformed", f"not CSV: {len(rows)} rows in one message")
        if len(rows[0]) != len(columns):
            raise RefusedError("width", f"{len(rows[0])} cells, and feed.columns names {len(columns)}")
        return [dict(zip(columns, rows[0], strict=True))]

    return decode


def _msgpack() -> Decode:
    msgpack = imported("msgpack", "msgpack", "feed.format = 'msgpack'")

    def decode(payload: bytes) -> Sequence[Cells]:
        try:
            value = msgpack.unpackb(payload)
        except Exception as error:  # noqa: BLE001 - its errors have no other root in common
            raise RefusedError("malformed", f"not msgpack: {error or type(error).__name__}") from None
        return [_mapping(value, "msgpack")]

    return decode


def _arrow() -> Decode:
    pyarrow = imported("pyarrow", "arrow", "feed.format = 'arrow'")

    def decode(payload: bytes) -> Sequence[Cells]:
        try:
            with pyarrow.ipc.open_stream(payload) as reader:
                rows: list[Cells] = reader.read_all().to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise RefusedError("malformed", f"not an Arrow stream: {error}") from None
        return rows

    return decode


def _text(payload: bytes) -> str:
    try:
        return payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RefusedError("encoding", f"not UTF-8: {error.reason} at byte {error.start}") from None


def _mapping(value: object, language: str) -> Cells:
    if not isinstance(value, dict):
        raise RefusedError("malformed", f"a {language} {type(value).__name__}, not an object")
    return {str(key): cell for key, cell in value.items()}


def as_bytes(cells: Cells) -> bytes:
    """Return cells as JSON, for the dead letters, where they came without bytes of their own."""
    return json.dumps(dict(cells), default=str).encode()


def present(rows: Iterator[Cells]) -> list[str]:
    """Return the names of all cells, in order of appearance."""
    return list(dict.fromkeys(name for cells in rows for name in cells))

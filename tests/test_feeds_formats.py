"""Payloads of messages: each format says the same, and what cannot be read says why."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from runners.feeds import REASONS
from runners.feeds.decode import RefusedError
from runners.feeds.formats import decoder
from streamkd.errors import ConfigError

RECORD: Mapping[str, Any] = {"a": 1, "b": 2.5, "y": "x"}


def packed(name: str) -> bytes:
    if name == "json":
        return json.dumps(RECORD).encode()
    if name == "csv":
        return b"1,2.5,x\n"
    if name == "msgpack":
        whole: bytes = pytest.importorskip("msgpack").packb(RECORD)
        return whole
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([RECORD, {**RECORD, "a": 3}])
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    stream: bytes = sink.getvalue().to_pybytes()
    return stream


@pytest.mark.parametrize("name", ["json", "csv", "msgpack", "arrow"])
def test_a_payload_becomes_cells_in_every_format(name: Any) -> None:
    cells = decoder(name, columns=("a", "b", "y"))(packed(name))
    assert [{key: str(cell) for key, cell in row.items()} for row in cells[:1]] == [{"a": "1", "b": "2.5", "y": "x"}]


def test_an_arrow_stream_holds_many_records() -> None:
    assert [row["a"] for row in decoder("arrow")(packed("arrow"))] == [1, 3]


@pytest.mark.parametrize(
    ("name", "payload", "reason"),
    [
        ("json", b"{", "malformed"),
        ("json", b"[1]", "malformed"),
        ("json", b"\xff", "encoding"),
        ("json", b"[" * 100_000, "malformed"),
        ("csv", b"1,2", "width"),
        ("csv", b'1,"2,x', "malformed"),
        ("csv", b"1,2,x\n3,4,y\n", "malformed"),
        ("csv", b"1,\xff,x", "encoding"),
        ("msgpack", b"\xc1", "malformed"),
        ("msgpack", b"\x93\x01\x02\x03", "malformed"),
        ("arrow", b"no stream", "malformed"),
        ("arrow", b"", "malformed"),
    ],
)
def test_a_payload_that_cannot_be_read_is_refused_with_a_reason(name: Any, payload: bytes, reason: str) -> None:
    pytest.importorskip({"msgpack": "msgpack", "arrow": "pyarrow"}.get(name, "json"))
    with pytest.raises(RefusedError) as refused:
        decoder(name, columns=("a", "b", "y"))(payload)
    assert refused.value.reason == reason
    assert reason in REASONS
    assert refused.value.detail


@pytest.mark.parametrize("name", ["json", "msgpack", "arrow"])
def test_no_payload_cut_short_is_taken_for_a_whole_one(name: Any) -> None:
    whole = packed(name)
    for length in range(len(whole)):
        try:
            cells = decoder(name)(whole[:length])
        except RefusedError:
            continue
        assert name == "arrow"  # its end mark may be missing
        assert list(cells) == [] or len(cells) == 2


def test_rows_of_csv_need_their_columns_named() -> None:
    with pytest.raises(ConfigError, match=r"feed\.columns: missing"):
        decoder("csv")

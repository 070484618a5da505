"""Many lines read at once come to what they come to one by one."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runners.feeds import DeadLetter, lines
from runners.feeds.blocks import Block, line_by_line
from runners.feeds.files import text_file
from streamkd import UNLABELLED, Batch
from streamkd.errors import StreamkdError

BLOCK = 200
"""Bytes: a few lines, so that a file has several blocks and lines that lie across two."""

numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, width=32).map(repr),
    st.integers(-(10**6), 10**6).map(str),
    st.sampled_from(["-0", "-0.0", ".5", "5.", "+1", "1e3", "3.4e38", "4.9e-324"]),
)
odd = st.sampled_from(
    [
        *("", " ", "NA", " NA ", "-9", " -9", "-9.0", "nan", "inf", "1e39", "1e400", "1_000", "0x10", "1 2", "\t3 "),
        *("two", "1d5", '"1"', '"1', '1"2"', '"a,b"', "\xa01", "\u0661", "1\0", "1,2", "#", "\x0b1", "1\u2028", "true"),
    ]
)
texts = st.sampled_from(
    ["x", "y", "z", " x ", "x y", "#x", "", "NA", "na\u00efve", "7", "7.0", "\x85", "\u2028x", "x\u2028y"]
)
endings = st.sampled_from([b"\n"] * 9 + [b"\r\n", b"\r\n", b"\n\n", b" \n", b"\r\r\n", b"\r", b"\n \t\n"])


def often(usual: st.SearchStrategy[Any], unusual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 30).flatmap(lambda one: unusual if one == 0 else usual)


@st.composite
def csv_files(draw: st.DrawFn) -> bytes:
    content = b"a,b,c,y,id,t\n"
    for row in range(draw(st.integers(1, 40))):
        cells = [draw(often(numbers, odd)), draw(often(numbers, odd)), draw(texts), draw(often(texts, odd))]
        cells += [draw(often(st.just(f"r{row}"), odd)), draw(often(st.just(str(1_700_000_000 + row)), odd))]
        content += ",".join(cells).encode() + draw(endings)
    return _cut(draw, content)


scalars = st.one_of(
    st.floats(allow_nan=False, width=32),
    st.integers(-(10**6), 10**6),
    st.none(),
    st.sampled_from(
        [True, "1.5", "x", "", "NA", 2**53, 2**63, 2**64, 10**30, 1e39, -0.0, 0, 1, 1.0, [], {}, [1], "\ud800"]
    ),
)


@st.composite
def json_files(draw: st.DrawFn) -> bytes:
    content = b""
    for row in range(draw(st.integers(1, 40))):
        record = {
            "a": draw(often(st.floats(-1e6, 1e6), scalars)),
            "b": draw(often(st.integers(-9, 9), scalars)),
            "c": draw(often(texts, scalars)),
            "y": draw(often(texts, scalars)),
            "id": draw(often(st.just(f"r{row}"), scalars)),
            "t": draw(often(st.just(1_700_000_000 + row), scalars)),
        }
        gone = draw(often(st.just(""), st.sampled_from([*record])))
        text = json.dumps({name: cell for name, cell in record.items() if name != gone})
        unusual = st.sampled_from(["{", "[1]", "null", text + text, "\ufeff" + text, text.replace("}", ',"a":NaN}')])
        content += draw(often(st.just(text), unusual)).encode() + draw(endings)
    return _cut(draw, content)


def _cut(draw: st.DrawFn, content: bytes) -> bytes:
    """Write it as it is, without its last newline, with a byte that is no UTF-8, or as gzip, which may break off."""
    way = draw(st.sampled_from(["whole"] * 5 + ["open", "byte", "gzip", "broken"]))
    if way == "open":
        return content.rstrip(b"\n")
    if way == "byte":
        place = draw(st.integers(0, len(content)))
        return content[:place] + b"\xff" + content[place:]
    compressed = gzip.compress(content, mtime=0)
    return {"gzip": compressed, "broken": compressed[:-9]}.get(way, content)


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "AT_ONCE", BLOCK)
        yield


NOTHING_REFUSED: dict[str, Any] = {"max_classes": 4, "refuse": pytest.fail}
Told = tuple[list[Any], list[DeadLetter], str]


def read(
    path: Path, kind: str, size: int, *, at_once: bool, after: dict[str, Any] | None = None, **options: Any
) -> Told:
    """Return all there is to know of a file's batches, its dead letters, and what stopped it."""
    refused: list[DeadLetter] = []
    given = {"label": "y", "id": "id", "time": "t", "categorical": ["c"], "max_classes": 4, **options}
    try:
        feed = text_file(path, kind=kind, refuse=refused.append, **given)
    except StreamkdError as error:
        return [], refused, str(error)
    if not at_once:
        feed.read_block = line_by_line
    if after is not None:
        feed.seek(after)
    told = []
    while (batch := feed.poll(size)) is not None:
        told.append(seen(batch))
    feed.close()
    return told, refused, ""


def seen(batch: Batch) -> tuple[Any, ...]:
    times = torch.tensor(batch.times, dtype=torch.float64).numpy().tobytes()
    return batch.x.shape, batch.x.numpy().tobytes(), batch.y.tolist(), batch.ids, times, batch.raw, batch.position


options = st.fixed_dictionaries(
    {"missing": st.sampled_from([[""], ["", "NA"], ["-9", "NA"], ["x"], []])},
    optional={
        "classes": st.just(["x", "y", "7"]),
        "ignore": st.just(["b"]),
        "id": st.just(""),
        "time": st.just(""),
        "label": st.just(""),
        "categorical": st.sampled_from([["c", "a"], ["c", "b"]]),
    },
).map(lambda given: given if not {"id", "time", "label"} & given.keys() else {**given, "ignore": _left(given)})


def _left(given: dict[str, Any]) -> list[str]:
    """Columns of text that are for nothing are to be left out."""
    names = {"id": "id", "time": "t", "label": "y"}
    return [*given.get("ignore", []), *(column for setting, column in names.items() if setting in given)]


@settings(max_examples=150, deadline=None)
@given(csv_files(), st.integers(1, 9), options)
@example(b"a,b,c,y,id,t\n1,2,x,x,r,5\n-9,2,x,x,s,5\n", 2, {"missing": ["-9"]})
@example(b"a,b,c,y,id,t\n1,2,x,x,r,5\n1,-0,x,,s,5\n", 2, {"missing": []})
def test_blocks_of_csv_are_read_as_their_lines_are(content: bytes, size: int, options: dict[str, Any]) -> None:
    _hold("csv", content, size, options)


@settings(max_examples=150, deadline=None)
@given(json_files(), st.integers(1, 9), options)
def test_blocks_of_json_are_read_as_their_lines_are(content: bytes, size: int, options: dict[str, Any]) -> None:
    _hold("jsonl", content, size, options)


def _hold(kind: str, content: bytes, size: int, options: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        path.write_bytes(content)
        one_by_one = read(path, kind, size, at_once=False, **options)
        assert read(path, kind, size, at_once=True, **options) == one_by_one
        batches, *_ = one_by_one
        for number in {1, len(batches) // 2} & set(range(1, len(batches))):
            rest, *_ = read(path, kind, size, at_once=True, after=batches[number - 1][-1], **options)
            assert rest == batches[number:]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("missing", [["NA"], []])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_empty_cell_is_not_known_whatever_else_means_that(
    tmp_path: Path, kind: str, missing: list[str], *, at_once: bool
) -> None:
    records = [{"a": str(row), "c": "x", "y": "k"} for row in range(40)] + [{"a": "", "c": " ", "y": ""}]
    rows = {"csv": ["a,c,y", *(",".join(one.values()) for one in records)], "jsonl": map(json.dumps, records)}
    (tmp_path / "data").write_text("\n".join(rows[kind]) + "\n")
    feed = text_file(tmp_path / "data", kind=kind, label="y", categorical=["c"], missing=missing, **NOTHING_REFUSED)
    feed.read_block = feed.read_block if at_once else line_by_line
    batch = feed.poll(100)
    assert batch is not None
    assert batch.y.tolist() == [0] * 40 + [UNLABELLED]
    assert batch.x[-1].isnan().all()
    assert not batch.x[:-1].isnan().any()
    feed.close()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_plain_file_is_read_block_by_block(tmp_path: Path, kind: str) -> None:
    records = [{"a": 0.5 * row, "y": f"k{row % 3}"} for row in range(500)]
    rows = {"csv": ["a,y", *(f"{one['a']},{one['y']}" for one in records)], "jsonl": map(json.dumps, records)}
    (tmp_path / "data").write_text("\n".join(rows[kind]) + "\n")
    feed = text_file(tmp_path / "data", kind=kind, label="y", max_classes=4, refuse=lambda _: None)
    inner, sizes = feed.read_block, []

    def spying(raw: bytes) -> Block | None:
        block = inner(raw)
        sizes.append(len(block or ()))
        return block

    feed.read_block = spying
    while feed.poll(16) is not None:
        pass
    feed.close()
    assert sum(sizes) > 0.8 * len(records)  # the others lie across two of these small blocks

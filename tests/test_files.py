import gzip
import io
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runners.feeds import REASONS, DeadLetter
from runners.feeds.files import FileFeed, text_file
from streamkd import UNLABELLED, Batch
from streamkd.errors import CheckpointError, ConfigError, FeedError
from streamkd.inputs import Standardiser

GOOD = b"a,b,y\n1,2,x\n"


def opened(path: Path, content: bytes, kind: str = "csv", **options: Any) -> tuple[FileFeed, list[DeadLetter]]:
    path.write_bytes(content)
    refused: list[DeadLetter] = []
    given = {"label": "y", "max_classes": 5, **options}
    return text_file(path, kind=kind, refuse=refused.append, **given), refused


def drained(feed: FileFeed, size: int = 4) -> list[Batch]:
    batches = []
    while (batch := feed.poll(size)) is not None:
        batches += [batch] if len(batch) else []
    feed.close()
    return batches


def rows(batches: Iterable[Batch]) -> list[list[float]]:
    return [row for batch in batches for row in batch.x.tolist()]


@pytest.mark.parametrize(
    ("line", "reason", "word"),
    [
        (b"1,2", "width", "2 cells"),
        (b"1,2,x,4", "width", "4 cells"),
        (b"1,two,x", "not_a_number", "'two'"),
        (b"nan,2,x", "not_finite", "'nan'"),
        (b"1,-inf,x", "not_finite", "'-inf'"),
        (b"1e39,2,x", "not_finite", "'1e39'"),
        (b'1,"2,x', "malformed", "CSV"),
        (b'1,2"3"4,x', "not_a_number", "'b'"),
        (b"1,\xff,x", "encoding", "UTF-8"),
        (b"1," + b"9" * (1 << 20) + b",x", "too_long", "bytes"),
    ],
)
def test_a_broken_row_goes_to_the_dead_letters_with_its_line_and_reason(
    tmp_path: Path, line: bytes, reason: str, word: str
) -> None:
    feed, refused = opened(tmp_path / "d.csv", GOOD + line + b"\n3,4,z\n")
    assert rows(drained(feed)) == [[1, 2], [3, 4]]
    (letter,) = refused
    assert letter.reason == reason
    assert letter.reason in REASONS
    assert letter.place["line"] == 3
    assert word in letter.detail
    assert line.startswith(letter.raw.rstrip(b"\n")[:100])


def test_more_labels_than_classes_are_refused(tmp_path: Path) -> None:
    content = b"a,y\n" + b"".join(b"%d,l%d\n" % (i, i % 7) for i in range(14))
    feed, refused = opened(tmp_path / "d.csv", content)
    assert sum(len(batch) for batch in drained(feed)) == 10
    assert [letter.reason for letter in refused] == ["too_many_classes"] * 4
    assert "max_classes = 5" in refused[0].detail


def test_labels_are_numbered_in_order_of_appearance_and_empty_ones_are_unknown(tmp_path: Path) -> None:
    feed, _ = opened(tmp_path / "d.csv", b"a,y\n1,dog\n2,\n3,cat\n4,dog\n")
    (batch,) = drained(feed)
    assert batch.y.tolist() == [0, UNLABELLED, 1, 0]
    assert feed.describe()["classes"] == ["dog", "cat"]


def test_missing_cells_are_nan_and_what_means_missing_is_configured(tmp_path: Path) -> None:
    feed, refused = opened(tmp_path / "d.csv", b"a,b,y\n1,,x\n?,2,x\n", missing=("", "?"))
    (batch,) = drained(feed)
    assert not refused
    assert batch.x.isnan().tolist() == [[False, True], [True, False]]


def test_categorical_columns_are_one_bucket_each_always_the_same(tmp_path: Path) -> None:
    content = b"a,town,y\n1,Ulm,x\n2,Bonn,x\n3,Ulm,x\n4,,x\n"
    feed, _ = opened(tmp_path / "d.csv", content, categorical=("town",), buckets=64)
    (batch,) = drained(feed)
    hashed = batch.x[:, 1:]
    assert feed.shape == (65,)
    assert hashed[:3].sum(1).tolist() == [1, 1, 1]
    assert torch.equal(hashed[0], hashed[2])
    assert not torch.equal(hashed[0], hashed[1])
    assert bool(hashed[3].isnan().all())


def test_ignored_columns_are_left_out(tmp_path: Path) -> None:
    feed, _ = opened(tmp_path / "d.csv", b"id,a,y\nfoo,1,x\nbar,2,x\n", ignore=("id",))
    assert rows(drained(feed)) == [[1], [2]]


def test_a_quoted_cell_may_hold_commas_quotes_and_newlines(tmp_path: Path) -> None:
    content = b'a,t,y\n1,"one, ""two""\nthree",x\n2,plain,x\n'
    feed, refused = opened(tmp_path / "d.csv", content, categorical=("t",))
    assert len(rows(drained(feed))) == 2
    assert not refused


def test_a_quote_that_is_never_closed_costs_its_own_line_only(tmp_path: Path) -> None:
    body = b"".join(b"%d,2,x\n" % i for i in range(300))
    feed, refused = opened(tmp_path / "d.csv", GOOD + b'7,"8,x\n' + body)
    assert len(rows(drained(feed, 16))) == 301
    assert [letter.place["line"] for letter in refused] == [3]


def test_a_quoted_record_with_a_bad_number_is_refused_whole(tmp_path: Path) -> None:
    torn = b'"note\nhello,9,u\nend",bad,d\n'
    feed, refused = opened(tmp_path / "d.csv", b"t,a,y\nx,1,u\n" + torn + b"x,2,u\n", categorical=("t",), buckets=2)
    assert [row[0] for row in rows(drained(feed))] == [1, 2]
    assert [(letter.reason, letter.raw) for letter in refused] == [("not_a_number", torn)]


def test_a_long_run_of_bad_rows_comes_up_for_air(tmp_path: Path) -> None:
    feed, refused = opened(tmp_path / "d.csv", GOOD + b"bad\n" * 2500 + b"3,4,x\n")
    sizes = []
    while (batch := feed.poll(4)) is not None:
        sizes.append(len(batch))
    feed.close()
    assert sizes == [1, 0, 1]
    assert len(refused) == 2500


def test_a_last_line_that_is_still_being_written_is_read_again_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    feed, refused = opened(path, GOOD + b"3,4")
    position = drained(feed)[-1].position
    assert [letter.reason for letter in refused] == ["width"]
    again, _ = opened(path, GOOD + b"3,4.5,z\n")
    again.seek(position)
    assert rows(drained(again)) == [[3, 4.5]]


@pytest.mark.parametrize("after", [b"a,b,y\n9,9,x\n3,4,z\n", b"a,b,y\n", GOOD[:-1] + b"yz\n3,4,z\n"])
def test_a_file_that_is_not_what_it_was_is_refused(tmp_path: Path, after: bytes) -> None:
    path = tmp_path / "d.csv"
    feed, _ = opened(path, GOOD + b"3,4,z\n")
    batch = feed.poll(1)
    assert batch is not None
    feed.close()
    path.write_bytes(after + b"7,7,x\n")
    other = text_file(path, kind="csv", label="y", max_classes=5, refuse=lambda _: None)
    with pytest.raises(FeedError, match="line 2 is not what it was"):
        other.seek(batch.position)
    other.close()


def test_classes_may_be_given_in_their_order_and_others_are_refused(tmp_path: Path) -> None:
    feed, refused = opened(tmp_path / "d.csv", GOOD + b"3,4,w\n5,6,z\n", classes=("z", "x", "y"))
    assert [y for batch in drained(feed) for y in batch.y.tolist()] == [1, 0]
    assert [(letter.reason, letter.raw) for letter in refused] == [("unknown_class", b"3,4,w\n")]


@pytest.mark.parametrize(
    ("given", "difference"),
    [
        (("z", "x"), "class 0: 'x' in the checkpoint, 'z' configured"),
        (("x",), "class 1: 'z' in the checkpoint, 'absent' configured"),
        (("x", "z", "new"), None),
        ((), None),
    ],
)
def test_a_class_map_that_is_not_the_checkpoints_is_refused(
    tmp_path: Path, given: tuple[str, ...], difference: str | None
) -> None:
    content = GOOD + b"3,4,z\n"
    feed, _ = opened(tmp_path / "d.csv", content)
    position = drained(feed)[-1].position
    again, _ = opened(tmp_path / "d.csv", content, classes=given)
    if difference:
        with pytest.raises(CheckpointError, match=re.escape(difference)):
            again.seek(position)
    else:
        again.seek(position)
        assert again.describe()["classes"] == list(given or ("x", "z"))
    again.close()


@pytest.mark.parametrize(("given", "told"), [(("x", "x"), "'x' is there twice"), (tuple("abcdef"), "max_classes = 5")])
def test_classes_that_cannot_be_are_refused(tmp_path: Path, given: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        opened(tmp_path / "d.csv", GOOD, classes=given)


def test_another_label_column_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b"a,b,y,t\n1,2,x,u\n3,4,z,v\n")
    first = text_file(path, kind="csv", label="y", ignore=("t",), max_classes=5, refuse=lambda _: None)
    other = text_file(path, kind="csv", label="t", ignore=("y",), max_classes=5, refuse=lambda _: None)
    batch = first.poll(1)
    assert batch is not None
    with pytest.raises(CheckpointError, match=r"feed\.label = 't': it was 'y'"):
        other.seek(batch.position)
    first.close()
    other.close()


def test_images_may_be_written_as_rows_of_pixels(tmp_path: Path) -> None:
    content = b"a,b,c,d,y\n1,2,3,4,x\n"
    feed, _ = opened(tmp_path / "d.csv", content, shape=(1, 2, 2))
    assert drained(feed)[0].x.tolist() == [[[[1, 2], [3, 4]]]]
    with pytest.raises(ConfigError, match=r"feed\.shape = \[3, 3\]: 9 numbers, and a record has 4"):
        opened(tmp_path / "d.csv", content, shape=(3, 3))


def test_time_stamps_keep_their_seconds(tmp_path: Path) -> None:
    content = b"t,y\n" + b"".join(b"%d,%d\n" % (1_600_000_000 + i % 2, i % 2) for i in range(10))
    feed, _ = opened(tmp_path / "d.csv", content)
    (batch,) = drained(feed, 10)
    scale = Standardiser()
    scale.update(batch.x)
    assert scale(batch.x)[:, 0].tolist() == pytest.approx([-1, 1] * 5, abs=1e-3)


def test_json_lines_take_columns_by_name_whichever_line_has_them_first(tmp_path: Path) -> None:
    lines = [
        {"a": 1, "b": 2.5, "y": 3},
        {"b": 4, "a": True, "y": None, "c": 7},
        {"a": None, "y": "3"},
    ]
    content = "\n".join(json.dumps(line) for line in lines).encode()
    feed, refused = opened(tmp_path / "d.jsonl", content, "jsonl")
    (batch,) = drained(feed)
    assert not refused
    assert batch.x.nan_to_num(-1).tolist() == [[1, 2.5, -1], [1, 4, 7], [-1, -1, -1]]
    assert batch.y.tolist() == [0, UNLABELLED, 0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "malformed"),
        (b"[1, 2]", "malformed"),
        (b'{"a": 1, "b": 2}', "no_label_column"),
        (b'{"a": NaN, "b": 2, "y": 1}', "not_finite"),
        (b'{"a": 1' + b"0" * 400 + b', "b": 2, "y": 1}', "not_finite"),
        (b'{"a": [1], "b": 2, "y": 1}', "not_a_number"),
        (b'{"a": 1, "b": 2, "y": {}}', "malformed"),
        (b"[" * 100_000, "malformed"),
    ],
)
def test_a_broken_object_goes_to_the_dead_letters(tmp_path: Path, line: bytes, reason: str) -> None:
    good = b'{"a": 1, "b": 2, "y": "x"}\n'
    feed, refused = opened(tmp_path / "d.jsonl", good + line + b"\n" + good, "jsonl")
    assert rows(drained(feed)) == [[1, 2], [1, 2]]
    assert [(letter.reason, letter.place["line"]) for letter in refused] == [(reason, 2)]


@pytest.mark.parametrize(
    ("content", "options", "error", "words"),
    [
        (b"", {}, FeedError, ["empty"]),
        (b"a,b,y\n", {}, FeedError, ["no record"]),
        (GOOD, {"label": "klass"}, ConfigError, ["feed.label = 'klass'", "'a', 'b', 'y'"]),
        (b"a,b,lable\n1,2,x\n", {"label": "label"}, ConfigError, ["did you mean 'lable'?"]),
        (b"a,y\n1,\n2,\n", {}, ConfigError, ["feed.label = 'y'", "none of the first 2 records has a label"]),
        (b"a,a,y\n1,2,x\n", {}, ConfigError, ["two columns are called 'a'"]),
        (b"a;b;y\n1;2;x\n", {}, ConfigError, ["feed.label = 'y'", 'feed.delimiter = ";"']),
        (b"a\tb\ty\n1\t2\tx\n", {}, ConfigError, ["feed.label = 'y'", r'feed.delimiter = "\t"']),
        (b"t,y\n2024-01-01,x\n", {}, ConfigError, ["'2024-01-01' is not a number", "feed.time"]),
        (GOOD, {"classes": ("a", "b")}, ConfigError, ["line 2", "'x'", "feed.classes, or leave it out"]),
        (b'{"a": 1, "y": 2}\n', {}, ConfigError, ["feed.kind = 'jsonl'"]),
        (b"y\nx\n", {}, ConfigError, ["no column is left", "'y'"]),
        (b"t,y\nfoo,x\nbar,x\n", {}, ConfigError, ["line 2", "'foo' is not a number", "feed.categorical"]),
        (GOOD, {"categorical": ("c",)}, ConfigError, ["feed.categorical = 'c'"]),
        (GOOD, {"ignore": ("y",)}, ConfigError, ["feed.ignore = 'y'", "feed.label has it, too"]),
        (GOOD, {"ignore": ("a",), "categorical": ("a",)}, ConfigError, ["feed.categorical = 'a'", "feed.ignore has"]),
        (b"a\0,b\n", {}, FeedError, ["NUL", "convert the file to UTF-8"]),
        (b"a,b,y\r1,2,x\r", {}, FeedError, ["2 records in one", "closed by a newline"]),
        (b"a,b,y" + b" " * (1 << 20), {}, FeedError, ["1048581 bytes"]),
        (gzip.compress(GOOD, mtime=0)[:12], {}, FeedError, ["breaks off before its first record"]),
        (b"\xff\xfe\x00\x01,\n", {}, FeedError, ["not UTF-8", "convert"]),
    ],
)
def test_a_file_that_cannot_be_learned_is_refused_at_once(
    tmp_path: Path, content: bytes, options: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as refused:
        opened(tmp_path / "d.csv", content, **options)
    for word in words:
        assert word in str(refused.value)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FeedError, match=r"feed\.path = .*nowhere\.csv"):
        text_file(tmp_path / "nowhere.csv", kind="csv", label="y", max_classes=2, refuse=lambda _: None)


def test_compressed_files_are_known_by_their_content(tmp_path: Path) -> None:
    plain, _ = opened(tmp_path / "a.csv", GOOD)
    packed, _ = opened(tmp_path / "b.csv", gzip.compress(GOOD))
    assert rows(drained(plain)) == rows(drained(packed))


def test_a_compressed_file_that_breaks_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = GOOD + b"".join(b"%d,%d,x\n" % (i * 7919, i * 104729) for i in range(50_000))
    feed, refused = opened(tmp_path / "d.csv.gz", gzip.compress(whole)[:-5000])
    assert 1000 < len(rows(drained(feed, 1000))) < 50_000
    assert [letter.reason for letter in refused] == ["truncated"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_every_line_before_the_break_is_accounted_for(tmp_path: Path, kind: str) -> None:
    """Those that a quote which was never closed had swallowed, and those read for their keys, too."""
    good = {"csv": b"3,4,z\n", "jsonl": b'{"a": 3, "b": 4, "y": "z"}\n'}[kind]
    torn = b'5,"6,z\n'
    content = (GOOD if kind == "csv" else good) + torn + good * 9
    feed, refused = opened(tmp_path / "d", gzip.compress(content)[:-8] + bytes(8), kind)
    assert len(rows(drained(feed))) == 10
    assert [(letter.reason, letter.raw) for letter in refused] == [("malformed", torn), ("truncated", b"")]


def test_brackets_nested_almost_too_deeply_are_no_number(tmp_path: Path) -> None:
    """What can still be read can also be shown in the reason."""
    good = b'{"a": 1, "y": "x"}\n'
    limit = sys.getrecursionlimit()  # a library that was at work before may have raised it
    deep = [b'{"a": %s%s, "y": "x"}\n' % (b"[" * depth, b"]" * depth) for depth in range(limit - 300, limit)]
    feed, refused = opened(tmp_path / "d.jsonl", good + b"".join(deep), "jsonl")
    assert len(rows(drained(feed))) == 1
    assert {letter.reason for letter in refused} == {"not_a_number", "malformed"}
    assert [letter.raw for letter in refused] == deep


def test_columns_that_changed_since_the_checkpoint_are_refused_with_their_names(tmp_path: Path) -> None:
    feed, _ = opened(tmp_path / "a.csv", GOOD)
    position = feed.position()
    feed.close()
    other, _ = opened(tmp_path / "b.csv", b"a,c,y\n1,2,x\n")
    with pytest.raises(CheckpointError, match=r"gone: \['b'\]; new: \['c'\]"):
        other.seek(position)
    other.close()


cells = st.one_of(st.integers(-9, 9).map(str), st.just(""), st.text(max_size=4), st.sampled_from(["nan", '"', '""']))


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.lists(cells, max_size=4).map(",".join)), cut=st.integers(0, 40))
def test_every_line_is_learned_or_in_the_dead_letters(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], cut: int
) -> None:
    """Whatever the lines hold; and whoever starts again at any place reads exactly the rest."""
    folder = tmp_path_factory.mktemp("lines")
    body = "\n".join(line.replace("\r", "").replace("\n", "") for line in lines)
    content = GOOD + body.encode("utf-8", "surrogatepass")
    feed, refused = opened(folder / "d.csv", content)
    batches = drained(feed, 1)
    taken = content.split(b"\n")[1:]
    learned_lines = sum(1 for line in taken if line.strip()) - len(refused)
    assert len(batches) <= learned_lines  # a quoted newline makes one record of two lines
    if not any('"' in line for line in lines):
        assert len(batches) == learned_lines
    if cut < len(batches):
        again, _ = opened(folder / "d.csv", content)
        again.seek(batches[cut].position)
        rest = drained(again, 1)
        assert torch.equal(
            torch.cat([batch.x for batch in [*rest, batches[0]]]).nan_to_num(-1),
            torch.cat([batch.x for batch in [*batches[cut + 1 :], batches[0]]]).nan_to_num(-1),
        )


keys = st.sampled_from(["a", "b", "y", "c"])
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4))
values = st.one_of(scalars, st.lists(scalars, max_size=2), st.dictionaries(keys, scalars, max_size=2))
tables = st.fixed_dictionaries({}, optional={"a": values, "b": scalars, "y": st.sampled_from(["x", "z", 1, None, []])})
written = st.one_of(tables, values).map(lambda value: json.dumps(value).encode())
torn = st.tuples(written, st.integers(0, 30)).map(lambda pair: pair[0][: pair[1]])
junk = st.binary(max_size=8).map(lambda line: line.replace(b"\n", b""))


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.one_of(written, torn, junk)), cut=st.integers(0, 10))
def test_every_line_of_json_is_a_record_or_a_dead_letter_with_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], cut: int
) -> None:
    """Whatever the lines hold; and whoever starts again at any place reads exactly the rest."""
    path = tmp_path_factory.mktemp("lines") / "d.jsonl"
    content = b'{"a": 1, "b": 2, "y": "x"}\n' + b"\n".join(lines)
    feed, refused = opened(path, content, "jsonl")
    batches = drained(feed, 1)
    raw = [row for batch in batches for row in batch.raw] + [letter.raw for letter in refused]
    assert sorted(raw) == sorted(line for line in io.BytesIO(content) if line.strip())
    assert all(letter.reason in REASONS and letter.detail for letter in refused)
    position = batches[min(cut, len(batches) - 1)].position
    again, refused_again = opened(path, content, "jsonl")
    again.seek(position)
    rest = [batch for batch in batches if batch.position["offset"] > position["offset"]]
    found = drained(again, 1)
    assert [(batch.raw, batch.y.tolist()) for batch in found] == [(batch.raw, batch.y.tolist()) for batch in rest]
    assert str(rows(found)) == str(rows(rest))  # where NaN is NaN
    assert refused_again == [letter for letter in refused if letter.place["offset"] >= position["offset"]]

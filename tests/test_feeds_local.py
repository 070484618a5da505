"""Feeds that need no server: a file that grows, standard input with a spool, Parquet and Arrow, iterables."""

import csv
import gzip
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from stack import taken
from test_commands import streamkd

from runners.bench.kill import (
    TABLE,
    arguments,
    drain,
    ended,
    in_a_child,
    kill_loop,
    notified,
    wait_until_ready,
    write_table,
)
from runners.feeds import DeadLetter, conformance
from runners.feeds.conformance import LAWS, Law, Row, Stand, rows
from runners.feeds.rows import iterable, table_file
from runners.feeds.spool import Spool
from runners.feeds.stdin import Pipe, stdin
from runners.feeds.stream import StreamFeed, UnreachableError
from runners.feeds.tail import tail
from streamkd import Batch, checkpoint
from streamkd.errors import ConfigError, FeedError
from streamkd.testing import check_feed

SPOILT = {"a": "two", "b": 1, "y": "a", "id": "spoilt"}
COMMON: dict[str, Any] = {"label": "y", "id": "id", "max_classes": 5}


def nobody(letter: DeadLetter) -> None:
    raise AssertionError(letter.detail)


def append(path: Path, kind: str, given: Sequence[Row]) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, list(given[0]))
            if not file.tell():
                writer.writeheader()
            writer.writerows(given)
        else:
            file.writelines(f"{json.dumps(row)}\n" for row in given)


def ids(batches: Sequence[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.ids]


def polled(feed: StreamFeed, records: int = 16) -> list[str]:
    batch = feed.poll(records)
    assert batch is not None
    return list(batch.ids)


def names(begin: int, end: int) -> list[str]:
    return [f"r{n}" for n in range(begin, end)]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_file_that_grows_keeps_the_laws_of_feeds(law: Law, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    law(
        Stand(
            open=partial(tail, path, format=kind, **COMMON),
            publish=partial(append, path, kind),
            spoil=lambda: append(path, kind, [SPOILT]),
            empty=lambda: os.truncate(path, 0),
        )
    )


@pytest.mark.parametrize("kind", ["csv", "json"])
@pytest.mark.parametrize("rotations", [1, 3])
def test_a_file_is_followed_through_its_rotation(kind: str, rotations: int, tmp_path: Path) -> None:
    """Whether the feed runs meanwhile, or comes back later."""
    path = tmp_path / "log"
    append(path, kind, rows(0, 10))
    feed = tail(path, format=kind, refuse=nobody, **COMMON)
    batch = feed.poll(4)
    assert batch is not None
    for rotation in range(rotations):
        append(path, kind, rows(10 + 20 * rotation, 20 + 20 * rotation))
        for number in range(rotation, 0, -1):
            (tmp_path / f"log.{number}").rename(tmp_path / f"log.{number + 1}")
        path.rename(tmp_path / "log.1")
        append(path, kind, rows(20 + 20 * rotation, 30 + 20 * rotation))
    wanted = names(4, 10 + 20 * rotations)
    assert polled(feed, 100) == wanted
    feed.close()
    again = tail(path, format=kind, refuse=nobody, **COMMON)
    again.seek(batch.position)
    assert polled(again, 100) == wanted
    again.close()


def rotate(path: Path, name: str) -> None:
    """Give a file another name, and compress it where that is one of gzip's, as gzip does: it keeps the time."""
    path.rename(plain := path.with_name(name.removesuffix(".gz")))
    if name.endswith(".gz"):
        with plain.open("rb") as file, gzip.open(path.with_name(name), "wb") as packed:
            shutil.copyfileobj(file, packed)
        shutil.copystat(plain, path.with_name(name))
        plain.unlink()


@pytest.mark.parametrize("kind", ["csv", "json"])
@pytest.mark.parametrize("name", ["log-2026112{}", "log-2026112{}.gz", "log.2026-11-2{}.gz"])
def test_a_file_is_followed_whatever_rotation_calls_it(name: str, kind: str, tmp_path: Path) -> None:
    """Two rotations at once; whether the feed runs meanwhile, or comes back later."""
    path = tmp_path / "log"
    append(path, kind, rows(0, 10))
    (tmp_path / "log.pos").write_text("another program's\n")
    feed = tail(path, format=kind, refuse=nobody, **COMMON)
    batch = feed.poll(4)
    assert batch is not None
    for rotation in range(2):
        append(path, kind, rows(10 + 20 * rotation, 20 + 20 * rotation))
        os.utime(path, (rotation, rotation))
        rotate(path, name.format(rotation))
        append(path, kind, rows(20 + 20 * rotation, 30 + 20 * rotation))
    assert polled(feed, 100) == names(4, 50)
    assert polled(feed, 100) == []
    feed.close()
    again = tail(path, format=kind, refuse=nobody, **COMMON)
    again.seek(batch.position)
    batch = again.poll(20)
    assert batch is not None
    assert list(batch.ids) == names(4, 24)  # the last of them of the second file
    again.seek(batch.position)
    assert polled(again, 100) == names(24, 50)
    again.close()


def test_files_that_came_and_went_unread_are_a_lost_position(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, "json", rows(0, 10))
    feed = tail(path, on_position_lost="earliest", refuse=nobody, **COMMON)
    assert polled(feed) == names(0, 10)
    for rotation in range(3):
        os.utime(path, (rotation, rotation))
        path.rename(tmp_path / f"log-{rotation}")
        append(path, "json", rows(10 + 10 * rotation, 20 + 10 * rotation))
    for removed in ("log-0", "log-1"):
        (tmp_path / removed).unlink()
    assert polled(feed) == []
    assert dict(feed.resets) == {"trimmed": 1}
    assert polled(feed) == names(30, 40)
    feed.close()


@pytest.mark.parametrize("records", [2, 30])
def test_a_file_that_was_cut_is_a_lost_position_however_much_it_has_grown_since(records: int, tmp_path: Path) -> None:
    path = tmp_path / "log"
    filler = {"filler": "x" * 1_000}  # so that the first bytes are alike
    append(path, "json", [filler | row for row in rows(0, 10)])
    feed = tail(path, on_position_lost="earliest", ignore=("filler",), refuse=nobody, **COMMON)
    assert polled(feed) == names(0, 10)
    os.truncate(path, 0)
    append(path, "json", [filler | row for row in rows(10, 10 + records)])
    assert polled(feed, 100) == []
    assert dict(feed.resets) == {"recreated": 1}
    assert polled(feed, 100) == names(10, 10 + records)
    feed.close()


def test_who_notices_a_rotation_late_loses_nothing(tmp_path: Path) -> None:
    """Logrotate's `create` makes the new file before it tells whoever writes."""
    path = tmp_path / "log"
    append(path, "json", rows(0, 10))
    feed = tail(path, refuse=nobody, **COMMON)
    assert polled(feed) == names(0, 10)
    path.rename(tmp_path / "log.1")
    path.touch()
    assert polled(feed) == []
    append(tmp_path / "log.1", "json", rows(10, 15))
    append(path, "json", rows(15, 20))
    assert polled(feed) == names(10, 20)
    feed.close()


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_run_goes_on_before_the_file_begun_by_a_rotation_has_a_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "log"
    settings = ["feed.kind=tail", "feed.path=log", f"feed.format={kind}", "feed.label=y", "feed.ignore=id"]
    settings += ["feed.follow=false", "feed.wait_seconds=0.1", "http.port=0", "checkpoint.directory=saved"]
    command = ["run", "default", *(f"--set={setting}" for setting in settings)]
    append(path, kind, rows(0, 100))
    assert streamkd(monkeypatch, *command) == 0
    append(path, kind, rows(100, 120))
    path.rename(tmp_path / "log.1")
    path.touch()
    assert streamkd(monkeypatch, *command) == 0
    assert checkpoint.about(checkpoint.found(Path("saved"))[0])["records"] == 120


def test_a_line_is_not_read_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, "json", rows(0, 1))
    feed = tail(path, refuse=nobody, **COMMON)
    assert polled(feed) == ["r0"]
    line = json.dumps(rows(1, 2)[0])
    with path.open("a", encoding="utf-8") as file:
        file.write(line[:9])
        file.flush()
        assert polled(feed) == []
        file.write(line[9:] + "\n")
    assert polled(feed) == ["r1"]
    feed.close()


def test_a_rotated_file_that_was_removed_unread_is_a_lost_position(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, "json", rows(0, 10))
    feed = tail(path, refuse=nobody, **COMMON)
    batch = feed.poll(4)
    assert batch is not None
    feed.close()
    path.rename(tmp_path / "moved")  # so that its inode is not given to the next file
    append(path, "json", rows(10, 20))
    again = tail(path, refuse=nobody, **COMMON)
    with pytest.raises(FeedError, match=r"is gone, .*feed\.on_position_lost"):
        again.seek(batch.position)
    again.close()


def test_latest_begins_after_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, "json", rows(0, 100))
    with path.open("a", encoding="utf-8") as file:
        feed = tail(path, start="latest", refuse=nobody, **COMMON)
        assert polled(feed) == []
        file.write(json.dumps(rows(100, 101)[0]) + "\n")
    assert polled(feed) == ["r100"]
    feed.close()


def test_a_file_to_follow_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FeedError, match=r"feed\.path = .*nowhere.*cannot be reached"):
        tail(tmp_path / "nowhere", refuse=nobody, **COMMON)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def hang_up(writer: int) -> None:
    """End what is written, and keep the number: closed twice, it might be another file's by then."""
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), writer)


def put(writer: int, given: Sequence[Row]) -> None:
    os.write(writer, b"".join(json.dumps(row).encode() + b"\n" for row in given))


@pytest.mark.parametrize("law", [law for law in LAWS if law is not conformance.a_feed_takes_no_more_than_it_can_hold])
def test_standard_input_with_a_spool_keeps_the_laws_of_feeds(law: Law, pipe: tuple[int, int], tmp_path: Path) -> None:
    reader, writer = pipe
    law(
        Stand(
            open=partial(stdin, spool=tmp_path / "spool", descriptor=reader, **COMMON),
            publish=partial(put, writer),
            spoil=lambda: put(writer, [SPOILT]),
        )
    )


def test_without_a_spool_standard_input_is_read_once_to_its_end(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    put(writer, rows(0, 30))
    os.write(writer, json.dumps(rows(30, 31)[0]).encode())  # without a newline
    hang_up(writer)
    feed = stdin(descriptor=reader, refuse=nobody, **COMMON)
    assert feed.capabilities.promise == "at most once"
    assert polled(feed, 20) == names(0, 20)
    assert polled(feed, 20) == names(20, 31)
    assert feed.poll(20) is None
    feed.close()


def test_more_than_is_asked_for_stays_in_the_pipe(pipe: tuple[int, int], tmp_path: Path) -> None:
    reader, writer = pipe
    os.set_blocking(writer, False)
    feed = stdin(spool=tmp_path / "spool", descriptor=reader, columns=("a", "b"), refuse=nobody, **COMMON)
    line = json.dumps({**rows(0, 1)[0], "filler": "x" * 1_000}).encode() + b"\n"
    written = 0
    for _ in range(2):
        with suppress(BlockingIOError):
            while True:
                written += os.write(writer, line)
        polled(feed, 1)
    feed.close()
    assert sum(file.stat().st_size for file in (tmp_path / "spool").iterdir()) <= written // 2


def test_what_is_in_a_checkpoint_leaves_the_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", segment_bytes=100)
    for n in range(50):
        spool.append(b"line %03d\nline" % n)
        spool.append(b" too\n")
    found = list(spool.lines(spool.first()))
    assert [line for line, _ in found] == [text for n in range(50) for text in (b"line %03d\n" % n, b"line too\n")]
    for cut in range(0, 100, 7):
        assert list(spool.lines(found[cut][1])) == found[cut + 1 :]
    before = len(list((tmp_path / "spool").iterdir()))
    spool.prune(found[60][1])
    assert len(list((tmp_path / "spool").iterdir())) < before
    assert list(spool.lines(found[60][1])) == found[61:]
    assert not spool.has(found[0][1])
    spool.close()


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """A disk that is full, to those who write more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_taken_from_the_pipe_waits_for_a_disk_that_is_full(pipe: tuple[int, int], tmp_path: Path) -> None:
    reader, writer = pipe
    feed = stdin(spool=tmp_path / "spool", descriptor=reader, columns=("a", "b"), refuse=nobody, **COMMON)
    put(writer, rows(0, 10))
    with no_file_longer_than(60):
        assert polled(feed) == []
        assert not feed.connected
        assert dict(feed.failures) == {"read": 1}
        put(writer, rows(10, 20))
    assert ids(taken(feed, 20)) == names(0, 20)
    assert feed.connected
    feed.close()


def test_what_the_pipe_gave_is_written_at_the_end_or_told_as_lost(tmp_path: Path) -> None:
    for room in (True, False):
        reader, writer = os.pipe()
        folder = tmp_path / f"{room}"
        feed = stdin(spool=folder, descriptor=reader, columns=("a", "b"), refuse=nobody, **COMMON)
        put(writer, rows(0, 10))
        with no_file_longer_than(60):
            assert polled(feed) == []
            if not room:
                with pytest.raises(OSError, match="bytes of standard input are lost: the spool cannot be written"):
                    feed.close()
        if room:
            assert "the spool cannot be written" in feed.describe()["trouble"]
            feed.close()
            spool = Spool(folder)
            assert len(list(spool.lines(spool.first()))) == 10
            spool.close()
        os.close(writer)
        os.close(reader)


def test_of_what_a_full_disk_took_in_part_the_rest_is_written_later(pipe: tuple[int, int], tmp_path: Path) -> None:
    reader, writer = pipe
    spool, source = Spool(tmp_path / "spool", segment_bytes=100), Pipe(reader)
    lines = [b"%03d %s\n" % (n, b"x" * size) for n, size in enumerate((50, 50, 50, 500))]
    os.write(writer, b"".join(lines))
    with no_file_longer_than(200), pytest.raises(UnreachableError, match="the spool cannot be written"):
        source.fill(spool)
    os.write(writer, b"next\n")
    assert source.fill(spool)
    assert source.fill(spool)
    assert [line for line, _ in spool.lines(spool.first())] == [*lines, b"next\n"]
    spool.close()


def test_of_what_is_in_a_checkpoint_the_spool_keeps_what_the_one_before_it_had_not_while_there_is_room(
    tmp_path: Path,
) -> None:
    spool = Spool(tmp_path / "spool", most_bytes=4_000, segment_bytes=100)
    spool.append(b"line\n" * 200)
    found = list(spool.lines(spool.first()))
    for earlier, later in pairwise(range(30, 180, 30)):
        spool.release(found[earlier][1])
        spool.release(found[later][1])
        assert list(spool.lines(found[earlier][1])) == found[earlier + 1 :]
        assert spool.has_room()
    assert not spool.has(found[30][1])
    spool.append(b"line\n" * 1_000)
    assert not spool.has_room()
    assert not spool.has(found[120][1])
    spool.release(list(spool.lines(found[150][1]))[-1][1])
    assert spool.has_room()
    spool.close()


def test_a_line_that_a_kill_cut_short_does_not_spoil_the_next(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.append(b"whole\ncut sho")
    spool.close()
    again = Spool(tmp_path / "spool")
    again.append(b"next\n")
    assert [line for line, _ in again.lines(again.first())] == [b"whole\n", b"cut sho\n", b"next\n"]
    again.close()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_of_columns_keep_the_laws_of_feeds(law: Law, kind: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet, feather = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.feather")
    path, given = tmp_path / "table", []

    def publish(more: Sequence[Row]) -> None:
        given.extend({**row, "a": float(str(row["a"])), "b": float(str(row["b"]))} for row in more)
        table = pyarrow.Table.from_pylist(given)
        if kind == "parquet":
            parquet.write_table(table, path, row_group_size=50)
        else:
            feather.write_feather(table, path)

    law(
        Stand(
            open=partial(table_file, path, kind=kind, **COMMON),
            publish=publish,
            spoil=lambda: publish([{**SPOILT, "a": "inf"}]),
            follows=False,
        )
    )


def test_a_file_that_is_no_table_is_told(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "t").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(FeedError, match=r"feed\.path = .*check the path"):
        table_file(tmp_path / "t", kind="parquet", refuse=nobody, **COMMON)


def pairs() -> Iterator[tuple[dict[str, float], str]]:
    return ((({"a": float(n), "b": n / 2}), "abc"[n % 3]) for n in range(60))


def numbers() -> list[tuple[list[float], bool]]:
    return [([n, n / 2], n % 2 == 0) for n in range(10)]


def nothing_of_the_kind() -> list[int]:
    return [1, 2]


@pytest.mark.parametrize("source", ["test_feeds_local:pairs", "test_feeds_local:numbers", "river.datasets:Phishing"])
def test_an_iterable_of_pairs_is_a_feed(source: str) -> None:
    check_feed(lambda: iterable(source, max_classes=5, refuse=nobody), records=200 if "river" in source else 7)


def test_what_is_no_iterable_of_pairs_is_told() -> None:
    with pytest.raises(ConfigError, match=r"feed\.source = 'test_feeds_local:nothing_of_the_kind'"):
        iterable("test_feeds_local:nothing_of_the_kind", max_classes=5, refuse=nobody)
    with pytest.raises(ConfigError, match="there is no nowhere in test_feeds_local"):
        iterable("test_feeds_local:nowhere", max_classes=5, refuse=nobody)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tail", "parquet", "stdin"])
def test_a_killed_run_ends_where_an_unbroken_one_ends(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(TABLE)
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow.csv").read_csv(TABLE), "t.parquet")
        feed = ["feed.path=t.parquet"]
    elif kind == "stdin":  # all that came is in the spool, and the pipe has ended
        spool = Spool(Path("spool"))
        with TABLE.open(encoding="utf-8", newline="") as file:
            spool.append(b"".join(json.dumps(row).encode() + b"\n" for row in csv.DictReader(file)))
        spool.close()
        feed = ["feed.spool=spool", f"feed.descriptor={os.open(os.devnull, os.O_RDONLY)}"]
    else:
        feed = ["feed.format=csv", f"feed.path={TABLE}", "feed.follow=false"]
    outcome = kill_loop("default", 4, seed=1, feed=[f"feed.kind={kind}", "feed.label=y", *feed])
    assert outcome.equal == outcome.ends >= 1


@pytest.mark.slow
def test_what_comes_through_a_pipe_while_runs_are_killed_is_learned_once(
    pipe: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reader, writer = pipe
    given = ["feed.kind=stdin", "feed.spool=spool", f"feed.descriptor={reader}", "feed.label=y", "feed.id=id"]
    command = arguments("default", Path("saved"), [*given, "labels.delay=0"])
    rows_of_all = rows(0, 2_000)
    with notified() as channel:
        for begin in range(0, 2_000, 1_000):
            drain(channel)
            put(writer, rows_of_all[begin : begin + 500])
            pid = in_a_child(*command)
            wait_until_ready(channel)
            put(writer, rows_of_all[begin + 500 : begin + 1_000])
            time.sleep(0.3)
            os.kill(pid, signal.SIGKILL)
            assert ended(pid) == -signal.SIGKILL
    hang_up(writer)
    assert ended(in_a_child(*command)) == 0
    assert checkpoint.about(checkpoint.found(Path("saved"))[0])["records"] == 2_000

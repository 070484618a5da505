"""Feeds that decode on a thread of their own give what they give without one."""

import csv
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from brokers import Broker, redis_server
from hypothesis import given
from hypothesis import strategies as st
from stack import PATIENCE, names, waited
from test_commands import started, streamkd, table, told
from test_images import Shelf, encoded, numbers, pictures

from runners.bench.kill import arguments, digest, kill_loop
from runners.feeds import NONE, REPLAYABLE, DeadLetter, Feed, Refuse
from runners.feeds import ahead as module
from runners.feeds.ahead import Ahead
from runners.feeds.conformance import LAWS, Law, Row, Stand, rows
from runners.feeds.files import text_file
from streamkd import Batch, checkpoint
from streamkd.errors import FeedError

MOST = 3


@pytest.fixture(autouse=True)
def no_thread_outlives_its_feed() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "decoding"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


class Scripted:
    """A feed of one's own: what each poll is to do is written down, one entry a poll.

    An entry is a number of records, an error to raise, or a function that is called and returns one of these. Before
    the records of a poll, `refusals` of it are refused. One thread at a time may be in it.

    Attributes:
        polls: so far.
        log: what was called, in order.
    """

    name, shape, capabilities = "scripted", (1,), REPLAYABLE
    connected, failures = True, NONE

    def __init__(
        self,
        script: Sequence[Any],
        refuse: Refuse = lambda _: None,
        *,
        refusals: Mapping[int, int] | None = None,
    ) -> None:
        self.script, self._refuse, self._refusals = script, refuse, refusals or {}
        self.polls = self.given = self._place = 0
        self.asked: list[int] = []
        self.log: list[str] = []
        self._one = threading.Lock()

    def _alone(self, what: str, work: Callable[[], Any]) -> Any:
        assert self._one.acquire(blocking=False), f"{what}: another thread is in the feed"
        try:
            self.log.append(what)
            return work()
        finally:
            self._one.release()

    def poll(self, records: int) -> Batch | None:
        """Do what is written."""
        self.asked.append(records)
        return self._alone("poll", self._poll)

    def _poll(self) -> Batch | None:
        if self.polls >= len(self.script):
            return None
        bad = self._refusals.get(self.polls, 0)
        for number in range(bad):
            self._refuse(DeadLetter("malformed", "as written", b"", {"poll": self.polls, "number": number}))
        entry = self.script[self.polls]
        entry = entry() if callable(entry) else entry
        self.polls += 1
        if isinstance(entry, BaseException):
            raise entry
        x = torch.arange(self.given, self.given + entry, dtype=torch.float32)[:, None]
        self.given += entry
        self._place = self.polls if entry or bad else self._place  # it stays where there is nothing
        return Batch(x, torch.zeros(entry, dtype=torch.int64), position={"polls": self._place, "given": self.given})

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on there."""
        self._alone("seek", lambda: None)
        self.polls, self.given = position["polls"], position["given"]

    def adopt(self, classes: Sequence[str]) -> None:
        """Take them down."""
        self._alone(f"adopt {' '.join(classes)}", lambda: None)

    def commit(self, position: Mapping[str, Any]) -> None:
        """Take it down."""
        self._alone(f"commit {position['polls']}", lambda: None)

    @property
    def resets(self) -> Mapping[str, int]:
        """As many as were given."""
        return {"trimmed": self.given}

    def lag(self) -> Mapping[str, int]:
        """Return the polls that are left."""
        return {"0": len(self.script) - self.polls}

    def progress(self) -> float:
        """Return how many records were given."""
        return float(self.given)

    def describe(self) -> Mapping[str, Any]:
        """Return how many polls there were."""
        return {"polls": self.polls}

    def close(self) -> None:
        """Take it down."""
        self._alone("close", lambda: None)


def wrapped(feed: Feed, most: int = MOST, refuse: Refuse = lambda _: None) -> Ahead:
    return Ahead(lambda _: feed, refuse, most)


def given_by(feed: Feed, refused: Sequence[DeadLetter]) -> list[tuple[Any, ...]]:
    """Return all that can be seen of a feed, poll by poll, up to its end or its first error."""
    seen: list[tuple[Any, ...]] = []
    while True:
        try:
            batch = feed.poll(5)
        except Exception as error:  # noqa: BLE001 - whatever it is
            return [*seen, (repr(error), len(refused))]
        if batch is None:
            return [*seen, (None, len(refused), feed.lag(), feed.progress())]
        if len(batch) or batch.position != (seen[-1][1] if seen else None):
            state = (feed.lag(), feed.progress(), dict(feed.resets), feed.describe())
            seen.append((batch.x.tolist(), dict(batch.position), [letter.place for letter in refused], *state))


@given(
    script=st.lists(st.one_of(st.integers(0, 5), st.sampled_from([OSError("broken"), FeedError("feed: broken")]))),
    refusals=st.dictionaries(st.integers(0, 9), st.integers(1, 3)),
    most=st.integers(1, 9),
)
def test_batches_refusals_and_errors_come_as_without_it(script: list[Any], refusals: dict[int, int], most: int) -> None:
    """And after each of them the feed tells of itself what it told then."""
    ways = []
    for open_feed in (
        lambda refuse: Scripted(script, refuse, refusals=refusals),
        lambda refuse: Ahead(lambda keep: Scripted(script, keep, refusals=refusals), refuse, most),
    ):
        refused: list[DeadLetter] = []
        with closing(open_feed(refused.append)) as feed:
            ways.append(given_by(feed, refused))
    assert ways[0] == ways[1]


@pytest.mark.parametrize("law", LAWS)
def test_a_file_read_ahead_keeps_the_laws_of_feeds(law: Law, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"

    def publish(given_rows: Sequence[Row]) -> None:
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(given_rows[0]))
            if not file.tell():
                writer.writeheader()
            writer.writerows(given_rows)

    law(
        Stand(
            open=of(partial(text_file, path, kind="csv", label="y", id="id", max_classes=5)),
            publish=publish,
            spoil=lambda: publish([{"a": "two", "b": 1, "y": "a", "id": "spoilt"}]),
            follows=False,
        )
    )


@pytest.mark.parametrize("law", LAWS)
def test_images_read_ahead_keep_the_laws_of_feeds(law: Law, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "set.parquet", "parquet")
    law(Stand(open=of(shelf.open), publish=shelf.publish, spoil=shelf.spoil, follows=False, numbers=numbers))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    made = redis_server(tmp_path_factory.mktemp("redis"), "--appendonly", "yes", "--appendfsync", "always")
    yield made
    made.stop()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("group", ["", "g"])
def test_a_broker_read_ahead_keeps_the_laws_of_feeds(law: Law, group: str, server: Broker) -> None:
    from test_feeds_redis import stand  # noqa: PLC0415 - which skips where the client is not installed

    server.start()
    made = stand(server, group=group, consumer="c")
    law(replace(made, open=of(made.open)))


def of(open_feed: Callable[..., Feed]) -> Callable[..., Feed]:
    """Return what opens the same feed, read ahead."""
    return lambda refuse, **options: Ahead(lambda keep: open_feed(refuse=keep, **options), refuse, 8)


def test_no_more_is_decoded_than_may_wait() -> None:
    feed = Scripted([1] * 50)
    with closing(wrapped(feed)) as ahead:
        for taken in range(1, 20):
            assert ahead.poll(1) is not None
            assert waited(lambda taken=taken: feed.polls == taken + MOST, every=0.001)
            time.sleep(0.002)
            assert feed.polls == taken + MOST
    assert feed.log[-1] == "close"


def test_what_waits_is_counted_as_waiting() -> None:
    feed = Scripted([1] * 10)
    with closing(wrapped(feed)) as ahead:
        assert ahead.lag() == {"0": 10}
        ahead.poll(1)
        assert waited(lambda: feed.polls == 1 + MOST, every=0.001)
        assert (ahead.lag(), ahead.progress(), ahead.resets) == ({"0": 9}, 1.0, {"trimmed": 1})


def test_a_feed_that_has_nothing_is_asked_once_more_for_each_time_that_its_reader_asks() -> None:
    feed = Scripted([2, *[0] * 40, 3])
    with closing(wrapped(feed)) as ahead:
        sizes = []
        while 3 not in sizes:
            batch = ahead.poll(5)
            assert batch is not None
            sizes.append(len(batch))
            time.sleep(0.001)
            assert feed.polls <= len(sizes) + 2
    assert sizes == [2, *[0] * (len(sizes) - 2), 3]


def test_an_empty_batch_waits_in_front_of_no_other() -> None:
    first_taken = threading.Event()
    feed = Scripted([1, lambda: int(first_taken.wait(PATIENCE)), 1, 0, 0, 1])
    with closing(wrapped(feed, 8)) as ahead:
        sizes = []
        for polls in (4, 5, 6, 6):
            sizes.append(len(ahead.poll(1) or ()))
            first_taken.set()
            assert waited(lambda polls=polls: feed.polls == polls, every=0.001)
            ahead.commit({"polls": 0})  # when that poll is over
    assert sizes == [1, 1, 1, 1]


def test_what_was_decoded_ahead_is_dropped_by_a_seek_and_refused_no_earlier_than_taken() -> None:
    refused: list[DeadLetter] = []
    feeds: list[Scripted] = []

    def opened(keep: Refuse) -> Feed:
        feeds.append(Scripted([1] * 9, keep, refusals={1: 1, 3: 2, 6: 1}))
        return feeds[-1]

    with closing(Ahead(opened, refused.append, 8)) as ahead:
        ahead.poll(1)
        assert waited(lambda: feeds[0].polls == 9, every=0.001)
        assert not refused
        ahead.seek({"polls": 4, "given": 4})
        left = [batch for _ in range(5) if (batch := ahead.poll(1)) is not None]
        assert [int(batch.x) for batch in left] == [4, 5, 6, 7, 8]
        assert [letter.place for letter in refused] == [{"poll": 6, "number": 0}]


def test_positions_and_classes_given_before_the_first_poll_reach_the_feed() -> None:
    feed = Scripted([1] * 5)
    with closing(wrapped(feed)) as ahead:
        ahead.adopt(["a", "b"])
        ahead.seek({"polls": 3, "given": 3})
        batch = ahead.poll(1)
        assert batch is not None
        assert int(batch.x) == 3
    assert feed.log[:2] == ["adopt a b", "seek"]


def test_another_number_of_records_holds_for_what_is_decoded_from_then_on() -> None:
    feed = Scripted([1] * 20)
    with closing(wrapped(feed)) as ahead:
        ahead.poll(16)
        assert waited(lambda: feed.polls == 1 + MOST, every=0.001)
        ahead.poll(4)
        assert waited(lambda: feed.polls == 2 + MOST, every=0.001)
    assert feed.asked == [*[16] * (1 + MOST), 4]


def test_a_commit_waits_for_the_poll_under_way_and_for_no_other() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow() -> int:
        inside.set()
        assert go_on.wait(PATIENCE)
        return 1

    feed = Scripted([1, slow, *[1] * 1_000])
    with closing(wrapped(feed, 1_000)) as ahead:
        ahead.poll(1)
        assert inside.wait(PATIENCE)
        telling = threading.Thread(target=lambda: ahead.commit({"polls": 1}))
        telling.start()
        telling.join(0.01)
        assert telling.is_alive()
        go_on.set()
        telling.join(PATIENCE)
    assert feed.log[:3] == ["poll", "poll", "commit 1"]


def test_a_feed_is_closed_while_its_source_blocks_and_never_by_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll that does not come back in time is left to its thread, and the source with it."""
    monkeypatch.setattr(module, "SECONDS", 0.05)
    inside, go_on = threading.Event(), threading.Event()

    def blocked() -> int:
        inside.set()
        assert go_on.wait(PATIENCE)
        return 1

    feed = Scripted([1, blocked, 1, 1])
    ahead = wrapped(feed)
    ahead.poll(1)
    assert inside.wait(PATIENCE)
    ahead.close()
    ahead.close()
    assert feed.log == ["poll", "poll"]
    go_on.set()
    assert waited(lambda: feed.log == ["poll", "poll", "close"], every=0.001)
    assert waited(lambda: not [thread for thread in threading.enumerate() if thread.name == "decoding"], every=0.001)


def test_after_its_end_or_an_error_a_feed_can_be_polled_again() -> None:
    feed = Scripted([1, OSError("once"), 1])
    with closing(wrapped(feed)) as ahead:
        ahead.poll(1)
        with pytest.raises(OSError, match="once"):
            ahead.poll(1)
        assert ahead.poll(1) is not None
        assert ahead.poll(1) is None
        assert ahead.poll(1) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_records_for_a_gpu_lie_where_it_copies_from() -> None:
    with closing(Ahead(lambda _: Scripted([4]), lambda _: None, 1, pinned=True)) as ahead:
        batch = ahead.poll(4)
        assert batch is not None
        assert batch.x.is_pinned()


WORLD = ["labels.delay=40", "http.port=0", "log.level=error", "deterministic=true", "checkpoint.every_records=150"]


def world(folder: Path, kind: str) -> list[str]:
    """Write a table or images of which some cannot be used, and with classes that come one after the other."""
    if kind == "images":
        for number, image in enumerate(pictures(90, 6, 6, 3)):
            place = folder / "images" / "abc"[number % 3] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"no image" if number % 17 == 0 and number else encoded(image))
        return ["feed.path=images", "peers.0.model.channels=[4]", "peers.1.model.channels=[4]", "replay.updates=1"]
    lines = sorted(table(folder / "d.csv").read_text(encoding="utf-8").splitlines()[1:], key=lambda line: line[-1])
    lines[100], lines[200], lines[300], lines[590] = "1,2", "1,2,x,4,class 1", "1,2,inf,4,class 1", "1,,,class"
    (folder / "d.csv").write_text("\n".join(["a,b,c,d,y", *lines]), encoding="utf-8")
    return ["feed.path=d.csv", "feed.label=y"]


@pytest.mark.parametrize(("configuration", "kind"), [("default", "csv"), ("images", "images")])
def test_a_run_ends_with_the_same_state_predictions_and_dead_letters(
    configuration: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*WORLD, *world(tmp_path, kind), "predictions.kind=jsonl"]
    ends = []
    for most in (0, 1, 6):
        own = [f"read_ahead={most}", f"checkpoint.directory=saved{most}", f"predictions.path=said{most}.jsonl"]
        given_settings = [*settings, *own, f"dead_letters.path=letters{most}.jsonl"]
        assert streamkd(monkeypatch, "run", configuration, *(f"--set={setting}" for setting in given_settings)) == 0
        letters = [json.loads(line) for line in Path(f"letters{most}.jsonl").read_text(encoding="utf-8").splitlines()]
        about = checkpoint.about(checkpoint.found(Path(f"saved{most}"))[0])
        ends.append(
            (
                digest(Path(f"saved{most}")),
                Path(f"said{most}.jsonl").read_text(encoding="utf-8"),
                [{key: value for key, value in letter.items() if key != "time"} for letter in letters],
                {key: value for key, value in about.items() if key != "configuration"},
            )
        )
    assert len(ends[0][2]) > 2
    assert ends[0] == ends[1] == ends[2]


def test_an_evaluation_gives_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world(tmp_path, "csv")
    figures = []
    for most in (0, 4):
        given_settings = ["--label", "y", "--json", "-", "--set", f"read_ahead={most}"]
        assert streamkd(monkeypatch, "eval", "default", "d.csv", *given_settings) == 0
        result = json.loads(capsys.readouterr().out)
        figures.append({key: value for key, value in result.items() if "second" not in key})
    assert figures[0] == figures[1]


@pytest.mark.parametrize("failing", ["OSError('the disk is gone')", "FeedError('feed.path: gone')"])
def test_an_error_ends_a_run_with_the_same_words_and_exit_code(
    failing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("broken_feed.py").write_text(
        "from runners.feeds.drifting import DriftingFeed\n"
        "from streamkd.errors import FeedError\n"
        "class Broken(DriftingFeed):\n"
        "    def poll(self, records):\n"
        f"        if self.progress() >= 0.5: raise {failing}\n"
        "        return super().poll(records)\n"
        "def broken(*, max_classes, refuse): return Broken(1_000, 0)\n",
        encoding="utf-8",
    )
    ends = []
    for most in (0, 8):
        own = ["feed.kind=broken_feed:broken", "http.port=0", f"read_ahead={most}", f"checkpoint.directory=s{most}"]
        code = streamkd(monkeypatch, "run", "default", *(f"--set={setting}" for setting in own))
        log = [line for line in capsys.readouterr().err.splitlines() if "streamkd" in line or "gone" in line]
        ends.append((code, log[-1]))
    assert ends[0] == ends[1]
    assert ends[0][0] == FeedError.exit_code


def test_too_large_a_share_of_refused_records_stops_a_run_at_the_same_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = table(tmp_path / "d.csv").read_text(encoding="utf-8").splitlines()
    lines[301:] = [line if number % 3 == 0 else "1,2,x,4,class 1" for number, line in enumerate(lines[301:])]
    (tmp_path / "d.csv").write_text("\n".join(lines), encoding="utf-8")
    ends = []
    for most in (0, 8):
        own = [f"read_ahead={most}", f"dead_letters.path=letters{most}.jsonl", "dead_letters.window=100"]
        code = streamkd(monkeypatch, "eval", "default", "d.csv", "--label=y", *(f"--set={setting}" for setting in own))
        ends.append((code, capsys.readouterr().err, len(Path(f"letters{most}.jsonl").read_text().splitlines())))
    assert ends[0] == ends[1]
    assert ends[0][0] == 2


@pytest.mark.slow
def test_a_signal_ends_a_run_that_reads_ahead_and_it_goes_on_where_it_stopped() -> None:
    header, *lines = table(Path("d.csv"), 6_000).read_text(encoding="utf-8").splitlines(keepends=True)
    for number in range(50, 6_000, 100):
        lines[number] = "1,2,x,4,class 1\n"
    Path("d.csv").write_text("".join([header, *lines]), encoding="utf-8")
    given_settings = ["feed.kind=tail", "feed.format=csv", "feed.path=d.csv", "feed.label=y", "http.port=0"]
    command = ["run", "default", *(f"--set={setting}" for setting in [*given_settings, "checkpoint.every_records=500"])]
    ahead = [*command, "--set=read_ahead=64", "--set=checkpoint.directory=ahead", "--set=dead_letters.path=ahead.jsonl"]
    with started(*ahead) as first:
        told(first, "checkpoint")
        first.terminate()
        assert told(first, "stopped")["records"] >= 500
        assert first.wait(PATIENCE) == 0
    for one in ([*ahead], [*command, "--set=checkpoint.directory=plain", "--set=dead_letters.path=plain.jsonl"]):
        with started(*one, "--set=feed.follow=false") as run:
            assert told(run, "stopped")["records"] == 5_940
            assert run.wait(PATIENCE) == 0
    assert digest(Path("ahead")) == digest(Path("plain"))
    letters = [Path(f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("ahead", "plain")]
    assert [[json.loads(line)["raw"] for line in told_of] for told_of in letters] == [["1,2,x,4,class 1\n"] * 60] * 2


@pytest.mark.slow
def test_a_run_that_reads_ahead_and_is_killed_ends_where_one_that_does_neither_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feed = ["feed.path=table.csv", "feed.label=y"]
    outcome = kill_loop("default", 20, seed=5, feed=[*feed, "read_ahead=5"])
    assert outcome.kills == 20
    assert outcome.equal == outcome.ends >= 1
    assert streamkd(monkeypatch, *arguments("default", Path("plain"), feed)) == 0
    assert digest(Path("plain")) == digest(Path("undisturbed"))


def test_ids_come_in_order_however_many_may_wait(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows(0, 300)), encoding="utf-8")
    for most in (1, 2, 1_024):
        opened = of(partial(text_file, path, kind="jsonl", label="y", id="id", max_classes=5))
        with closing(opened(refuse=lambda _: None)) as feed:
            batches = list(iter(lambda feed=feed: feed.poll(7), None))
        assert names(batches) == [f"r{n}" for n in range(300)], most


def test_a_feed_that_never_gives_a_record_again_is_not_read_ahead(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed = "feed={kind='stdin', columns=['a', 'y'], label='y'}"
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert streamkd(monkeypatch, "run", "default", "--set", feed, "--set", "read_ahead=8") == 2
    said = capsys.readouterr().err
    assert "read_ahead = 8" in said
    assert "feed.spool" in said


def test_the_demo_knows_its_stream_whatever_is_around_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    around = ["--set", "read_ahead=2", "--set", "labels.delay=20"]
    assert streamkd(monkeypatch, "demo", "--records", "200", "--port", "0", "--no-live", *around) == 0
    assert "200 records, true drifts at 40, 80, 120, 160" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_evaluates_every_feed_with_and_without(
    server: Broker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("redis", reason="the client is not installed: pip install 'streamkd[redis]'")
    server.start()
    options = ["--records", "20", "--most", "2", "--rounds", "1", "--url", f"redis://127.0.0.1:{server.port}/0"]
    assert streamkd(monkeypatch, "bench", "ahead", *options, "--json", "-") == 0
    speeds = json.loads(capsys.readouterr().out)["records_per_second"]
    assert [*speeds][-2:] == ["200 rows of CSV", "the same in Redis"]
    assert len(speeds) == 5
    assert all(speed > 0 for ways in speeds.values() for way in ways.values() for speed in way)

"""Redis Streams, beside a real redis-server."""

import csv
import os
import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from brokers import Broker, redis_server
from outage import costs_nothing, newest_interval
from stack import PATIENCE, names, taken, waited
from test_commands import fetched, started, streamkd, told

from runners.bench.kill import RECORDS, TABLE, arguments, ended, in_a_child, kill_loop, write_table
from runners.feeds import conformance
from runners.feeds.conformance import Law, Stand
from runners.feeds.redis_streams import redis_stream
from streamkd import checkpoint
from streamkd.errors import ConfigError, FeedError
from streamkd.testing import check_feed

redis = pytest.importorskip("redis", reason="the client is not installed: pip install 'streamkd[redis]'")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    made = redis_server(tmp_path_factory.mktemp("redis"), "--appendonly", "yes", "--appendfsync", "always")
    yield made
    made.stop()


@pytest.fixture
def broker(server: Broker) -> Broker:
    """Running, whatever the last test did."""
    server.start()
    return server


def url(broker: Broker) -> str:
    return f"redis://127.0.0.1:{broker.port}/0"


def publish(broker: Broker, rows: Sequence[Mapping[str, Any]]) -> None:
    with redis.Redis.from_url(url(broker)) as client, client.pipeline(transaction=False) as pipeline:
        for row in rows:
            pipeline.xadd("s", row)
        pipeline.execute()


def stand(broker: Broker, **options: Any) -> Stand:
    """Return a stand on an empty server."""

    def run(command: str, *arguments: object) -> None:
        with redis.Redis.from_url(url(broker)) as client:
            client.execute_command(command, *arguments)

    def trim(records: int) -> None:
        with redis.Redis.from_url(url(broker)) as client:
            client.xtrim("s", client.xlen("s") - records, approximate=False)

    run("FLUSHALL")
    given = {"label": "y", "id": "id", "max_classes": 5, "stream": "s", "url": url(broker), **options}
    return Stand(
        open=partial(redis_stream, **given),
        publish=partial(publish, broker),
        spoil=lambda: publish(broker, [{"a": "two", "b": 1, "y": "a", "id": "spoilt"}]),
        stop=broker.stop,
        start=broker.start,
        forget=trim,
        empty=lambda: run("DEL", "s"),
    )


@pytest.mark.parametrize("law", conformance.LAWS)
def test_by_id_it_keeps_the_laws_of_feeds(law: Law, broker: Broker) -> None:
    law(stand(broker))


@pytest.mark.parametrize("law", conformance.LAWS)
def test_in_a_group_it_keeps_the_laws_of_feeds(law: Law, broker: Broker) -> None:
    law(stand(broker, group="g", consumer="c"))


@pytest.mark.parametrize("group", ["", "g"])
def test_an_entry_is_as_old_as_its_id_unless_it_tells_or_its_id_was_chosen(broker: Broker, group: str) -> None:
    made = stand(broker, group=group, consumer="c", columns=("a", "b"))
    began = time.time() - 1
    made.publish([{**conformance.rows(0, 1)[0], "at": 1_767_225_600}])
    feed = made.open(refuse=lambda _: None)
    (batch,) = taken(feed, 1)
    assert began < batch.times[0] < time.time() + 1
    feed.close()
    telling = redis_stream(
        stream="s", url=url(broker), label="y", id="id", time="at", max_classes=5, refuse=lambda _: None
    )
    (batch,) = taken(telling, 1)
    assert batch.times == (1_767_225_600.0,)
    telling.close()
    chosen = stand(broker, group=group, consumer="c")
    with redis.Redis.from_url(url(broker)) as client:
        client.xadd("s", conformance.rows(0, 1)[0], id="7-0")
    feed = chosen.open(refuse=lambda _: None)
    (batch,) = taken(feed, 1)
    assert (len(batch), batch.times) == (1, ())
    feed.close()


def drifting() -> list[dict[str, str]]:
    """A stream that drifts."""
    write_table(TABLE)
    with TABLE.open(encoding="utf-8", newline="") as file:
        return [{**row, "id": f"r{n}"} for n, row in enumerate(csv.DictReader(file))]


@pytest.fixture
def table(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stream that drifts, published; the settings to learn it by id up to its end."""
    monkeypatch.chdir(tmp_path)
    stand(broker).publish(drifting())
    return ["feed.kind=redis", f"feed.url={url(broker)}", "feed.stream=s", "feed.label=y", "feed.id=id"]


@pytest.mark.slow
def test_a_run_by_id_that_is_killed_ends_where_an_unbroken_one_ends(table: list[str]) -> None:
    outcome = kill_loop("default", 20, seed=3, feed=[*table, "feed.follow=false"])
    assert outcome.kills == 20
    assert outcome.equal == outcome.ends >= 1


@pytest.mark.slow
def test_a_run_by_id_ends_where_one_on_a_file_ends(table: list[str]) -> None:
    for folder, feed in (("file", []), ("redis", [*table, "feed.follow=false"])):
        assert ended(in_a_child(*arguments("default", Path(folder), feed))) == 0
    about = [checkpoint.about(checkpoint.found(Path(folder))[0]) for folder in ("file", "redis")]
    assert about[0]["records"] == about[1]["records"] == RECORDS
    assert about[0]["peers"] == about[1]["peers"]


def test_what_was_learned_is_saved_where_the_group_has_gone(broker: Broker, table: list[str]) -> None:
    stand(broker)
    publish(broker, drifting()[:400])
    command = arguments("default", Path("saved"), [*table, "feed.group=g", "feed.consumer=c", "labels.delay=0"])
    with started(*command, "--set=log.level=info", "--set=checkpoint.every_records=100000") as daemon:
        port = told(daemon, "listening")["port"]
        assert waited(lambda: '_feed_records_total{feed="redis"} 400.0' in fetched(port, "/metrics")[1])
        with redis.Redis.from_url(url(broker)) as client:
            client.flushall()
        assert daemon.wait(PATIENCE) == 3
    assert checkpoint.about(checkpoint.newest(Path("saved")))["records"] == 400


def acknowledged(broker: Broker) -> int:
    with redis.Redis.from_url(url(broker)) as client:
        return sum(
            group["entries-read"] - group["pending"] for group in client.xinfo_groups("s") if group["entries-read"]
        )


@pytest.mark.slow
def test_killed_members_of_a_group_learn_all_and_little_of_it_twice(broker: Broker, table: list[str]) -> None:
    """At least once: a kill brings again what is in the newest checkpoint and not in the one before it, at most."""
    rows, twice = drifting(), 0
    stand(broker)  # emptied: something new is published before each kill, however far the run before has come
    group = [*table, "feed.group=g", "feed.consumer=c", "labels.delay=0"]
    command = arguments("default", Path("saved"), group)
    chance = random.Random(5)  # noqa: S311 - not for secrets
    for begin in range(0, RECORDS, 400):
        publish(broker, rows[begin : begin + 400])
        before = acknowledged(broker)
        pid = in_a_child(*command)
        assert waited(lambda before=before: acknowledged(broker) > before, every=0.02)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        twice += newest_interval(Path("saved"))
    last = ("--set=log.level=info", "--set=checkpoint.every_seconds=0.5")
    with started(*command, *last) as daemon, redis.Redis.from_url(url(broker)) as client:
        told(daemon, "restored")
        assert waited(lambda: [(group["lag"], group["pending"]) for group in client.xinfo_groups("s")] == [(0, 0)])
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE) == 0
    learned = checkpoint.about(checkpoint.found(Path("saved"))[0])["records"]
    # What a killed run learned after its last checkpoint is not in the state that went on, so it counts once; what was
    # in that checkpoint and not yet acknowledged counts twice.
    assert RECORDS <= learned <= RECORDS + twice


@pytest.mark.slow
def test_a_server_that_is_gone_for_ten_seconds_costs_nothing_and_is_told(broker: Broker, table: list[str]) -> None:
    rows = [{"x0": n, "id": f"m{n}", "y": "1"} for n in range(100)]
    costs_nothing(broker, table, lambda: publish(broker, rows), more=len(rows))


@pytest.mark.slow
def test_a_position_that_was_lost_while_nothing_ran_is_told(broker: Broker, table: list[str]) -> None:
    settings = [*table, "http.port=0", "checkpoint.directory=saved", "feed.on_position_lost=earliest"]
    command = ["run", "default", *(f"--set={setting}" for setting in settings)]
    with started(*command, "--set=checkpoint.every_records=400") as daemon:
        told(daemon, "checkpoint")
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE) == 0
    with TABLE.open(encoding="utf-8", newline="") as file:
        publish(broker, [{**row, "id": f"m{n}"} for n, row in zip(range(100), csv.DictReader(file), strict=False)])
    with redis.Redis.from_url(url(broker)) as client:
        client.xtrim("s", 50, approximate=False)
    with started(*command) as daemon:
        port = told(daemon, "listening")["port"]
        entry = told(daemon, "position lost")
        assert (entry["reason"], entry["so_far"], entry["level"]) == ("trimmed", 1, "warning")
        wanted = 'streamkd_feed_position_resets_total{feed="redis",reason="trimmed"} 1.0'
        assert waited(lambda: wanted in fetched(port, "/metrics")[1])


def test_what_a_group_was_told_of_a_checkpoint_that_was_damaged_since_is_a_lost_position(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stand(broker).publish(conformance.rows(0, 600))
    settings = ["feed.kind=redis", f"feed.url={url(broker)}", "feed.stream=s", "feed.label=y", "feed.ignore=id"]
    settings += ["feed.group=g", "feed.consumer=c", "http.port=0", "checkpoint.directory=saved"]
    command = ["run", "default", *(f"--set={setting}" for setting in settings)]
    assert streamkd(monkeypatch, *command, "--set=feed.follow=false", "--set=checkpoint.every_records=200") == 0
    newest, before = checkpoint.found(Path("saved"))[:2]
    (newest / "tensors.pt").write_bytes(b"nothing")
    with started(*command) as daemon:
        port = told(daemon, "listening")["port"]
        assert told(daemon, "restored")["path"].endswith(before.name)
        entry = told(daemon, "position lost")
        assert (entry["reason"], entry["so_far"], entry["level"]) == ("acknowledged", 1, "warning")
        wanted = 'streamkd_feed_position_resets_total{feed="redis",reason="acknowledged"} 1.0'
        assert waited(lambda: wanted in fetched(port, "/metrics")[1])


@pytest.mark.parametrize("left", [5, 0])
def test_a_run_that_goes_on_learns_the_columns_of_its_checkpoint_whatever_waits(
    left: int, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else records of today have, and though there may be none."""
    monkeypatch.chdir(tmp_path)
    made = stand(broker)
    made.publish(conformance.rows(0, 100))
    settings = ["feed.kind=redis", f"feed.url={url(broker)}", "feed.stream=s", "feed.label=y", "feed.ignore=id"]
    settings += ["feed.follow=false", "feed.wait_seconds=0.1", "http.port=0", "checkpoint.directory=saved"]
    command = ["default", *(f"--set={setting}" for setting in settings)]
    assert streamkd(monkeypatch, "run", *command) == 0
    made.publish(conformance.rows(100, 120, new=1))
    assert streamkd(monkeypatch, "run", *command) == 0
    assert made.forget is not None
    made.forget(120 - left)
    for begun in ("check", "run"):
        assert streamkd(monkeypatch, begun, *command) == 0
    made.publish(conformance.rows(120, 130, new=1))
    assert streamkd(monkeypatch, "run", *command) == 0
    assert checkpoint.about(checkpoint.found(Path("saved"))[0])["records"] == 130
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    assert streamkd(monkeypatch, "run", *command) == 0
    about = checkpoint.about(checkpoint.found(Path("saved"))[0])
    assert (about["records"], about["feed"]["columns"]) == (left + 10, ["a", "b", "new"])


@pytest.mark.parametrize("setting", ["feed.ignore=b", "feed.categorical=new"])
def test_other_columns_than_those_of_the_checkpoint_are_refused(
    setting: str, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stand(broker).publish(conformance.rows(0, 100))
    settings = ["feed.kind=redis", f"feed.url={url(broker)}", "feed.stream=s", "feed.label=y", "feed.id=id"]
    settings += ["feed.follow=false", "http.port=0", "checkpoint.directory=saved"]
    command = ["run", "default", *(f"--set={setting}" for setting in settings)]
    assert streamkd(monkeypatch, *command) == 0
    assert streamkd(monkeypatch, *command, f"--set={setting}") == 4
    assert "its columns are not those of the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told_"),
    [
        ({"label": "klass"}, r"feed\.label = 'klass': no such column in 's'"),
        ({"labels": "y"}, r"feed\.labels: no such setting; did you mean feed\.label\?"),
        ({"on_position_lost": "ignore"}, r"feed\.on_position_lost = 'ignore'"),
        ({"format": "csv"}, r"feed\.columns: missing; a message of CSV has no header"),
        ({"format": "json", "field": "a"}, r"feed\.stream = 's': none of its first 3 messages can be used"),
        ({"password_env": "STREAMKD_NOT_SET"}, r"feed\.password_env = 'STREAMKD_NOT_SET'"),
        ({"shape": (3,)}, r"feed\.shape = \[3\]: 3 numbers, and a record has 2"),
    ],
)
def test_a_setting_that_does_not_fit_is_told(broker: Broker, options: dict[str, Any], told_: str) -> None:
    made = stand(broker, **options)
    made.publish(conformance.rows(0, 3))
    with pytest.raises(ConfigError, match=told_):
        made.open(refuse=lambda _: None)


def test_a_stream_without_records_is_waited_for_and_then_told(broker: Broker) -> None:
    made = stand(broker, wait_seconds=0.1)
    with pytest.raises(FeedError, match=r"no record in 0\.1 s; publish one, or name all columns in feed\.columns"):
        made.open(refuse=lambda _: None)
    feed = made.open(refuse=lambda _: None, columns=("a", "b"))
    made.publish(conformance.rows(0, 3))
    batches = taken(feed, 3)
    feed.close()
    assert [row for batch in batches for row in batch.x.tolist()] == [[0, 0], [1, 0.5], [2, 1]]


def test_a_payload_of_many_records_is_left_and_found_again_in_its_middle(broker: Broker) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    made = stand(broker, format="arrow", field="data", ignore=("filler",), follow=False)
    for begin in (0, 20):
        table = pyarrow.Table.from_pylist(conformance.rows(begin, begin + 20, filler=""))
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        made.publish([{"data": sink.getvalue().to_pybytes()}])
    check_feed(lambda: made.open(refuse=lambda _: None))


def test_an_entry_deleted_by_hand_is_no_loss(broker: Broker) -> None:
    made = stand(broker, columns=("a", "b"))
    made.publish(conformance.rows(0, 10))
    with redis.Redis.from_url(url(broker)) as client:
        client.xdel("s", client.xrange("s")[5][0])
    feed = made.open(refuse=lambda _: None)
    position = taken(feed, 9)[-1].position
    assert not len(feed.poll(16) or ())
    assert not any(feed.lag().values())
    feed.close()
    assert made.forget is not None
    made.forget(9)
    made.publish(conformance.rows(10, 12))
    again = made.open(refuse=lambda _: None)
    again.seek(position)
    assert names(taken(again, 2)) == ["r10", "r11"]
    again.close()


def test_latest_begins_with_what_comes_next(broker: Broker) -> None:
    made = stand(broker, start="latest")
    made.publish(conformance.rows(0, 10))
    feed = made.open(refuse=lambda _: None)
    made.publish(conformance.rows(10, 12))
    assert names(taken(feed, 2)) == ["r10", "r11"]
    feed.close()


def test_what_a_member_of_a_group_left_long_ago_is_taken_over_by_another(broker: Broker) -> None:
    made = stand(broker, group="g", idle_seconds=0.05)
    made.publish(conformance.rows(0, 30))
    for consumer in ("gone", "next"):
        time.sleep(0.1)
        feed = made.open(refuse=lambda _: None, consumer=consumer)
        assert names(taken(feed, 30)) == [f"r{n}" for n in range(30)]
        feed.close()


def test_check_shows_three_records_and_a_server_that_is_away(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    stand(broker).publish(conformance.rows(0, 10))
    given = [f"--set={pair}" for pair in (f"feed.url={url(broker)}", "feed.stream=s", "feed.id=id", "http.port=0")]
    assert streamkd(monkeypatch, "check", "redis", *given) == 0
    shown = capsys.readouterr().out
    for word in ("First 3 records", "effectively once", "waiting", "It would run"):
        assert word in shown
    broker.stop()
    assert streamkd(monkeypatch, "check", "redis", *given) == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert streamkd(monkeypatch, "run", "redis", *given) == 3
    assert "Traceback" not in capsys.readouterr().err

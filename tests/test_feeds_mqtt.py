"""MQTT, beside a real mosquitto."""

import csv
import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from brokers import Broker, mosquitto
from outage import costs_nothing
from stack import PATIENCE, names, taken, waited
from test_commands import fetched, started, told

from runners.bench.kill import RECORDS, TABLE, kill_loop, write_table
from runners.feeds import DeadLetter, conformance
from runners.feeds.conformance import Law, Stand
from runners.feeds.mqtt import AT_ONCE, mqtt
from runners.feeds.spooled import as_line
from streamkd import checkpoint
from streamkd.errors import ConfigError

client_of = pytest.importorskip("paho.mqtt.client", reason="the client is not installed: pip install 'streamkd[mqtt]'")

SESSIONS = (f"session-{number}" for number in count())
COMMON: dict[str, Any] = {"label": "y", "id": "id", "max_classes": 5}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    made = mosquitto(tmp_path_factory.mktemp("mqtt"))
    yield made
    made.stop()


@pytest.fixture
def broker(server: Broker) -> Broker:
    """Running, whatever the last test did."""
    server.start()
    return server


def nobody(letter: DeadLetter) -> None:
    raise AssertionError(letter.detail)


def publish(broker: Broker, topic: str, rows: Sequence[Mapping[str, Any]]) -> None:
    client = client_of.Client(client_of.CallbackAPIVersion.VERSION2, protocol=client_of.MQTTv5)
    client.max_inflight_messages_set(1_000)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    for sent in [client.publish(topic, json.dumps(row), qos=1) for row in rows]:
        sent.wait_for_publish(PATIENCE)
        assert sent.is_published()
    client.disconnect()
    client.loop_stop()


def stand(broker: Broker, folder: Path, **options: Any) -> Stand:
    """Return a stand of a topic and a session of its own, which has begun."""
    session = next(SESSIONS)
    given = {
        **COMMON,
        "topic": session,
        "session": session,
        "spool": folder / "spool",
        "url": f"mqtt://127.0.0.1:{broker.port}",
        **options,
    }
    mqtt(**{**given, "columns": ("a", "b"), "ignore": (), "refuse": nobody, "spool": folder / "none"}).close()
    return Stand(
        open=partial(mqtt, **given),
        publish=partial(publish, broker, session),
        spoil=lambda: publish(broker, session, [{"a": "two", "b": 1, "y": "a", "id": "spoilt"}]),
        stop=broker.stop,
        start=broker.start,
    )


@pytest.mark.parametrize("law", conformance.LAWS)
def test_it_keeps_the_laws_of_feeds(law: Law, broker: Broker, tmp_path: Path) -> None:
    law(stand(broker, tmp_path))


def test_a_spool_that_is_full_leaves_the_rest_with_the_broker_until_there_is_room(
    broker: Broker, tmp_path: Path
) -> None:
    made = stand(broker, tmp_path, ignore=("filler",), spool_bytes=1 << 16)
    made.publish(conformance.rows(0, 500, filler="x" * 1_000))
    feed = made.open(refuse=nobody)
    time.sleep(0.5)
    spooled = sum(file.stat().st_size for file in (tmp_path / "spool").iterdir())
    assert spooled < 350_000  # of 700,000
    found: list[str] = []

    def come() -> bool:
        batch = feed.poll(100)
        assert batch is not None
        found.extend(batch.ids)
        feed.commit(batch.position)
        return len(found) >= 500

    waited(come, every=0)
    feed.close()
    assert found == [f"r{n}" for n in range(500)]


@pytest.mark.slow
def test_a_killed_run_learns_what_an_unbroken_one_learns(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was published while nobody listened and while runs were killed is learned, all of it."""
    monkeypatch.chdir(tmp_path)
    made = stand(broker, tmp_path)
    rows = [{"a": n % 7, "b": n / 2, "y": "abc"[n % 3], "id": f"r{n}"} for n in range(2_000)]
    feed = made.open.keywords  # type: ignore[attr-defined]
    settings = [f"feed.{key}={feed[key]}" for key in ("topic", "session", "spool", "url", "label", "id")]
    more = ["checkpoint.directory=saved", "checkpoint.every_records=160", "http.port=0", "log.level=info"]
    command = ["run", "default", *(f"--set={setting}" for setting in ["feed.kind=mqtt", *settings, *more])]
    for begin in range(0, 2_000, 1_000):
        made.publish(rows[begin : begin + 500])
        with started(*command) as daemon:
            told(daemon, "checkpoint")
            made.publish(rows[begin + 500 : begin + 1_000])
            daemon.kill()
    with started(*command) as daemon:
        port = told(daemon, "listening")["port"]
        assert waited(lambda: json.loads(fetched(port, "/v1/status")[1]).get("records", 0) >= 2_000)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE) == 0
    learned = checkpoint.about(checkpoint.found(Path("saved"))[0])["records"]
    assert 2_000 <= learned <= 2_000 + 2 * AT_ONCE


@pytest.fixture
def table(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Stand, list[str]]:
    """Return a stand to which the table was published, and the settings of a feed on it."""
    monkeypatch.chdir(tmp_path)
    write_table(TABLE)
    made = stand(broker, tmp_path, id="")
    with TABLE.open(encoding="utf-8", newline="") as file:
        made.publish(list(csv.DictReader(file)))
    feed = made.open.keywords  # type: ignore[attr-defined]
    settings = [f"feed.{key}={feed[key]}" for key in ("topic", "session", "spool", "url", "label")]
    return made, ["feed.kind=mqtt", *settings]


@pytest.mark.slow
def test_from_the_spool_a_killed_run_ends_where_an_unbroken_one_ends(table: tuple[Stand, list[str]]) -> None:
    made, settings = table
    feed = made.open(refuse=nobody)
    taken(feed, RECORDS)
    feed.close()
    outcome = kill_loop("default", 4, seed=1, feed=[*settings, "feed.follow=false"])
    assert outcome.equal == outcome.ends >= 1


@pytest.mark.slow
def test_a_broker_that_is_gone_for_ten_seconds_costs_nothing_and_is_told(
    broker: Broker, table: tuple[Stand, list[str]]
) -> None:
    made, settings = table
    with TABLE.open(encoding="utf-8", newline="") as file:
        more = list(csv.DictReader(file))[:100]
    costs_nothing(broker, settings, lambda: made.publish(more), more=len(more))


def test_a_message_that_a_kill_cut_short_is_the_brokers_to_send_again(tmp_path: Path, broker: Broker) -> None:
    made = stand(broker, tmp_path)
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "000000000001.lines").write_bytes(as_line(b'{"a": 1, "b": 2, "y": "a"}')[:21])
    made.publish(conformance.rows(0, 3))
    feed = made.open(refuse=nobody)
    assert names(taken(feed, 3)) == ["r0", "r1", "r2"]
    feed.close()


def test_who_is_kept_off_the_spool_leaves_the_session_alone(tmp_path: Path, broker: Broker) -> None:
    """As `streamkd check` beside the daemon is."""
    made = stand(broker, tmp_path, columns=("a", "b"))
    feed = made.open(refuse=nobody)
    with pytest.raises(ConfigError, match=r"feed\.spool = .*another process takes records in there"):
        made.open(refuse=nobody)
    made.publish(conformance.rows(0, 3))
    assert names(taken(feed, 3)) == ["r0", "r1", "r2"]
    assert not feed.failures
    feed.close()


def test_an_address_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"feed\.url = 'localhost': write it as mqtt://host:port"):
        mqtt(topic="t", spool=tmp_path, url="localhost", refuse=nobody, **COMMON)

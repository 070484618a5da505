"""Predictions to real brokers: all of them, whatever becomes of the broker meanwhile."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import brokers
import pytest
from brokers import Broker
from stack import PATIENCE, waited
from test_commands import run_once, streamkd, table
from worlds import batches, engine

from runners import sinks
from runners.predictions import Predictions

RECORDS = 100


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@dataclass(frozen=True)
class Place:
    """Where predictions go.

    Attributes:
        broker: that takes them.
        settings: of `predictions`, the first being the kind.
        received: gives those that it has; waits until there are as many as it is told.
    """

    broker: Broker
    settings: tuple[str, ...]
    received: Callable[[int], list[bytes]]


@contextmanager
def redis_place(folder: Path) -> Iterator[Place]:
    redis = pytest.importorskip("redis")
    broker = brokers.redis_server(folder, "--appendonly", "yes", "--appendfsync", "always")
    url = f"redis://127.0.0.1:{broker.port}/0"

    def received(_: int) -> list[bytes]:
        with redis.Redis.from_url(url) as client:
            return [fields[b"data"] for _, fields in client.xrange("out")]

    yield Place(broker, ("kind=redis", f"url={url}", "stream=out"), received)
    broker.stop()


@contextmanager
def nats_place(folder: Path) -> Iterator[Place]:
    nats = pytest.importorskip("nats")
    broker = brokers.nats_server(folder)
    url = f"nats://127.0.0.1:{broker.port}"
    found: list[bytes] = []

    async def run(work: Callable[[Any], Any]) -> None:
        client = await nats.connect(url)
        await work(client.jetstream(timeout=PATIENCE))
        await client.close()

    async def read(context: Any) -> None:
        state = (await context.stream_info("out")).state
        found[:] = [(await context.get_msg("out", n)).data for n in range(1, state.last_seq + 1)]

    def received(_: int) -> list[bytes]:
        asyncio.run(run(read))
        return found

    asyncio.run(run(lambda context: context.add_stream(name="out", subjects=["out"])))
    yield Place(broker, ("kind=nats", f"url={url}", "subject=out"), received)
    broker.stop()


@contextmanager
def mqtt_place(folder: Path) -> Iterator[Place]:
    client_of = pytest.importorskip("paho.mqtt.client")
    broker = brokers.mosquitto(folder)
    found: list[bytes] = []
    client = client_of.Client(client_of.CallbackAPIVersion.VERSION2, client_id="reader", clean_session=False)
    client.reconnect_delay_set(0.1, 0.2)
    client.on_message = lambda _client, _data, message: found.append(message.payload)
    client.on_connect = lambda client, *_: client.subscribe("out", qos=1)
    subscribed = threading.Event()
    client.on_subscribe = lambda *_: subscribed.set()
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    assert subscribed.wait(PATIENCE)  # what is published before is for nobody

    def received(least: int) -> list[bytes]:
        """Wait until no more comes: a publisher may hear of its message sooner than a reader."""
        waited(lambda: len(set(found)) >= least)
        count = -1
        while len(found) != count:
            count = len(found)
            time.sleep(0.5)
        return found

    yield Place(broker, ("kind=mqtt", f"url=mqtt://127.0.0.1:{broker.port}", "topic=out"), received)
    client.disconnect()
    client.loop_stop()
    broker.stop()


@contextmanager
def kafka_place(folder: Path) -> Iterator[Place]:
    confluent = pytest.importorskip("confluent_kafka")
    broker = brokers.kafka(folder)
    servers = f"127.0.0.1:{broker.port}"
    admin = pytest.importorskip("confluent_kafka.admin")
    client = admin.AdminClient({"bootstrap.servers": servers})
    client.create_topics([admin.NewTopic("out", 1)])["out"].result()

    def received(_: int) -> list[bytes]:
        settings = {"bootstrap.servers": servers, "group.id": "none", "enable.partition.eof": True}
        consumer = confluent.Consumer(settings)
        consumer.assign([confluent.TopicPartition("out", 0, 0)])
        found = []
        while (message := consumer.poll(PATIENCE)) is not None:
            error = message.error()
            if error is None:
                found.append(message.value())
            elif error.code() == confluent.KafkaError._PARTITION_EOF:  # noqa: SLF001 - so named
                break
        consumer.close()
        return found

    yield Place(broker, ("kind=kafka", f"servers={servers}", "topic=out"), received)
    broker.stop()


PLACES = [
    pytest.param(redis_place, id="redis"),
    pytest.param(nats_place, id="nats"),
    pytest.param(mqtt_place, id="mqtt"),
    pytest.param(kafka_place, id="kafka", marks=pytest.mark.slow),
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with request.param(tmp_path / "broker") as made:
        yield made


def test_every_prediction_is_a_message_and_a_broker_that_is_away_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), RECORDS)
    overrides = [f"predictions.{setting}" for setting in place.settings]
    assert run_once(monkeypatch, *overrides) == 0
    assert [json.loads(line)["record"] for line in place.received(RECORDS)] == list(range(1, RECORDS + 1))
    place.broker.stop()
    given = [f"--set={pair}" for pair in ("feed.path=d.csv", "feed.label=y", *overrides, "checkpoint.directory=other")]
    assert streamkd(monkeypatch, "run", "default", *given) == 3
    said = capsys.readouterr().err
    assert "cannot be reached" in said
    assert "Traceback" not in said


def opened(place: Place) -> Any:
    kind, *pairs = (setting.partition("=")[2] for setting in place.settings)
    make: Any = {
        "redis": lambda url, name: sinks.redis_entries(url=url, stream=name),
        "nats": lambda url, name: sinks.nats_messages(url=url, subject=name),
        "mqtt": lambda url, name: sinks.mqtt_publications(url=url, topic=name),
        "kafka": lambda servers, name: sinks.kafka_records(servers=(servers,), topic=name),
    }[kind]
    return make(*pairs)


def test_what_could_not_be_put_is_told_and_put_again_when_the_broker_is_back(place: Place) -> None:
    sink = opened(place)

    def put(lines: list[str]) -> bool:
        try:
            sink.put(lines)
            sink.sync()
        except OSError:
            return False
        return True

    assert waited(lambda: put(["a", "b"]))
    place.broker.stop()
    assert not put(["c", "d"])
    place.broker.start()
    assert waited(lambda: put(["c", "d"]))
    sink.close()
    found = place.received(4)
    assert set(found) == {b"a", b"b", b"c", b"d"}
    assert found[:2] == [b"a", b"b"]


def test_what_redis_refuses_waits_until_it_takes_it(tmp_path: Path) -> None:
    redis = pytest.importorskip("redis")
    broker = brokers.redis_server(tmp_path / "broker")
    url = f"redis://127.0.0.1:{broker.port}/0"
    sink, made = Predictions(sinks.redis_entries(stream="out", url=url)), engine()
    with redis.Redis.from_url(url) as client:
        client.set("other", "text")
        for batch, (trouble, remedy, why) in zip(
            batches(48),
            [
                ("rename other out", "rename out other", "wrong kind of value"),
                ("config set maxmemory 1", "config set maxmemory 0", "maxmemory"),
                ("replicaof 127.0.0.1 1", "replicaof no one", "read only replica"),
            ],
            strict=True,
        ):
            client.execute_command(*trouble.split())
            sink.write(batch, made.step(batch), dict)
            with pytest.raises(OSError, match=why):
                sink.flush()
            assert len(client.client_list()) == 1  # by its name another server may be reached now
            client.execute_command(*remedy.split())
            sink.flush()
            entries = [json.loads(fields[b"data"])["record"] for _, fields in client.xrange("out")]
            assert entries == list(range(1, made.records + 1))
    sink.close()
    broker.stop()


def test_what_is_too_long_for_kafka_is_told_of_and_keeps_back_what_comes_after_it() -> None:
    pytest.importorskip("confluent_kafka")
    client = {"test.mock.num.brokers": 1, "message.max.bytes": 1_000}
    sink = sinks.kafka_records(topic="out", client=client)
    sink.put(["a", "b" * 2_000, "c"])
    for _ in range(2):
        with pytest.raises(OSError, match="MSG_SIZE_TOO_LARGE"):
            sink.sync()
        with pytest.raises(OSError, match="MSG_SIZE_TOO_LARGE"):
            sink.put(["d"])
    sink.close()


def test_a_subject_that_no_stream_keeps_is_refused_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with nats_place(tmp_path / "broker") as place:
        table(Path("d.csv"), 40)
        settings = [f"predictions.{setting}" for setting in place.settings]
        given = [f"--set={pair}" for pair in ("feed.path=d.csv", "feed.label=y", "http.port=0", *settings)]
        assert streamkd(monkeypatch, "check", "default", *given) == 0
        capsys.readouterr()
        assert streamkd(monkeypatch, "check", "default", *given, "--set=predictions.subject=nobodys") == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "predictions.subject = 'nobodys': no stream of JetStream's keeps it; add one" in said


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES[:3], indirect=True)
def test_a_broker_that_hangs_is_told_of_and_not_heaped_with_what_is_put_again(place: Place) -> None:
    sink = opened(place)
    sink.put(["a"])
    place.broker.hang()
    for _ in range(2):
        with pytest.raises(OSError, match=r"in 5 s|[Tt]imeout"):
            sink.put(["b", "c"])
    place.broker.hang(on=False)

    def put() -> bool:
        try:
            sink.put(["b", "c"])
        except OSError:
            return False
        return True

    assert waited(put)
    sink.close()
    found = place.received(3)
    assert set(found) == {b"a", b"b", b"c"}
    assert found.count(b"b") <= 2


def test_what_an_mqtt_broker_refuses_is_told(tmp_path: Path) -> None:
    pytest.importorskip("paho.mqtt.client")
    broker = brokers.mosquitto(tmp_path / "broker", "acl_file {folder}/acl", acl="topic read #\n")
    sink = sinks.mqtt_publications(topic="out", url=f"mqtt://127.0.0.1:{broker.port}")
    with pytest.raises(OSError, match="Not authorized"):
        sink.put(["a"])
    sink.close()
    broker.stop()

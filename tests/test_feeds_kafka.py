"""Kafka, beside librdkafka's own brokers, which open real ports, and beside a real single-node broker."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import brokers as brokers_of_tests
import pytest
from brokers import Broker
from outage import costs_nothing, newest_interval
from stack import PATIENCE, names, taken, waited
from test_commands import started, streamkd, told

from runners.bench.kill import TABLE, arguments, write_table
from runners.feeds import DeadLetter, Feed, conformance
from runners.feeds.conformance import Law, Stand
from runners.feeds.kafka import Reader, kafka
from streamkd import Batch, checkpoint
from streamkd.errors import ConfigError
from streamkd.testing import check_feed

confluent_kafka = pytest.importorskip(
    "confluent_kafka", reason="the client is not installed: pip install 'streamkd[kafka]'"
)

from confluent_kafka import TopicPartition  # noqa: E402 - which may not be there
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic  # noqa: E402 - likewise

COMMON: dict[str, Any] = {"label": "y", "id": "id", "max_classes": 5}
SPOILT = {"a": "two", "b": 1, "y": "a", "id": "spoilt"}


def nobody(letter: DeadLetter) -> None:
    raise AssertionError(letter.detail)


class Publisher:
    """A producer, and perhaps brokers with it."""

    def __init__(self, topic: str, **settings: Any) -> None:
        self.topic = topic
        self._producer = confluent_kafka.Producer({"log_level": 0, **settings})

    @property
    def servers(self) -> list[str]:
        """Where the brokers are."""
        brokers = self._producer.list_topics(timeout=PATIENCE).brokers.values()
        return [f"{broker.host}:{broker.port}" for broker in brokers]

    def publish(self, rows: Sequence[Mapping[str, Any]], partitions: Sequence[int] = (0,), first: int = 1) -> None:
        """Send rows to partitions in turn, a millisecond after one another, and wait until the broker has them."""
        for number, row in enumerate(rows):
            partition = partitions[number % len(partitions)]
            self._producer.produce(self.topic, json.dumps(row), partition=partition, timestamp=first + number)
            self._producer.poll(0)
        assert self._producer.flush(PATIENCE) == 0


def drained(feed: Feed, at_once: int) -> list[Batch]:
    """Poll a feed to its end."""
    batches = []
    while (batch := feed.poll(at_once)) is not None:
        batches.append(batch)
    return batches


@pytest.fixture
def brokers() -> Publisher:
    """Three of librdkafka's."""
    made = Publisher("s", **{"test.mock.num.brokers": 3})
    made.publish([], (0,))
    return made


def mocked(brokers: Publisher, law: Law, **options: Any) -> Stand:
    # Its brokers keep no more than 5 MB of a partition.
    partitions = range(4) if law is conformance.a_feed_takes_no_more_than_it_can_hold else (0,)
    given = {**COMMON, "topic": "s", "servers": brokers.servers, **options}
    return Stand(
        open=partial(kafka, **given),
        publish=partial(brokers.publish, partitions=partitions),
        spoil=lambda: brokers.publish([SPOILT]),
    )


@pytest.mark.parametrize("law", conformance.LAWS)
def test_by_offset_it_keeps_the_laws_of_feeds(law: Law, brokers: Publisher) -> None:
    law(mocked(brokers, law))


@pytest.mark.slow
@pytest.mark.parametrize(
    "law", [conformance.records_come_in_order_and_once, conformance.what_is_not_committed_comes_again]
)
def test_in_a_group_it_keeps_some_laws_of_feeds(law: Law, brokers: Publisher) -> None:
    law(mocked(brokers, law, group="g", client={"session.timeout.ms": 6_000}))


def test_a_record_is_as_old_as_its_time_stamp(brokers: Publisher) -> None:
    began = time.time()
    brokers.publish(conformance.rows(0, 3), (0,), first=round(1_000 * began))
    feed = kafka(topic="s", servers=brokers.servers, refuse=nobody, **COMMON)
    times = [at for batch in taken(feed, 3) for at in batch.times]
    feed.close()
    assert times == pytest.approx([began, began + 0.001, began + 0.002], abs=1e-3)


def test_partitions_come_in_the_order_of_their_time_stamps_from_every_position(brokers: Publisher) -> None:
    brokers.publish(conformance.rows(0, 90), (0, 1, 2))
    feed = kafka(topic="s", servers=brokers.servers, follow=False, refuse=nobody, **COMMON)
    assert names(drained(feed, 7)) == [f"r{n}" for n in range(90)]
    feed.close()
    check_feed(lambda: kafka(topic="s", servers=brokers.servers, follow=False, refuse=nobody, **COMMON), records=23)


def test_a_partition_that_is_paused_goes_on_where_it_was(brokers: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions of which one is far ahead in time, so that the others wait for it, and run ahead."""
    monkeypatch.setattr("runners.feeds.kafka.MOST_AHEAD", 100)
    pauses: list[int] = []
    breathe = Reader._breathe  # noqa: SLF001 - what is watched

    def watched(reader: Reader) -> None:
        breathe(reader)
        pauses.append(len(reader._paused))  # noqa: SLF001 - likewise

    monkeypatch.setattr(Reader, "_breathe", watched)
    brokers.publish(conformance.rows(0, 3_000), (0,), first=1)
    brokers.publish(conformance.rows(3_000, 6_000), (1,), first=3_001)
    feed = kafka(topic="s", servers=brokers.servers, follow=False, refuse=nobody, **COMMON)
    assert names(drained(feed, 64)) == [f"r{n}" for n in range(6_000)]
    feed.close()
    assert any(pauses)


def test_only_the_partitions_wanted_come(brokers: Publisher) -> None:
    brokers.publish(conformance.rows(0, 30), (0, 1, 2))
    feed = kafka(topic="s", servers=brokers.servers, partitions=(2, 0), follow=False, refuse=nobody, **COMMON)
    assert names(drained(feed, 99)) == [f"r{n}" for n in range(30) if n % 3 != 1]
    feed.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    made = brokers_of_tests.kafka(tmp_path_factory.mktemp("kafka"))
    yield made
    made.stop()


@pytest.fixture
def broker(server: Broker) -> Broker:
    """Running, whatever the last test did."""
    server.start()
    return server


TOPICS = (f"s{number}" for number in count())
SMALL_FETCHES = {"fetch.message.max.bytes": 20_000, "queued.min.messages": 1}


class Real:
    """A topic of its own on a real broker."""

    def __init__(self, broker: Broker, partitions: int = 1) -> None:
        self.server = f"127.0.0.1:{broker.port}"
        self.topic = next(TOPICS)
        self._broker = broker
        self._partitions = partitions
        self._admin = AdminClient({"bootstrap.servers": self.server, "log_level": 0})
        self.make()
        self.publisher = Publisher(self.topic, **{"bootstrap.servers": self.server, "linger.ms": 5})

    def make(self) -> None:
        """Make the topic."""

        def made() -> bool:
            (asked,) = self._admin.create_topics([NewTopic(self.topic, self._partitions)]).values()
            return asked.exception() is None

        assert waited(made)  # one of the name may still be on its way out

    def remake(self) -> None:
        """Delete it with all that it has, and make another one of its name."""
        (gone,) = self._admin.delete_topics([self.topic]).values()
        gone.result()
        self.make()

    def extend(self, partitions: int) -> None:
        """Give it more partitions."""
        (more,) = self._admin.create_partitions([NewPartitions(self.topic, partitions)]).values()
        more.result()

    def forget(self, records: int, partition: int = 0) -> None:
        """Take away so many of the oldest records."""
        consumer = confluent_kafka.Consumer({"bootstrap.servers": self.server, "group.id": "none"})
        low, _ = consumer.get_watermark_offsets(TopicPartition(self.topic, partition))
        consumer.close()
        (done,) = self._admin.delete_records([TopicPartition(self.topic, partition, low + records)]).values()
        done.result()

    def publish(self, rows: Sequence[Mapping[str, Any]], *partitions: int) -> None:
        """Append rows, in small batches."""
        for begin in range(0, len(rows), 50):
            self.publisher.publish(rows[begin : begin + 50], partitions or (0,), first=now() + begin)

    def stand(self, **options: Any) -> Stand:
        """Return the topic as a stand."""
        given = {**COMMON, "topic": self.topic, "servers": [self.server], **options}
        return Stand(
            open=partial(kafka, **given),
            publish=self.publish,
            spoil=lambda: self.publish([SPOILT]),
            stop=self._broker.stop,
            start=self._broker.start,
            forget=self.forget,
            empty=self.remake,
        )


def now() -> int:
    return int(1_000 * time.time())


@pytest.mark.slow
@pytest.mark.parametrize("law", conformance.LAWS)
def test_by_offset_it_keeps_the_laws_beside_a_real_broker(law: Law, broker: Broker) -> None:
    law(Real(broker).stand(client=SMALL_FETCHES))


@pytest.mark.slow
@pytest.mark.parametrize("law", conformance.LAWS)
def test_in_a_group_it_keeps_the_laws_beside_a_real_broker(law: Law, broker: Broker) -> None:
    topic = Real(broker)
    law(topic.stand(client=SMALL_FETCHES, group=f"group of {topic.topic}"))


def drifting() -> list[dict[str, Any]]:
    """A stream that drifts."""
    write_table(TABLE)
    with TABLE.open(encoding="utf-8", newline="") as file:
        return [
            {name: cell if name == "y" else float(cell) for name, cell in row.items()} for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_a_killed_run_ends_where_an_unbroken_one_ends(
    brokers: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    brokers.publish(drifting(), (0, 1, 2))
    feed = ["feed.kind=kafka", f"feed.servers={brokers.servers}", "feed.topic=s", "feed.label=y", "feed.follow=false"]
    # In a process of its own, whose children inherit none of the client's threads and locks.
    program = (
        "import sys; from runners.bench.kill import kill_loop; print(kill_loop('default', 4, 4, feed=sys.argv[1:]))"
    )
    run = subprocess.run([sys.executable, "-c", program, *feed], capture_output=True, text=True, check=True)
    found = re.fullmatch(r"Outcome\(kills=4, .*, ends=(\d+), equal=(\d+)\)\n", run.stdout)
    assert found is not None
    assert found[1] == found[2] >= "1"


@pytest.mark.slow
def test_a_broker_that_is_gone_for_ten_seconds_costs_nothing_and_is_told(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    topic = Real(broker)
    rows = drifting()
    topic.publish(rows)
    feed = ["feed.kind=kafka", f"feed.servers={topic.server}", f"feed.topic={topic.topic}", "feed.label=y"]
    costs_nothing(broker, feed, lambda: topic.publish(rows[:100]), more=100)


@pytest.mark.slow
def test_killed_members_of_a_group_learn_all_and_little_of_it_twice(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least once: a kill brings again what is in the newest checkpoint and not in the one before it, at most."""
    monkeypatch.chdir(tmp_path)
    topic, twice = Real(broker, partitions=2), 0
    rows = drifting()
    feed = ["feed.kind=kafka", f"feed.servers={topic.server}", f"feed.topic={topic.topic}", "feed.label=y"]
    more = ["feed.group=members", "feed.client={'session.timeout.ms' = 6000}", "labels.delay=0", "log.level=info"]
    command = arguments("default", Path("saved"), [*feed, *more])
    for begin in range(0, 1_800, 600):  # so that each has something to learn, however long the one before lived
        topic.publish(rows[begin : begin + 600], 0, 1)
        with started(*command) as daemon:
            told(daemon, "checkpoint")
            daemon.kill()
        twice += newest_interval(Path("saved"))
    topic.publish(rows[1_800:], 0, 1)
    consumer = confluent_kafka.Consumer({"bootstrap.servers": topic.server, "group.id": "members"})

    def committed() -> int:
        places = [TopicPartition(topic.topic, number) for number in (0, 1)]
        return sum(place.offset for place in consumer.committed(places, timeout=PATIENCE))

    with started(*command, "--set=checkpoint.every_seconds=0.5") as daemon:
        assert waited(lambda: committed() == len(rows))
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE) == 0
    consumer.close()
    learned = checkpoint.about(checkpoint.found(Path("saved"))[0])["records"]
    assert len(rows) <= learned <= len(rows) + twice


@pytest.mark.slow
def test_partitions_that_are_added_are_read_from_their_beginning(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runners.feeds.kafka.LOOK_SECONDS", 0.0)
    topic = Real(broker)
    topic.publish(conformance.rows(0, 10))
    feed = topic.stand(start="latest", columns=("a", "b")).open(refuse=nobody)
    topic.extend(2)
    topic.publisher = Publisher(topic.topic, **{"bootstrap.servers": topic.server})  # the other does not know yet
    topic.publish(conformance.rows(10, 30), 1)
    assert names(taken(feed, 20)) == [f"r{n}" for n in range(10, 30)]
    feed.close()


@pytest.mark.slow
def test_only_the_partition_that_lost_its_position_is_read_anew(broker: Broker) -> None:
    topic = Real(broker, partitions=2)
    topic.publish(conformance.rows(0, 100), 0, 1)
    made = topic.stand(on_position_lost="earliest", follow=False)
    feed = made.open(refuse=nobody)
    position = taken(feed, 20)[-1].position
    feed.close()
    topic.forget(30, partition=1)
    again = made.open(refuse=nobody)
    again.seek(position)
    rest = names(drained(again, 200))
    again.close()
    assert sorted(rest) == sorted(f"r{n}" for n in range(20, 100) if n % 2 == 0 or n >= 60)
    assert dict(again.resets) == {"trimmed": 1}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"client": {"group.id": "g"}}, r"feed\.client: group\.id is not to be set there: feed\.group says it"),
        ({"client": {"group": "g"}}, r"feed\.client: No such configuration property: \"group\""),
        ({"password_env": "STREAMKD_NOT_SET"}, r"feed\.password_env = 'STREAMKD_NOT_SET'"),
        ({"partitions": (0,), "group": "g"}, r"feed\.partitions = \[0\]: feed\.group shares them out"),
    ],
)
def test_a_setting_that_does_not_fit_is_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        kafka(topic="s", refuse=nobody, **COMMON, **options)


def test_check_shows_three_records_and_a_broker_that_is_away(
    brokers: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    brokers.publish(conformance.rows(0, 10))
    settings = ["feed.topic=s", "feed.id=id", "http.port=0"]
    given = [f"--set={setting}" for setting in settings]
    assert streamkd(monkeypatch, "check", "kafka", *given, f"--set=feed.servers={brokers.servers}") == 0
    shown = capsys.readouterr().out
    for word in ("First 3 records", "effectively once", "waiting", "It would run"):
        assert word in shown
    assert streamkd(monkeypatch, "check", "kafka", *given, "--set=feed.servers=127.0.0.1:1") == 2
    assert "feed.servers = '127.0.0.1:1': cannot be reached" in capsys.readouterr().err

"""Kafka: by partition and offset, each message exactly once; or as a member of a consumer group, at least once."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from runners.feeds import NONE, REPLAYABLE, Capabilities, Refuse
from runners.feeds.formats import decoder, imported
from runners.feeds.merge import Merge
from runners.feeds.stream import (
    Message,
    Names,
    Place,
    PositionLostError,
    Source,
    Start,
    StreamFeed,
    UnreachableError,
    open_stream,
    reading,
)
from runners.passwords import from_environment
from streamkd.errors import ConfigError

SECONDS = 5.0
"""For an answer; a broker that takes longer is taken for lost."""
REFUSED_SECONDS = 0.7
"""For one after no address could be connected to: the next address of the same host may answer."""
NAME_SECONDS = 2.0
"""For it to say which topic it is that has the name."""
JOIN_SECONDS = 30.0
"""For a group to let a member in: others finish their steps first, and one that was killed is waited for."""
MOMENT = 0.05
"""Seconds to wait for what is under way."""
LOOK_SECONDS = 30.0
"""Between two looks for partitions that were added to the topic."""
MOST_AHEAD = 2_048
"""Messages of one partition that may wait for those of another; then it is paused until a quarter is left."""
DAY = 86_400_000
"""Milliseconds."""
OURS = {
    **dict.fromkeys(("enable.auto.commit", "enable.auto.offset.store"), "positions are kept in the checkpoint"),
    "auto.offset.reset": "feed.start and feed.on_position_lost say it",
    "enable.partition.eof": "the feed needs it as it is",
    "bootstrap.servers": "feed.servers says it",
    "group.id": "feed.group says it",
    "sasl.password": "feed.password_env names where it is",
}
"""Settings of the client that are not the user's, and why."""
Answer = TypeVar("Answer")


class Reader:
    """A topic, and Kafka's client for it.

    Args:
        topic: its name.
        settings: of the client.

    Raises:
        ConfigError: the client is not installed, or does not know a setting.
    """

    def __init__(self, topic: str, settings: Mapping[str, Any]) -> None:
        self.topic = topic
        self._kafka, self._admin = (
            imported(name, "kafka", "feed.kind = 'kafka'") for name in ("confluent_kafka", "confluent_kafka.admin")
        )
        self._settings = settings
        self._fault = ""
        self._controlled = False
        self._paused: set[int] = set()
        self._high: dict[int, int] = {}
        self._on_commit: Callable[[Any], None] = lambda _: None
        self._client: Any = None
        self.merge = Merge({})
        try:
            self._kafka.Consumer(dict(settings)).close()
        except self._kafka.KafkaException as error:
            raise ConfigError(f"feed.client: {error.args[0].str()}") from None

    @property
    def client(self) -> Any:
        """The client of the connection there is."""
        if self._client is None:
            raise UnreachableError("not connected")
        return self._client

    def connect(self) -> list[int]:
        """Connect anew, and return the topic's partitions."""
        self.close()
        self._fault = ""
        self._client = self._kafka.Consumer(
            {**self._settings, "error_cb": self._hear, "on_commit": lambda error, _: self._on_commit(error)}
        )
        begun, patience = time.monotonic(), MOMENT
        while True:
            try:
                partitions = self.partitions(patience)
            except self._kafka.KafkaException as error:
                self.client.poll(0)  # which tells of what went wrong meanwhile
                waited = time.monotonic() - begun
                if waited > (REFUSED_SECONDS if self._fault else SECONDS):
                    raise UnreachableError(self._fault or _told(error)) from error
                patience = min(2 * patience, SECONDS)  # it may be far away
            else:
                self._fault = ""
                return partitions

    def partitions(self, seconds: float) -> list[int]:
        """Return the numbers of the topic's partitions."""
        cluster = self.client.list_topics(self.topic, timeout=seconds)
        about = cluster.topics[self.topic]
        self._controlled = cluster.controller_id in cluster.brokers
        if about.error is not None:
            raise UnreachableError(f"topic {self.topic!r}: {about.error.str()}")
        return sorted(about.partitions)

    def _hear(self, error: Any) -> None:
        wrong = self._kafka.KafkaError
        if error.code() in (wrong._AUTHENTICATION, wrong._SSL) or error.fatal():  # noqa: SLF001 - so named
            self._fault = error.str()
        elif error.code() == wrong._ALL_BROKERS_DOWN:  # noqa: SLF001 - so named
            self._fault = self._fault or error.str()  # why they are was told before

    def identity(self) -> str:
        """Return what tells the topic from others of its name; empty where the broker does not say."""
        if not self._controlled:  # librdkafka's own brokers, for one; nobody would answer
            return ""
        admin = self._admin.AdminClient(dict(self._settings))
        asked = admin.describe_topics(self._kafka.TopicCollection([self.topic]), request_timeout=NAME_SECONDS)
        try:
            return str(asked[self.topic].result(timeout=2 * NAME_SECONDS).topic_id)
        except (self._kafka.KafkaException, TimeoutError):
            return ""

    def bounds(self, partition: int) -> tuple[int, int]:
        """Return the offsets of the oldest message and of the next one."""
        low, high = self.reach(lambda: self.client.get_watermark_offsets(self.at(partition), timeout=SECONDS))
        self._high[partition] = high
        return low, high

    def at(self, partition: int, *offset: int) -> Any:
        """Return a place as the client wants it."""
        return self._kafka.TopicPartition(self.topic, partition, *offset)

    def reach(self, work: Callable[[], Answer]) -> Answer:
        """Ask the broker.

        Raises:
            UnreachableError: it does not answer, or not well.
        """
        try:
            return work()
        except (self._kafka.KafkaException, RuntimeError) as error:  # the latter where the client was closed
            raise UnreachableError(_told(error)) from error

    def begin(self, offsets: Mapping[int, int]) -> None:
        """Read these partitions from these offsets on."""
        self.merge = Merge(offsets)
        self._paused.clear()
        self.reach(lambda: self.client.assign([self.at(*place) for place in offsets.items()]))

    def read(self, most: int) -> list[Any]:
        """Return the next messages; none only where there are none now.

        Raises:
            UnreachableError: the broker is gone.
            PositionLostError: it has not what comes next of a partition, which is in `merge.lost`.
        """
        patience = time.monotonic() + SECONDS
        while not (found := self.merge.take(most)):
            for partition in self.merge.lost:
                if not self.merge.waiting(partition):
                    raise self.lost(partition, self.merge.offsets[partition])
            self.pump(most)
            if self.merge.drained and not self._fault:
                return []
            if not self.merge.ready and (self._fault or time.monotonic() > patience):
                raise UnreachableError(self._fault or f"no answer in {SECONDS:g} s")
        return found

    def pump(self, most: int = 1) -> None:
        """Take in what has come, or what comes in a moment."""
        come = self.reach(lambda: self.client.consume(most, 0) or self.client.consume(1, MOMENT))
        for message in come:
            error = message.error()
            if error is None:
                self.merge.add(message)
            elif error.code() == self._kafka.KafkaError._PARTITION_EOF:  # noqa: SLF001 - so named
                self.merge.end(message.partition())
            elif error.code() == self._kafka.KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001 - so named
                self.merge.lost.add(message.partition())
            else:
                raise UnreachableError(error.str())
        self._breathe()

    def _breathe(self) -> None:
        """Pause partitions that run too far ahead of others; what the client holds of them is fetched again."""
        if len(self.merge.offsets) == 1:
            return  # it waits for no other
        far = {number for number in self.merge.offsets if self.merge.waiting(number) > MOST_AHEAD}
        near = {number for number in self._paused if self.merge.waiting(number) <= MOST_AHEAD // 4}
        for partitions, say in ((far - self._paused, "pause"), (near, "resume")):
            if partitions:
                self.reach(lambda say=say, of=partitions: getattr(self.client, say)([self.at(one) for one in of]))  # type: ignore[misc]  # of a lambda with a default
        self._paused = (self._paused | far) - near

    def lost(self, partition: int, offset: int) -> PositionLostError:
        """Return what is said of an offset that is not there."""
        low, high = self.bounds(partition)
        self.merge.lost.add(partition)
        if offset > high:
            return PositionLostError("recreated", f"partition {partition} has no offset {offset}: it is another topic")
        gone = max(0, low - offset)
        return PositionLostError(
            "trimmed", f"{gone} messages of partition {partition} were removed before they were read"
        )

    def commit(self, offsets: Sequence[Any]) -> None:
        """Commit offsets, and wait until the broker has them."""
        answers: list[Any] = []
        self._on_commit = answers.append
        self.reach(lambda: self.client.commit(offsets=offsets))
        patience = time.monotonic() + SECONDS
        while not answers and not self._fault and time.monotonic() < patience:
            self.pump()  # which is when the client tells
        self._on_commit = lambda _: None
        if not answers or answers[0] is not None:
            raise UnreachableError(self._fault or (answers[0].str() if answers else f"no answer in {SECONDS:g} s"))

    def lag(self) -> dict[str, int]:
        """Return how many messages wait, by partition, as far as is known without asking."""
        waiting = {}
        for partition, offset in sorted(self.merge.offsets.items()):
            _, high = self.reach(lambda of=partition: self.client.get_watermark_offsets(self.at(of), cached=True))  # type: ignore[misc]  # of a lambda with a default
            self._high[partition] = max(high, self._high.get(partition, 0))
            waiting[str(partition)] = 0 if self.merge.exhausted(partition) else max(0, self._high[partition] - offset)
        return waiting

    def oldest(self, partitions: Sequence[int], most: int) -> list[bytes]:
        """Return the payloads of the oldest messages, read beside the feed."""
        with closing(Reader(self.topic, self._settings)) as beside:
            there = beside.connect()
            beside.begin({number: beside.bounds(number)[0] for number in partitions or there})
            return [message.value() or b"" for message in beside.read(most)]

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            client, self._client = self._client, None
            client.close()


class Offsets:
    """Partitions by their offsets; nothing is committed, and no group is joined.

    Partitions that a topic gets later are read, too, from their beginning.

    Args:
        reader: of the topic.
        partitions: to be read; none: all there are.
    """

    def __init__(self, reader: Reader, partitions: Sequence[int]) -> None:
        self.capabilities = REPLAYABLE
        self.lag: Mapping[str, int] = NONE
        self.ended = False
        self._reader, self._wanted = reader, partitions
        self._topic = ""
        self._offsets: dict[str, int] = {}
        self._lost: set[str] = set()
        self._next_look = 0.0

    def open(self, place: Place | None, start: Start) -> Place:
        """Stand after messages that were read; at one end of partitions of which none were, or that lost theirs."""
        there = self._among(self._reader.connect())
        topic = self._reader.identity()
        if place is not None:
            self._offsets = dict(place["offsets"])
            self._hold(place["topic"], topic, there)
            self._topic = place["topic"]
        self._topic = topic or self._topic
        whole = {name: offset for name, offset in self._offsets.items() if name not in self._lost}
        for partition in there:
            low, high = self._reader.bounds(partition)
            # One that is new beside others was added to the topic, and all of it came since.
            end = high if start == "latest" and (not whole or str(partition) in self._lost) else low
            self._offsets[str(partition)] = whole.get(str(partition), end)
        self._lost.clear()
        self._reader.begin({partition: self._offsets[str(partition)] for partition in there})
        self._next_look = time.monotonic() + LOOK_SECONDS
        self.lag = self._reader.lag()
        return self._place()

    def _among(self, there: list[int]) -> list[int]:
        missing = [number for number in self._wanted if number not in there]
        if missing:
            raise UnreachableError(f"topic {self._reader.topic!r} has no partition {missing[0]}; it has {len(there)}")
        return list(self._wanted) or there

    def _hold(self, before: str, now: str, there: Sequence[int]) -> None:
        """Find out whether the topic still has what comes next of each partition."""
        other = bool(before and now and before != now)
        if other or (not self._wanted and {*map(int, self._offsets)} - {*there}):
            self._lost = set(self._offsets)
            raise PositionLostError("recreated", "the topic was made anew since")
        for partition in there:
            offset = self._offsets.get(str(partition))
            if offset is None:
                continue
            low, high = self._reader.bounds(partition)
            if not low <= offset <= high:
                self._lost = {str(partition)}
                raise self._reader.lost(partition, offset)

    def peek(self, most: int) -> Sequence[bytes]:
        """Return the payloads of the oldest messages."""
        return self._reader.oldest(self._wanted, most)

    def read(self, most: int) -> Sequence[Message]:
        """Return the next messages."""
        self._look_around()
        try:
            found = self._reader.read(most)
        except PositionLostError:
            self._lost = {*map(str, self._reader.merge.lost)}
            raise
        messages = []
        for message in found:
            self._offsets[str(message.partition())] = message.offset() + 1
            messages.append(_message(message, self._place()))
        self.lag = self._reader.lag()
        return messages

    def _look_around(self) -> None:
        """Take in partitions that were added."""
        if self._wanted or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        there = self._reader.reach(lambda: self._reader.partitions(SECONDS))
        new = [number for number in there if str(number) not in self._offsets]
        if new:
            self._offsets |= {str(number): self._reader.bounds(number)[0] for number in new}
            self._reader.begin({number: self._offsets[str(number)] for number in there})

    def _place(self) -> Place:
        return {"topic": self._topic, "offsets": self._offsets.copy()}

    def commit(self, place: Place) -> None:
        """Do nothing: the broker keeps no account of what was read."""

    def close(self) -> None:
        """Close the connection."""
        self._reader.close()


class Group:
    """Messages as a member of a consumer group gets them.

    The group itself knows what is committed. A place says what this process was given of each partition; when a
    partition comes back to it, it goes on there, or where another member has got to since.

    Args:
        reader: of the topic.
    """

    def __init__(self, reader: Reader) -> None:
        self.capabilities = Capabilities(replayable=False, promise="at least once")
        self.lag: Mapping[str, int] = NONE
        self.ended = False
        self._reader = reader
        self._start: Start = "earliest"
        self._shares = 0
        self._given: dict[str, int] = {}
        self._committed: dict[str, int] = {}
        self._lost: set[int] = set()

    def open(self, place: Place | None, start: Start) -> Place:  # noqa: ARG002 - it is the group that knows the place
        """Join the group, and wait to be let in."""
        self._start, shares = start, self._shares
        self._reader.connect()
        self._reader.reach(
            lambda: self._reader.client.subscribe(
                [self._reader.topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked
            )
        )
        patience = time.monotonic() + JOIN_SECONDS
        while self._shares == shares:
            self._reader.pump()
            if time.monotonic() > patience:
                raise UnreachableError(f"the group did not let this member in within {JOIN_SECONDS:g} s")
        self.lag = self._reader.lag()
        return self._place()

    def _assigned(self, client: Any, given: Sequence[Any]) -> None:
        """Stand where the group stands; in a partition of which it knows nothing, at one end, and tell it so."""
        committed = self._reader.reach(lambda: client.committed(list(given), timeout=SECONDS)) if given else []
        offsets, told = {}, []
        for one in committed:
            name, offset = str(one.partition), max(one.offset, self._given.get(str(one.partition), 0))
            if one.offset < 0 or one.partition in self._lost:
                offset = self._reader.bounds(one.partition)[self._start == "latest"]
                told.append(self._reader.at(one.partition, offset))
            offsets[one.partition] = self._given[name] = offset
            self._committed[name] = one.offset
        self._lost.clear()
        self._shares += 1
        self._reader.begin(offsets)
        if told:
            self._reader.reach(lambda: client.commit(offsets=told, asynchronous=False))

    def _revoked(self, _: Any, given: Sequence[Any]) -> None:
        """Forget what waits of partitions that are another member's now."""
        self._reader.merge.drop([one.partition for one in given])

    def peek(self, most: int) -> Sequence[bytes]:
        """Return the payloads of the oldest messages, whoever gets them."""
        return self._reader.oldest((), most)

    def read(self, most: int) -> Sequence[Message]:
        """Return the next messages."""
        try:
            found = self._reader.read(most)
        except PositionLostError:
            self._lost = set(self._reader.merge.lost)
            raise
        messages = []
        for message in found:
            self._given[str(message.partition())] = message.offset() + 1
            messages.append(_message(message, self._place()))
        self.lag = self._reader.lag()
        return messages

    def _place(self) -> Place:
        return {"offsets": self._given.copy()}

    def commit(self, place: Place) -> None:
        """Commit what was given up to a place, of partitions that are still this member's."""
        new = {
            name: offset
            for name, offset in place["offsets"].items()
            if int(name) in self._reader.merge.offsets and offset > self._committed[name]
        }
        if new:
            self._reader.commit([self._reader.at(int(name), offset) for name, offset in new.items()])
            self._committed |= new

    def close(self) -> None:
        """Leave the group."""
        self._reader.close()


def _message(message: Any, place: Place) -> Message:
    kind, milliseconds = message.timestamp()
    written = milliseconds / 1_000 if kind else math.nan  # 0: the broker tells none
    about = {"partition": message.partition(), "offset": message.offset()}
    return Message(message.value() or b"", place, about, written)


def _told(error: Exception) -> str:
    about = error.args[0] if error.args else error
    return str(about.str()) if hasattr(about, "str") else str(about)


def kafka(
    *,
    topic: Annotated[str, Field(min_length=1)],
    servers: Names = ("127.0.0.1:9092",),
    partitions: Sequence[Annotated[int, Field(ge=0)]] = (),
    group: str = "",
    user: str = "",
    password_env: str = "",
    client: Mapping[str, str | int | float | bool] | None = None,
    format: Literal["json", "csv", "msgpack", "arrow"] = "json",  # noqa: A002 - the user's word for it
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ",",
    max_classes: int,
    refuse: Refuse,
    **options: Any,
) -> StreamFeed:
    """Read a topic of Kafka.

    Args:
        topic: its name.
        servers: host and port of some of its brokers.
        partitions: that are wanted, where it is not all.
        group: consumer group; left out, messages are read by their offsets, each of them exactly once.
        user: with the password that the environment variable `password_env` holds, over TLS unless `client` says other.
        password_env: likewise.
        client: more settings of librdkafka's, by their names there.
        format: of a message.
        delimiter: of CSV.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be used.
        options: those of `runners.feeds.stream.Reading`.

    Raises:
        FeedError: the brokers cannot be reached, or no record came in time.
        ConfigError: a setting does not fit.
    """
    settings = reading(options)
    if group and partitions:
        raise ConfigError(f"feed.partitions = {list(partitions)}: feed.group shares them out; set one of the two")
    at = ",".join(servers)
    more = client or {}
    reader = Reader(topic, client_settings(at, user, password_env, more) | _consuming(group, more))
    source: Source = Group(reader) if group else Offsets(reader, partitions)
    return open_stream(
        source,
        decoder(format, columns=settings.columns, delimiter=delimiter),
        settings,
        about={"kind": "kafka", "key": "topic", "stream": topic, "address": "servers", "at": at},
        max_classes=max_classes,
        refuse=refuse,
    )


def client_settings(
    servers: str, user: str, password_env: str, client: Mapping[str, Any], key: str = "feed"
) -> dict[str, Any]:
    """Return what the client needs to connect.

    Raises:
        ConfigError: a setting is not the user's, or the password is not there.
    """
    for name, why in OURS.items():
        if name in client:
            raise ConfigError(f"{key}.client: {name} is not to be set there: {why}")
    secret = from_environment(password_env, f"{key}.password_env")
    login = {"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": user} if user else {}
    password = {"sasl.password": secret} if secret else {}
    quiet = {"log_level": 0}  # what matters is told by the feed
    return {**quiet, **login, **password, **client, "bootstrap.servers": servers}


def _consuming(group: str, client: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "queued.max.messages.kbytes": 16_384,
        "fetch.queue.backoff.ms": 50,
        "fetch.wait.max.ms": 20,  # the end of a partition is told by an empty answer
        "max.poll.interval.ms": DAY,  # a step may be long; who is dead is known by its heartbeats,
        "session.timeout.ms": 10_000,  # which come from a thread of the client's
        **client,
        "group.id": group or "streamkd",  # the client wants one; without a group it is never used
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "enable.partition.eof": True,
    }

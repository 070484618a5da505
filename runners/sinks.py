"""Brokers as sinks of predictions: a message a line, and what the broker has acknowledged is safe."""

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from threading import Condition
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from pydantic import Field

from runners.feeds.formats import imported
from runners.feeds.jetstream import ONCE, Loop
from runners.feeds.kafka import client_settings
from runners.feeds.mqtt import PORTS
from runners.feeds.redis_streams import Server
from runners.feeds.stream import Names, UnreachableError, unreachable
from runners.passwords import from_environment
from streamkd.errors import ConfigError, reason

SECONDS = 5.0
"""For a broker to acknowledge."""
CLOSING_SECONDS = 1.0
"""For a connection to be closed; a server that hangs takes nothing any more."""
ENVIRONMENT_KEY = "predictions.password_env"
MOST_UNDER_WAY = 100_000
"""Messages that Kafka's client may hold."""


class Entries:
    """A Redis stream, an entry a prediction, in its field `data`."""

    def __init__(self, server: Server, stream: str, most: int) -> None:
        self._server, self._stream, self._most = server, stream, most

    def put(self, lines: Sequence[str]) -> None:
        """Append entries, in one transaction."""
        try:
            self._server.ask(*(("xadd", self._stream, {"data": line}, "*", self._most) for line in lines))
        except Exception as error:
            self._server.close()  # one that is a replica now keeps the line; its name may lead elsewhere
            raise OSError(str(error)) from error

    def sync(self) -> None:
        """Do nothing: what the server has acknowledged is as safe as it is configured to keep it."""

    def close(self) -> None:
        """Close the connection."""
        self._server.close()


def redis_entries(
    *,
    stream: Annotated[str, Field(min_length=1)],
    url: str = "redis://127.0.0.1:6379/0",
    password_env: str = "",
    most: Annotated[int, Field(ge=1)] = 1_000_000,
) -> Entries:
    """Append predictions to a Redis stream.

    Args:
        stream: its key.
        url: of the server.
        password_env: name of the environment variable that holds the password.
        most: entries that are kept, roughly; the oldest go first.

    Raises:
        FeedError: the server cannot be reached.
        ConfigError: a setting does not fit.
    """
    server = Server(url, from_environment(password_env, ENVIRONMENT_KEY), key="predictions")
    try:
        server.ask(("ping",))
    except UnreachableError as error:
        server.close()
        raise unreachable("predictions.url", url, str(error)) from error
    return Entries(server, stream, most)


class Messages:
    """A subject of NATS that a JetStream stream keeps.

    Args:
        url: of the server.
        subject: of the messages.
        options: for the connection.
    """

    def __init__(self, url: str, subject: str, options: Mapping[str, Any]) -> None:
        self._nats = imported("nats", "nats", "predictions.kind = 'nats'")
        self._missing = imported("nats.js.errors", "nats", "predictions.kind = 'nats'")
        self._url, self._subject, self._options = url, subject, options
        self._loop = Loop("nats predictions")
        self._client: Any = None

    def put(self, lines: Sequence[str]) -> None:
        """Publish messages, and wait until the stream has them."""
        self._reach(self._put(lines))

    def kept(self) -> bool:
        """Say whether a stream keeps the subject; where that is not told to us, believe it."""
        try:
            self._reach(self._keeper())
        except OSError as error:
            return not isinstance(error.__cause__, (self._missing.NotFoundError, self._missing.ServiceUnavailableError))
        return True

    def _reach(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            self._loop.run(asyncio.wait_for(work, SECONDS))
        except Exception as error:
            why = f"no answer in {SECONDS:g} s" if isinstance(error, TimeoutError) else reason(error)
            self._disconnect()  # what it has not sent, it would send beside what is put again
            raise OSError(why) from error

    async def _put(self, lines: Sequence[str]) -> None:
        context = await self._context()
        await asyncio.gather(*(context.publish(self._subject, line.encode()) for line in lines))

    async def _keeper(self) -> None:
        await (await self._context()).find_stream_name_by_subject(self._subject)

    async def _context(self) -> Any:
        if self._client is None or not self._client.is_connected:
            self._client = self._nats.NATS()
            await self._client.connect(self._url, error_cb=_quiet, **ONCE, **self._options)
        return self._client.jetstream(timeout=SECONDS)

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with suppress(Exception):  # it may be gone already
                self._loop.run(asyncio.wait_for(client.close(), CLOSING_SECONDS))

    def sync(self) -> None:
        """Do nothing: what the stream has acknowledged is as safe as it is configured to keep it."""

    def close(self) -> None:
        """Close the connection."""
        self._disconnect()
        self._loop.close()


async def _quiet(_: Exception) -> None:
    """Say nothing: whoever puts is told."""


def nats_messages(
    *,
    subject: Annotated[str, Field(min_length=1)],
    url: str = "nats://127.0.0.1:4222",
    user: str = "",
    password_env: str = "",
) -> Messages:
    """Publish predictions to a subject of NATS that a JetStream stream keeps.

    Args:
        subject: of the messages.
        url: of the server.
        user: with the password that the environment variable `password_env` holds.
        password_env: likewise.

    Raises:
        FeedError: the server cannot be reached.
        ConfigError: a setting does not fit.
    """
    password = from_environment(password_env, ENVIRONMENT_KEY)
    sink = Messages(url, subject, {"user": user, "password": password} if user else {})
    try:
        sink.put(())
    except OSError as error:
        sink.close()
        raise unreachable("predictions.url", url, str(error)) from error
    if not sink.kept():
        sink.close()
        raise ConfigError(
            f"predictions.subject = {subject!r}: no stream of JetStream's keeps it; add one that does (nats stream "
            "add), or name a subject of one"
        )
    return sink


class Records:
    """A topic of Kafka. The client sends in the background; what it could not deliver is sent again."""

    def __init__(self, producer: Any, topic: str) -> None:
        self._producer, self._topic = producer, topic
        self._unsent: deque[bytes] = deque()
        self._why = "no answer"

    def put(self, lines: Sequence[str]) -> None:
        """Hand lines to the client, which has room for all of them or is given none.

        One that it does not take, for it is too long, keeps back those after it: who puts next, or syncs, is told.
        """
        self._send()
        if len(self._producer) + len(lines) > MOST_UNDER_WAY:
            raise OSError(f"{len(self._producer)} messages are under way to Kafka already")
        self._unsent.extend(line.encode() for line in lines)
        with suppress(OSError):
            self._send()

    def _send(self) -> None:
        self._producer.poll(0)
        try:
            while self._unsent:
                self._producer.produce(self._topic, self._unsent[0], on_delivery=self._delivered)
                self._unsent.popleft()
        except Exception as error:
            raise OSError(f"Kafka's client does not take a prediction: {reason(error)}") from error

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self._unsent.append(message.value())
            self._why = error.str()

    def sync(self) -> None:
        """Wait until the brokers have all of them."""
        self._send()
        left = self._producer.flush(SECONDS) + len(self._unsent)
        if left:
            raise OSError(f"Kafka has not acknowledged {left} predictions in {SECONDS:g} s: {self._why}")

    def close(self) -> None:
        """Let the client send what it can in a moment."""
        self._producer.flush(SECONDS)


def kafka_records(
    *,
    topic: Annotated[str, Field(min_length=1)],
    servers: Names = ("127.0.0.1:9092",),
    user: str = "",
    password_env: str = "",
    client: Mapping[str, str | int | float | bool] | None = None,
) -> Records:
    """Publish predictions to a topic of Kafka.

    Args:
        topic: its name.
        servers: host and port of some of its brokers.
        user: with the password that the environment variable `password_env` holds, over TLS unless `client` says other.
        password_env: likewise.
        client: more settings of librdkafka's, by their names there.

    Raises:
        FeedError: the brokers cannot be reached.
        ConfigError: a setting does not fit.
    """
    confluent = imported("confluent_kafka", "kafka", "predictions.kind = 'kafka'")
    at = ",".join(servers)
    settings = client_settings(at, user, password_env, client or {}, key="predictions")
    told: list[str] = []
    try:
        producer = confluent.Producer(
            {
                "linger.ms": 5,
                "queue.buffering.max.messages": 2 * MOST_UNDER_WAY,
                **settings,
                "error_cb": lambda error: None if told else told.append(error.str()),  # the cause comes first
                "enable.idempotence": True,  # each once and in order, as long as this process lives
            }
        )
    except confluent.KafkaException as error:
        raise ConfigError(f"predictions.client: {error.args[0].str()}") from None
    try:
        producer.list_topics(topic, timeout=SECONDS)
    except confluent.KafkaException as error:
        producer.poll(0)  # which tells of what went wrong meanwhile
        raise unreachable("predictions.servers", at, (told or [error.args[0].str()])[0]) from error
    return Records(producer, topic)


class Publications:
    """A topic of MQTT, with quality of service 1."""

    def __init__(self, client: Any, topic: str) -> None:
        self._client, self._topic = client, topic
        self._given = self._answered = 0
        self._refused = ""
        self._told = Condition()
        client.on_publish = self._hear

    def put(self, lines: Sequence[str]) -> None:
        """Publish messages, and wait until the broker has them."""
        if not self._client.is_connected():  # it tries again by itself, and would keep what it is given
            raise OSError("the MQTT broker is away")
        self._wait()  # for what an earlier one gave up on, as the client did not
        self._refused = ""
        for line in lines:
            self._client.publish(self._topic, line, qos=1)
            self._given += 1
        self._wait()
        if self._refused:
            raise OSError(f"the MQTT broker refuses: {self._refused}")

    def _wait(self) -> None:
        with self._told:
            while self._answered < self._given:
                if not self._told.wait(SECONDS):
                    raise OSError(f"the MQTT broker has not acknowledged in {SECONDS:g} s")

    def _hear(self, _client: Any, _data: Any, _message: int, why: Any, _properties: Any) -> None:
        with self._told:
            self._answered += 1
            self._refused = self._refused or str(why) * why.is_failure
            self._told.notify()

    def sync(self) -> None:
        """Do nothing: what the broker has acknowledged is as safe as it is configured to keep it."""

    def close(self) -> None:
        """Close the connection."""
        self._client.disconnect()
        self._client.loop_stop()


def mqtt_publications(
    *,
    topic: Annotated[str, Field(min_length=1)],
    url: str = "mqtt://127.0.0.1:1883",
    user: str = "",
    password_env: str = "",
) -> Publications:
    """Publish predictions to a topic of MQTT.

    Args:
        topic: its name.
        url: of the broker; `mqtts://` for TLS.
        user: with the password that the environment variable `password_env` holds.
        password_env: likewise.

    Raises:
        FeedError: the broker cannot be reached.
        ConfigError: a setting does not fit.
    """
    paho: Any = imported("paho.mqtt.client", "mqtt", "predictions.kind = 'mqtt'")
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ConfigError(f"predictions.url = {url!r}: write it as mqtt://host:port, or mqtts://host:port for TLS")
    name = f"streamkd-predictions-{socket.gethostname()}-{os.getpid()}"
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv5)
    password = from_environment(password_env, ENVIRONMENT_KEY) or unquote(parts.password or "")
    if user or parts.username:
        client.username_pw_set(user or unquote(parts.username or ""), password or None)
    if parts.scheme == "mqtts":
        client.tls_set()
    refused: list[str] = []
    client.on_connect = lambda _client, _data, _flags, why, _properties: refused.extend([str(why)] * why.is_failure)
    sink = Publications(client, topic)
    try:
        client.connect(parts.hostname, parts.port or PORTS[parts.scheme])
    except (OSError, ValueError) as error:
        raise unreachable("predictions.url", url, str(error)) from error
    client.loop_start()
    patience = time.monotonic() + SECONDS
    while not client.is_connected():
        if refused or time.monotonic() > patience:
            sink.close()
            raise unreachable("predictions.url", url, refused[0] if refused else f"no answer in {SECONDS:g} s")
        time.sleep(0.01)
    return sink

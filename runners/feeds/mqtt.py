"""MQTT: a persistent session of quality of service 1; a message is acknowledged when it is on our disk."""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit
from zlib import crc32

from pydantic import Field

from runners.feeds import Refuse
from runners.feeds.formats import decoder, imported
from runners.feeds.spool import MOST_BYTES, Spool
from runners.feeds.spooled import QUIET_SECONDS, Arrivals, Spooled, as_line, from_line
from runners.feeds.stream import StreamFeed, UnreachableError, open_stream, reading
from runners.passwords import from_environment
from streamkd.errors import ConfigError

SECONDS = 5.0
"""For the broker to let us in."""
LONGEST_SESSION = 0xFFFFFFFF
"""Seconds, which stand for good."""
AT_ONCE = 100
"""Messages that the broker may send before the first of them is acknowledged; many allow fewer."""
END_SECONDS = 3.0
"""Without a message, after which a feed that does not wait for more has come to its end."""
FULL_SECONDS = 0.1
"""Between two attempts to write to a spool or a disk that is full."""
PORTS = {"mqtt": 1883, "mqtts": 8883}


class Subscription:
    """Messages of a topic, written to a spool on a thread of its own, so that the broker is never kept waiting.

    A message that the broker sends again, since our acknowledgement did not reach it, is not written twice; of those
    that were under way when this process was killed, some may be.

    Args:
        host, port: of the broker.
        topic: a filter; wildcards are MQTT's.
        session: its name; only one client may have it.
        user, password, tls: for the broker; empty: none.
        quiet: seconds after which the broker is taken to have no more; it does not tell.
    """

    def __init__(
        self,
        host: str,
        port: int,
        topic: str,
        *,
        session: str,
        user: str = "",
        password: str = "",
        tls: bool = False,
        quiet: float = QUIET_SECONDS,
    ) -> None:
        self.ended = False
        self._mqtt = imported("paho.mqtt.client", "mqtt", "feed.kind = 'mqtt'")
        self._where, self._topic = (host, port), topic
        self._make: Callable[[], Any] = lambda: self._client_for(session, user, password, tls=tls)
        self._client: Any = None
        self._arrivals = Arrivals(quiet)
        self._waiting: SimpleQueue[Any] = SimpleQueue()
        self._writer: Thread | None = None
        self._let_in, self._closing = Event(), Event()
        self._fault = ""
        self._latest: dict[int, int] = {}

    def _client_for(self, session: str, user: str, password: str, *, tls: bool) -> Any:
        client = self._mqtt.Client(
            self._mqtt.CallbackAPIVersion.VERSION2,
            client_id=session,
            protocol=self._mqtt.MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,  # the feed tries again itself, and tells
        )
        if user:
            client.username_pw_set(user, password or None)
        if tls:
            client.tls_set()
        client.on_connect, client.on_subscribe = self._connected, self._subscribed
        client.on_disconnect = self._disconnected
        client.on_message = lambda client, _data, message: self._waiting.put((client, message))
        return client

    def listen(self, spool: Spool) -> None:
        """Connect, and take the session up where it was left."""
        self._disconnect()
        self._fault = ""
        self._let_in.clear()
        self._client = self._make()
        properties = imported("paho.mqtt.properties", "mqtt", "feed.kind = 'mqtt'")
        packet = imported("paho.mqtt.packettypes", "mqtt", "feed.kind = 'mqtt'")
        asked = properties.Properties(packet.PacketTypes.CONNECT)
        asked.SessionExpiryInterval = LONGEST_SESSION
        asked.ReceiveMaximum = AT_ONCE
        self._client.connect_timeout = SECONDS
        try:
            self._client.connect(*self._where, clean_start=False, properties=asked)
        except (OSError, ValueError) as error:
            raise UnreachableError(str(error)) from error
        if self._writer is None:
            self._writer = Thread(target=self._write, args=(spool,), name="spool", daemon=True)
            self._writer.start()
        self._client.loop_start()
        if not self._let_in.wait(SECONDS) or self._fault:
            raise UnreachableError(self._fault or f"no answer in {SECONDS:g} s")
        self._arrivals.note(0)

    def _connected(self, client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._fault = str(reason)
            self._let_in.set()
        else:
            subscribed = imported("paho.mqtt.subscribeoptions", "mqtt", "feed.kind = 'mqtt'").SubscribeOptions
            client.subscribe(self._topic, options=subscribed(qos=1, retainHandling=1))  # retained ones once a session

    def _subscribed(self, _client: Any, _data: Any, _mid: int, reasons: Sequence[Any], _properties: Any) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        self._fault = f"topic {self._topic!r}: {refused[0]}" if refused else ""
        self._let_in.set()

    def _disconnected(self, client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if client is self._client:
            self._fault = self._fault or f"disconnected: {reason}"  # which comes after a refusal, and says less

    def _write(self, spool: Spool) -> None:
        """Write what has come, many messages at once, and then acknowledge them; until told to end."""
        ending = False
        while not ending:
            come = [self._waiting.get()]
            while len(come) < AT_ONCE and not self._waiting.empty():  # as a full spool takes in no more than that
                come.append(self._waiting.get())
            ending = None in come
            arrived = [pair for pair in come if pair is not None]
            lines = b"".join(as_line(message.payload) for _, message in arrived if not self._again(message))
            if arrived and self._put(spool, lines):
                for client, message in arrived:
                    client.ack(message.mid, message.qos)
                self._arrivals.note()

    def _put(self, spool: Spool, lines: bytes) -> bool:
        """Write lines when there is room; say whether they were."""
        while True:
            try:
                if spool.has_room():
                    spool.append(lines)
                    return True
            except OSError as error:
                self._fault = f"the spool cannot be written: {error}"
            if self._closing.wait(FULL_SECONDS):
                return False

    def _again(self, message: Any) -> bool:
        """Say whether a message is one that was written before."""
        if not message.qos:
            return False
        mark = crc32(message.payload, crc32(message.topic.encode()))
        again: bool = message.dup and self._latest.get(message.mid) == mark
        self._latest[message.mid] = mark
        return again

    def fill(self, spool: Spool) -> bool:  # noqa: ARG002 - the thread fills it
        """Say whether more has come."""
        if self._arrivals.wait():
            return True
        if self._fault:
            raise UnreachableError(self._fault)
        return False

    def _disconnect(self) -> None:
        if self._client is not None:
            client = self._client
            client.disconnect()
            client.loop_stop()

    def close(self) -> None:
        """Disconnect; the broker keeps the session."""
        self._closing.set()
        if self._writer is not None:
            self._waiting.put(None)
            self._writer.join()
            self._writer = None
        self._disconnect()
        self._client = None


def mqtt(
    *,
    topic: Annotated[str, Field(min_length=1)],
    spool: Path,
    url: str = "mqtt://127.0.0.1:1883",
    session: str = "",
    user: str = "",
    password_env: str = "",
    spool_bytes: Annotated[int, Field(ge=1 << 16)] = MOST_BYTES,
    format: Literal["json", "csv", "msgpack", "arrow"] = "json",  # noqa: A002 - the user's word for it
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ",",
    max_classes: int,
    refuse: Refuse,
    **options: Any,
) -> StreamFeed:
    """Read a topic of an MQTT broker that speaks version 5.

    A broker does not tell how much it has: with `follow = false` the feed ends when nothing has come for 3 seconds.

    Args:
        topic: a filter; `+` and `#` are wildcards.
        spool: a folder in which messages are kept until they are in two checkpoints.
        url: of the broker; `mqtts://` for TLS.
        session: its name at the broker, which keeps what comes while we are away; after the host, unless given.
        user: with the password that the environment variable `password_env` holds.
        password_env: likewise.
        spool_bytes: that may wait there; then the broker has to keep what comes.
        format: of a message.
        delimiter: of CSV.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be used.
        options: those of `runners.feeds.stream.Reading`.

    Raises:
        FeedError: the broker cannot be reached, or no record came in time.
        ConfigError: a setting does not fit.
    """
    settings = reading(options)
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ConfigError(f"feed.url = {url!r}: write it as mqtt://host:port, or mqtts://host:port for TLS")
    subscription = Subscription(
        parts.hostname,
        parts.port or PORTS[parts.scheme],
        topic,
        session=session or f"streamkd-{socket.gethostname()}",
        user=user or unquote(parts.username or ""),
        password=from_environment(password_env, "feed.password_env") or unquote(parts.password or ""),
        tls=parts.scheme == "mqtts",
        quiet=QUIET_SECONDS if settings.follow else END_SECONDS,
    )
    return open_stream(
        Spooled(subscription, Spool(spool, spool_bytes, whole=True), from_line),
        decoder(format, columns=settings.columns, delimiter=delimiter),
        settings,
        about={"kind": "mqtt", "key": "topic", "stream": topic, "address": "url", "at": url},
        max_classes=max_classes,
        refuse=refuse,
    )

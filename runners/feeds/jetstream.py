"""NATS JetStream, by the sequence numbers of a stream; a durable consumer may be told what is safe."""

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from runners.feeds import NONE, REPLAYABLE, Capabilities, Refuse
from runners.feeds.formats import decoder, imported
from runners.feeds.stream import (
    Message,
    Place,
    PositionLostError,
    Start,
    StreamFeed,
    UnreachableError,
    open_stream,
    reading,
)
from runners.passwords import from_environment

SECONDS = 5.0
"""For an answer; a server that takes longer is taken for lost."""
ONCE = {"allow_reconnect": False, "max_reconnect_attempts": 1, "reconnect_time_wait": 0, "connect_timeout": SECONDS}
"""The client tries a server for good unless it is told all of this; the feed tries again itself, and tells."""
ACKNOWLEDGED_SECONDS = 86_400.0
"""Within which a checkpoint covers what was read; the server gives what it does not a second time."""
IDLE_SECONDS = 60.0
"""After which the server drops the consumer of a client that is gone."""
PARTITION = "0"
Answer = TypeVar("Answer")


class Loop:
    """An event loop on a thread of its own, for clients that need one."""

    def __init__(self, name: str) -> None:
        logging.getLogger("asyncio").addFilter(_of_use)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Do some work there, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End the loop and its thread."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _of_use(told: logging.LogRecord) -> bool:
    """Keep back what asyncio has to say of the client whenever a connection over TLS ends."""
    return "eof_received" not in str(told.msg)


class Sequences:
    """A stream's messages by their sequence numbers.

    Without a durable consumer nothing is acknowledged, and the server keeps no account of us. With one it is told what
    is safe, and without a place reading begins after that. A durable consumer is made anew after what was acknowledged
    whenever it is opened, as the server would wait to give the rest again.

    Args:
        url: of the server.
        stream: its name.
        subject: of the messages wanted; wildcards are NATS's.
        options: for the connection.
        durable: name of the consumer; empty: none.
    """

    def __init__(self, url: str, stream: str, subject: str, options: Mapping[str, Any], durable: str = "") -> None:
        # A durable consumer is made anew wherever a checkpoint says; it tells only who comes without one.
        self.capabilities = Capabilities(replayable=True, promise="at least once") if durable else REPLAYABLE
        self.lag: Mapping[str, int] = NONE
        self.ended = False
        self._nats = imported("nats", "nats", "feed.kind = 'nats'")
        self._api = imported("nats.js.api", "nats", "feed.kind = 'nats'")
        self._wrong = imported("nats.errors", "nats", "feed.kind = 'nats'")
        self._missing = imported("nats.js.errors", "nats", "feed.kind = 'nats'")
        self._url, self._stream, self._subject, self._options = url, stream, subject, options
        self._last, self._seen, self._created = 0, 0, ""
        self._lost = False
        self._durable, self._unacknowledged = durable, deque[Any]()
        self._loop = Loop("nats")
        self._client: Any = None
        self._consumer: Any = None

    def open(self, place: Place | None, start: Start) -> Place:
        """Stand after a message, or at one end."""
        return self._reach(self._open(place, start))

    async def _open(self, place: Place | None, start: Start) -> Place:
        await self._disconnect()
        connecting = self._nats.connect(self._url, error_cb=_quiet, **ONCE, **self._options)
        self._client = await asyncio.wait_for(connecting, SECONDS)
        self._context = self._client.jetstream(timeout=SECONDS)
        about = await self._context.stream_info(self._stream)
        if place is not None:
            if place["created"] != str(about.created) or place["sequence"] > about.state.last_seq:
                raise PositionLostError("recreated", "the stream was made anew since")
            self._last = place["sequence"]
        else:
            self._last = max(0, about.state.first_seq - 1) if start == "earliest" else about.state.last_seq
        self._created = str(about.created)
        safe = await self._acknowledged()
        if safe is not None and place is None and not self._lost:
            self._last = safe
        self._lost = False
        self._seen = self._last
        if place is not None:
            self._missed(about.state)
        self._consumer = await self._subscribe(1 + min(self._last, self._last if safe is None else safe), self._durable)
        return {"sequence": self._last, "created": self._created}

    async def _acknowledged(self) -> int | None:
        """Return the last message that the durable consumer knows to be safe, and end it; None where there is none."""
        if not self._durable:
            return None
        self._unacknowledged.clear()
        try:
            about = await self._context.consumer_info(self._stream, self._durable)
        except self._missing.NotFoundError:
            return None
        await self._context.delete_consumer(self._stream, self._durable)
        safe: int = max(about.ack_floor.stream_seq, (about.config.opt_start_seq or 1) - 1)
        return safe

    async def _subscribe(self, sequence: int, durable: str = "") -> Any:
        config = self._api.ConsumerConfig(
            deliver_policy=self._api.DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=sequence,
            ack_policy=self._api.AckPolicy.ALL if durable else self._api.AckPolicy.NONE,
            **(
                {"ack_wait": ACKNOWLEDGED_SECONDS, "max_ack_pending": -1}
                if durable
                else {"inactive_threshold": IDLE_SECONDS}
            ),
        )
        return await self._context.pull_subscribe(
            self._subject, durable=durable or None, stream=self._stream, config=config
        )

    def _missed(self, state: Any) -> None:
        """Tell of messages after the last one read that the stream no longer has."""
        missed = state.first_seq - 1 - self._seen
        if missed > 0:
            self._lost = True
            raise PositionLostError(
                "trimmed", f"{missed} messages after {self._seen} were removed before they were read"
            )

    def peek(self, most: int) -> Sequence[bytes]:
        """Return the payloads of the oldest messages."""
        return self._reach(self._peek(most))

    async def _peek(self, most: int) -> Sequence[bytes]:
        about = await self._context.stream_info(self._stream)
        consumer = await self._subscribe(max(1, about.state.first_seq))
        try:
            found = await self._fetch(consumer, most)
            return [message.data for message in found]
        finally:
            await consumer.unsubscribe()

    def read(self, most: int) -> Sequence[Message]:
        """Return the next messages."""
        return self._reach(self._read(most))

    async def _read(self, most: int) -> Sequence[Message]:
        state = (await self._context.stream_info(self._stream)).state
        if state.last_seq < self._seen:
            raise PositionLostError("recreated", "the stream was made anew since")
        self._missed(state)
        messages = []
        for found in await self._fetch(self._consumer, most):
            sequence = found.metadata.sequence.stream
            if self._durable:
                self._unacknowledged.append(found)
            if sequence <= self._last:
                continue  # given before the connection broke
            self._last = self._seen = sequence
            place = {"sequence": self._last, "created": self._created}
            about = {"sequence": self._last, "subject": found.subject}
            messages.append(Message(found.data, place, about, found.metadata.timestamp.timestamp()))
        if not messages:
            self._seen = state.last_seq  # what there is beyond is of other subjects
        return messages

    async def _fetch(self, consumer: Any, most: int) -> list[Any]:
        """Return as many messages as wait, up to `most`; the server is not asked for any that are yet to come."""
        waiting = (await consumer.consumer_info()).num_pending
        wanted = min(most, waiting)
        found: list[Any] = []
        while len(found) < wanted:
            found += await consumer.fetch(wanted - len(found), timeout=SECONDS)
        self.lag = {PARTITION: waiting - len(found)}
        return found

    def commit(self, place: Place) -> None:
        """Acknowledge all up to a place, where there is a durable consumer to be told."""
        safe = None
        while self._unacknowledged and self._unacknowledged[0].metadata.sequence.stream <= place["sequence"]:
            safe = self._unacknowledged.popleft()
        if safe is not None:
            self._reach(safe.ack_sync(timeout=SECONDS))

    def close(self) -> None:
        """Close the connection."""
        with suppress(UnreachableError, RuntimeError):  # the loop may have been closed already
            self._reach(self._disconnect())
        self._loop.close()

    async def _disconnect(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            with suppress(Exception):  # it may be gone already
                await asyncio.wait_for(client.close(), SECONDS)

    def _reach(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        try:
            return self._loop.run(work)
        except (TimeoutError, self._wrong.Error, OSError, AttributeError) as error:
            raise UnreachableError(str(error) or type(error).__name__) from error
        finally:
            work.close()


async def _quiet(_: Exception) -> None:
    """Say nothing: whoever asks is told."""


def jetstream(
    *,
    stream: Annotated[str, Field(min_length=1)],
    url: str = "nats://127.0.0.1:4222",
    subject: str = ">",
    user: str = "",
    password_env: str = "",
    credentials: Path | None = None,
    durable: str = "",
    format: Literal["json", "csv", "msgpack", "arrow"] = "json",  # noqa: A002 - the user's word for it
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ",",
    max_classes: int,
    refuse: Refuse,
    **options: Any,
) -> StreamFeed:
    """Read a stream of NATS JetStream.

    Args:
        stream: its name.
        url: of the server; `tls://` for TLS.
        subject: of the messages wanted, wildcards included.
        user: with the password that the environment variable `password_env` holds.
        password_env: likewise.
        credentials: a file of NATS's, instead of the two.
        durable: name of a consumer that is to know what is in a checkpoint; left out, the server keeps no account. No
            two running processes may share one.
        format: of a message.
        delimiter: of CSV.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be used.
        options: those of `runners.feeds.stream.Reading`.

    Raises:
        FeedError: the server cannot be reached, or no record came in time.
        ConfigError: a setting does not fit.
    """
    settings = reading(options)
    password = from_environment(password_env, "feed.password_env")
    login = {
        **({"user": user} if user else {}),
        **({"password": password} if password else {}),
        **({"user_credentials": str(credentials)} if credentials else {}),
    }
    return open_stream(
        Sequences(url, stream, subject, login, durable),
        decoder(format, columns=settings.columns, delimiter=delimiter),
        settings,
        about={"kind": "nats", "key": "stream", "stream": stream, "address": "url", "at": url},
        max_classes=max_classes,
        refuse=refuse,
    )

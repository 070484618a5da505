"""Redis Streams: by entry id, each entry exactly once; or as a member of a consumer group, at least once."""

import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from runners.feeds import NONE, REPLAYABLE, Capabilities, Refuse
from runners.feeds.decode import moment
from runners.feeds.formats import decoder, imported
from runners.feeds.stream import (
    Message,
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
"""For an answer; a server that takes longer is taken for lost."""
PARTITION = "0"


class Entries:
    """A stream's entries by id. The place counts them, too, so that those trimmed unread are missed.

    Args:
        server: connected at its first call.
        stream: the key.
        field: of an entry, that holds the payload; empty: its fields are the cells.
    """

    def __init__(self, server: "Server", stream: str, field: str) -> None:
        self.capabilities = REPLAYABLE
        self.lag: Mapping[str, int] = NONE
        self.ended = False
        self._server, self._stream, self._field = server, stream, field
        self._last, self._seen = "0-0", 0

    def open(self, place: Place | None, start: Start) -> Place:
        """Stand after an entry that was read, or at one end."""
        (about,) = self._server.ask(("xinfo_stream", self._stream))
        if place is not None:
            if _number(about["last-generated-id"]) < _number(place["id"]) or about["entries-added"] < place["seen"]:
                raise PositionLostError("recreated", f"there is no entry {place['id']} in it: it is another stream")
            self._last, self._seen = place["id"], place["seen"]
        elif start == "earliest":
            self._last, self._seen = "0-0", about["entries-added"] - about["length"]
        else:
            self._last, self._seen = about["last-generated-id"], about["entries-added"]
        self.lag = {PARTITION: about["entries-added"] - self._seen}
        return {"id": self._last, "seen": self._seen}

    def peek(self, most: int) -> Sequence[Mapping[str, object] | bytes]:
        """Return the payloads of the oldest entries."""
        return _oldest(self._server, self._stream, self._field, most)

    def read(self, most: int) -> Sequence[Message]:
        """Return the next entries, without waiting."""
        about, found = self._server.ask(("xinfo_stream", self._stream), ("xread", {self._stream: self._last}, most))
        added = about["entries-added"]
        if _number(about["last-generated-id"]) < _number(self._last) or added < self._seen:
            raise PositionLostError("recreated", f"there is no entry {self._last} in it: it is another stream")
        trimmed = added - about["length"] - self._seen
        oldest = about["recorded-first-entry-id"] if about["length"] else about["last-generated-id"]
        if trimmed > 0 and _number(oldest) > _number(self._last):
            raise PositionLostError(
                "trimmed", f"{trimmed} entries after {self._last} were trimmed before they were read"
            )
        entries = _entries(found, self._stream)
        if len(entries) < most:
            self._seen = added - len(entries)  # those that were deleted one by one are not waited for
        messages = []
        for name, fields in entries:
            self._last, self._seen = name, self._seen + 1
            messages.append(_message(name, fields, self._field, {"id": name, "seen": self._seen}))
        self.lag = {PARTITION: max(0, added - self._seen)}
        return messages

    def commit(self, place: Place) -> None:
        """Do nothing: a stream waits for nobody."""

    def close(self) -> None:
        """Close the connection."""
        self._server.close()


class Group:
    """Entries as a member of a consumer group gets them: first those it did not acknowledge before, then new ones.

    Those that another member left unacknowledged for `idle_seconds` are taken over. The place is a number, counted by
    the process: the group itself knows what is acknowledged.

    Args:
        server: connected at its first call.
        stream: the key.
        field: as for `Entries`.
        group, consumer: names of the group, and of this member.
        idle_seconds: before entries of other members are taken over; longer than between two checkpoints.
    """

    def __init__(
        self, server: "Server", stream: str, field: str, *, group: str, consumer: str, idle_seconds: float
    ) -> None:
        self.capabilities = Capabilities(replayable=False, promise="at least once")
        self.lag: Mapping[str, int] = NONE
        self.ended = False
        self._server, self._stream, self._field = server, stream, field
        self._group, self._consumer, self._idle = group, consumer, idle_seconds
        self._taken = 0
        self._unacknowledged: deque[tuple[int, str]] = deque()
        self._gone: list[str] = []
        self._ready: Sequence[Message] = ()
        self._own = "0-0"
        self._next_claim = 0.0

    def open(self, place: Place | None, start: Start) -> Place:
        """Join the group, which is made at one end of the stream where it is not there yet."""
        begin = "0-0" if start == "earliest" else "$"
        self._server.ask(("xgroup_create", self._stream, self._group, begin, True))
        if self._gone:
            self._server.ask(("xack", self._stream, self._group, *self._gone))
            self._gone.clear()
        self._own = "0-0"
        self._taken = max(self._taken, place["taken"] if place else 0)
        return {"taken": self._taken}

    def peek(self, most: int) -> Sequence[Mapping[str, object] | bytes]:
        """Return the payloads of the oldest entries, whoever got them."""
        return _oldest(self._server, self._stream, self._field, most)

    def read(self, most: int) -> Sequence[Message]:
        """Return entries that were delivered before, while there are any; then new ones."""
        if self._ready:
            ready, self._ready = self._ready, ()
            return ready
        while self._own:
            found = self._delivered_before(most, self._own)
            self._own = found[-1][0] if found else ""
            if messages := self._messages(found):
                return messages
        return self._taken_over(most) or self._new(most)

    def _delivered_before(self, most: int, after: str) -> list[tuple[str, Any]]:
        (found,) = self._server.ask(("xreadgroup", self._group, self._consumer, {self._stream: after}, most))
        return _entries(found, self._stream)

    def _taken_over(self, most: int) -> Sequence[Message]:
        """Return entries that another member got long ago, and did not acknowledge."""
        if time.monotonic() < self._next_claim:
            return ()
        patience = int(1_000 * self._idle)
        ((_, claimed, gone),) = self._server.ask(
            ("xautoclaim", self._stream, self._group, self._consumer, patience, "0-0", most)
        )
        messages = self._messages([(name.decode(), fields) for name, fields in claimed])
        if not messages:  # else there may be more
            self._next_claim = time.monotonic() + self._idle
        if gone:
            self._ready = messages
            raise PositionLostError("trimmed", f"{len(gone)} entries were trimmed before they were acknowledged")
        return messages

    def _new(self, most: int) -> Sequence[Message]:
        """Return entries that no member got yet; where some were trimmed before any member did, tell that first."""
        stream, before, found, after = self._server.ask(
            ("xinfo_stream", self._stream),
            ("xinfo_groups", self._stream),
            ("xreadgroup", self._group, self._consumer, {self._stream: ">"}, most),
            ("xinfo_groups", self._stream),
        )
        self.lag = {PARTITION: self._about(after)["lag"] or 0}
        messages = self._messages(_entries(found, self._stream))
        read = self._about(before)["entries-read"]
        trimmed = 0 if read is None else stream["entries-added"] - stream["length"] - read
        if trimmed > 0 and messages:
            self._ready = messages
            raise PositionLostError(
                "trimmed", f"{trimmed} entries were trimmed before any member of the group got them"
            )
        return messages

    def _about(self, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return next(group for group in groups if group["name"] == self._group.encode())

    def _messages(self, found: Sequence[tuple[str, Any]]) -> list[Message]:
        known = {name for _, name in self._unacknowledged}
        new = [(name, fields) for name, fields in found if name not in known]
        gone = [name for name, fields in new if not fields]
        if gone:
            self._gone = gone
            self._own = "0-0"
            raise PositionLostError("trimmed", f"{len(gone)} entries were trimmed before they were acknowledged")
        messages = []
        for name, fields in new:
            self._taken += 1
            self._unacknowledged.append((self._taken, name))
            messages.append(_message(name, fields, self._field, {"taken": self._taken}))
        return messages

    def commit(self, place: Place) -> None:
        """Acknowledge what was given up to a place."""
        names = [name for number, name in self._unacknowledged if number <= place["taken"]]
        if names:
            self._server.ask(("xack", self._stream, self._group, *names))
        for _ in names:
            self._unacknowledged.popleft()

    def close(self) -> None:
        """Close the connection; the group keeps what this member did not acknowledge, and gives it again."""
        self._server.close()


class Server:
    """A Redis server, and the one way to ask it anything.

    Args:
        url: as redis-py takes it.
        password: empty where the url has it, or there is none.
        key: of the table of settings, for messages.

    Raises:
        ConfigError: the client is not installed, or the url is none.
    """

    def __init__(self, url: str, password: str, key: str = "feed") -> None:
        self._redis, retry, backoff = (
            imported(name, "redis", f"{key}.kind = 'redis'") for name in ("redis", "redis.retry", "redis.backoff")
        )
        try:
            self._client = self._redis.Redis.from_url(
                url,
                **({"password": password} if password else {}),
                socket_timeout=SECONDS,
                socket_connect_timeout=SECONDS,
                retry=retry.Retry(backoff.NoBackoff(), 0),  # the feed tries again itself, and tells
            )
        except ValueError as error:
            raise ConfigError(f"{key}.url = {url!r}: {error}") from None

    def ask(self, *calls: tuple[Any, ...]) -> list[Any]:
        """Run commands in one transaction, so that what they tell is of one moment.

        Args:
            calls: name of a method of redis-py's pipeline, and its arguments.

        Raises:
            UnreachableError: the server is gone.
        """
        wrong = self._redis.exceptions
        try:
            with self._client.pipeline(transaction=len(calls) > 1) as pipeline:
                for name, *arguments in calls:
                    getattr(pipeline, name)(*arguments)
                answers: list[Any] = pipeline.execute(raise_on_error=False)
        except (wrong.ConnectionError, wrong.TimeoutError) as error:
            raise UnreachableError(str(error)) from error
        return [_checked(answer) for answer in answers]

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _checked(answer: Any) -> Any:
    """Return an answer; a stream that is not there is one without entries."""
    if not isinstance(answer, Exception):
        return answer
    if "no such key" in str(answer):
        return {"length": 0, "entries-added": 0, "last-generated-id": b"0-0", "recorded-first-entry-id": b"0-0"}
    if "BUSYGROUP" in str(answer):
        return None  # the group is there already
    raise answer


def _entries(found: Any, stream: str) -> list[tuple[str, Any]]:
    """Return the entries of an answer to XREAD or XREADGROUP."""
    return [(name.decode(), fields) for key, entries in found for name, fields in entries if key == stream.encode()]


def _oldest(server: Server, stream: str, field: str, most: int) -> list[Mapping[str, object] | bytes]:
    (found,) = server.ask(("xrange", stream, "-", "+", most))
    return [_message(name.decode(), fields, field, {}).payload for name, fields in found]


def _number(name: bytes | str) -> tuple[int, ...]:
    return tuple(int(part) for part in (name.decode() if isinstance(name, bytes) else name).split("-"))


def _message(name: str, fields: Mapping[bytes, bytes], field: str, place: Place) -> Message:
    written = moment(_number(name)[0] / 1_000)  # NaN where whoever wrote the entry has chosen its id
    if field:
        return Message(fields.get(field.encode(), b""), place, {"entry": name}, written)
    text = {
        key.decode(errors="backslashreplace"): value.decode(errors="backslashreplace") for key, value in fields.items()
    }
    return Message(text, place, {"entry": name}, written)


def redis_stream(
    *,
    stream: Annotated[str, Field(min_length=1)],
    url: str = "redis://127.0.0.1:6379/0",
    password_env: str = "",
    format: Literal["fields", "json", "csv", "msgpack", "arrow"] = "fields",  # noqa: A002 - the user's word for it
    field: str = "data",
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ",",
    group: str = "",
    consumer: str = "",
    idle_seconds: Annotated[float, Field(gt=0)] = 3_600.0,
    max_classes: int,
    refuse: Refuse,
    **options: Any,
) -> StreamFeed:
    """Read a stream of a Redis server, version 7 or newer.

    Args:
        stream: its key.
        url: of the server; `rediss://` for TLS.
        password_env: name of the environment variable that holds the password.
        format: of an entry: `fields`, where its fields are the columns; or of the payload in one field.
        field: that one.
        delimiter: of CSV.
        group: consumer group; left out, entries are read by their ids, each of them exactly once.
        consumer: name of this member; the host's, unless given. No two running members may share one.
        idle_seconds: after which entries that another member has not acknowledged are taken over; longer than the time
            between two checkpoints, or they are learned twice.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be used.
        options: those of `runners.feeds.stream.Reading`.

    Raises:
        FeedError: the server cannot be reached, or no record came in time.
        ConfigError: a setting does not fit.
    """
    settings = reading(options)
    server = Server(url, from_environment(password_env, "feed.password_env"))
    payload = "" if format == "fields" else field
    source: Source = (
        Group(
            server, stream, payload, group=group, consumer=consumer or socket.gethostname(), idle_seconds=idle_seconds
        )
        if group
        else Entries(server, stream, payload)
    )
    return open_stream(
        source,
        decoder(format, columns=settings.columns, delimiter=delimiter) if format != "fields" else no_payload,
        settings,
        about={"kind": "redis", "key": "stream", "stream": stream, "address": "url", "at": url},
        max_classes=max_classes,
        refuse=refuse,
    )


def no_payload(_: bytes) -> Sequence[Mapping[str, object]]:
    """Return nothing: the cells of these messages came apart."""
    return ()

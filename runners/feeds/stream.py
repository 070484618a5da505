"""Streams of messages as feeds: what all brokers have in common. Each broker adds a `Source`, and no more."""

import math
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field, ValidationError

from runners.feeds import NONE, Capabilities, DeadLetter, Refuse
from runners.feeds.classes import ClassMap
from runners.feeds.decode import RefusedError, assign
from runners.feeds.formats import Cells, as_bytes, present
from runners.feeds.records import Decoder, Records
from streamkd.batch import Batch
from streamkd.errors import ConfigError, FeedError, one_screen
from streamkd.settings import Settings, complaints

PREFETCH = 512
"""Messages that are taken from a source at once: no more than these are held in memory."""
MOST_REFUSED = 1_000
"""Records refused in a row before the feed comes up for air."""
FIRST_LOOK = 100
"""Messages whose keys are the columns."""
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0
"""Seconds between two attempts to reach a source again: twice as long every time, up to the longest."""
Start = Literal["earliest", "latest"]
Place = Mapping[str, Any]


class UnreachableError(Exception):
    """The source cannot be reached; it may come back."""


class PositionLostError(Exception):
    """The source no longer has what comes after a place.

    Args:
        reason: one of `runners.feeds.RESETS`.
        detail: what is gone.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        payload: its bytes, or its cells, where the source keeps them apart.
        place: where the source stands after it.
        about: what tells it from others, for the dead letters.
        time: when the source took it in, in seconds since the epoch; NaN where it does not tell.
    """

    payload: bytes | Cells
    place: Place
    about: Mapping[str, Any]
    time: float = math.nan


class Source(Protocol):
    """What is particular about a broker."""

    capabilities: Capabilities

    @property
    def lag(self) -> Mapping[str, int]:
        """Messages that wait, by partition, as of the last read or later."""

    @property
    def ended(self) -> bool:
        """Whether all there will ever be was read."""

    def open(self, place: Place | None, start: Start) -> Place:
        """Connect, and stand after `place`; without one, at one end. Called again after a loss; return the place.

        Raises:
            UnreachableError: the source cannot be reached.
            PositionLostError: it has not what comes after `place`.
        """

    def peek(self, most: int) -> Sequence[Cells | bytes]:
        """Return the payloads of up to `most` messages, the oldest there are, and take none.

        Raises:
            UnreachableError: the source cannot be reached.
        """

    def read(self, most: int) -> Sequence[Message]:
        """Return up to `most` messages, in order; none only where there are none now.

        Raises:
            UnreachableError: the source cannot be reached.
            PositionLostError: it has lost what comes next.
        """

    def commit(self, place: Place) -> None:
        """Tell the source that everything up to `place` is safe.

        Raises:
            UnreachableError: it cannot be told.
        """

    def close(self) -> None:
        """Let go."""


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int) else value


def _list(value: Any) -> Any:
    return [value] if isinstance(value, (str, int)) else value


Name = Annotated[str, BeforeValidator(_text)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_list)]


class Reading(Settings):
    """How records are read from a stream: the settings that all such feeds have.

    Attributes:
        label: column with the label; empty: records come without.
        id: column with the record's name, by which its label can come later.
        time: column that tells when the record came to be; empty: the source's own time, where it has one.
        columns: all columns, in order; left out, they are the keys of the first records.
        categorical, ignore, buckets, missing, shape, classes: as for files.
        start: where to begin without a checkpoint.
        on_position_lost: what to do where the source no longer has the checkpoint's position.
        follow: wait for more at the end; false: end there.
        wait_seconds: for a first record, where `columns` are left out.
        labels_only: the records are labels of another feed's.
        learned: columns of the checkpoint from which the process goes on; it tells them, and the user need not.
    """

    label: Name
    id: Name = ""
    time: Name = ""
    columns: Names = ()
    categorical: Names = ()
    ignore: Names = ()
    buckets: Annotated[int, Field(ge=2, le=65_536)] = 16
    missing: Names = ("",)
    shape: tuple[Annotated[int, Field(ge=1)], ...] = ()
    classes: Names = ()
    start: Start = "earliest"
    on_position_lost: Literal["fail", "earliest", "latest"] = "fail"
    follow: bool = True
    wait_seconds: Annotated[float, Field(ge=0)] = 10.0
    labels_only: bool = False
    learned: Names = ()

    @property
    def known(self) -> Names:
        """All columns, where the stream need not be looked at for them."""
        given = self.columns or (self.learned and (*self.learned, *self.categorical, *self.ignore))
        if not given and not self.labels_only:
            return ()
        return tuple(dict.fromkeys([*given, *filter(None, (self.label, self.id, self.time))]))


ASSIGNED = {"id", "time", "label", "categorical", "ignore", "buckets", "missing", "labels_only"}
"""Of these settings, those that say what each column is for."""


class StreamFeed:
    """The records of a source, in order; made by `open_stream`.

    A source that goes away is tried again, and nothing is held against it but `failures`.
    """

    def __init__(
        self,
        source: Source,
        decode: Callable[[bytes], Sequence[Cells]],
        decoder: Decoder,
        reading: Reading,
        *,
        place: Place,
        about: Mapping[str, str],
        refuse: Refuse,
    ) -> None:
        self.name = about["kind"]
        self.shape = decoder.shape
        self.capabilities = source.capabilities
        self.connected = True
        self.resets: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self._source, self._decode, self._decoder, self._reading = source, decode, decoder, reading
        self._about, self._refuse = about, refuse
        self._records = 0
        self._wait, self._next_try = FIRST_WAIT, 0.0
        self._trouble = ""
        self._uncommitted: Place | None = None
        self._stand(place)

    def _stand(self, place: Place, row: int = 0) -> None:
        """Go on after a place, and after `row` records of the message that follows it."""
        self._place = self._read_to = place
        self._row = row
        self._queue: deque[Message] = deque()
        self._message: Message | None = None
        self._cells: Sequence[Cells] = ()

    def poll(self, records: int) -> Batch | None:
        """Return the next usable records, up to `records`; none, where there are none now; None at the end."""
        found: list[Records] = []
        refused = 0
        while len(found) < records and refused < MOST_REFUSED and (read := self._next()) is not None:
            if isinstance(read, DeadLetter):
                self._refuse(read)
                refused += 1
            else:
                found.append(read)
        if not found and not refused and self.connected and (self._source.ended or not self._reading.follow):
            return None
        self._records += len(found)
        return self._decoder.batch(found, self.position())

    def position(self) -> dict[str, Any]:
        """Return where the next record is, and the classes met before it."""
        return {"place": dict(self._place), "row": self._row, "records": self._records, **self._decoder.state()}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on where `position` was taken.

        Raises:
            CheckpointError: columns or classes are not those that were being learned.
            FeedError: the source cannot be reached, or has lost the position and `on_position_lost` is `fail`.
        """
        self._decoder.restore(position)
        self._records = position["records"]
        try:
            self._stand(self._source.open(position["place"], self._reading.start), position["row"])
        except PositionLostError as lost:
            self._reset(lost)
        except UnreachableError as error:
            raise unreachable(*_address(self._about), str(error)) from error

    def adopt(self, classes: Sequence[str]) -> None:
        """Number these labels first.

        Raises:
            CheckpointError: all labels are given, and are others.
        """
        self._decoder.classes.restore(classes)

    def progress(self) -> float | None:
        """Return None: a stream has no end."""
        return None

    def lag(self) -> Mapping[str, int]:
        """Return how many messages wait, by partition; those taken from the source and not yet given included."""
        if not self._source.lag:
            return NONE
        first, *_ = self._source.lag
        return {**self._source.lag, first: self._source.lag[first] + len(self._queue)}

    def commit(self, position: Mapping[str, Any]) -> None:
        """Tell the source; where it cannot be reached, tell it later."""
        self._uncommitted = position["place"]
        self._tell()

    def _tell(self) -> None:
        if self._uncommitted is None or not self.connected:
            return
        try:
            self._source.commit(self._uncommitted)
            self._uncommitted = None
        except UnreachableError as error:
            self._lose_touch("commit", error)

    def describe(self) -> dict[str, Any]:
        """Return the stream, its columns, what is known of the labels, and why it cannot be read, if it cannot."""
        trouble = {} if self.connected else {"trouble": self._trouble}
        return {**self._about, "waiting": sum(self.lag().values()), **self._decoder.describe(), **trouble}

    def close(self) -> None:
        """Let go of the source."""
        self._source.close()

    def _next(self) -> Records | DeadLetter | None:
        """Take one record, or say why it cannot be used; None where there is none now."""
        while self._message is None:
            message = self._take()
            if message is None:
                return None
            try:
                rows = [message.payload] if isinstance(message.payload, Mapping) else self._decode(message.payload)
            except RefusedError as error:
                self._place, self._row = message.place, 0
                return _letter(error, _raw(message), message)
            if self._row < len(rows):
                self._message, self._cells = message, rows
            else:
                self._place, self._row = message.place, 0
        message, cells = self._message, self._cells[self._row]
        raw = _raw(message) if len(self._cells) == 1 else as_bytes(cells)
        self._row += 1
        if self._row == len(self._cells):
            self._place, self._row, self._message = message.place, 0, None
        try:
            return self._decoder.record(cells, raw, sent=message.time)
        except RefusedError as error:
            return _letter(error, raw, message)

    def _take(self) -> Message | None:
        if not self._queue:
            self._queue.extend(self._read())
        return self._queue.popleft() if self._queue else None

    def _read(self) -> Sequence[Message]:
        if not self.connected and time.monotonic() < self._next_try:
            return ()
        try:
            if not self.connected:
                self._source.open(self._read_to, self._reading.start)
            messages = self._source.read(PREFETCH)
        except UnreachableError as error:
            self._lose_touch("read", error)
            return ()
        except PositionLostError as lost:
            self._reset(lost)
            return ()
        self.connected, self._wait = True, FIRST_WAIT
        self._tell()
        if messages:
            self._read_to = messages[-1].place
        return messages

    def _lose_touch(self, stage: str, error: UnreachableError) -> None:
        self.failures[stage] += 1
        self._trouble = str(error)
        self.connected = False
        self._next_try = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def _reset(self, lost: PositionLostError) -> None:
        """Go on from one end, as the user chose, or not at all."""
        policy = self._reading.on_position_lost
        where = f"feed.{self._about['key']} = {self._about['stream']!r}"
        if policy == "fail":
            raise FeedError(
                f"{where}: {lost}; to go on without, set feed.on_position_lost = 'earliest' (from the oldest that is "
                "still there) or 'latest' (from what comes next); to start afresh, name another checkpoint.directory"
            ) from lost
        self.resets[lost.reason] += 1
        try:
            self._stand(self._source.open(None, policy))
        except UnreachableError as error:
            self._lose_touch("read", error)


def _raw(message: Message) -> bytes:
    return message.payload if isinstance(message.payload, bytes) else as_bytes(message.payload)


def _letter(error: RefusedError, raw: bytes, message: Message) -> DeadLetter:
    return DeadLetter(error.reason, error.detail, raw, message.about)


REFUSED = re.compile("authenticat|authoriz|wrongpass|noauth|password", re.IGNORECASE)
"""How brokers say that they let somebody not in."""


def _address(about: Mapping[str, str]) -> tuple[str, str]:
    """Return the setting that tells where a source is, and its value."""
    return f"feed.{about['address']}", about["at"]


def unreachable(key: str, value: str, why: str) -> FeedError:
    """Return what is said of a source or a sink that cannot be reached at start, and what helps."""
    helps = "start it, or name another"
    if "ssl.ca.location" in why:
        client = f"{key.rpartition('.')[0]}.client"
        helps = f"""set {client} = {{ "ssl.ca.location" = "FILE" }}, with the authority's certificate"""
    elif "certificate verify failed" in why:
        helps = "set SSL_CERT_FILE to a file with the authority's certificate, and name the server as its own does"
    elif REFUSED.search(why):
        helps = "check the user, and the password in the environment variable that password_env names"
    return FeedError(f"{key} = {value!r}: cannot be reached ({why}); {helps}")


def reading(options: Mapping[str, Any]) -> Reading:
    """Check the settings that all streams have.

    Raises:
        ConfigError: one is missing, misspelt or out of range.
    """
    try:
        return Reading.model_validate(options)
    except ValidationError as error:
        raise ConfigError(one_screen(complaints(error, "feed", Reading))) from None


def open_stream(
    source: Source,
    decode: Callable[[bytes], Sequence[Cells]],
    settings: Reading,
    *,
    about: Mapping[str, str],
    max_classes: int,
    refuse: Refuse,
) -> StreamFeed:
    """Connect, find out the columns, and give the source's records as a feed.

    Args:
        source: not yet opened.
        decode: takes payloads apart.
        settings: checked already.
        about: `kind`, the setting `key` that names the `stream`, and the one that is its `address`, which is `at`.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be used.

    Raises:
        FeedError: the source cannot be reached, or no record came in time.
        ConfigError: a column is not there.
    """
    with ExitStack() as unless_it_fits:
        unless_it_fits.callback(source.close)
        try:
            place = source.open(None, settings.start)
            first = [] if settings.known else _look(source, settings.wait_seconds)
        except UnreachableError as error:
            raise unreachable(*_address(about), str(error)) from error
        columns = assign(
            _columns(first, decode, settings, about),
            where=about["stream"],
            key=about["key"],
            **settings.model_dump(
                include=ASSIGNED,
            ),
        )
        where = f"feed.{about['key']} = {about['stream']!r}"
        decoder = Decoder(columns, ClassMap(max_classes, settings.classes), shape=settings.shape, where=where)
        made = StreamFeed(source, decode, decoder, settings, place=place, about=about, refuse=refuse)
        unless_it_fits.pop_all()
        return made


def _look(source: Source, seconds: float) -> Sequence[Cells | bytes]:
    """Wait for the first messages."""
    patience = time.monotonic() + seconds
    while not (first := source.peek(FIRST_LOOK)) and time.monotonic() < patience:
        time.sleep(0.05)
    return first


def _columns(
    first: Sequence[Cells | bytes],
    decode: Callable[[bytes], Sequence[Cells]],
    settings: Reading,
    about: Mapping[str, str],
) -> list[str]:
    if settings.known:
        return list(settings.known)
    where = f"feed.{about['key']} = {about['stream']!r}"
    if not first:
        raise FeedError(
            f"{where}: no record in {settings.wait_seconds:g} s; publish one, or name all columns in feed.columns"
        )
    rows: list[Cells] = []
    complaint = ""
    for payload in first:
        try:
            rows += [payload] if isinstance(payload, Mapping) else decode(payload)
        except RefusedError as error:
            complaint = complaint or str(error)
    if not rows:
        raise ConfigError(
            f"{where}: none of its first {len(first)} messages can be used; the first: {complaint}. Set feed.format"
        )
    return present(iter(rows))

"""Batches decoded on a thread of their own, ahead of the learning, and no more of them than may wait."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from threading import Condition, Thread
from typing import Any

from runners.feeds import DeadLetter, Feed, Refuse
from streamkd.batch import Batch

SECONDS = 5.0
"""That a poll under way is waited for when the feed is closed."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a feed told of itself after a poll."""

    connected: bool
    resets: Mapping[str, int]
    failures: Mapping[str, int]
    lag: Mapping[str, int]
    progress: float | None
    description: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Polled:
    """What came of a poll: records refused, and a batch, the end or an error; and how the feed then stood.

    Attributes:
        idle: whether nothing at all came.
    """

    batch: Batch | None
    refused: Sequence[DeadLetter]
    told: Told | None = None
    error: BaseException | None = None
    idle: bool = False


class Ahead:
    """A feed that decodes while its batches are learned, up to `most` of them ahead.

    Whoever polls it finds what an unwrapped feed would give, in the same order: records refused reach the dead letters
    with the batch that they were read for, an error comes after the batches before it, and what the feed tells of
    itself is what it told when it gave the batch that was taken last. So `lag` counts what waits here, too, and what
    was decoded and never taken leaves no trace: it is read again after the position of what was.

    Only one thread at a time is inside the feed. The number of records asked for holds for what is decoded from then
    on; batches that wait already are of the number before.

    Args:
        open_feed: opens the feed, given what takes its refused records.
        refuse: takes them in the end.
        most: batches that may wait, at least 1.
        pinned: whether their `x` lies in memory from which a GPU copies by itself.
    """

    def __init__(self, open_feed: Callable[[Refuse], Feed], refuse: Refuse, most: int, *, pinned: bool = False) -> None:
        self._refuse, self._most, self._pinned = refuse, most, pinned
        self._refused: list[DeadLetter] = []
        self._feed = open_feed(self._keep)
        self.name = self._feed.name
        self.shape = self._feed.shape
        self.capabilities = self._feed.capabilities
        self._changed = Condition()
        self._waiting: deque[Polled] = deque()
        self._records = 0
        self._thread: Thread | None = None
        self._inside = self._idle = False  # the thread is in the feed; it found nothing there since the last take
        self._wanted = self._ending = self._left = False  # it is to keep out; to end; and to close the feed then
        self._told: Told | None = None

    def _keep(self, letter: DeadLetter) -> None:
        self._refused.append(letter)

    def poll(self, records: int) -> Batch | None:
        """Return what the feed gave next; wait for it no longer than the feed does."""
        with self._changed:
            self._records = records
            if self._thread is None:
                self._thread = Thread(target=self._decode, name="decoding", daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: self._waiting)
            polled = self._waiting.popleft()
            self._idle = False
            self._changed.notify_all()
        if polled.batch is None:  # the last one of this thread
            self._halt()
        self._told = polled.told or self._told
        for letter in polled.refused:
            self._refuse(letter)
        if polled.error is not None:
            raise polled.error
        return polled.batch

    def _decode(self) -> None:
        """Poll the feed whenever there is room, up to its end or an error."""
        place: Mapping[str, Any] | None = None
        while self._enter():
            polled = self._polled(place)
            with self._changed:
                self._inside = False
                self._idle = polled.idle
                if not polled.idle or not self._waiting:  # else there is better to be taken
                    self._waiting.append(polled)
                self._changed.notify_all()
            if polled.batch is None:
                break
            place = polled.batch.position
        if self._left:
            with suppress(Exception):  # nobody is there to be told
                self._feed.close()

    def _enter(self) -> bool:
        """Wait until the feed may be polled; say whether it ever may."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ending or not (self._wanted or self._idle or len(self._waiting) >= self._most)
            )
            self._inside = not self._ending
            return self._inside

    def _polled(self, place: Mapping[str, Any] | None) -> Polled:
        """Poll the feed, which stands at `place`, as far as that is known."""
        batch, told, error = None, None, None
        try:
            batch = self._feed.poll(self._records)
            told = self._look()
            if batch is not None and self._pinned:
                batch = replace(batch, x=batch.x.pin_memory())
        except BaseException as caught:  # noqa: BLE001 - it is raised where the batch would have been taken
            batch, error = None, caught
        refused, self._refused = self._refused, []
        idle = batch is not None and not (len(batch) or batch.late or refused) and batch.position == place
        return Polled(batch, refused, told, error, idle)

    def _look(self) -> Told:
        feed = self._feed
        counts = dict(feed.resets), dict(feed.failures), dict(feed.lag())
        return Told(feed.connected, *counts, feed.progress(), dict(feed.describe()))

    @property
    def _standing(self) -> Told:
        """How the feed stood after what was taken last; before anything is, how it stands."""
        return self._told or self._look()

    @property
    def connected(self) -> bool:
        """Whether the source could be read."""
        return self._standing.connected

    @property
    def resets(self) -> Mapping[str, int]:
        """How often its position was lost."""
        return self._standing.resets

    @property
    def failures(self) -> Mapping[str, int]:
        """How often the source failed."""
        return self._standing.failures

    def lag(self) -> Mapping[str, int]:
        """Return how many records waited in the source after those that were taken; decoded or not."""
        return self._standing.lag

    def progress(self) -> float | None:
        """Return how much of the feed was taken."""
        return self._standing.progress

    def describe(self) -> Mapping[str, Any]:
        """Return what the feed told of itself."""
        return self._standing.description

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on after the batch that carried `position`; what was decoded ahead is dropped."""
        self._halt()
        self._waiting.clear()
        self._told = None
        self._feed.seek(position)

    def adopt(self, classes: Sequence[str]) -> None:
        """Number these labels first."""
        with self._alone():
            self._feed.adopt(classes)

    def commit(self, position: Mapping[str, Any]) -> None:
        """Tell the source, after the poll that is under way."""
        with self._alone():
            self._feed.commit(position)

    def close(self) -> None:
        """Let go of the source; if a poll does not come back in time, its thread does so when it does."""
        self._halt(SECONDS)
        with self._changed:
            self._left = self._inside
        if not self._left:
            self._feed.close()

    def _halt(self, seconds: float | None = None) -> None:
        """End the thread after the poll that is under way, and wait for that, at most so long."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return
        self._thread = None
        self._ending = self._idle = False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the thread out of the feed."""
        with self._changed:
            self._wanted = True
            try:
                self._changed.wait_for(lambda: not self._inside)
                yield
            finally:
                self._wanted = False
                self._changed.notify_all()

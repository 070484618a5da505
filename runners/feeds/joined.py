"""Labels that come on a feed of their own, joined to their records by id."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from runners.feeds import DeadLetter, Feed, Refuse
from streamkd.batch import UNLABELLED, Batch

HORIZON = 10
"""Times `capacity`: the records after which a label is given up whose own has not come."""


NOTHING = Batch(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64))


class Joined:
    """Records from one feed, their labels from another; either may run ahead.

    A label that comes before its record waits for it; it is given with a later batch than the record, as an answer
    comes after its question. When as many wait as may, no more labels are read until records have come for some; those
    for which none came within `HORIZON` times as many records go to the dead letters.

    Args:
        feed: the records, with ids.
        labels: the labels, with ids; records of no features.
        capacity: records that may wait for their labels, and labels for their records.
        seconds: after which a record is given up; 0: never.
        clock: reads seconds since the epoch.
        refuse: takes the labels whose records never came.
    """

    def __init__(
        self, feed: Feed, labels: Feed, *, capacity: int, seconds: float, clock: Callable[[], float], refuse: Refuse
    ) -> None:
        self.name = feed.name
        self.shape = feed.shape
        # Together they promise what the weaker one does.
        self.capabilities = min(
            feed.capabilities, labels.capabilities, key=lambda one: (one.replayable, one.promise == "effectively once")
        )
        self._feed, self._labels = feed, labels
        self._capacity, self._seconds, self._clock, self._refuse = capacity, seconds, clock, refuse
        self._waiting: OrderedDict[str, float] = OrderedDict()
        self._early: OrderedDict[str, tuple[int, int]] = OrderedDict()  # id -> label, records asked when it came
        self._asked = 0
        self._due: list[str] = []
        self._places: dict[str, Mapping[str, Any]] = {"feed": {}, "labels": {}}

    def poll(self, records: int) -> Batch | None:
        """Return the next records without labels, and the labels that have come for earlier ones."""
        late = {name: self._early.pop(name)[0] for name in self._due}
        batch = self._feed.poll(records)
        ended = batch is None
        full = not ended and len(self._early) >= self._capacity
        answers = NOTHING if full else self._labels.poll(2 * records)  # so that labels catch up
        if batch is None and answers is None and not late:
            return None
        if answers is not None and answers is not NOTHING:
            self._places["labels"] = answers.position
            self._hear(answers, late)
        for name in late:
            self._waiting.pop(name, None)
        late |= dict.fromkeys(self._given_up(), UNLABELLED)
        asked = batch.ids if batch is not None else ()
        if batch is not None:
            self._places["feed"] = batch.position
        self._ask(asked)
        self._give_up_labels(oldest=math.inf if ended else self._asked - HORIZON * self._capacity)
        return Batch(
            batch.x if batch is not None else torch.zeros(0, *self.shape),
            torch.full((len(asked),), UNLABELLED),
            ids=asked,
            late=late,
            position=self.position(),
            raw=batch.raw if batch is not None else (),
            times=batch.times if batch is not None else (),
        )

    def _hear(self, answers: Batch, late: dict[str, int]) -> None:
        for name, y in zip(answers.ids, answers.y.tolist(), strict=True):
            if y != UNLABELLED and name in self._waiting:
                late[name] = y
            elif y != UNLABELLED:
                self._early[name] = (y, self._asked)

    def _given_up(self) -> list[str]:
        """Return the records that have waited for too long, and forget them."""
        given_up: list[str] = []
        oldest = self._clock() - self._seconds
        while self._seconds and self._waiting and next(iter(self._waiting.values())) < oldest:
            given_up.append(self._waiting.popitem(last=False)[0])
        return given_up

    def _ask(self, names: tuple[str, ...]) -> None:
        self._due = [name for name in dict.fromkeys(names) if name in self._early]
        now = self._clock() if self._seconds else 0.0
        self._waiting.update(dict.fromkeys(names, now))
        while len(self._waiting) > self._capacity:
            self._waiting.popitem(last=False)  # as the engine gives it up, and counts it
        self._asked += len(names)

    def _give_up_labels(self, oldest: float) -> None:
        """Refuse labels that came before so many records had been asked, and whose own has not come since."""
        while self._early:
            name, (y, came) = next(iter(self._early.items()))
            if name in self._due or came >= oldest:
                return
            del self._early[name]
            detail = f"a label for {name!r}, a record that never came"
            self._refuse(DeadLetter("no_record", detail, name.encode(), {"id": name, "class": y}))

    def position(self) -> dict[str, Any]:
        """Return the positions of both feeds, and what waits on either side."""
        return {
            **{name: dict(place) for name, place in self._places.items()},
            "waiting": list(self._waiting.items()),
            "early": [[name, *early] for name, early in self._early.items()],
            "asked": self._asked,
            "due": list(self._due),
        }

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on after the batch that carried `position`."""
        self._places = {name: position[name] for name in ("feed", "labels")}
        for feed, place in ((self._feed, position["feed"]), (self._labels, position["labels"])):
            if place:
                feed.seek(place)
        self._waiting = OrderedDict(position["waiting"])
        self._early = OrderedDict((name, (y, came)) for name, y, came in position["early"])
        self._asked = position["asked"]
        self._due = list(position["due"])

    def adopt(self, classes: Sequence[str]) -> None:
        """Number these labels first."""
        self._labels.adopt(classes)

    @property
    def connected(self) -> bool:
        """Whether both can be read now."""
        return self._feed.connected and self._labels.connected

    @property
    def resets(self) -> Mapping[str, int]:
        """How often either lost its position."""
        return _sum(self._feed.resets, self._labels.resets)

    @property
    def failures(self) -> Mapping[str, int]:
        """How often the source of either failed."""
        return _sum(self._feed.failures, self._labels.failures)

    def lag(self) -> Mapping[str, int]:
        """Return how many records wait in the source, and labels likewise."""
        return {**self._feed.lag(), **{f"labels-{name}": count for name, count in self._labels.lag().items()}}

    def progress(self) -> float | None:
        """Return how much of the records was given."""
        return self._feed.progress()

    def commit(self, position: Mapping[str, Any]) -> None:
        """Tell both."""
        for feed, place in ((self._feed, position["feed"]), (self._labels, position["labels"])):
            if place:
                feed.commit(place)

    def describe(self) -> dict[str, Any]:
        """Return what the feed of the records tells of itself, and the classes that the labels' knows."""
        labels = self._labels.describe()
        return {**self._feed.describe(), "classes": labels.get("classes"), "labels": f"{self._labels.name}, by id"}

    def close(self) -> None:
        """Close both."""
        self._feed.close()
        self._labels.close()


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {*one, *other}}

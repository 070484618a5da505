"""The laws that every feed keeps, for authors of feeds: run them against a real source, as the built-in ones are.

Describe your source as a `Stand`, and call every law of `laws(stand)` with a stand of its own, its source empty:

    @pytest.mark.parametrize("law", LAWS)
    def test_it_keeps(law, my_server):
        law(my_stand(my_server))

Each raises AssertionError with a sentence that says what does not hold.
"""

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from runners.feeds import REASONS, DeadLetter, Feed
from streamkd.batch import Batch
from streamkd.errors import FeedError
from streamkd.testing import check_feed

PATIENCE = 120.0
"""Seconds for what a feed does by itself."""
PROMPT = 20.0
"""Seconds that a poll may take on a busy machine, whatever has become of the source: fewer than stall a daemon."""
CLASSES = "abc"
LAST = 1_999
"""Number of the last record that a feed which is too slow is after."""
AT_ONCE = 7
"""Records that are asked for."""
LEFT = 12_000 - 10 * AT_ONCE
"""Records that wait when ten times as many as are asked for were taken of 12,000."""
MOST_HELD = 6_000_000
"""Bytes that a feed may hold of the 12 MB there are."""
Row = Mapping[str, object]


def _first_column(x: Tensor) -> list[int]:
    return [int(value) for value in x[:, 0]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stand:
    """A source, and what can be done to it.

    Attributes:
        open: opens a feed on it: of label `y` and id `id`, `max_classes` 5. Takes `refuse`, and where the feed has such
            settings `follow` and `on_position_lost`.
        publish: appends records: two numbers `a` and `b`, a label `y`, an `id`, and perhaps others.
        spoil: appends one record that cannot be used.
        stop, start: end the source, as its crash would, and bring it back with all that it had; None: it cannot end.
        forget: takes so many of the oldest records away; None: it keeps all.
        empty: makes another source of the same name, without any record; None: it cannot.
        follows: whether the feed waits at the end for more.
        numbers: reads the number `a` of each record out of its `x`.
    """

    open: Callable[..., Feed]
    publish: Callable[[Sequence[Row]], None]
    spoil: Callable[[], None]
    stop: Callable[[], None] | None = None
    start: Callable[[], None] | None = None
    forget: Callable[[int], None] | None = None
    empty: Callable[[], None] | None = None
    follows: bool = True
    numbers: Callable[[Tensor], list[int]] = _first_column


Law = Callable[[Stand], None]


def rows(begin: int, end: int, **more: object) -> list[Row]:
    """Return numbered records."""
    return [{"a": n, "b": n / 2, "y": CLASSES[n % 3], "id": f"r{n}", **more} for n in range(begin, end)]


def records_come_in_order_and_once(stand: Stand) -> None:
    """Order, once each, with labels and ids."""
    stand.publish(rows(0, 700))
    with _opened(stand, **_ending(stand)) as feed:
        batches = _drained(feed)
        _hold(_numbers(stand, batches) == list(range(700)), "records come in order, each of them once")
        _hold([y for batch in batches for y in batch.y.tolist()] == [n % 3 for n in range(700)], "with their labels")
        _hold([name for batch in batches for name in batch.ids] == [f"r{n}" for n in range(700)], "and with their ids")
        _hold(all(len(batch) == AT_ONCE for batch in batches), "as many as were asked for, while there are so many")
        _hold(not any(feed.lag().values()), "and then none waits")


def from_every_position_come_exactly_the_records_after_it(stand: Stand) -> None:
    """Exact resume, of feeds that are replayable."""
    stand.publish(rows(0, 60))
    with _opened(stand, **_ending(stand)) as feed:
        replayable = feed.capabilities.replayable
    if replayable:
        check_feed(lambda: stand.open(refuse=_nobody, **_ending(stand)))


def what_is_not_committed_comes_again(stand: Stand) -> None:
    """At least once, of feeds that promise it: the source is told by `commit`, and by nothing else."""
    stand.publish(rows(0, 60))
    with _opened(stand) as feed:
        if feed.capabilities.promise != "at least once":
            return
        batches = [_next(feed) for _ in range(4)]
        feed.commit(batches[1].position)
    with _opened(stand) as feed:
        again = _until(feed, 60 - 14)
        _hold(
            sorted(_numbers(stand, again)) == list(range(14, 60)), "all that was not committed comes again, and no more"
        )
        feed.commit(again[-1].position)
    with _opened(stand) as feed:
        _hold(not len(feed.poll(AT_ONCE) or ()), "and what was committed does not")


def a_record_that_cannot_be_used_is_refused_and_the_others_come(stand: Stand) -> None:
    """Poison."""
    stand.publish(rows(0, 5))
    stand.spoil()
    stand.publish(rows(5, 10))
    refused: list[DeadLetter] = []
    with _opened(stand, refuse=refused.append, **_ending(stand)) as feed:
        _hold(_numbers(stand, _drained(feed)) == list(range(10)), "all records but the spoilt one come")
        _hold(len(refused) == 1, "the spoilt one is refused, once")
        _hold(refused[0].reason in REASONS and bool(refused[0].detail), "with a reason")
        _hold(bool(refused[0].raw) and bool(refused[0].place), "with its bytes and its place")


def a_feed_that_has_nothing_waits_and_goes_on(stand: Stand) -> None:
    """Idle."""
    if not stand.follows:
        return
    stand.publish(rows(0, 20))
    with _opened(stand) as feed:
        before = _until(feed, 20)
        began = time.monotonic()
        for _ in range(5):
            batch = feed.poll(AT_ONCE)
            _hold(batch is not None and not len(batch), "where there is nothing yet, a batch is empty")
            _hold(batch is not None and batch.position == before[-1].position, "and the position stays")
        _hold(time.monotonic() - began < 5 * PROMPT, "a poll waits no longer than a moment")
        stand.publish(rows(20, 40))
        _hold(_numbers(stand, _until(feed, 20)) == list(range(20, 40)), "then what was published comes")


def a_source_that_is_down_at_start_is_told(stand: Stand) -> None:
    """Down at start."""
    if stand.stop is None or stand.start is None:
        return
    stand.publish(rows(0, 3))
    stand.stop()
    try:
        with _opened(stand):
            _hold(holds=False, law="a feed whose source is down does not open")
    except FeedError as error:
        _hold("feed." in str(error), f"the error names the setting; it says: {error}")
    finally:
        stand.start()


def a_source_that_goes_away_is_waited_for_and_nothing_is_lost(stand: Stand) -> None:
    """Down in the middle."""
    if stand.stop is None or stand.start is None:
        return
    stand.publish(rows(0, 1_300))
    with _opened(stand) as feed:
        given = [_next(feed)]
        stand.stop()
        feed.commit(given[0].position)  # it raises nothing: the source is told when it is back
        patience = time.monotonic() + PATIENCE
        while (feed.connected or len(given[-1])) and time.monotonic() < patience:
            began = time.monotonic()
            batch = feed.poll(AT_ONCE)
            _hold(batch is not None, "a feed whose source is down is not at its end")
            given += [batch] if batch is not None else []
            _hold(time.monotonic() - began < PROMPT, "a poll returns, though the source is down")
        _hold(not feed.connected, "the feed says that it is not connected")
        _hold(sum(feed.failures.values()) > 0, "and counts the failure")
        stand.start()
        stand.publish(rows(1_300, 1_320))
        given += _until(feed, 1_320 - sum(map(len, given)))
        _hold(feed.connected, "the feed says that it is connected again")
        _hold(_numbers(stand, given) == list(range(1_320)), "and every record has come, once and in order")


def lost_positions_are_dealt_with_as_configured(stand: Stand) -> None:
    """Retention took what comes after the position."""
    if stand.forget is None:
        return
    stand.publish(rows(0, 40))
    with _opened(stand) as feed:
        if not feed.capabilities.replayable:
            return
        position = _next(feed).position
    stand.forget(20)
    _refuses(stand, position)
    with _opened(stand, on_position_lost="earliest") as feed:
        feed.seek(position)
        _hold(_numbers(stand, _until(feed, 20)) == list(range(20, 40)), "earliest: what is still there comes")
        _hold(dict(feed.resets) == {"trimmed": 1}, "and the reset is counted")
    with _opened(stand, on_position_lost="latest") as feed:
        feed.seek(position)
        _hold(not len(feed.poll(AT_ONCE) or ()), "latest: nothing old comes")
        stand.publish(rows(40, 50))
        _hold(_numbers(stand, _until(feed, 10)) == list(range(40, 50)), "and all that is new")
        _hold(dict(feed.resets) == {"trimmed": 1}, "and the reset is counted, likewise")


def records_lost_while_they_are_read_are_noticed(stand: Stand) -> None:
    """Retention overtakes a feed that is too slow."""
    if stand.forget is None:
        return
    stand.publish(rows(0, LAST + 1))
    with _opened(stand, on_position_lost="earliest") as feed:
        batches = [_next(feed)]
        stand.forget(1_500)
        while _numbers(stand, batches[-1:])[-1] < LAST:
            batches.append(_next(feed))
        numbers = _numbers(stand, batches)
        _hold(numbers == sorted(set(numbers)) and set(range(1_500, LAST)) <= set(numbers), "what is left comes")
        _hold(dict(feed.resets) == {"trimmed": 1}, "and what is gone is counted as a reset")


def another_source_of_the_same_name_is_told_from_the_first(stand: Stand) -> None:
    """The position is of a source that was made anew."""
    if stand.empty is None:
        return
    stand.publish(rows(0, 40))
    with _opened(stand) as feed:
        if not feed.capabilities.replayable:
            return
        position = _until(feed, 40)[-1].position
    stand.empty()
    stand.publish(rows(100, 110))
    _refuses(stand, position)
    with _opened(stand, on_position_lost="earliest") as feed:
        feed.seek(position)
        _hold(
            _numbers(stand, _until(feed, 10)) == list(range(100, 110)),
            "earliest: the new source is read from its start",
        )
        _hold(dict(feed.resets) == {"recreated": 1}, "and the reset is counted")


def a_feed_takes_no_more_than_it_can_hold(stand: Stand) -> None:
    """Back-pressure: what nobody asked for yet stays in the source."""
    filler = "x" * 1_000
    for begin in range(0, LEFT, 1_000):
        stand.publish(rows(begin, begin + 1_000, filler=filler))
    tracemalloc.start()
    try:
        with _opened(stand, ignore=("filler",)) as feed:
            for _ in range(10):
                _next(feed)
            held, _ = tracemalloc.get_traced_memory()
            lag, patience = feed.lag(), time.monotonic() + PATIENCE
            while lag and sum(lag.values()) != LEFT and time.monotonic() < patience:  # it may be under way still
                time.sleep(0.05)
                lag = feed.lag()
    finally:
        tracemalloc.stop()
    _hold(held < MOST_HELD, f"of 12 MB published and 70 records taken, {held / 1e6:.1f} MB are in memory")
    _hold(not lag or sum(lag.values()) == LEFT, f"and lag tells what waits; it tells {lag}")


def closing_leaves_nothing_behind(stand: Stand) -> None:
    """Clean close."""
    stand.publish(rows(0, 20))
    before = set(threading.enumerate())
    feed = stand.open(refuse=_nobody)
    _next(feed)
    feed.close()
    feed.close()
    left = set(threading.enumerate()) - before
    _hold(not left, f"no thread outlives the feed; there are {sorted(thread.name for thread in left)}")


LAWS: tuple[Law, ...] = (
    records_come_in_order_and_once,
    from_every_position_come_exactly_the_records_after_it,
    what_is_not_committed_comes_again,
    a_record_that_cannot_be_used_is_refused_and_the_others_come,
    a_feed_that_has_nothing_waits_and_goes_on,
    a_source_that_is_down_at_start_is_told,
    a_source_that_goes_away_is_waited_for_and_nothing_is_lost,
    lost_positions_are_dealt_with_as_configured,
    records_lost_while_they_are_read_are_noticed,
    another_source_of_the_same_name_is_told_from_the_first,
    a_feed_takes_no_more_than_it_can_hold,
    closing_leaves_nothing_behind,
)
"""All of them; one that asks for what a source cannot do holds of it."""


def _nobody(letter: DeadLetter) -> None:
    raise AssertionError(f"does not hold: no good record is refused; one was, for {letter.detail}")


@contextmanager
def _opened(stand: Stand, **options: Any) -> Iterator[Feed]:
    feed = stand.open(**{"refuse": _nobody, **options})
    try:
        yield feed
    finally:
        feed.close()


def _ending(stand: Stand) -> dict[str, bool]:
    return {"follow": False} if stand.follows else {}


def _refuses(stand: Stand, position: Mapping[str, Any]) -> None:
    try:
        with _opened(stand) as feed:
            feed.seek(position)
            feed.poll(AT_ONCE)
    except FeedError as error:
        _hold("feed.on_position_lost" in str(error), f"fail: the error names the remedy; it says: {error}")
    else:
        _hold(holds=False, law="fail, the default: a position that is lost is told")


def _drained(feed: Feed) -> list[Batch]:
    batches = []
    while (batch := feed.poll(AT_ONCE)) is not None:
        batches += [batch] if len(batch) else []
    return batches


def _next(feed: Feed) -> Batch:
    """Return the next batch that has records."""
    return _until(feed, 1)[0]


def _until(feed: Feed, records: int) -> list[Batch]:
    """Return batches that have so many records together, waiting for them."""
    batches: list[Batch] = []
    patience = time.monotonic() + PATIENCE
    while sum(map(len, batches)) < records:
        batch = feed.poll(AT_ONCE)
        if batch is not None and len(batch):
            batches.append(batch)
            continue
        _hold(
            batch is not None and time.monotonic() < patience,
            f"{records} records come; {sum(map(len, batches))} did",
        )
        time.sleep(0.01)
    return batches


def _numbers(stand: Stand, batches: Sequence[Batch]) -> list[int]:
    return [number for batch in batches for number in stand.numbers(batch.x)]


def _hold(holds: bool, law: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise AssertionError(f"does not hold: {law}")

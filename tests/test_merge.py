"""Messages of several partitions come in one order, however they arrive."""

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from runners.feeds.merge import Merge


@dataclass(frozen=True)
class Sent:
    """A message as Kafka's client gives it."""

    of: int
    number: int
    at: int

    def partition(self) -> int:
        """Return its partition."""
        return self.of

    def offset(self) -> int:
        """Return its offset there."""
        return self.number

    def timestamp(self) -> tuple[int, int]:
        """Return the kind of its time stamp, and the stamp."""
        return (1, self.at)


STAMPS = st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=4)


def arriving(stamps: Sequence[Sequence[int]], order: Sequence[int], most: int) -> list[Sent]:
    """Return what a merge gives while partitions are read in some order, each to its end."""
    merge = Merge(dict.fromkeys(range(len(stamps)), 0))
    left = [[Sent(of, number, at) for number, at in enumerate(some)] for of, some in enumerate(stamps)]
    taken: list[Sent] = []
    for turn in [*order, *list(range(len(stamps))) * 9]:
        partition = turn % len(stamps)
        if left[partition]:
            merge.add(left[partition].pop(0))
        else:
            merge.end(partition)
        while found := merge.take(most):
            taken += found
    assert merge.drained
    assert merge.offsets == {of: len(some) for of, some in enumerate(stamps)}
    return taken


@given(STAMPS, st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_the_order_does_not_depend_on_which_partition_was_read_first(
    stamps: list[list[int]], order: list[int], most: int
) -> None:
    taken = arriving(stamps, order, most)
    assert taken == arriving(stamps, (), 99)
    for partition, some in enumerate(stamps):
        assert [one.offset() for one in taken if one.partition() == partition] == list(range(len(some)))


@given(st.lists(st.lists(st.integers(0, 9), max_size=8).map(sorted), min_size=1, max_size=4))
def test_where_each_partition_is_in_order_all_are(stamps: list[list[int]]) -> None:
    given_ = [one.at for one in arriving(stamps, (), 99)]
    assert given_ == sorted(given_)


def test_nothing_is_given_before_it_is_known_what_comes_first() -> None:
    merge = Merge({0: 0, 1: 0})
    merge.add(Sent(0, 0, 5))
    assert merge.take(9) == []
    assert not merge.ready
    merge.add(Sent(1, 0, 3))
    assert [one.of for one in merge.take(9)] == [1]
    merge.end(1)
    assert [one.of for one in merge.take(9)] == [0]
    assert not merge.drained
    merge.end(0)
    assert merge.drained

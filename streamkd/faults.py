"""Which examples of a lesson are at fault when an update breaks down."""

from collections.abc import Callable, Sequence

import torch

from streamkd.lesson import Lesson


def at_fault(lesson: Lesson, peers: Sequence[int], broken: Callable[[Lesson, int], bool]) -> list[int]:
    """Find, by bisection, the examples on which alone an update is not finite.

    A peer that breaks down on every one of them, and on an example of zeros, around which all inputs are scaled,
    has itself to blame.

    Args:
        lesson: what an update was not finite on.
        peers: for which it was not.
        broken: tells whether the update of a peer on a part of the lesson is not finite.
    """

    def search(rows: list[int], peer: int) -> list[int]:
        if not broken(lesson.rows(rows), peer):
            return []
        half = len(rows) // 2
        return rows if len(rows) == 1 else search(rows[:half], peer) + search(rows[half:], peer)

    neutral = Lesson(torch.zeros_like(lesson.x[:1]), lesson.y[:1], torch.ones_like(lesson.weights[:1]))
    everything = list(range(len(lesson)))
    faulty: set[int] = set()
    for peer in peers:
        found = search(everything, peer)
        if len(found) < len(lesson) or not broken(neutral, peer):
            faulty |= set(found)
    return sorted(faulty)

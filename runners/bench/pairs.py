"""Things timed beside one another, in turn, so that a machine's moods fall on them alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any


@dataclass(frozen=True, slots=True)
class Ratio:
    """How long one thing takes over another: the median of the rounds, and the quarter of them below and above."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def in_turn(runs: Mapping[str, Callable[[], Any]], *, rounds: int, each: int, warm_up: int) -> dict[str, list[float]]:
    """Time every run `each` times a round, one run after the other; return seconds a call, a value a round.

    Args:
        runs: by name.
        rounds: how often it is each one's turn.
        each: calls a turn.
        warm_up: calls of each before the first round.
    """
    for call in runs.values():
        for _ in range(warm_up):
            call()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, call in runs.items():
            began = time.perf_counter()
            for _ in range(each):
                call()
            taken[name].append((time.perf_counter() - began) / each)
    return taken


def ratio(over: list[float], under: list[float]) -> Ratio:
    """Divide round by round."""
    values = [one / other for one, other in zip(over, under, strict=True)]
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4)
    return Ratio(median(values), low, high)

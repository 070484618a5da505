"""`streamkd bench replay`: what a memory of a million costs over one of a thousand."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from runners.bench.pairs import in_turn, ratio
from runners.bench.rivals import made as machine
from runners.eval_command import check_targets, write_json
from streamkd import ReplayBuffer

CAPACITIES = (1_000, 10_000, 100_000, 1_000_000)
DRAWN = 64
FEATURES = 32
AT_ONCE = 50_000


def main(*, rounds: int, json_to: str | None) -> None:
    """Time a draw and the new priorities after it in full memories of several sizes, and print the ratios."""
    check_targets(json_to)
    console = Console(stderr=json_to == "-")
    runs = {str(capacity): rehearsing(filled(capacity)) for capacity in CAPACITIES}
    taken = in_turn(runs, rounds=rounds, each=100, warm_up=100)
    made = Table("capacity", f"sample and update of {DRAWN}", f"over {CAPACITIES[0]:,}", box=None, pad_edge=False)
    said = {}
    for capacity in CAPACITIES:
        grown, seconds = ratio(taken[str(capacity)], taken[str(CAPACITIES[0])]), median(taken[str(capacity)])
        made.add_row(f"{capacity:,}", f"{1e6 * seconds:.0f} us", str(grown))
        said[str(capacity)] = {"seconds": seconds, "over_smallest": grown.median}
    console.print(made)
    console.print(f"medians of {rounds} rounds, each in turn; in brackets a quarter of them below, above")
    if json_to is not None:
        write_json(
            json_to,
            {
                "made": machine(),
                "ratio": said[str(CAPACITIES[-1])]["over_smallest"],
                "capacities": said,
                "rounds": rounds,
            },
        )


def filled(capacity: int) -> ReplayBuffer:
    """Fill a memory with made-up records, each of a priority of its own."""
    chance = torch.Generator().manual_seed(0)
    made = ReplayBuffer(capacity)
    for start in range(0, capacity, AT_ONCE):
        n = min(AT_ONCE, capacity - start)
        made.add(torch.randn(n, FEATURES, generator=chance), torch.zeros(n, dtype=torch.int64))
    made.update(torch.arange(capacity), torch.rand(capacity, generator=chance))
    return made


def rehearsing(memory: ReplayBuffer) -> Callable[[], Any]:
    """Return what draws once, and gives what was drawn the priorities of new losses."""
    losses = torch.rand(DRAWN, generator=torch.Generator().manual_seed(1))
    return lambda: memory.update(memory.sample(DRAWN).slots, losses)

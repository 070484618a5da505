"""`streamkd bench scale`: what more peers of one shape cost, together and one by one."""

from statistics import median

from rich.console import Console
from rich.table import Table

from runners.bench.overhead import FEATURES, engine, stepping, table
from runners.bench.pairs import in_turn, ratio
from runners.bench.rivals import made as machine
from runners.eval_command import check_targets, write_json
from streamkd import Engine
from streamkd.stack import Single

SIZES = (2, 4, 8)


def main(*, rounds: int, json_to: str | None) -> None:
    """Time a step of cohorts that differ in nothing but their size, and print the ratios."""
    check_targets(json_to)
    console = Console(stderr=json_to == "-")
    stream = table(200, 16)
    together = {size: cohort(size) for size in SIZES}
    apart = {size: one_by_one(cohort(size)) for size in SIZES}
    runs = {f"together {size}": stepping(made, stream) for size, made in together.items()}
    runs |= {f"apart {size}": stepping(made, stream) for size, made in apart.items()}
    taken = in_turn(runs, rounds=rounds, each=20, warm_up=40)
    made = Table("peers", "a step", f"over {SIZES[0]} peers", "one by one over together", box=None, pad_edge=False)
    said = {}
    for size in SIZES:
        grown = ratio(taken[f"together {size}"], taken[f"together {SIZES[0]}"])
        saved = ratio(taken[f"apart {size}"], taken[f"together {size}"])
        step = median(taken[f"together {size}"])
        made.add_row(str(size), f"{1e3 * step:.2f} ms", str(grown), str(saved))
        said[str(size)] = {"seconds": step, "over_smallest": grown.median, "apart_over_together": saved.median}
    console.print(made)
    console.print(f"medians of {rounds} rounds, each in turn; in brackets a quarter of them below, above")
    if json_to is not None:
        write_json(
            json_to,
            {"made": machine(), "ratio": said[str(SIZES[-1])]["over_smallest"], "sizes": said, "rounds": rounds},
        )


def cohort(size: int) -> Engine:
    """Build the shipped default with so many peers of its shape."""
    model = "{kind='mlp', widths=[128, 64], layer_norm=true}"
    peers = [f"{{name='{index}', model={model}, optimizer={{kind='sgd', lr=0.1}}}}" for index in range(size)]
    return engine((FEATURES,), [f"peers=[{', '.join(peers)}]"])


def one_by_one(made: Engine) -> Engine:
    """Let every peer go through a model of its own."""
    made.cohort.groups = [Single(index, peer) for index, peer in enumerate(made.cohort.peers)]
    return made

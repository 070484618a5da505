"""`streamkd bench overhead`: what the engine costs above the arithmetic, and below the loop one would write oneself."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, permutations
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from monitoring.bulk import MOST_WAITING
from monitoring.metrics import Metrics
from runners.bench import by_hand
from runners.bench.pairs import Ratio, in_turn, ratio
from runners.bench.rivals import made as machine
from runners.eval_command import check_targets, write_json
from runners.settings import load
from streamkd import Batch, Engine
from streamkd.config import build_engine
from streamkd.models import cnn, mlp

FEATURES, CLASSES = 33, 6
IMAGE = (1, 28, 28)
RATES = (0.3, 0.1, 0.03)
EACH, WARM_UP = MOST_WAITING, 150


def main(*, rounds: int, json_to: str | None) -> None:
    """Time the engine beside loops by hand, and print the ratios."""
    check_targets(json_to)
    console = Console(stderr=json_to == "-")
    torch.set_num_threads(load("default").threads)
    tables, pictures = small(rounds), images(max(3, rounds // 4))
    found = {
        "engine over the bare loop, batch 16, small networks": tables["bare"],
        "engine over that without scaling and weighing of answers": tables["networks"],
        "engine over a plain loop, batch 16, small networks": tables["plain"],
        "engine over the bare loop, batch 32, convolutional networks on 28x28": pictures,
    }
    if "compiled" in tables:
        found["compile = true over the engine as it is, batch 16, small networks"] = tables["compiled"]
    share = telling(rounds)
    made = Table("", "ratio", "a quarter of the rounds below, above", box=None, pad_edge=False)
    for name, one in found.items():
        made.add_row(name, f"{one.median:.2f}", f"{one.low:.2f}, {one.high:.2f}")
    console.print(made)
    console.print(f"report and metrics, as a share of a step: {100 * share.median:.1f} %")
    console.print(f"{rounds} rounds, each in turn; {torch.get_num_threads()} threads")
    if json_to is not None:
        ratios = {"ratio" if name == "bare" else name: one.median for name, one in tables.items()}
        ratios["images"] = pictures.median
        write_json(json_to, {"made": machine(), **ratios, "metrics_share": share.median, "rounds": rounds})


def small(rounds: int) -> dict[str, Ratio]:
    """Hold the shipped default to the loops by hand, on a table; and, where it can be compiled, that to itself."""
    stream = cycle(table(200, 16))
    build = partial(mlp, (FEATURES,), CLASSES, widths=(128, 64), layer_norm=True)
    models = [build() for _ in RATES]
    bare = by_hand.ByHand(by_hand.Stacked(models, RATES), (FEATURES,), CLASSES)
    networks = by_hand.Networks(by_hand.Stacked(models, RATES), (FEATURES,))
    plain = by_hand.Plain(build, RATES, (FEATURES,))
    compiled = engine((FEATURES,), ["compile=true"])
    taken = in_turn(
        {
            "engine": stepping(engine((FEATURES,)), table(200, 16)),
            "compiled": stepping(compiled, table(200, 16)),
            "bare": lambda: bare(*next(stream)),
            "networks": lambda: networks(*next(stream)),
            "plain": lambda: plain(*next(stream)),
        },
        rounds=rounds,
        each=EACH,
        warm_up=WARM_UP,
    )
    found = {name: ratio(taken["engine"], taken[name]) for name in ("bare", "networks", "plain")}
    if not compiled.uncompiled:
        found["compiled"] = ratio(taken["compiled"], taken["engine"])
    return found


def images(rounds: int) -> Ratio:
    """Hold the default with convolutional peers to a loop by hand, on images."""
    pictures = [(torch.rand(32, *IMAGE), torch.randint(0, CLASSES, (32,))) for _ in range(8)]
    models: list[nn.Module] = [cnn(IMAGE, CLASSES) for _ in RATES]
    bare = by_hand.ByHand(by_hand.Separate(models, RATES), IMAGE, CLASSES)
    stream = cycle(pictures)
    kinds = [f"peers.{index}.model={{kind='cnn'}}" for index in range(len(RATES))]
    taken = in_turn(
        {"engine": stepping(engine(IMAGE, kinds), pictures), "bare": lambda: bare(*next(stream))},
        rounds=rounds,
        each=3,
        warm_up=4,
    )
    return ratio(taken["engine"], taken["bare"])


def telling(rounds: int) -> Ratio:
    """Time what the report of each step takes and the metrics take of it, over the step with both."""
    made = engine((FEATURES,), clock=time.perf_counter)
    names = made.cohort.names
    metrics = Metrics(
        peers=names,
        sources=list(permutations(names, 2)),
        feed="bench",
        reasons=(),
        detector="never",
        signal="error",
        version="",
    )
    step = stepping(made, table(200, 16))
    steps, told = list[float](), list[float]()
    for number in range(WARM_UP + EACH * rounds):
        began = time.perf_counter()
        report = step()
        metrics.observe(report, now=0.0)
        whole = time.perf_counter() - began
        if number >= WARM_UP:
            steps.append(whole)
            told.append(whole - sum(report.seconds.values()))  # all that comes after the last stage
    return ratio(*([sum(taken[i : i + EACH]) for i in range(0, len(taken), EACH)] for taken in (told, steps)))


def engine(shape: Sequence[int], settings: Sequence[str] = (), **options: Any) -> Engine:
    """Build the shipped default, for records of a shape."""
    return build_engine(
        load("default", [f"max_classes={CLASSES}", "drift.detector.kind=never", *settings]), shape, **options
    )


def table(batches: int, size: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Make up records whose label is the largest of a few linear functions."""
    chance = torch.Generator().manual_seed(seed)
    law = torch.randn(FEATURES, CLASSES, generator=chance)
    x = torch.randn(batches, size, FEATURES, generator=chance)
    return list(zip(x, (x @ law).argmax(-1), strict=True))


def stepping(made: Engine, stream: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], Any]:
    """Return what takes the engine one batch further."""
    batches = cycle([Batch(x, y) for x, y in stream])
    return lambda: made.step(next(batches))

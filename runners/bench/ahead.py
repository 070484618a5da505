"""`streamkd bench ahead`: is a thread that decodes ahead worth it? Images, a table and a stream, with and without."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from runners.bench.feeds import STREAM, publish, server
from runners.bench.kill import write_table
from runners.bench.pairs import ratio
from runners.bench.rivals import made as machine
from runners.eval_command import check_targets, write_json
from runners.evaluate import evaluate
from runners.feeds.formats import imported
from runners.settings import load

SIDES = (64, 224, 640)
"""Of the images, which the networks see as 32 x 32."""
ROWS = 10
"""Of the tables, for each image."""
CLASSES = 4
WARM_UP = 320
"""Records of each feed that are evaluated before anything is timed."""


def main(*, records: int, most: int, rounds: int, url: str, json_to: str | None) -> None:
    """Evaluate every feed with and without reading ahead, in turn, and print how fast.

    Raises:
        ConfigError: there is neither a server nor a program to start one.
    """
    check_targets(json_to)
    console = Console(stderr=json_to == "-")
    speeds: dict[str, tuple[list[float], list[float]]] = {}
    with TemporaryDirectory() as folder, server(url) as at, Progress(console=console) as progress:
        feeds = {**images(Path(folder), records), **tables(Path(folder), ROWS * records, at)}
        task = progress.add_task("", total=rounds * len(feeds) * 2)
        for source, settings in feeds.values():
            speed(source, settings, records=WARM_UP)
        for _ in range(rounds):
            for name, (source, settings) in feeds.items():
                for waiting, taken in zip((0, most), speeds.setdefault(name, ([], [])), strict=True):
                    progress.update(task, description=name)
                    taken.append(speed(source, [*settings, f"read_ahead={waiting}"]))
                    progress.advance(task)
        forget(at)
    made = Table("feed", "records per second", f"read_ahead = {most}", "over none", box=None, pad_edge=False)
    for name, (without, ahead) in speeds.items():
        made.add_row(name, f"{median(without):,.0f}", f"{median(ahead):,.0f}", str(ratio(ahead, without)))
    console.print(made)
    console.print(f"medians of {rounds} rounds, in turn; in brackets a quarter of them below, above")
    if json_to is not None:
        figures = {name: {"without": without, "ahead": ahead} for name, (without, ahead) in speeds.items()}
        write_json(json_to, {"made": machine(), "read_ahead": most, "records_per_second": figures})


def speed(source: str, settings: Sequence[str], records: int | None = None) -> float:
    """Return the records a second of one evaluation, of all records or so many."""
    nowhere = ["dead_letters.path=/dev/null", "dead_letters.max_bytes=0"]
    return evaluate(load(source, [*nowhere, *settings]), lambda *_: None, records=records).records_per_second


def images(folder: Path, records: int) -> Mapping[str, tuple[str, Sequence[str]]]:
    """Write folders of JPEG files of made-up colours; return the settings that read them, by name."""
    chance = np.random.default_rng(0)
    feeds = {}
    for side in SIDES:
        for number in range(records):
            coarse = Image.fromarray(chance.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            file = folder / str(side) / str(number % CLASSES) / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, quality=90)
        name = f"{records:,} JPEG files of {side} x {side}"
        feeds[name] = ("images", [f"feed.path={folder / str(side)}", "feed.size=32"])
    return feeds


def tables(folder: Path, records: int, url: str) -> Mapping[str, tuple[str, Sequence[str]]]:
    """Write a table and publish it; return the settings that read them, by name."""
    path = folder / "table.csv"
    write_table(path, records)
    forget(url)
    publish(path, url)
    stream = ["feed.kind=redis", f"feed.url={url}", f"feed.stream={STREAM}", "feed.follow=false"]
    return {
        f"{records:,} rows of CSV": ("default", [f"feed.path={path}", "feed.label=y"]),
        "the same in Redis": ("default", [*stream, "feed.label=y"]),
    }


def forget(url: str) -> None:
    """Remove the stream."""
    redis = imported("redis", "redis", "streamkd bench ahead")
    with closing(redis.Redis.from_url(url)) as client:
        client.delete(STREAM)

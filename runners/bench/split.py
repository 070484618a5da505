"""`streamkd bench split`: classes come task after task, and nobody is told; what is left of them at the end?"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from runners.bench.learners import OURS
from runners.bench.rivals import made, of_seeds, percent, spread
from runners.bench.rows import Row
from runners.bench.split_rows import rows
from runners.eval_command import check_targets, write_json
from runners.feeds.images import ImageFeed
from runners.session import prepare_torch
from runners.settings import Configuration, load
from streamkd.batch import Batch
from streamkd.config import build_engine
from streamkd.engine import Engine
from streamkd.errors import ConfigError

TESTED_X, TESTED_Y = ("x_test", "X_test", "test_images"), ("y_test", "Y_test", "test_labels")
"""Arrays for testing, by their usual names."""
PEERS, CHANNELS = 2, [8, 16]
"""Networks in every row, and what they are narrowed to, so that all rows are done in minutes on one core."""
CHUNK = 500
"""Test records asked at a time."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where images for training and for testing come from: settings of a feed for each.

    Attributes:
        name: for people.
        train, test: key -> value.
        tasks: groups of classes.
    """

    name: str
    train: Mapping[str, Any]
    test: Mapping[str, Any]
    tasks: int

    def read(self, seed: int, *, test: bool, records: int | None = None) -> "Records":
        """Read the images task by task.

        Args:
            seed: of the order within the tasks.
            test: those for testing.
            records: of each task, the first in that order; None: all.

        Raises:
            StreamkdError: they cannot be read, or there are fewer classes than tasks.
        """
        order = {"kind": "class_incremental", "tasks": self.tasks, "seed": seed}
        given = {f"feed.{key}": value for key, value in (self.test if test else self.train).items()}
        refused: list[Any] = []
        feed = load("images", (), {**given, "feed.order": order, "feed.size": None}).open_feed(refused.append)
        with closing(feed):
            if not isinstance(feed, ImageFeed):
                raise ConfigError(f"feed.kind = {given['feed.kind']!r}: has no tasks; give images")
            everything = feed.poll(len(feed.order.indices))
            tasks = feed.order.tasks
        if refused or everything is None:
            raise ConfigError(f"{self.name}: {len(refused)} images cannot be used; leave them out first")
        rows = [torch.from_numpy(np.flatnonzero(tasks == task)[:records]) for task in range(self.tasks)]
        return Records(tuple(feed.shape), [(everything.x[row], everything.y[row]) for row in rows])


@dataclass(frozen=True, eq=False, slots=True)
class Records:
    """Images `[n, channels, height, width]` and labels `[n]` of each task, and the shape of an image."""

    shape: tuple[int, ...]
    tasks: Sequence[tuple[torch.Tensor, torch.Tensor]]

    @property
    def classes(self) -> int:
        """How many there are."""
        return 1 + max(int(y.max()) for _, y in self.tasks)


@dataclass(frozen=True, eq=False, slots=True)
class Pass:
    """What came of one row with one seed.

    Attributes:
        accuracies: `[tasks, tasks]`, in row i those on the test records of each task after task i was learned.
        sizes: `[tasks]`, test records of each.
        records: that were learned.
        updates: optimizer steps of each network.
        lessons: examples that went forward and back through a network, over all networks.
        seconds: of a core, that predicting and learning took.
    """

    accuracies: NDArray[np.float64]
    sizes: NDArray[np.int64]
    records: int
    updates: int
    lessons: int
    seconds: float

    @property
    def final(self) -> float:
        """Accuracy over all test records of all tasks, at the end."""
        return float(self.accuracies[-1] @ self.sizes / self.sizes.sum())

    @property
    def forgetting(self) -> float:
        """Mean over the tasks but the last of the best accuracy ever less that at the end (Chaudhry et al. 2018)."""
        return float((self.accuracies.max(0) - self.accuracies[-1])[:-1].mean())

    @property
    def learning(self) -> float:
        """Mean over tasks of the accuracy on each when it had just been learned (Riemer et al. 2019)."""
        return float(self.accuracies.diagonal().mean())

    def as_json(self) -> dict[str, Any]:
        """Return all figures."""
        return {
            "final": self.final,
            "forgetting": self.forgetting,
            "learning": self.learning,
            "accuracies": self.accuracies.tolist(),
            "records": self.records,
            "updates": self.updates,
            "lessons": self.lessons,
            "core_seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class Settings:
    """What all rows have alike: records a batch, images remembered, images drawn for each update."""

    batch: int
    memory: int
    drawn: int

    def configuration(self, row: Row, classes: int, seed: int) -> Configuration:
        """Return the configuration of a row.

        Raises:
            ConfigError: a setting does not fit.
        """
        alike: dict[str, Any] = {"batch": self.batch, "replay.capacity": self.memory, "replay.records": self.drawn}
        alike |= {f"peers.{index}.model.channels": CHANNELS for index in range(PEERS)}
        return load(row.source, row.overrides, {**alike, "max_classes": classes, "seed": seed, "threads": 1})


def main(
    data: Path | None,
    *,
    dataset: str | None,
    root: Path,
    tasks: int,
    records: int | None,
    settings: Settings,
    seeds: Sequence[int],
    json_to: str | None,
) -> None:
    """Measure every row with every seed, and print the table."""
    check_targets(json_to)
    console = Console(stderr=json_to == "-")
    source = source_of(data, dataset, root, tasks)
    named = rows()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading", total=len(named) * len(seeds))
        test = source.read(0, test=True)
        done: dict[Row, list[Pass]] = {row: [] for row in named}
        for seed in seeds:
            train = source.read(seed, test=False, records=records)
            for row in named:
                progress.update(task, description=f"{row.name}, seed {seed}")
                done[row].append(go(settings.configuration(row, train.classes, seed), train, test))
                progress.advance(task)
    console.print(table(source, done, settings, seeds))
    about = made()
    console.print(f"{about['date']}, {about['cores']} cores ({about['machine']}), Python {about['python']}; one thread")
    if json_to is not None:
        found = [{**asdict(row), "passes": [one.as_json() for one in passes]} for row, passes in done.items()]
        alike = {**asdict(settings), "tasks": tasks, "seeds": list(seeds)}
        write_json(json_to, {"made": about, "data": source.name, **alike, "rows": found})


def source_of(data: Path | None, dataset: str | None, root: Path, tasks: int) -> Source:
    """Return where the images come from: an .npz file with arrays for testing, or a dataset of torchvision.

    Raises:
        ConfigError: neither is named, or both are, or there are no images to test on.
    """
    if (data is None) == (dataset is None):
        raise ConfigError("name an .npz file, or a dataset of torchvision by --dataset; one of the two")
    if dataset is not None:
        feed = {"kind": "torchvision", "dataset": dataset, "root": str(root), "path": None}
        return Source(dataset, feed, {**feed, "arguments": {"train": False}}, tasks)
    path = Path(str(data))
    try:
        with np.load(path, allow_pickle=False) as held:
            names = list(getattr(held, "files", ()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}; name an .npz file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not an .npz file of plain arrays: {error}") from None
    x, y = (next((name for name in names if name in tested), None) for tested in (TESTED_X, TESTED_Y))
    if x is None or y is None:
        raise ConfigError(f"{path}: has no images to test on; arrays x_test and y_test, beside {', '.join(names)}")
    feed = {"kind": "npz", "path": str(path)}
    return Source(path.name.partition(".")[0], feed, {**feed, "x": x, "y": y}, tasks)


def go(
    configuration: Configuration, train: Records, test: Records, progress: Callable[[int], None] = lambda _: None
) -> Pass:
    """Learn task after task, each once, and test after each on all that came so far."""
    prepare_torch(configuration)
    engine = build_engine(configuration, train.shape)
    views = 1 + len(engine.cohort.distillation.views)
    accuracies = np.zeros((len(train.tasks), len(train.tasks)))
    size, records, lessons, seconds = configuration.batch, 0, 0, 0.0
    for number, (x, y) in enumerate(train.tasks):
        for part, labels in zip(torch.split(x, size), torch.split(y, size), strict=True):
            before, began = engine.guidance.updates, time.process_time()
            report = engine.step(Batch(part, labels))
            seconds += time.process_time() - began
            records += len(part)
            learned = (report.updates - before) * len(part) + len(report.replay.ages)
            lessons += learned * views * len(engine.cohort)
            progress(records)
        accuracies[number, : number + 1] = [accuracy(engine, *task) for task in test.tasks[: number + 1]]
    sizes = np.array([len(y) for _, y in test.tasks])
    return Pass(accuracies, sizes, records, engine.guidance.updates, lessons, seconds)


def accuracy(engine: Engine, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the share of images that the served answer is right on, among all classes met so far."""
    said = torch.cat([engine.predict(part).argmax(-1) for part in torch.split(x, CHUNK)])
    return float((said == y).float().mean())


def table(source: Source, done: Mapping[Row, Sequence[Pass]], settings: Settings, seeds: Sequence[int]) -> Table:
    """Return the figures for people."""
    first = next(iter(done.values()))[0]
    caption = (
        f"{first.records:,} images in {source.tasks} tasks, each once, in batches of {settings.batch}; "
        f"{settings.memory:,} remembered, {settings.drawn} drawn an update; tested on {int(first.sizes.sum()):,}; "
        f"{PEERS} networks of {' and '.join(map(str, CHANNELS))} channels"
    )
    headings = ("final\n%", "forgetting\npoints", "learning\n%", "updates", "lessons\na record", "core ms\na record")
    shown = of_seeds(source.name, caption, headings, seeds)
    named = list(done)
    for row, following in zip(named, [*named[1:], None], strict=True):
        passes = done[row]
        measures = [[getattr(one, key) for one in passes] for key in ("final", "forgetting", "learning")]
        shown.add_row(
            Text(row.name),
            *(percent(mean(values), spread(values)) for values in measures),
            f"{mean(one.updates for one in passes):,.0f}",
            f"{mean(one.lessons / one.records for one in passes):.1f}",
            f"{1e3 * mean(one.seconds / one.records for one in passes):.2f}",
            style="bold" if row.name == OURS else "",
            end_section=following is None or following.group != row.group,
        )
    return shown

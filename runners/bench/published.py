"""`streamkd bench published`: the rows of the ablation that the articles print, measured here, in their order.

The articles tell neither protocol nor code, so what can be checked is the order of their rows: each is said to be
better than the one before. Two ladders are measured, of rules as they were published and of ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from runners.bench import split
from runners.bench.ablation import Run, measure
from runners.bench.rivals import made, of_seeds, percent, spread
from runners.bench.rows import Row
from runners.bench.streams import Stream
from runners.eval_command import check_targets, kind_of, write_json
from runners.settings import load

TASKS = 5
PUBLISHED, TABLES, IMAGES = "rules as published", "ours", "ours, of images"


def ladder(
    group: str, source: str, *, least: Sequence[str], fixed: Sequence[str], dynamic: Sequence[str], whole: Sequence[str]
) -> list[Row]:
    """Return the five rows of the articles.

    Args:
        group: of the rows.
        source: name of a shipped configuration.
        least: settings that take away what only the last row has.
        fixed: weights that stay as they are.
        dynamic: weights that follow what is measured.
        whole: settings of the last row.
    """
    alone, bare = ("roles.rule=never",), ("replay.capacity=0",)
    rungs: dict[str, tuple[Sequence[str], str]] = {
        "base": ((*least, *fixed, *alone, *bare), "the first peer teaches, at a weight that stays"),
        "+ dynamic weights": ((*least, *dynamic, *alone, *bare), "the weight follows the schedule"),
        "+ role swap": ((*least, *dynamic, *bare), "who teaches is elected"),
        "+ replay": ((*least, *dynamic), "memories are rehearsed"),
        "full online": (whole, "and averaged weights, temperature, drift: all there is"),
    }
    return [Row(name, tuple(settings), why, group, source) for name, (settings, why) in rungs.items()]


def _constant(**values: float) -> tuple[str, ...]:
    return tuple(f"distillation.{key}={{kind='constant', value={value}}}" for key, value in values.items())


_LED, _UNAVERAGED = "distillation.scheme=leader", "served.averages=false"


def rows(*, images: bool) -> list[Row]:
    """Return both ladders, for tables or for images."""
    published = ladder(
        PUBLISHED,
        "mission",
        least=(_LED, _UNAVERAGED, *_constant(temperature=3.0)),
        fixed=_constant(alpha=0.5, beta=0.5),
        dynamic=(),
        whole=(_LED,),
    )
    if images:
        ours = ladder(
            IMAGES,
            "images",
            least=(_LED, _UNAVERAGED),
            fixed=_constant(alpha=1.0, temperature=4.0),
            dynamic=("distillation.alpha={kind='competence'}", "distillation.temperature={kind='loss_driven'}"),
            whole=(),
        )
    else:
        ours = ladder(
            TABLES,
            "default",
            least=(_UNAVERAGED, "served.floor=1.0", "served.pool=false", "drift.detector.kind=never"),
            fixed=(*_constant(alpha=1.0, temperature=1.0), "distillation.gate=open", "distillation.cap=false"),
            dynamic=(),
            whole=(),
        )
    return [*published, *ours]


@dataclass(frozen=True, slots=True)
class Standing:
    """What came of all rows on one stream: an accuracy for each seed.

    Attributes:
        name: of the stream.
        measure: what the accuracy is of.
        accuracies: by row.
    """

    name: str
    measure: str
    accuracies: Mapping[Row, Sequence[float]]

    def place(self, row: Row) -> int:
        """Return the row's place in its ladder, 1 the least accurate; the articles say 1 to 5 from the top down."""
        rivals = [mean(values) for other, values in self.accuracies.items() if other.group == row.group]
        return 1 + sum(value < mean(self.accuracies[row]) for value in rivals)


def main(
    data: Sequence[Path],
    *,
    label: str | None,
    batch: int,
    seeds: Sequence[int],
    records: int | None,
    json_to: str | None,
) -> None:
    """Measure both ladders on every stream; print a table of each as soon as it is done."""
    check_targets(json_to)
    console = Console(stderr=json_to == "-")
    done = []
    for path in data or (None,):
        images = path is not None and kind_of(path) == "npz"
        named = rows(images=images)
        found: dict[Row, list[float]] = {row: [] for row in named}
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("reading", total=len(named) * len(seeds))
            for seed in seeds:
                accuracy = _of_images(path, batch, records, seed) if images and path else None
                for row in named:
                    progress.update(task, description=f"{row.name}, seed {seed}")
                    stream = Stream(path, label, batch, records)
                    score = accuracy(row) if accuracy else measure(_run(stream, row, seed)).accuracy
                    found[row].append(score)
                    progress.advance(task)
        name = "made-up" if path is None else path.name.partition(".")[0]
        said = f"on all of {TASKS} tasks, at the end" if images else "before each batch is learned"
        done.append(Standing(name, said, found))
        console.print(table(done[-1], seeds))
    about = made()
    console.print(f"{about['date']}, {about['cores']} cores ({about['machine']}), Python {about['python']}; one thread")
    if json_to is not None:
        streams = [
            {
                "stream": one.name,
                "accuracy_of": one.measure,
                "rows": [
                    {**asdict(row), "accuracies": list(values), "place": one.place(row)}
                    for row, values in one.accuracies.items()
                ],
            }
            for one in done
        ]
        write_json(json_to, {"made": about, "batch": batch, "seeds": list(seeds), "streams": streams})


def _run(stream: Stream, row: Row, seed: int) -> Run:
    return Run(stream, row.source, row.overrides, row.answer, seed)


def _of_images(path: Path, batch: int, records: int | None, seed: int) -> Callable[[Row], float]:
    """Return what measures a row on images that come task after task."""
    source = split.source_of(path, None, Path(), TASKS)
    each = None if records is None else max(1, records // TASKS)
    train, test = source.read(seed, test=False, records=each), source.read(0, test=True)
    alike: dict[str, Any] = {"batch": batch, "max_classes": train.classes, "seed": seed, "threads": 1}

    def accuracy(row: Row) -> float:
        return split.go(load(row.source, row.overrides, alike), train, test).final

    return accuracy


def table(done: Standing, seeds: Sequence[int]) -> Table:
    """Return the figures of one stream for people."""
    caption = f"accuracy {done.measure}; places are within a ladder, 1 the least accurate"
    headings = ("accuracy\n%", "against the\nrow above", "place\nmeasured", "place in\nthe articles")
    shown = of_seeds(done.name, caption, headings, seeds)
    named = list(done.accuracies)
    for number, row in enumerate(named):
        values = done.accuracies[row]
        above = named[number - 1] if number and named[number - 1].group == row.group else None
        gained = [a - b for a, b in zip(values, done.accuracies[above], strict=True)] if above else []
        shown.add_row(
            Text(row.name if above else f"{row.name} ({row.group})"),
            percent(mean(values), spread(values)),
            percent(mean(gained), spread(gained), sign="+") if gained else "",
            str(done.place(row)),
            str(1 + sum(other.group == row.group for other in named[:number])),
            end_section=row is named[-1] or named[number + 1].group != row.group,
        )
    return shown

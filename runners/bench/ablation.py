"""`streamkd bench ablation`: what each mechanism of the default is worth, against the same seeds with it."""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from monitoring.prequential import NO_CHANGE
from runners.bench.rivals import made, percent, spread
from runners.bench.rows import DEFAULT, Row, rows
from runners.bench.streams import Stream, streams
from runners.eval_command import check_targets, write_json
from runners.evaluate import evaluate
from runners.picture import COLOURS
from streamkd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Run:
    """One configuration on one stream with one seed; rows of equal settings share it."""

    stream: Stream
    source: str
    overrides: tuple[str, ...]
    answer: str
    seed: int


@dataclass(frozen=True, slots=True)
class Score:
    """What came of a run: shares of the labelled records, and records a second."""

    accuracy: float
    no_change: float
    speed: float


@dataclass(frozen=True, slots=True)
class Ablation:
    """All rows on one stream: for each row its scores, one for each seed."""

    stream: Stream
    records: int
    seeds: Sequence[int]
    scores: Mapping[Row, Sequence[Score]]

    def accuracies(self, row: Row) -> list[float]:
        """Return the accuracy of each seed."""
        return [score.accuracy for score in self.scores[row]]

    def differences(self, row: Row) -> list[float]:
        """Return, seed by seed, by how much the accuracy lies above the default's."""
        default = next(row for row in self.scores if row.name == DEFAULT)
        pairs = zip(self.accuracies(row), self.accuracies(default), strict=True)
        return [accuracy - with_all for accuracy, with_all in pairs]

    def speed(self, row: Row) -> float:
        """Return its records a second over the default's."""
        default = next(row for row in self.scores if row.name == DEFAULT)
        return mean(score.speed for score in self.scores[row]) / mean(score.speed for score in self.scores[default])

    def as_json(self) -> dict[str, Any]:
        """Return all figures: shares between 0 and 1."""
        return {
            "stream": self.stream.name,
            "records": self.records,
            "no_change": next(iter(self.scores.values()))[0].no_change,
            "rows": [
                {
                    **asdict(row),
                    "accuracy": mean(self.accuracies(row)),
                    "accuracy_std": spread(self.accuracies(row)),
                    "accuracies": self.accuracies(row),
                    "difference": mean(self.differences(row)),
                    "difference_std": spread(self.differences(row)),
                    "records_per_second": round(mean(score.speed for score in scores), 1),
                }
                for row, scores in self.scores.items()
            ],
        }


def main(
    data: Sequence[Path],
    *,
    label: str | None,
    batch: int,
    seeds: Sequence[int],
    records: int | None,
    json_to: str | None,
    plot: Path | None,
    jobs: int | None,
) -> None:
    """Measure every row on every stream with every seed; print each stream's table as soon as it is done."""
    check_targets(json_to, plot=plot)
    console = Console(stderr=json_to == "-")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    done = []
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        chosen = []
        reading = progress.add_task("reading", total=None)
        for stream in streams(data, label=label, batch=batch, records=records):
            count = stream.read().count
            chosen.append((stream, count, rows(count, batch)))
        progress.remove_task(reading)
        with closing(ablations(chosen, seeds, jobs or os.cpu_count() or 1, progress)) as found:
            for one in found:
                done.append(one)
                progress.console.print(table([one]))
    if len(done) > 1:
        console.print(table(done))
    about = made()
    console.print(f"{about['date']}, {about['cores']} cores ({about['machine']}), Python {about['python']}")
    if json_to is not None:
        result = {"made": about, "batch": batch, "seeds": list(seeds), "streams": [one.as_json() for one in done]}
        write_json(json_to, result)
    if plot is not None:
        draw(plot, done)
        console.print(f"picture: {plot}", markup=False)


def ablations(
    chosen: Sequence[tuple[Stream, int, Sequence[Row]]],
    seeds: Sequence[int],
    jobs: int,
    progress: Progress | None = None,
) -> Generator[Ablation, None, None]:
    """Yield what came of each stream, in order, as soon as all its runs are done.

    Args:
        chosen: stream, its number of records, and the rows to measure on it; the default among them.
        seeds: one run of every row for each.
        jobs: processes at once; 1 is this one.
        progress: shows how many runs are done.

    Raises:
        StreamkdError: a run ended with a mistake.
    """
    wanted = {
        (index, row, seed): Run(stream, row.source, row.overrides, row.answer, seed)
        for index, (stream, _, named) in enumerate(chosen)
        for row in named
        for seed in seeds
    }
    runs = list(dict.fromkeys(wanted.values()))
    task = progress.add_task("runs", total=len(runs)) if progress else None
    scores: dict[Run, Score] = {}
    told = 0
    with measured(runs, jobs) as results:
        for run, score in results:
            scores[run] = score
            if progress and task is not None:
                progress.advance(task)
            while told < len(chosen) and all(wanted[key] in scores for key in wanted if key[0] == told):
                stream, count, named = chosen[told]
                by_row = {row: [scores[wanted[told, row, seed]] for seed in seeds] for row in named}
                yield Ablation(stream, count, seeds, by_row)
                told += 1


@contextmanager
def measured(runs: Sequence[Run], jobs: int) -> Iterator[Iterator[tuple[Run, Score]]]:
    """Give a context in which runs are measured in so many processes; each comes out as soon as it is done."""
    if jobs == 1:
        yield ((run, measure(run)) for run in runs)
        return
    # A fork would inherit torch's threads in whatever state they are.
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        futures = {pool.submit(measure, run): run for run in runs}
        yield ((futures[future], future.result()) for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)


def measure(run: Run) -> Score:
    """Make one run, on one thread; what it refuses is thrown away."""
    with TemporaryDirectory() as folder:
        letters = f"dead_letters.path={Path(folder, 'refused.jsonl')}"
        configuration = run.stream.configuration(run.source, (*run.overrides, letters), seed=run.seed)
        evaluation = evaluate(configuration, lambda _, __: None, records=run.stream.records)
    measures = evaluation.tally.measures()
    return Score(measures[run.answer].accuracy, measures[NO_CHANGE].accuracy, evaluation.records_per_second)


def table(done: Sequence[Ablation]) -> Table:
    """Return accuracy, and the paired difference from the default, of every row and stream, for people."""
    first = done[0]
    sizes = ", ".join(f"{one.stream.name} {one.records:,}" for one in done)
    caption = f"{sizes} records in batches of {first.stream.batch}; the differences are in points"
    if len(first.seeds) > 1:
        caption += (
            f"; mean and standard deviation of seeds {', '.join(map(str, first.seeds))}, differences seed by seed"
        )
    shown = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("", no_wrap=True)
    for one in done:
        shown.add_column(f"{one.stream.name}\naccuracy %", justify="right", no_wrap=True)
        shown.add_column("against\nthe default", justify="right", no_wrap=True)
    shown.add_column("speed over\nits", justify="right", no_wrap=True)
    names = list(dict.fromkeys(row.name for row in first.scores))
    by_name = [{row.name: row for row in one.scores} for one in done]
    for number, name in enumerate(names):
        cells: list[str] = []
        for one, named in zip(done, by_name, strict=True):
            cells += _cells(one, named[name])
        cells.append(f"{mean(one.speed(named[name]) for one, named in zip(done, by_name, strict=True)):.2f}")
        group = by_name[0][name].group
        last = number + 1 == len(names) or by_name[0][names[number + 1]].group != group
        shown.add_row(Text(name), *cells, style="bold" if name == DEFAULT else "", end_section=last)
    return shown


def _cells(one: Ablation, row: Row) -> tuple[str, str]:
    accuracies, differences = one.accuracies(row), one.differences(row)
    against = "" if row.name == DEFAULT else percent(mean(differences), spread(differences), sign="+")
    return percent(mean(accuracies), spread(accuracies)), against


def draw(path: Path, done: Sequence[Ablation]) -> None:
    """Draw the paired differences as bars with their standard deviation, by row and stream.

    Raises:
        ConfigError: the file cannot be written.
    """
    shown = [row for row in done[0].scores if row.overrides or row.source != "default"]
    figure = Figure(figsize=(10, 1.5 + len(shown) * (0.12 + 0.13 * len(done))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    thickness = 0.8 / len(done)
    for index, one in enumerate(done):
        named = {row.name: row for row in one.scores}
        differences = [[100 * value for value in one.differences(named[row.name])] for row in shown]
        axes.barh(
            [place + (index - (len(done) - 1) / 2) * thickness for place in range(len(shown))],
            [mean(values) for values in differences],
            height=thickness,
            xerr=[spread(values) or 0.0 for values in differences],
            label=one.stream.name,
            color=COLOURS[index % len(COLOURS)],
            error_kw={"elinewidth": 0.8},
        )
    # Most differ by tenths of a point and a few by tens: linear up to one point, logarithmic beyond.
    axes.set_xscale("symlog", linthresh=1.0)
    axes.xaxis.set_major_locator(FixedLocator([s * x for s in (-1, 1) for x in (0.5, 1, 2, 5, 10, 20, 50)] + [0]))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%+g"))
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row.name for row in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("accuracy less the default's, percentage points (bars: mean over seeds, lines: standard deviation)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=len(done), frameon=False, fontsize="small")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the picture cannot be written: {error}") from None

"""`streamkd bench rivals`: our default beside what one would otherwise install, on the same batches in the same run."""

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from runners.bench.learners import OURS, PACE, RIVALS, Learner, Rival
from runners.bench.streams import Records, streams
from runners.eval_command import check_targets, write_json
from streamkd.batch import Batch, labelled
from streamkd.errors import reason

BUSY = 0.8
"""The share of a core under which a speed says more of the machine than of the learner."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One learner's way through one stream.

    Attributes:
        scored: labelled records.
        accuracy: share of them that were answered rightly before their batch was learned.
        no_change: likewise of the last label of the batch before.
        seconds: predicting and learning took; reading and converting the records does not count.
        busy: of them, seconds for which a core worked for this process; fewer where others wanted the machine.
    """

    scored: int
    accuracy: float
    no_change: float
    seconds: float
    busy: float


@dataclass(frozen=True, slots=True)
class Standing:
    """What came of one rival on one stream: a pass for each seed, over `records` records each."""

    records: int
    passes: Sequence[Pass]

    @property
    def accuracies(self) -> list[float]:
        """One for each pass."""
        return [one.accuracy for one in self.passes]

    @property
    def speed(self) -> float:
        """Records a second, over all passes."""
        return self.records * len(self.passes) / max(1e-9, sum(one.seconds for one in self.passes))

    @property
    def share(self) -> float:
        """Of a core, that the process had; over 1 where a learner has threads of its own."""
        return sum(one.busy for one in self.passes) / max(1e-9, sum(one.seconds for one in self.passes))


@dataclass(frozen=True, slots=True)
class Race:
    """What came of all rivals on one stream: how each stands, or why it broke off."""

    records: Records
    standings: Mapping[str, Standing]
    failed: Mapping[str, str]

    def ratio(self, name: str) -> float | None:
        """Return how many times as fast as `PACE` a rival was; None where that did not run."""
        pace = self.standings.get(PACE)
        return None if pace is None else self.standings[name].speed / pace.speed

    def as_json(self) -> dict[str, Any]:
        """Return all figures: shares between 0 and 1."""
        return {
            "stream": self.records.stream.name,
            "records": self.records.count,
            "classes": self.records.classes,
            "no_change": next(iter(self.standings.values())).passes[0].no_change,
            "rivals": {
                name: {
                    "accuracy": mean(standing.accuracies),
                    "accuracy_std": spread(standing.accuracies),
                    "accuracies": standing.accuracies,
                    "records_per_second": round(standing.speed, 1),
                    "speed_ratio": self.ratio(name),
                    "core_share": round(standing.share, 3),
                }
                for name, standing in self.standings.items()
            },
            "failed": dict(self.failed),
        }


def main(
    data: Sequence[Path],
    *,
    label: str | None,
    batch: int,
    seeds: Sequence[int],
    records: int | None,
    json_to: str | None,
) -> None:
    """Race on every stream; print a table of each as soon as it is done."""
    check_targets(json_to)
    console = Console(stderr=json_to == "-")
    missing = {name: said for name, rival in RIVALS.items() if (said := rival.missing())}
    racing = {name: rival for name, rival in RIVALS.items() if name not in missing}
    races = []
    for stream in streams(data, label=label, batch=batch, records=records):
        with Progress(console=console, transient=True) as progress:
            progress.add_task(f"{stream.name}: reading", total=None)
            found = stream.read()

            def follow(name: str, progress: Progress = progress, found: Records = found) -> Callable[[int], None]:
                task = progress.add_task(f"{found.stream.name}: {name}", total=found.count)
                return lambda count: progress.update(task, completed=count)

            races.append(race(found, racing, seeds, follow))
        console.print(table(races[-1], seeds))
        for name, why in races[-1].failed.items():
            console.print(f"broke off: {name}: {why}", markup=False)
        least = min(standing.share for standing in races[-1].standings.values())
        if least < BUSY:
            console.print(f"a busy machine: some had only {least:.0%} of a core, so their speeds do not compare")
    for said in dict.fromkeys(missing.values()):
        names = ", ".join(name for name, why in missing.items() if why == said)
        console.print(f"not raced: {names}; {said}", markup=False)
    console.print(conditions(), markup=False)
    if json_to is not None:
        result = {
            "made": made(),
            "batch": batch,
            "seeds": list(seeds),
            "streams": [one.as_json() for one in races],
            "missing": missing,
        }
        write_json(json_to, result)


def race(
    records: Records,
    rivals: Mapping[str, Rival],
    seeds: Sequence[int],
    follow: Callable[[str], Callable[[int], None]] = lambda _: lambda _: None,
) -> Race:
    """Send every rival through one stream, one after the other.

    Args:
        records: of the stream.
        rivals: name -> rival.
        seeds: one pass for each; the first alone for rivals without chance.
        follow: called with a name, returns what is called now and then with the records so far.
    """
    filled = list(imputed(records.batches))
    standings, failed = {}, {}
    for name, rival in rivals.items():
        gc.freeze()  # as a run does: what was imported is gone through in nobody's time
        try:
            passes = []
            for seed in seeds if rival.seeded else seeds[:1]:
                progress = follow(f"{name}, seed {seed}")  # to make one may take a while
                passes.append(go(rival.make(records, seed), records.batches, filled, progress))
        except Exception as error:
            if name == OURS:
                raise
            failed[name] = reason(error)  # whatever it was: the others race on
        else:
            standings[name] = Standing(records.count, passes)
        finally:
            gc.unfreeze()
    return Race(records, standings, failed)


def go(
    learner: Learner,
    batches: Sequence[Batch],
    filled: Sequence[NDArray[np.float64]],
    progress: Callable[[int], None] = lambda _: None,
) -> Pass:
    """Let one learner predict every batch whole, and then learn it.

    Args:
        learner: a fresh one.
        batches: of the stream.
        filled: their inputs without missing values.
        progress: called now and then with the records so far.
    """
    count = scored = hits = unchanged = last = 0
    seconds = busy = 0.0
    for number, (batch, x) in enumerate(zip(batches, filled, strict=True)):
        known = labelled(batch.y)
        whole = bool(known.all())
        rows = known.numpy()
        question = learner.prepare(batch, x)
        lesson = question if whole else learner.prepare(Batch(batch.x[known], batch.y[known]), x[rows])
        y = batch.y[known].tolist()
        began, worked = time.perf_counter(), time.process_time()
        said = learner.predict(question)
        if y:
            learner.learn(lesson, y)
        seconds += time.perf_counter() - began
        busy += time.process_time() - worked
        count += len(batch)
        scored += len(y)
        hits += int((np.asarray(said)[rows] == y).sum())
        unchanged += y.count(last)
        last = y[-1] if y else last
        if number % 16 == 0:
            progress(count)
    progress(count)
    return Pass(scored, hits / max(1, scored), unchanged / max(1, scored), seconds, busy)


def imputed(batches: Sequence[Batch]) -> Iterator[NDArray[np.float64]]:
    """Yield inputs `[n, features]` in which a missing value is the mean of those in earlier batches, 0 for none.

    That is what the engine puts there. Without it one empty cell would end some of the rivals.
    """
    total = count = np.zeros(0)
    for batch in batches:
        x = batch.x.reshape(len(batch), -1).double().numpy()
        missing = np.isnan(x)
        if not len(total):
            total = count = np.zeros(x.shape[1])
        yield np.where(missing, total / np.maximum(count, 1), x)
        total = total + np.where(missing, 0, x).sum(0)
        count = count + (~missing).sum(0)


def table(race: Race, seeds: Sequence[int]) -> Table:
    """Return the figures of one stream for people."""
    stream = race.records.stream
    figures = race.as_json()
    caption = (
        f"{race.records.count:,} records of {race.records.classes} classes in batches of {stream.batch}; the last "
        f"label again: {100 * figures['no_change']:.2f} %"
    )
    headings = ("accuracy\n%", "records\na second", f"times as fast\nas {PACE}")
    shown = of_seeds(stream.name, caption, headings, seeds)
    for name, row in figures["rivals"].items():
        ratio = "-" if row["speed_ratio"] is None else f"{row['speed_ratio']:.1f}"
        shown.add_row(
            Text(name),
            percent(row["accuracy"], row["accuracy_std"]),
            f"{row['records_per_second']:,.0f}",
            ratio,
            style="bold" if name == OURS else "",
        )
    return shown


def of_seeds(title: str, caption: str, headings: Sequence[str], seeds: Sequence[int]) -> Table:
    """Return an empty table of figures under a column of names; its caption tells of the seeds."""
    if len(seeds) > 1:
        caption += f"; mean and standard deviation of seeds {', '.join(map(str, seeds))}"
    shown = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    shown.add_column("")
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    return shown


def percent(value: float, deviation: float | None, *, sign: str = "") -> str:
    """Return a share in percent, with its standard deviation where there is one."""
    beside = "" if deviation is None else f" ±{100 * deviation:.2f}"
    return f"{100 * value:{sign}.2f}{beside}"


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample; None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def made() -> dict[str, Any]:
    """Return when and on what figures were made."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def conditions() -> str:
    """Return the same in a line, and how it was measured."""
    about = made()
    return (
        f"{about['date']}, {about['cores']} cores ({about['machine']}), Python {about['python']}; one process, one "
        "thread; predicting and learning are timed, reading and converting are not"
    )

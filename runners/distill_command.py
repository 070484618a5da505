"""`streamkd distill`: the command around the offline protocols, with its files and its progress bars."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from runners import history, session
from runners.distill import Distilled, Measured, check_empty, distill, make_plan, write
from runners.eval_command import check_targets, of_file, write_json
from runners.evaluate import cell
from runners.feeds import DeadLetter
from runners.history import History
from runners.settings import Configuration, LateLabelSettings, load
from streamkd.settings import Part


def main(
    config: str,
    data: Path,
    *,
    label: str | None,
    batch: int | None,
    seeds: Sequence[int],
    json_to: str | None,
    out: Path | None,
    overrides: Sequence[str],
    **planned: Any,
) -> None:
    """Distil once a seed, and print and write what came of it; `planned` is what `make_plan` takes."""
    check_targets(json_to)
    if out is not None:
        check_empty(out)
    given = of_file(data, label, batch, overrides)
    passes = [_plain(load(config, overrides, {**given, "seed": seed})) for seed in seeds or (None,)]
    console = Console(stderr=json_to == "-")
    with closing(session.start(passes[0])) as running:
        plan = make_plan(running.engine, **planned)
        with _bar(console, "reading") as told:
            read = history.read(running, told)
        done = []
        for configuration in passes:
            with _bar(console, f"seed {configuration.seed}") as told:
                done.append(distill(configuration, read, plan, told))
        for row in sorted(frozenset[int]().union(*(distilled.faulty for distilled in done))):
            running.dead_letters(_letter(row, read))
        refused = dict(running.dead_letters.counts)
    console.print(_table(done))
    console.print(_sizes(done))
    if refused:
        reasons = ", ".join(f"{count:,} {why}" for why, count in sorted(refused.items()))
        console.print(f"refused: {reasons}; see {passes[0].dead_letters.path}", markup=False)
    if json_to is not None:
        results = [_as_json(distilled, read, refused) for distilled in done]
        write_json(json_to, results[0] if len(results) == 1 else results)
    if out is not None:
        path = write(out, done[0], read)
        console.print(f"wrote {path}; begin with it: --set checkpoint.warm_start={out}", markup=False)


def _letter(row: int, read: History) -> DeadLetter:
    """Return a record that no update could be made on."""
    raw = json.dumps({"x": read.x[row].tolist(), "class": int(read.y[row])}).encode()
    return DeadLetter("non_finite_step", "an update on this record alone is not finite", raw, {"record": row + 1})


def _plain(configuration: Configuration) -> Configuration:
    """Return a configuration by which labels come with their records, and no answers go out."""
    return configuration.model_copy(update={"labels": LateLabelSettings(), "predictions": Part(kind="none")})


@contextmanager
def _bar(console: Console, title: str) -> Iterator[Callable[[float], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=1.0)
        yield lambda share: progress.update(task, completed=share)


def _as_json(distilled: Distilled, read: History, refused: Mapping[str, int]) -> dict[str, Any]:
    """Return everything, for machines: shares between 0 and 1."""
    return {
        **distilled.plan.as_json(),
        "seed": distilled.configuration.seed,
        "batch": distilled.configuration.batch,
        "records": len(read),
        "learned": distilled.learned,
        "held_out": distilled.held_out,
        "rows": [asdict(row) for row in distilled.rows],
        "classes": read.known["classes"],
        "dead_letters": refused,
    }


def _table(done: Sequence[Distilled]) -> Table:
    """Return the figures for people: percent, and mean with standard deviation where there are several seeds."""
    first = done[0]
    measure = f"the {first.held_out:,} after them measure" if first.held_out else "none held out to measure on"
    caption = (
        f"{first.learned:,} records learned in batches of {first.configuration.batch}, {measure}; "
        f"{first.plan.teacher} teaches"
    )
    if len(done) > 1:
        caption += f"; mean and standard deviation of seeds {', '.join(str(one.configuration.seed) for one in done)}"
    made = _empty(caption, "", "learned from", "passes", "accuracy\n%", "over itself\nalone", "log-loss")
    alone: tuple[Measured, ...] = ()
    for rows in zip(*(one.rows for one in done), strict=True):
        row = rows[0]
        taught = row.peer in first.plan.students and not row.alone
        made.add_row(
            Text(f"{row.peer} (teacher)" if row.peer == first.plan.teacher else row.peer),
            f"{row.learned}, alone" if row.alone else row.learned,
            f"{row.passes}",
            cell(rows, "accuracy"),
            _gain(rows, alone) if taught else "",
            cell(rows, "log_loss"),
            style="bold" if taught else "",
        )
        alone = rows if row.alone else ()
    return made


def _sizes(done: Sequence[Distilled]) -> Table:
    """Return what a peer costs."""
    made = _empty(f"answered in batches of {done[0].configuration.batch}", "", "parameters", "records\na second")
    for name in done[0].engine.cohort.names:
        rows = [row for one in done for row in one.rows if row.peer == name]
        speeds = [row.records_per_second for row in rows if row.records_per_second is not None]
        size = rows[0].parameters
        made.add_row(Text(name), f"{size:,}" if size else "-", f"{median(speeds):,.0f}" if speeds else "-")
    return made


def _empty(caption: str, *headings: str) -> Table:
    made = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        made.add_column(heading, justify="left" if heading in {"", "learned from"} else "right", no_wrap=True)
    return made


def _gain(taught: Sequence[Measured], alone: Sequence[Measured]) -> str:
    """Return the points of accuracy that the teacher was worth, seed by seed."""
    pairs = zip(taught, alone, strict=True) if alone else ()
    gains = [
        100 * (one.accuracy - other.accuracy)
        for one, other in pairs
        if one.accuracy is not None and other.accuracy is not None
    ]
    if not gains:
        return "-"
    return f"{mean(gains):+.2f}" + (f" ±{stdev(gains):.2f}" if len(gains) > 1 else "")

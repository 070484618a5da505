"""`streamkd eval`: the command around an evaluation, with its files and its progress bar."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from runners import picture
from runners.evaluate import Evaluation, evaluate, table
from runners.settings import Configuration, load
from streamkd.errors import ConfigError

KINDS = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".npz": "npz",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
"""The kind of feed that a file's suffix tells."""


def main(
    config: str,
    data: Path,
    *,
    label: str | None,
    batch: int | None,
    seeds: Sequence[int],
    json_to: str | None,
    plot: Path | None,
    labels: float,
    overrides: Sequence[str],
) -> None:
    """Evaluate once a seed, and print, write and draw what came of it."""
    check_targets(json_to, plot=plot)
    given = of_file(data, label, batch, overrides)
    if not 0 < labels <= 1:
        raise ConfigError(f"--labels {labels}: a share; give one above 0, and 1 at the most")
    passes = [_of_history(load(config, overrides, {**given, "seed": seed})) for seed in seeds or (None,)]
    if labels < 1 and passes[0].labels.delay:
        raise ConfigError(f"--labels {labels}: with labels.delay every label comes in the end; set one of the two")
    # Figures for machines alone on standard output; what is for people goes beside it.
    console = Console(stderr=json_to == "-")
    done = [_one(configuration, labels, console) for configuration in passes]
    console.print(table(done))
    for evaluation in done:
        _tell_refused(evaluation, passes[0], console)
    for trouble in {evaluation.uncompiled: None for evaluation in done if evaluation.uncompiled}:
        console.print(f"not compiled: {trouble}; it learned as without compile = true, only slower", markup=False)
    if json_to is not None:
        results = [evaluation.as_json() for evaluation in done]
        write_json(json_to, results[0] if len(results) == 1 else results)
    if plot is not None:
        picture.draw(plot, done[0].tally, done[0].trace, title=f"{data.name}, seed {done[0].seed}")
        console.print(f"picture: {plot}", markup=False)


def of_file(data: Path, label: str | None, batch: int | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings that read a file, key.path -> value; its kind is told by its name, unless it is overridden.

    Args:
        data: the file.
        label: column that holds the labels; None leaves it to the configuration, as with the batch.
        batch: records a step.
        overrides: as the user gave them.
    """
    named = any(override.startswith("feed.kind=") for override in overrides)
    return {
        "feed.path": str(data),
        "feed.label": label,
        "batch": batch,
        "feed.kind": None if named else kind_of(data),
    }


def kind_of(data: Path) -> str | None:
    """Return the kind of feed that a file's name tells, or that it is a folder; None where it tells nothing."""
    if os.path.isdir(data):  # noqa: PTH112 - pathlib's raises for a name that is too long, which the feed is to tell
        return "images"
    suffixes = [suffix for suffix in data.suffixes if suffix != ".gz"]
    return KINDS.get(suffixes[-1].lower()) if suffixes else None


def _of_history(configuration: Configuration) -> Configuration:
    """Return a configuration by which labels come with their records, unless these have ids alone to join them by."""
    options = configuration.feed.options if configuration.feed else {}
    if options.get("id") and not options.get("label"):
        return configuration
    return configuration.model_copy(update={"labels": configuration.labels.model_copy(update={"feed": None})})


def _one(configuration: Configuration, labels: float, console: Console) -> Evaluation:
    columns = (
        TextColumn("seed {task.fields[seed]}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[records]:,} records"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=1.0, seed=configuration.seed, records=0)
        return evaluate(
            configuration, lambda share, n: progress.update(task, completed=share, records=n), labels=labels
        )


def _tell_refused(evaluation: Evaluation, configuration: Configuration, console: Console) -> None:
    if evaluation.refused:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(evaluation.refused.items()))
        console.print(
            f"refused, seed {evaluation.seed}: {reasons}; see {configuration.dead_letters.path}", markup=False
        )


def check_targets(*targets: str | Path | None, plot: Path | None = None) -> None:
    """Refuse files that could not be written once the work is done; None and - are none.

    Raises:
        ConfigError: there is no such folder, or the plot is to be no picture.
    """
    if plot is not None:
        picture.check_format(plot)
    for target in (path for path in (*targets, plot) if path not in {None, "-"}):
        if not Path(str(target)).absolute().parent.is_dir():
            raise ConfigError(
                f"{target}: there is no folder {Path(str(target)).parent} to write it into; make it first"
            )


def write_json(target: str, value: Any) -> None:
    """Write `value` to a file, or to standard output for -.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = json.dumps(value, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {target}: cannot be written: {error.strerror}") from None

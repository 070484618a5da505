"""`streamkd bench`: the benchmarks' part of the command line. Nothing heavy is imported before a command needs it."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

from runners.arguments import Batch, Json, Label, Records, Seeds, Some

bench = App(name="bench", help="Benchmarks: claims that you can check on your machine.", help_format="markdown")


@bench.command
def kill(*configurations: str, kills: Some = 100, seed: int = 0) -> None:
    """Kill runs with SIGKILL, half of them inside a save, resume them, and compare where they end.

    Parameters
    ----------
    configurations
        Names of shipped ones; all of them, if none is named.
    kills
        For each.
    seed
        Of the moments.
    """
    from rich.console import Console

    from runners.bench.kill import main as runner

    runner(configurations, kills=kills, seed=seed, console=Console())


@bench.command
def soak(*, records: Some = 1_000_000, batch: Some = 16) -> None:
    """Learn a long stream with the whole daemon; say whether memory and time a step stay flat.

    Parameters
    ----------
    records
        Of the stream.
    batch
        Records a step.
    """
    from rich.console import Console

    from runners.bench.soak import main as runner

    runner(records, batch, Console())


Rounds = Annotated[int, Parameter(validator=Number(gte=1), help="Turns of each; the medians are over these.")]


@bench.command
def overhead(*, rounds: Rounds = 40, json: Json = None) -> None:
    """Hold the engine to loops written by hand: the same arithmetic with nothing around it, and torch as it comes."""
    from runners.bench.overhead import main as runner

    runner(rounds=rounds, json_to=json)


@bench.command
def replay(*, rounds: Rounds = 40, json: Json = None) -> None:
    """Time a draw from memories of a thousand to a million records, and the new priorities after it."""
    from runners.bench.replay import main as runner

    runner(rounds=rounds, json_to=json)


@bench.command
def scale(*, rounds: Rounds = 40, json: Json = None) -> None:
    """Time a step of two, four and eight peers of one shape, together and one by one."""
    from runners.bench.scale import main as runner

    runner(rounds=rounds, json_to=json)


@bench.command
def rivals(
    *data: Path,
    label: Label = None,
    batch: Batch = 16,
    seed: Seeds = (0, 1, 2),
    records: Records = None,
    json: Json = None,
) -> None:
    """Race the shipped default, compiled and not, against river's forests, deep-river's networks and MOA's learners.

    Same records, same batches, one process, one thread: accuracy and records per second side by side.

    Parameters
    ----------
    data
        CSV or JSON lines, plain or gzip; a made-up stream that drifts, if none is named.
    """
    from runners.bench.rivals import main as runner

    runner(data, label=label, batch=batch, seeds=seed, records=records, json_to=json)


@bench.command
def ablation(
    *data: Path,
    label: Label = None,
    batch: Batch = 16,
    seed: Seeds = (0, 1, 2),
    records: Records = None,
    json: Json = None,
    plot: Annotated[Path | None, Parameter(help="Draw the differences from the default there.")] = None,
    jobs: Annotated[
        int | None, Parameter(validator=Number(gte=1), help="Processes at once; the number of cores, unless set.")
    ] = None,
) -> None:
    """Switch every mechanism of the default off, one at a time and from the bottom up, and say what it costs.

    Every row is a list of settings, so `streamkd eval default FILE --set ...` gives the same figures; --json has them.

    Parameters
    ----------
    data
        CSV or JSON lines, plain or gzip; a made-up stream that drifts, if none is named.
    """
    from runners.bench.ablation import main as runner

    runner(data, label=label, batch=batch, seeds=seed, records=records, json_to=json, plot=plot, jobs=jobs)


@bench.command
def split(
    data: Path | None = None,
    *,
    dataset: Annotated[
        str | None, Parameter(help="Of torchvision, instead of a file; it must be there already.")
    ] = None,
    root: Annotated[Path, Parameter(help="Folder in which that dataset lies.")] = Path("data"),
    tasks: Annotated[int, Parameter(validator=Number(gte=2), help="Groups that the classes come in.")] = 5,
    records: Annotated[int | None, Parameter(validator=Number(gte=1), help="Of each task; all, unless set.")] = None,
    batch: Batch = 10,
    memory: Annotated[int, Parameter(validator=Number(gte=1), help="Images remembered.")] = 1_000,
    drawn: Annotated[int, Parameter(validator=Number(gte=1), help="Of them, drawn for each update.")] = 64,
    seed: Seeds = (0, 1, 2),
    json: Json = None,
) -> None:
    """Learn classes that come task after task, once, without being told; say what is left of them at the end.

    Experience replay, deep mutual learning, averaged teachers, ER-ACE, CCL-DC and the shipped `images`, with the same
    networks, memory and draws; passes over what is learned are counted.

    Parameters
    ----------
    data
        An .npz file with arrays x_train, y_train, x_test and y_test, or X, y, X_test and y_test.
    """
    from runners.bench.split import Settings, main

    settings = Settings(batch, memory, drawn)
    main(
        data,
        dataset=dataset,
        root=root,
        tasks=tasks,
        records=records,
        settings=settings,
        seeds=seed,
        json_to=json,
    )


@bench.command
def published(
    *data: Path,
    label: Label = None,
    batch: Batch = 16,
    seed: Seeds = (0, 1, 2),
    records: Records = None,
    json: Json = None,
) -> None:
    """Measure the rows of the articles' ablation, by their rules and by ours: is each better than the one before?

    Tables are learned as they come, images in five tasks of classes.

    Parameters
    ----------
    data
        CSV, JSON lines, or .npz with arrays for testing; a made-up stream that drifts, if none is named.
    """
    from runners.bench.published import main as runner

    runner(data, label=label, batch=batch, seeds=seed, records=records, json_to=json)


@bench.command
def feeds(
    data: Path,
    *,
    label: Annotated[str, Parameter(help="Column that holds the labels.")],
    passes: Some = 3,
    url: Annotated[str, Parameter(help="Of a Redis server; one is started, unless it is given.")] = "",
) -> None:
    """Learn a table from its file, and from Redis while it is being published there; print how fast.

    Parameters
    ----------
    data
        CSV, plain or gzip.
    passes
        Of each, in turn.
    """
    from rich.console import Console

    from runners.bench.feeds import main as runner

    runner(data, label, passes=passes, url=url, console=Console())


@bench.command
def ahead(
    *,
    records: Annotated[
        int, Parameter(validator=Number(gte=10), help="Images of each size; tables have ten times as many.")
    ] = 2_000,
    most: Annotated[int, Parameter(validator=Number(gte=1, lte=1_024), help="Batches decoded ahead.")] = 8,
    rounds: Rounds = 5,
    url: Annotated[str, Parameter(help="Of a Redis server; one is started, unless it is given.")] = "",
    json: Json = None,
) -> None:
    """Evaluate images, a table and a stream, decoded ahead (`read_ahead`) and not; print how fast."""
    from runners.bench.ahead import main as runner

    runner(records=records, most=most, rounds=rounds, url=url, json_to=json)

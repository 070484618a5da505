"""The command line. Nothing heavy is imported before a command needs it, so that help comes at once."""

import sys
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

app = App(
    name="streamkd",
    version=lambda: version("streamkd"),
    help="Online mutual distillation for streaming data: peers that keep learning while the world drifts.",
    help_format="markdown",
)
Set = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set", negative="", show_default=False, help="Override one setting: key.path=value. May be repeated."
    ),
]
Label = Annotated[str | None, Parameter(help="Column that holds the labels.")]
Batch = Annotated[
    int, Parameter(validator=Number(gte=1), help="Records predicted before any of their labels is learned.")
]
Seeds = Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="", help="One pass for each.")]
OwnSeeds = Annotated[
    tuple[int, ...], Parameter(consume_multiple=True, negative="", show_default=False, help="One pass for each.")
]
Count = Annotated[int, Parameter(validator=Number(gte=0))]
Some = Annotated[int, Parameter(validator=Number(gte=1))]
Records = Annotated[int | None, Parameter(validator=Number(gte=1), help="End each stream after as many.")]
Json = Annotated[
    str | None, Parameter(allow_leading_hyphen=True, help="Write the figures there; - is standard output.")
]


bench = App(name="bench", help="Benchmarks: claims that you can check on your machine.", help_format="markdown")
app.command(bench)


@app.command
def demo(
    *,
    records: Annotated[int | None, Parameter(help="Length of the stream; 100,000 unless set.")] = None,
    seed: int | None = None,
    port: Annotated[int | None, Parameter(help="Of /metrics, /healthz and /readyz; 9464 unless set.")] = None,
    live: Annotated[bool | None, Parameter(negative="--no-live", help="A view that redraws itself.")] = None,
    picture: Annotated[Path, Parameter(help="Where the picture is written.")] = Path("demo.png"),
    set_: Set = (),
) -> None:
    """Learn a made-up stream with four known drifts, for half a minute.

    Needs no configuration, no data and no network. Ends with a table and a picture.
    """
    from rich.console import Console

    from runners import demo as runner
    from runners.settings import load

    console = Console()
    extra = {"feed.records": records, "feed.seed": seed, "seed": seed, "http.port": port}
    configuration = load("demo", set_, extra)
    runner.run(configuration, console, live=console.is_terminal if live is None else live, file=picture)


@app.command
def run(config: str, *, set_: Set = ()) -> None:
    """Learn a feed until it ends or SIGTERM comes.

    Serves metrics, logs to standard error, saves checkpoints, and goes on where the last run stopped.

    Parameters
    ----------
    config
        A TOML file, or the name of a shipped configuration.
    """
    from runners import logs, saver, session
    from runners.daemon import Daemon, fronted
    from runners.settings import load

    configuration = load(config, set_)
    log = logs.configure(configuration.log.level)
    with fronted(configuration, log) as front:
        learned = saver.learned(configuration.checkpoint.directory)
        with closing(session.start(configuration, learned=learned)) as running:
            Daemon(running, front, log, reload=lambda: load(config, set_)).run()


@app.command
def check(config: str, *, set_: Set = ()) -> None:
    """Say whether a configuration would run, and with what.

    Prints it with all defaults, reads the first records, and tries the models on them. Exit code 2 where it would not.

    Parameters
    ----------
    config
        A TOML file, or the name of a shipped configuration.
    """
    from rich.console import Console

    from runners.check import check as runner
    from runners.settings import load
    from streamkd.errors import ConfigError, StreamkdError

    try:
        runner(load(config, set_), Console())
    except StreamkdError as error:
        raise ConfigError(str(error)) from error


@app.command(name="eval")
def evaluate(
    config: str,
    data: Path,
    *,
    label: Label = None,
    batch: Annotated[int | None, Parameter(help="Records predicted before any of their labels is learned.")] = None,
    seed: OwnSeeds = (),
    json: Json = None,
    plot: Annotated[Path | None, Parameter(help="Draw accuracy over time there.")] = None,
    labels: Annotated[float, Parameter(help="Share of the records whose label is revealed; all are scored.")] = 1.0,
    set_: Set = (),
) -> None:
    """Evaluate on a history: every batch is predicted whole, then its labels are revealed and learned.

    Parameters
    ----------
    config
        A TOML file, or the name of a shipped configuration.
    data
        CSV or JSON lines, plain or gzip; Parquet or Arrow; images in an .npz file, or in a folder with a sub-folder a
        class.
    """
    from runners.eval_command import main as runner

    runner(config, data, label=label, batch=batch, seeds=seed, json_to=json, plot=plot, labels=labels, overrides=set_)


@app.command
def distill(
    config: str,
    data: Path,
    *,
    protocol: Annotated[
        Literal["three_stage", "static"],
        Parameter(
            help="three_stage: students learn the teacher's softened answers, then the labels. static: both at once."
        ),
    ] = "three_stage",
    teacher: Annotated[str | None, Parameter(help="The peer who teaches; the largest, unless set.")] = None,
    student: Annotated[
        tuple[str, ...],
        Parameter(
            consume_multiple=True, negative="", show_default=False, help="Peers to teach; all others, unless set."
        ),
    ] = (),
    label: Label = None,
    epochs: Annotated[
        tuple[Count, ...],
        Parameter(
            consume_multiple=True,
            negative="",
            show_default=lambda passes: " ".join(map(str, passes)),
            help="Passes of the teacher and of each stage: one number, or each.",
        ),
    ] = (5,),
    holdout: Annotated[
        float, Parameter(validator=Number(gte=0, lt=1), help="The last share, which measures and is not learned.")
    ] = 0.2,
    temperature: Annotated[
        float, Parameter(validator=Number(gt=0, lt=1e4), help="At which answers are compared.")
    ] = 4.0,
    alpha: Annotated[
        float, Parameter(validator=Number(gte=0, lte=1), help="Weight of the teacher beside the labels, for static.")
    ] = 0.5,
    batch: Annotated[int | None, Parameter(validator=Number(gte=1), help="Records an update.")] = None,
    seed: OwnSeeds = (),
    json: Json = None,
    out: Annotated[
        Path | None, Parameter(help="Write a checkpoint for checkpoint.warm_start, of the first seed.")
    ] = None,
    set_: Set = (),
) -> None:
    """Learn a history in several passes: a teacher from the labels, students from the teacher.

    The same students alone, with as many updates, are measured beside them. What all have learned can be written for a
    run to begin with.

    Parameters
    ----------
    config
        A TOML file, or the name of a shipped configuration.
    data
        CSV or JSON lines, plain or gzip; Parquet or Arrow; images in an .npz file, or in a folder with a sub-folder a
        class. Held in memory; images are learned as they are, without inputs.augment.
    """
    from runners.distill_command import main as runner

    runner(
        config,
        data,
        label=label,
        batch=batch,
        seeds=seed,
        json_to=json,
        out=out,
        overrides=set_,
        protocol=protocol,
        epochs=epochs,
        teacher=teacher,
        students=student,
        temperature=temperature,
        alpha=alpha,
        holdout=holdout,
    )


@app.command
def inspect(
    directory: Path, *, json: Annotated[bool, Parameter(negative="", help="For machines, to standard output.")] = False
) -> None:
    """Show what is in a checkpoint, and whether it is whole.

    Parameters
    ----------
    directory
        A checkpoint, or a folder of them, of which the newest is taken.
    """
    from runners.inspect_command import main as runner

    runner(directory, as_json=json)


@app.command
def init(name: str | None = None) -> None:
    """List the shipped configurations, or write one into the current folder.

    Parameters
    ----------
    name
        Of the configuration; `default` becomes `default.toml`.
    """
    from runners.shipped import shipped
    from streamkd.errors import ConfigError

    ready = shipped()
    if name is None:
        for known, text in ready.items():
            sys.stdout.write(f"{known:10} {text.splitlines()[0].lstrip('# ')}\n")
        return
    if name not in ready:
        raise ConfigError(f"{name}: no shipped configuration of that name; there are {', '.join(ready)}")
    target = Path(f"{name}.toml")
    if target.exists():
        raise ConfigError(f"{target}: is there already; move it away first")
    target.write_text(ready[name], encoding="utf-8")
    sys.stdout.write(f"wrote {target}\n")


@app.command
def methods(name: str | None = None) -> None:
    """List every loss, schedule, detector and other part that a configuration can name, each with its source.

    Parameters
    ----------
    name
        Of one of them: tells its formula, its options and their defaults.
    """
    from runners.methods_command import main as runner

    runner(name)


@app.command
def watch(
    url: str = "http://127.0.0.1:9464",
    *,
    once: Annotated[bool, Parameter(negative="", help="Print how things stand, and end.")] = False,
) -> None:
    """Show a running daemon in the terminal, from its /metrics.

    Parameters
    ----------
    url
        Of the daemon.
    """
    from rich.console import Console

    from runners.watch import main as runner

    runner(url, Console(), once=once)


@app.command
def dashboards(directory: Path) -> None:
    """Write what Prometheus, Alertmanager and Grafana need to watch streamkd: rules, dashboards, runbooks.

    Parameters
    ----------
    directory
        Where to; made if it is not there.
    """
    from runners.dashboards_command import main as runner

    runner(directory)
    sys.stdout.write(f"wrote {directory}; start with {directory / 'README.md'}\n")


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
    """Race the shipped default against river's forests, deep-river's networks and MOA's learners.

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


def main() -> None:
    """Run a command; end with the exit code that its mistake calls for, and without a traceback."""
    sys.path.insert(0, "")  # module:Name in a configuration may be a file of the current folder
    try:
        app(sys.argv[1:], exit_on_error=False)
    except CycloptsError:
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from streamkd.errors import StreamkdError

        if not isinstance(error, StreamkdError):
            raise
        from rich.console import Console

        from runners.passwords import masked

        console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
        with suppress(OSError, SystemExit):  # rich would end with 1 where nobody reads it
            console.print("[bold red]streamkd:[/]", end=" ")
            console.print(masked(str(error)), markup=False)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

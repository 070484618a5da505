"""The command line. Nothing heavy is imported before a command needs it, so that help comes at once."""

import os
import sys
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

from runners.arguments import Count, Json, Label, OwnSeeds, Set
from runners.bench.commands import bench

app = App(
    name="streamkd",
    version=lambda: version("streamkd"),
    help="Online mutual distillation for streaming data: peers that keep learning while the world drifts.",
    help_format="markdown",
)
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


def main() -> None:
    """Run a command; end with the exit code that its mistake calls for, and without a traceback."""
    sys.path.insert(0, "")  # module:Name in a configuration may be a file of the current folder
    if sys.stderr is None:  # it was closed: what is logged goes nowhere
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long as the process
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

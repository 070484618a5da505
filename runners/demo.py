"""A made-up stream with known drifts, learned in front of the user's eyes."""

import time
from contextlib import ExitStack, closing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from monitoring.prequential import WINDOW, Tally
from monitoring.standing import Reader
from monitoring.trace import Trace
from runners import logs, picture, session
from runners.daemon import Daemon, fronted
from runners.eval_command import check_targets
from runners.evaluate import Evaluation, table
from runners.settings import Configuration
from runners.view import View, plain
from streamkd.report import SERVED, Report

CLOSE = 0.03
"""Accuracy within this of its level before a drift counts as recovered."""


def run(configuration: Configuration, console: Console, *, live: bool, file: Path) -> None:
    """Learn the stream of the configuration, show it, and draw it.

    Args:
        configuration: of the demo.
        console: where to.
        live: a view that redraws itself, rather than lines.
        file: of the picture.

    Raises:
        ConfigError: the picture could not be written there.
    """
    check_targets(plot=file)
    with closing(session.start(configuration)) as running:
        _learn(running, console, live=live, file=file)


def _learn(running: session.Session, console: Console, *, live: bool, file: Path) -> None:
    configuration = running.configuration
    about = running.feed.describe()
    records, drifts = about["records"], about["drifts"]
    tally, trace = Tally(), Trace()

    def keep(report: Report) -> None:
        tally.update(report)
        trace.update(report, tally)

    log = logs.configure("error")
    address = f"http://{configuration.http.host}"
    heading = f"{records:,} records, true drifts at {', '.join(f'{record:,}' for record in drifts)}"
    began = time.perf_counter()
    with ExitStack() as stack:
        lines = [] if live else [plain(console, tally, max(1, records // 10))]
        front = stack.enter_context(fronted(configuration, log))
        console.print(f"{address}:{front.server.port}/metrics  /healthz  /readyz")
        daemon = Daemon(running, front, log, keep, *lines, resume=False)
        if live:
            reader, metrics = Reader(), daemon.metrics
            view = View(
                console,
                lambda: reader.read(metrics.registry.collect(), time.time()),
                heading=lambda: heading,
                total=records,
            )
            stack.enter_context(view.live)
        else:
            console.print(heading)
        daemon.run()
    seconds = time.perf_counter() - began
    result = Evaluation(configuration.seed, configuration.batch, tally, trace, seconds, {}, [])
    console.print(table([result]))
    console.print(recoveries(tally, trace, drifts))
    picture.draw(file, tally, trace, title=f"A made-up stream with {len(drifts)} drifts", drifts=drifts)
    console.print(f"picture: {file}")


def recoveries(tally: Tally, trace: Trace, drifts: list[int]) -> Table:
    """Return what each true drift did to the served answer: when it was found, and when it was overcome."""
    made = Table(title="The served answer at each true drift", title_justify="left")
    for heading in ("drift at", "found after", "accuracy before", "lowest", "at the end", "back after"):
        made.add_column(heading, justify="right")
    points = list(zip(trace.records, trace.accuracy.get(SERVED, []), strict=True))
    for start, end in zip(drifts, [*drifts[1:], tally.scored + 1], strict=True):
        before = [value for record, value in points if record <= start]
        after = [(record, value) for record, value in points if start < record <= end]
        if not before or not after:
            continue
        level, lowest = before[-1], min(after, key=lambda point: point[1])
        found = [record - start for record in tally.drifts if start < record <= end]
        back = [record - start for record, value in after if record >= lowest[0] and value >= level - CLOSE]
        made.add_row(
            f"{start:,}",
            f"{found[0]:,}" if found else "not found",
            f"{100 * level:.1f} %",
            f"{100 * lowest[1]:.1f} %",
            f"{100 * after[-1][1]:.1f} %",
            f"{back[0]:,}" if back else "not yet",
        )
    made.caption = f"accuracy over the last {WINDOW:,} records; back: within {100 * CLOSE:.0f} points of before"
    made.caption_justify = "left"
    return made

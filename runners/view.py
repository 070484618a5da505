"""The live view in a terminal."""

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from monitoring.prequential import Tally
from streamkd.report import SERVED, Report


class View:
    """Shows the latest report, a few times a second; `with` puts it on the screen.

    Args:
        console: where.
        tally: counts of the run, kept up to date by someone else.
        total: records to come in all.
        heading: a line on top.
    """

    def __init__(self, console: Console, tally: Tally, *, total: int, heading: str) -> None:
        self._tally = tally
        self._heading = heading
        self._latest: Report | None = None
        self._last_drift = ""
        self._last_swap = ""
        self._progress = Progress(
            TextColumn("records"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("records", total=total, speed="")
        self._began = time.monotonic()
        self.live = Live(console=console, get_renderable=self._draw, refresh_per_second=6)

    def __call__(self, report: Report) -> None:
        """Take in one batch."""
        self._latest = report
        speed = report.records / max(1e-9, time.monotonic() - self._began)
        self._progress.update(self._task, completed=report.records, speed=f"{speed:,.0f}/s")
        for alarm in report.drift:
            self._last_drift = f"last at record {alarm.record:,}"
        if report.swap is not None:
            swap = report.swap
            self._last_swap = f"last at record {report.records:,}: {swap.before} to {swap.after} ({swap.reason})"

    def _draw(self) -> RenderableType:
        report, tally = self._latest, self._tally
        if report is None or not tally.scored:
            return Panel(Group(self._heading, self._progress), title="streamkd")
        events = Text(
            f"drifts found {len(tally.drifts)}  {self._last_drift}\nrole swaps   {len(tally.swaps)}  {self._last_swap}"
        )
        return Panel(Group(self._heading, self._progress, peers_table(report, tally), events), title="streamkd")


def peers_table(report: Report, tally: Tally) -> Table:
    """Return a row for the served answer and one a peer."""
    made = Table(expand=True)
    for heading in ("", "accuracy, last 1,000", "role", "weight", "temperature", "alpha", "loss"):
        made.add_column(heading, justify="left" if heading in {"", "role"} else "right")
    made.add_row(SERVED, f"{100 * tally.recent[SERVED].accuracy:.1f} %", "", "", "", "", "", style="bold")
    for name, peer in report.peers.items():
        heard = [alpha for (_, student), alpha in report.alphas.items() if student == name]
        made.add_row(
            name,
            f"{100 * tally.recent[name].accuracy:.1f} %",
            "teacher" if name == report.teacher else "student",
            f"{100 * peer.weight:.0f} %",
            f"{peer.temperature:.2f}",
            f"{sum(heard) / len(heard):.2f}" if heard else "-",
            f"{peer.loss:.3f}",
        )
    return made


def plain(console: Console, tally: Tally, every: int) -> Callable[[Report], None]:
    """Return an observer that prints a line now and then, for where there is no terminal."""

    def line(report: Report) -> None:
        for alarm in report.drift:
            console.print(f"{report.records:>9,}  drift found at record {alarm.record:,}")
        if report.swap is not None:
            swap = report.swap
            console.print(f"{report.records:>9,}  role swap: {swap.before} to {swap.after} ({swap.reason})")
        if report.records // every > (report.records - report.size) // every:
            accuracies = ", ".join(
                f"{name} {100 * tally.recent[name].accuracy:.1f} %" for name in [SERVED, *report.peers]
            )
            console.print(f"{report.records:>9,}  {accuracies}; teacher {report.teacher}", soft_wrap=True)

    return line

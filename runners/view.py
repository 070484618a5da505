"""The live view in a terminal."""

from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from monitoring.prequential import Tally
from monitoring.standing import Standing
from streamkd.report import SERVED, Report


class View:
    """Shows how things stand, again and again; `with view.live` puts it on the screen.

    Args:
        console: where.
        read: returns how things stand.
        heading: a line on top, asked for each time.
        total: records to come in all, where that is known.
        per_second: how often it is drawn.
    """

    def __init__(
        self,
        console: Console,
        read: Callable[[], Standing],
        *,
        heading: Callable[[], str],
        total: int | None = None,
        per_second: float = 6,
    ) -> None:
        self._read = read
        self._heading = heading
        self._total = total
        self._progress = Progress(
            TextColumn("records"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("records", total=total)
        self.live = Live(console=console, get_renderable=self.draw, refresh_per_second=per_second)

    def draw(self) -> RenderableType:
        """Return what is shown."""
        standing = self._read()
        self._progress.update(self._task, completed=standing.records)
        progress = [] if self._total is None else [self._progress]
        shown = Group(Text(self._heading()), *progress, peers_table(standing), Text(events(standing)))
        return Panel(shown, title="streamkd")


def peers_table(standing: Standing) -> Table:
    """Return a row for the served answer and one a peer."""
    made = Table(expand=True)
    for heading in ("", "accuracy, last 1,000", "role", "weight", "temperature", "alpha", "loss"):
        made.add_column(heading, justify="left" if heading in {"", "role"} else "right")
    made.add_row(SERVED, _percent(standing.accuracy, 1), "", "", "", "", "", style="bold")
    for name, peer in standing.peers.items():
        made.add_row(
            Text(name),
            _percent(peer.accuracy, 1),
            "teacher" if peer.teacher else "student",
            _percent(peer.weight),
            f"{peer.temperature:.2f}",
            "-" if peer.alpha is None else f"{peer.alpha:.2f}",
            "-" if peer.loss is None else f"{peer.loss:.3f}",
        )
    return made


def events(standing: Standing) -> str:
    """Return what happened so far, in a few lines."""
    ago = "" if standing.since_drift is None else f", the last {standing.since_drift:,.0f} s ago"
    waiting = "" if standing.lag is None else f", {standing.lag:,} wait in the feed"
    return (
        f"{standing.state}: {standing.records:,} records, {standing.speed:,.0f}/s{waiting}\n"
        f"drifts found {standing.drifts:,}{ago}; role swaps {standing.swaps:,}; "
        f"the peers agree in {_percent(standing.agreement)}\n"
        f"refused {standing.refused:,}; labels awaited {standing.pending:,}; "
        f"since the last checkpoint {standing.uncovered:,}"
    )


def _percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def plain(console: Console, tally: Tally, every: int) -> Callable[[Report], None]:
    """Return an observer that prints a line now and then, for where there is no terminal."""

    def line(report: Report) -> None:
        for alarm in report.drift:
            console.print(f"{report.records:>9,}  drift found at record {alarm.record:,}")
        if report.swap is not None:
            swap = report.swap
            console.print(f"{report.records:>9,}  role swap: {swap.before} to {swap.after} ({swap.reason})")
        if report.records // every > (report.records - report.size) // every:
            accuracies = ", ".join(f"{name} {100 * tally.recent(name):.1f} %" for name in [SERVED, *report.peers])
            console.print(f"{report.records:>9,}  {accuracies}; teacher {report.teacher}", soft_wrap=True)

    return line

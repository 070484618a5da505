"""A run at a glance: accuracy over time, drifts, swaps."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from monitoring.prequential import WINDOW, Tally
from monitoring.trace import Trace
from streamkd.errors import ConfigError
from streamkd.report import SERVED

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def check_format(path: Path) -> None:
    """Refuse the name of a file that no picture can be written to.

    Raises:
        ConfigError: its ending names no format.
    """
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        raise ConfigError(f"{path}: there are no pictures of this ending; end its name in .png, .svg or .pdf")


def draw(path: Path, tally: Tally, trace: Trace, *, title: str, drifts: Sequence[int] = ()) -> None:
    """Write the picture.

    Args:
        path: of the file; its ending names the format.
        tally: counts, for the drifts found and the swaps.
        trace: recent accuracy over time.
        title: above the picture.
        drifts: where the world truly changed, where that is known.

    Raises:
        ConfigError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = sorted(trace.accuracy, key=lambda name: name == SERVED)  # the served answer on top
    for index, name in enumerate(names):
        served = name == SERVED
        axes.plot(
            trace.records,
            [100 * value for value in trace.accuracy[name]],
            label="served answer" if served else name,
            color="black" if served else COLOURS[index % len(COLOURS)],
            linewidth=1.8 if served else 1.1,
        )
    for number, record in enumerate(drifts):
        label = "true drift" if number == 0 else None
        axes.axvline(record, color="0.75", linewidth=6, zorder=0, label=label)
    for number, record in enumerate(tally.drifts):
        label = "drift found" if number == 0 else None
        axes.axvline(record, color="#cc3311", linewidth=1, linestyle="--", zorder=1, label=label)
    floor = _floor(trace)
    axes.set_ylim(bottom=floor)
    if tally.swaps:
        places = [swap["record"] for swap in tally.swaps]
        axes.plot(places, [floor] * len(places), "^", color="#aa3377", markersize=8, clip_on=False, label="role swap")
    axes.set_xlabel("records learned")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel(f"accuracy over the last {WINDOW:,} records, %")
    axes.set_title(title, loc="left", parse_math=False)
    axes.margins(x=0.01)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if trace.records:
        axes.legend(loc="lower right", ncols=4, framealpha=0.9, fontsize="small")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the picture cannot be written: {error}") from None


def _floor(trace: Trace) -> float:
    """Return where the axis starts: the climb from nothing may leave the picture, so that the rest can be seen."""
    settled = [
        100 * value
        for points in trace.accuracy.values()
        for record, value in zip(trace.records, points, strict=True)
        if record > WINDOW
    ]
    return max(0.0, min(settled) - 4) if settled else 0.0

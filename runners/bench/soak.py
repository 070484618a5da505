"""`streamkd bench soak`: do memory and time stay flat, however long the stream?"""

import os
import time
from contextlib import chdir, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from runners import logs, session
from runners.daemon import Daemon, Observer, fronted
from runners.settings import load
from streamkd.report import Report

PARTS = 10
SAVES = 50
WAITED, PHASE = "streamkd_step_duration_seconds", {"phase": "checkpoint"}


@dataclass(frozen=True, slots=True)
class Stretch:
    """A tenth of the stream.

    Attributes:
        records: learned at its end.
        memory: resident then, in bytes.
        step: median, in seconds.
        pace: the median step over the median of a fixed computation beside it, since machines have their moods.
    """

    records: int
    memory: int
    step: float
    pace: float


def main(records: int, batch: int, console: Console) -> None:
    """Learn a long stream, and print what each tenth of it took."""
    with Progress(console=console) as progress:
        task = progress.add_task(f"{records:,} records", total=records)
        stretches, held = soak(records, batch, lambda report: progress.update(task, completed=report.records))
    made = Table("records", "resident memory", "a step, median", "over a fixed load", box=None, pad_edge=False)
    for stretch in stretches:
        memory, step = f"{stretch.memory / 2**20:,.1f} MiB", f"{1e3 * stretch.step:.3f} ms"
        made.add_row(f"{stretch.records:,}", memory, step, f"{stretch.pace:.2f}")
    console.print(made)
    console.print(f"a save held learning up by {1e3 * held:.2f} ms, the mean of {SAVES}")
    console.print(
        f"after the first tenth: memory {100 * growth([s.memory for s in stretches]):+.2f} %, "
        f"step {100 * growth([s.step for s in stretches]):+.2f} %, over the fixed load "
        f"{100 * growth([s.pace for s in stretches]):+.2f} % in the last tenth against the second"
    )


def soak(records: int, batch: int, observe: Observer = lambda _: None) -> tuple[list[Stretch], float]:
    """Run the daemon with all that belongs to it (metrics, server, checkpoints) on a made-up stream.

    Args:
        records: of the stream, which drifts four times.
        batch: records a step.
        observe: called with every report.

    Returns:
        The tenths of the stream, and for how many seconds a save held learning up, in the mean.
    """
    stretches: list[Stretch] = []
    steps: list[float] = []
    loads: list[float] = []
    weight = torch.randn(128, 128)

    def keep(report: Report) -> None:
        steps.append(sum(report.seconds.values()))
        observe(report)
        began = time.perf_counter()
        value = weight
        for _ in range(8):
            value = (value @ weight).relu() / 128
        loads.append(time.perf_counter() - began)
        if report.records * PARTS >= records * (len(stretches) + 1):
            stretches.append(Stretch(report.records, resident(), median(steps), median(steps) / median(loads)))
            steps.clear()
            loads.clear()

    settings = [
        f"feed.records={records}",
        f"batch={batch}",
        "http.port=0",
        f"checkpoint.every_records={records // SAVES}",
    ]
    configuration, log = load("demo", settings), logs.configure("error")
    with (
        TemporaryDirectory() as folder,
        chdir(folder),
        fronted(configuration, log) as front,
        closing(session.start(configuration)) as running,
    ):
        daemon = Daemon(running, front, log, keep)
        daemon.run()
        waited = [daemon.metrics.registry.get_sample_value(f"{WAITED}_{part}", PHASE) for part in ("sum", "count")]
    return stretches, (waited[0] or 0.0) / (waited[1] or 1.0)


def growth(values: list[float]) -> float:
    """Return by which share the last tenth lies above the second; the first is for warming up."""
    return values[-1] / values[1] - 1


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

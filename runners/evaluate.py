"""Prequential evaluation of a history: every batch is predicted whole, then its labels are revealed and learned."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from monitoring.prequential import MAJORITY, NO_CHANGE, Tally
from monitoring.trace import Trace
from runners import session, warm_start
from runners.settings import Configuration
from streamkd.batch import UNLABELLED, labelled
from streamkd.errors import ConfigError
from streamkd.report import SERVED, score

MEASURES = ("accuracy", "balanced_accuracy", "cohen_kappa", "temporal_kappa", "log_loss")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One pass over a history.

    Attributes:
        seed, batch: with which it was made.
        tally: all counts.
        trace: recent accuracy over time.
        seconds: the pass took, decoding included.
        refused: records that could not be used, by reason.
        labels: the classes, as they are written, in order of appearance.
        uncompiled: why what was to be compiled was not; empty where it was, or was not to be.
    """

    seed: int
    batch: int
    tally: Tally
    trace: Trace
    seconds: float
    refused: Mapping[str, int]
    labels: Sequence[str]
    uncompiled: str = ""

    @property
    def records_per_second(self) -> float:
        """Over the whole pass."""
        return self.tally.records / max(self.seconds, 1e-9)

    def as_json(self) -> dict[str, Any]:
        """Return everything, for machines: shares between 0 and 1."""
        measures = {name: asdict(value) for name, value in self.tally.measures().items()}
        return {
            "records": self.tally.records,
            "labelled": self.tally.scored,
            "unlabelled": self.tally.unlabelled,
            "batch": self.batch,
            "seed": self.seed,
            **measures[SERVED],
            "records_per_second": round(self.records_per_second, 1),
            "seconds": round(self.seconds, 3),
            "drifts": len(self.tally.drifts),
            "drift_records": self.tally.drifts,
            "role_swaps": len(self.tally.swaps),
            "role_swap_events": self.tally.swaps,
            "peers": {name: value for name, value in measures.items() if name not in _NOT_PEERS},
            "baselines": {name.replace("-", "_"): measures[name] for name in (NO_CHANGE, MAJORITY)},
            "classes": list(self.labels),
            "dead_letters": dict(self.refused),
            "uncompiled": self.uncompiled,
        }


_NOT_PEERS = {SERVED, NO_CHANGE, MAJORITY}


def evaluate(
    configuration: Configuration,
    progress: Callable[[float, int], None],
    *,
    labels: float = 1.0,
    records: int | None = None,
) -> Evaluation:
    """Make one pass, from the beginning or from `checkpoint.warm_start`.

    Args:
        configuration: its feed must have labels.
        progress: called now and then with the share that is done and the records so far.
        labels: share of the records whose label is revealed, drawn by the seed; all are scored.
        records: end with the batch in which that many are reached; None goes to the end of the feed.

    Raises:
        StreamkdError: with the exit code of the process.
    """
    running = session.start(configuration)
    try:
        warm_start.begin(running)
        tally, trace = Tally(), Trace()
        chance = torch.Generator().manual_seed(configuration.seed)
        began = time.perf_counter()
        while (records is None or tally.records < records) and (batch := running.poll()) is not None:
            if not len(batch) and not batch.late:
                continue
            if labels == 1.0:
                report = running.step(batch)
            else:
                revealed = torch.rand(len(batch), generator=chance) < labels
                # Without names, too: what is withheld never comes, and whoever has a name waits for it.
                report = running.step(replace(batch, y=torch.where(revealed, batch.y, UNLABELLED), ids=()))
                known = labelled(batch.y)
                *names, _ = report.scored.names
                spoken = report.log_p[: len(names), known]
                scored = score(names, batch.y[known], spoken, report.served[known])
                report = report._replace(scored=scored)
            tally.update(report)
            trace.update(report, tally)
            if report.step % 16 == 0:
                progress(running.feed.progress() or 0.0, report.records)
        seconds = time.perf_counter() - began
        progress(1.0, tally.records)
        if not tally.scored:
            if refused := sum(running.dead_letters.counts.values()):
                raise ConfigError(
                    f"feed: {refused:,} records were refused, and none that was not has a label; "
                    f"see {configuration.dead_letters.path}"
                )
            raise ConfigError("feed.label: no record has a label, so there is nothing to score; name the label column")
        classes = running.feed.describe().get("classes", [])
        return Evaluation(
            configuration.seed,
            configuration.batch,
            tally,
            trace,
            seconds,
            running.dead_letters.counts,
            classes if isinstance(classes, list) else [],
            running.engine.uncompiled,
        )
    finally:
        running.close()


def table(evaluations: Sequence[Evaluation]) -> Table:
    """Return the figures for people: percent, and mean with standard deviation where there are several seeds."""
    first = evaluations[0]
    speeds = [evaluation.records_per_second for evaluation in evaluations]
    unlabelled = f", {first.tally.unlabelled:,} of them unlabelled," if first.tally.unlabelled else ""
    caption = (
        f"{first.tally.records:,} records{unlabelled} in batches of {first.batch}, "
        f"{mean(speeds):,.0f} records per second; "
        f"drifts found {_counts([len(e.tally.drifts) for e in evaluations])}, "
        f"role swaps {_counts([len(e.tally.swaps) for e in evaluations])}"
    )
    if len(evaluations) > 1:
        caption += f"; mean and standard deviation of seeds {', '.join(str(e.seed) for e in evaluations)}"
    made = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("", "accuracy\n%", "balanced\naccuracy %", "Cohen's\nkappa %", "temporal\nkappa %", "log-loss"):
        made.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    every = [evaluation.tally.measures() for evaluation in evaluations]
    for name in every[0]:
        rows = [measures[name] for measures in every]
        made.add_row(Text(name), *(cell(rows, measure) for measure in MEASURES), style="bold" if name == SERVED else "")
    return made


def cell(rows: Sequence[object], measure: str) -> str:
    """Return the mean of what several rows tell of a measure, and how it varies where it does."""
    values = [value for row in rows if (value := getattr(row, measure)) is not None]
    if not values:
        return "-"
    scale, digits = (1, 3) if measure == "log_loss" else (100, 2)
    spread = f" ±{stdev(values) * scale:.{digits}f}" if len(set(values)) > 1 else ""
    return f"{mean(values) * scale:.{digits}f}{spread}"


def _counts(counts: Sequence[int]) -> str:
    return "/".join(str(count) for count in counts)

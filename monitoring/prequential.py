"""The honest score: every answer was given before its label was learned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamkd.report import SERVED, Report

NO_CHANGE = "no-change"
MAJORITY = "majority"
WINDOW = 1_000
"""Labelled records over which recent accuracy is taken."""


@dataclass(frozen=True, slots=True)
class Measures:
    """How well one predictor did. Shares are between 0 and 1, the kappas at most 1, log-loss in nats.

    Attributes:
        accuracy: share of right answers.
        balanced_accuracy: mean over the classes that occurred of the share found of each (Brodersen et al. 2010).
        cohen_kappa: accuracy beyond that of answers at random with the same frequencies (Cohen 1960).
        temporal_kappa: accuracy beyond that of the no-change baseline (Bifet et al. 2013).
        log_loss: None for the baselines, which give no probabilities.
    """

    accuracy: float
    balanced_accuracy: float
    cohen_kappa: float
    temporal_kappa: float
    log_loss: float | None


class Tally:
    """Counts of one run, for the served answer, each peer and two baselines.

    The baselines know what the peers know: within a batch, the last label (no-change) and the most frequent label so
    far (majority) are those of the batches before it.
    """

    def __init__(self) -> None:
        self.records = 0
        self.unlabelled = 0  # of the records, without a label as yet
        self.scored = 0
        self.drifts: list[int] = []
        self.swaps: list[dict[str, Any]] = []
        self._asked = 0  # of the records, without a label when they came
        self._names: list[str] = []  # those who are scored, then the baselines
        self._confusion: NDArray[np.int64] = np.zeros((0, 0, 0), dtype=np.int64)  # [names, classes, classes]
        self._recent: NDArray[np.bool_] = np.zeros((0, WINDOW), dtype=bool)  # [names, records]: who was right
        self._log_losses = np.zeros(0)
        self._last = 0
        self._frequencies = np.zeros(1, dtype=np.int64)

    def update(self, report: Report) -> None:
        """Take in one batch."""
        self.records += report.size
        self._asked += report.unlabelled
        self.unlabelled = self._asked - report.joined
        self.drifts += [alarm.record for alarm in report.drift]
        if report.swap is not None:
            swap = report.swap
            self.swaps.append(
                {
                    "record": self.scored + len(report.scored.y),
                    "before": swap.before,
                    "after": swap.after,
                    "reason": swap.reason,
                }
            )
        y = report.scored.y.numpy()
        if not len(y):
            return
        if not self._names:
            self._names = [*report.scored.names, NO_CHANGE, MAJORITY]
            self._confusion = np.zeros((len(self._names), 0, 0), dtype=np.int64)
            self._recent = np.zeros((len(self._names), WINDOW), dtype=bool)
            self._log_losses = np.zeros(len(report.scored.names))
        baselines = np.repeat([[self._last], [int(self._frequencies.argmax())]], len(y), 1)
        answers = np.concatenate([report.scored.answers.numpy(), baselines])
        self._count(y, answers)
        self._log_losses += report.scored.losses.numpy().sum(1, dtype=np.float64)
        self._recent[:, (self.scored + np.arange(len(y)))[-WINDOW:] % WINDOW] = (answers == y)[:, -WINDOW:]
        self.scored += len(y)
        self._last = int(y[-1])
        more = np.bincount(y, minlength=len(self._frequencies))
        more[: len(self._frequencies)] += self._frequencies
        self._frequencies = more

    def _count(self, y: NDArray[np.int64], answers: NDArray[np.int64]) -> None:
        """Count the answers `[names, m]` to records of the classes `y` `[m]`."""
        wider = int(max(y.max(), answers.max())) + 1 - self._confusion.shape[1]
        if wider > 0:  # tables are as large as the classes met, not as those that may come
            self._confusion = np.pad(self._confusion, ((0, 0), (0, wider), (0, wider)))
        names, classes, _ = self._confusion.shape
        cells = np.arange(names)[:, None] * classes**2 + y * classes + answers
        np.add.at(self._confusion.reshape(-1), cells.ravel(), 1)

    def recent(self, name: str) -> float:
        """Return the accuracy of one over the last `WINDOW` labelled records; 0 before the first."""
        hits = int(self._recent[self._names.index(name)].sum()) if name in self._names else 0
        return hits / max(1, min(self.scored, WINDOW))

    def measures(self) -> Mapping[str, Measures]:
        """Return the measures of every predictor: the served answer first, then peers, then baselines."""
        names = sorted(self._names, key=lambda name: (name in {NO_CHANGE, MAJORITY}, name != SERVED))
        return {name: self._measure(self._names.index(name)) for name in names}

    def _measure(self, number: int) -> Measures:
        table, no_change = self._confusion[number], _accuracy(self._confusion[self._names.index(NO_CHANGE)])
        accuracy, occurred = _accuracy(table), table.sum(1) > 0
        recall = np.diag(table)[occurred] / table.sum(1)[occurred]
        chance = float((table.sum(0) / self.scored) @ (table.sum(1) / self.scored))
        return Measures(
            accuracy=accuracy,
            balanced_accuracy=float(recall.mean()),
            cohen_kappa=_beyond(accuracy, chance),
            temporal_kappa=_beyond(accuracy, no_change),
            log_loss=float(self._log_losses[number]) / self.scored if number < len(self._log_losses) else None,
        )


def _accuracy(table: NDArray[np.int64]) -> float:
    return float(np.trace(table) / max(1, table.sum()))


def _beyond(accuracy: float, baseline: float) -> float:
    """Return the share of the baseline's errors that was avoided; 0 where the baseline makes none."""
    return (accuracy - baseline) / (1 - baseline) if baseline < 1 else 0.0

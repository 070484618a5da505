"""The course of a run: recent accuracy over time, in bounded memory however long the stream."""

from monitoring.prequential import WINDOW, Tally
from streamkd.report import Report

MOST_POINTS = 2_000


class Trace:
    """Points of recent accuracy, at a spacing that doubles whenever there are too many.

    Attributes:
        records: where each point was taken, in labelled records scored so far.
        accuracy: name of a peer, or `served` -> recent accuracy at each point.
    """

    def __init__(self) -> None:
        self.records: list[int] = []
        self.accuracy: dict[str, list[float]] = {}
        self._spacing = WINDOW // 10
        self._next = self._spacing

    def update(self, report: Report, tally: Tally) -> None:
        """Take a point, if it is time; `tally` has seen the report already."""
        if tally.scored < self._next:
            return
        self.records.append(tally.scored)
        for name in report.scored.names:
            self.accuracy.setdefault(name, []).append(tally.recent(name))
        if len(self.records) >= MOST_POINTS:
            self.records = self.records[1::2]
            self.accuracy = {name: points[1::2] for name, points in self.accuracy.items()}
            self._spacing *= 2
        self._next = tally.scored + self._spacing

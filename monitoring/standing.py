"""How things stand, read from metrics: of this process's registry, or of another's /metrics."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import Metric

from monitoring.prequential import WINDOW
from streamkd.report import SERVED

SPEED_SECONDS = 5.0
"""Time over which the speed is taken."""
Label = tuple[tuple[str, str], ...]
Values = Mapping[tuple[str, Label], float]


@dataclass(frozen=True, slots=True)
class PeerStanding:
    """One peer. Accuracy and loss are those of about the last 1,000 labelled records; None where there is nothing yet.

    Attributes:
        accuracy: of the answers given before their labels were known.
        teacher: whether it is in office.
        weight: in the served answer.
        temperature: of its lessons.
        alpha: how much it listens, the mean over those who teach it; None where nobody does.
        loss: what its updates minimise, in nats.
    """

    accuracy: float | None
    teacher: bool
    weight: float
    temperature: float
    alpha: float | None
    loss: float | None


@dataclass(frozen=True, slots=True)
class Standing:
    """One process.

    Attributes:
        state: of the process.
        records: received so far.
        speed: records a second.
        lag: records that the feed has and has not given; None where it cannot tell.
        refused: records so far.
        accuracy: of the served answer, likewise of the last 1,000.
        agreement: of the peers, likewise.
        drifts, swaps: so far.
        since_drift: seconds; None before the first.
        pending: predictions that wait for labels.
        uncovered: records since the last checkpoint.
        peers: by name.
    """

    state: str
    records: int
    speed: float
    lag: int | None
    refused: int
    accuracy: float | None
    agreement: float | None
    drifts: int
    since_drift: float | None
    swaps: int
    pending: int
    uncovered: int
    peers: Mapping[str, PeerStanding]


class Reader:
    """Reads again and again, and so knows what was of late; counters alone know only what was since the start."""

    def __init__(self) -> None:
        self._past: deque[tuple[float, Values]] = deque([(0.0, {})])

    def read(self, families: Iterable[Metric], now: float) -> Standing:
        """Take in all metrics of a process, at `now` in seconds since the epoch."""
        values = {
            (sample.name.removeprefix("streamkd_"), tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith(("streamkd_", "process_"))  # others may have taken a name that we give
        }
        if _total(values, "steps_total") < _total(self._past[-1][1], "steps_total"):
            self._past = deque([(0.0, {})])  # another process answers now
        self._past.append((now, values))
        while len(self._past) > 2 and self._old_enough(self._past[1]):  # noqa: PLR2004 - the last two make a difference
            self._past.popleft()
        return self._standing(now, values)

    def _old_enough(self, then: tuple[float, Values]) -> bool:
        scored = _one(self._past[-1][1], "prequential_evaluated_total", peer=SERVED)
        return scored - _one(then[1], "prequential_evaluated_total", peer=SERVED) >= WINDOW

    def _standing(self, now: float, values: Values) -> Standing:
        drift = max(_by(values, "drift_last_detection_timestamp_seconds", "signal").values(), default=0.0)
        partitions = _by(values, "feed_lag_records", "partition")
        return Standing(
            state=next((state for state, on in _by(values, "state", "state").items() if on), "unknown"),
            records=int(_total(values, "feed_records_total")),
            speed=self._speed(now, values),
            lag=int(sum(partitions.values())) if partitions else None,
            refused=int(_total(values, "dead_letter_records_total")),
            accuracy=self._accuracy(SERVED),
            agreement=self._share("peer_agreed_total", "peer_compared_total"),
            drifts=int(_total(values, "drift_detections_total")),
            since_drift=now - drift if drift else None,
            swaps=int(_total(values, "role_swaps_total")),
            pending=int(_total(values, "labels_pending")),
            uncovered=int(_total(values, "checkpoint_uncovered_records")),
            peers={name: self._peer(name, values) for name in _by(values, "teacher", "peer")},
        )

    def _peer(self, name: str, values: Values) -> PeerStanding:
        alphas = (
            value for (metric, labels), value in values.items() if metric == "alpha" and ("student", name) in labels
        )
        heard = [alpha for alpha in alphas if alpha]
        return PeerStanding(
            accuracy=self._accuracy(name),
            teacher=bool(_one(values, "teacher", peer=name)),
            weight=_one(values, "served_weight", peer=name),
            temperature=_one(values, "temperature", peer=name),
            alpha=sum(heard) / len(heard) if heard else None,
            loss=self._share("loss_sum", "loss_count", peer=name, component="total"),
        )

    def _accuracy(self, name: str) -> float | None:
        return self._share("prequential_correct_total", "prequential_evaluated_total", peer=name)

    def _share(self, part: str, whole: str, **labels: str) -> float | None:
        """Return by how much one counter rose for what the other rose by, of late."""
        (_, then), (_, now) = self._past[0], self._past[-1]
        rise = _one(now, whole, **labels) - _one(then, whole, **labels)
        return (_one(now, part, **labels) - _one(then, part, **labels)) / rise if rise else None

    def _speed(self, now: float, values: Values) -> float:
        began = _one(values, "process_start_time_seconds")
        recent = [(time, past) for time, past in self._past if began < time >= now - SPEED_SECONDS and time < now]
        then, before = recent[0] if recent else (began, {})
        risen = _total(values, "feed_records_total") - _total(before, "feed_records_total")
        return risen / max(1e-9, now - then)


def _one(values: Values, name: str, **labels: str) -> float:
    return values.get((name, tuple(sorted(labels.items()))), 0.0)


def _by(values: Values, name: str, label: str) -> dict[str, float]:
    return {dict(labels)[label]: value for (metric, labels), value in values.items() if metric == name}


def _total(values: Values, name: str) -> float:
    return sum(value for (metric, _), value in values.items() if metric == name)

"""What happened on one batch, frozen and complete: the only thing that the eyes ever see."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import isfinite, log
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from streamkd.lesson import Learned

SERVED = "served"
"""The name of the served answer, beside the names of the peers."""
FLOOR = 1e-6
"""No answer is charged with more than -ln of this: one bold mistake must not silence anyone for ever."""
LOG_FLOOR = log(FLOOR)


@dataclass(frozen=True, eq=False, slots=True)
class Scored:
    """The prequential score of the records whose labels came with this batch.

    Attributes:
        names: of those who answered: the peers, then `served`.
        y: `[m]`, what was true.
        answers: `[names, m]`, the classes they answered before the label was known.
        losses: `[names, m]`, their log-losses, in nats, cut at -ln(1e-6).
    """

    names: Sequence[str]
    y: Tensor
    answers: Tensor
    losses: Tensor

    @property
    def right(self) -> Tensor:
        """`[names, m]` bool, which answers were right."""
        return self.answers == self.y

    @property
    def correct(self) -> Mapping[str, int]:
        """How many answers of each were right."""
        return dict(zip(self.names, self.right.sum(1).tolist(), strict=True))

    @property
    def predicted(self) -> Mapping[str, Tensor]:
        """The answers of each, `[m]`."""
        return dict(zip(self.names, self.answers, strict=True))

    @property
    def log_loss(self) -> Mapping[str, Tensor]:
        """The losses of each, `[m]`."""
        return dict(zip(self.names, self.losses, strict=True))


def of_truth(log_p: Tensor, y: Tensor) -> Tensor:
    """Return what each said of what turned out to be true: `[members, n, classes]` and `[n]` give `[members, n]`.

    At the least `LOG_FLOOR`, which is also for those that say nothing finite.
    """
    return torch.from_numpy(np.fmax(log_p.numpy()[:, np.arange(len(y)), y.numpy()], LOG_FLOOR))


def score(names: Sequence[str], y: Tensor, log_p: Tensor, served: Tensor, told: Tensor | None = None) -> Scored:
    """Hold what was said against what turned out to be true.

    Args:
        names: of the peers.
        y: `[m]`, class indices.
        log_p: `[peers, m, classes]`, what the peers said.
        served: `[m, classes]`, probabilities.
        told: what `of_truth` makes of `log_p`, where that is known already.
    """
    p, truth = served.numpy(), (np.arange(len(y)), y.numpy())
    answers = np.concatenate([log_p.numpy().argmax(-1), p.argmax(-1)[None]])
    own = (of_truth(log_p, y) if told is None else told).numpy()
    losses = -np.concatenate([own, np.log(np.fmax(p[truth], FLOOR))[None]])
    return Scored((*names, SERVED), y, torch.from_numpy(answers), torch.from_numpy(losses))


@dataclass(frozen=True, slots=True)
class PeerReport:
    """One peer after one batch.

    Attributes:
        weight: its share of the served answer, its average's included.
        loss: running prequential loss, in nats.
        accuracy: running prequential accuracy.
        temperature: of its lessons now, raised at an alarm like the learning rate.
        hard, soft, total: parts of what its last updates minimised, the mean over the updates of the batch.
        divergence: from its teachers, in nats.
        gradient_norm: before clipping.
        skipped: steps not taken for want of a finite gradient, since the start.
        rollbacks, restarts: how often it was put back to its last good weights because it stayed non-finite, and how
            often it was restarted because that was no help.
        capacity_ratio: its capacity over its teacher's; NaN where one of them has none that is known.
        transfer_efficiency: mutual information of teacher's and student's answers over the teacher's entropy.
    """

    weight: float
    loss: float
    accuracy: float
    temperature: float
    hard: float
    soft: float
    total: float
    divergence: float
    gradient_norm: float
    skipped: int
    rollbacks: int
    restarts: int
    capacity_ratio: float
    transfer_efficiency: float


class Unsound(Protocol):
    """What has counted how often it had no finite gradient, and what was done about it."""

    @property
    def skipped(self) -> int:
        """Steps not taken."""

    @property
    def rollbacks(self) -> int:
        """How often it was put back to its last good weights."""

    @property
    def restarts(self) -> int:
        """How often it began anew."""


def unsound(peer: Unsound) -> dict[str, int]:
    """Return how often a peer had no finite gradient and what was done about it, so far."""
    return {"skipped": peer.skipped, "rolled_back": peer.rollbacks, "restarted": peer.restarts}


class Later(Mapping[str, PeerReport]):
    """Reports of peers by name, worked out when somebody first asks for one: after most batches nobody does.

    Args:
        names: of the peers.
        work_out: returns their reports; it may look at nothing that changes.
    """

    def __init__(self, names: Sequence[str], work_out: Callable[[], Sequence[PeerReport]]) -> None:
        self._names = names
        self._work_out = work_out

    @cached_property
    def _reports(self) -> dict[str, PeerReport]:
        return dict(zip(self._names, self._work_out(), strict=True))

    def __getitem__(self, name: str) -> PeerReport:
        """Return the report of a peer."""
        return self._reports[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __reduce__(self) -> tuple[type[dict[str, PeerReport]], tuple[dict[str, PeerReport]]]:
        """Go into a pickle as what was worked out."""
        return dict, (self._reports,)


@dataclass(frozen=True, slots=True)
class DriftReport:
    """An alarm.

    Attributes:
        detector, signal: by which it was raised, and on what.
        record: how many labelled records had been scored when it rose.
        reaction: what the engine did about it, name -> value.
    """

    detector: str
    signal: str
    record: int
    reaction: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SwapReport:
    """The teacher in office changed: names of peers, and `drift` or `periodic`."""

    before: str
    after: str
    reason: str


@dataclass(frozen=True, eq=False, slots=True)
class ReplayReport:
    """The memory: its size, the window it is drawn from, and the priorities and ages `[m]` of what was recalled."""

    size: int
    capacity: int
    window: int
    priorities: Tensor
    ages: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Fault:
    """A record that cannot be learned: an update on it alone is not finite.

    Attributes:
        row: in the batch; None for a record of an earlier batch, whose label came with this one.
        x: `[...]`, its raw inputs.
        y: its class index.
    """

    row: int | None
    x: Tensor
    y: int


@dataclass(frozen=True, eq=False, slots=True)
class Report:
    """One batch through the engine.

    Attributes:
        step: batches so far; the first is 1.
        updates: optimizer steps so far, of each peer.
        records: records so far.
        size: records in this batch.
        unlabelled: of them, without a label.
        trained: labelled records that were learned on this batch.
        faults: labelled records that could not be.
        classes: classes seen so far.
        rate: factor on every learning rate, raised at an alarm and then fading to 1.
        accuracy: of the served answer, running over 1,000 labelled records.
        position: where the feed stands after this batch.
        log_p: `[peers, n, classes]`, what each peer said of the batch before any label of it was known.
        served: `[n, classes]`, probabilities, the answer that was given, likewise.
        taught: records of the batch, without a label for good, that were learned from the served answer.
        scored: the prequential score.
        teacher: name of the peer in office.
        learned: what each update of the batch did.
        unsound: name of a peer -> how often it was skipped, rolled back and restarted, so far.
        alphas: (teacher, student) -> weight of the distillation.
        pending, joined, expired: records waiting for labels now; labels that came late and that never came, so far.
        seconds: stage -> time it took, by the clock that was handed to the engine.
    """

    step: int
    updates: int
    records: int
    size: int
    unlabelled: int
    trained: int
    faults: tuple[Fault, ...]
    classes: int
    rate: float
    accuracy: float
    position: Mapping[str, Any]
    log_p: Tensor
    served: Tensor
    taught: int
    scored: Scored
    teacher: str
    peers: Mapping[str, PeerReport]
    learned: tuple[Learned, ...]
    unsound: Mapping[str, Mapping[str, int]]
    alphas: Mapping[tuple[str, str], float]
    drift: tuple[DriftReport, ...]
    swap: SwapReport | None
    replay: ReplayReport
    pending: int
    joined: int
    expired: int
    seconds: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return how things stand, in plain values, for people and their scripts."""
        return {
            "step": self.step,
            "records": self.records,
            "classes": self.classes,
            "accuracy": self.accuracy,
            "position": dict(self.position),
            "teacher": self.teacher,
            "peers": {
                name: {key: value if isfinite(value) else None for key, value in asdict(peer).items()}
                for name, peer in self.peers.items()
            },
            "alphas": [{"teacher": t, "student": s, "alpha": alpha} for (t, s), alpha in self.alphas.items()],
            "replay": {"size": self.replay.size, "capacity": self.replay.capacity, "window": self.replay.window},
            "pending": self.pending,
        }

"""What happened on one batch, frozen and complete: the only thing that the eyes ever see."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, log, nan
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from streamkd.lesson import Learned, means
from streamkd.transfer import Classes, efficiencies

SERVED = "served"
"""The name of the served answer, beside the names of the peers."""
FLOOR = 1e-6
"""No answer is charged with more than -ln of this: one bold mistake must not silence anyone for ever."""
LOG_FLOOR = log(FLOOR)
K = TypeVar("K")
V = TypeVar("V")


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


def peer_reports(
    *,
    unsound: Mapping[str, Mapping[str, int]],
    learned: Sequence[Learned],
    weights: Tensor,
    losses: Sequence[float],
    accuracies: Sequence[float],
    softness: Sequence[float],
    capacities: Sequence[float],
    teacher: int,
    answers: Classes,
    taught_by: int,
) -> dict[str, PeerReport]:
    """Report on every peer.

    Args:
        unsound: by name, in order, see `Report`.
        learned: what each update of the batch did.
        weights: `[2 * peers]`, of the members in the served answer.
        losses: a value a peer, as are the next three; see `Guidance`.
        accuracies: likewise.
        softness: likewise.
        capacities: likewise.
        teacher: index of the peer in office.
        answers: `[peers, records]`, class indices, by which transfer efficiency is measured.
        taught_by: index of the teacher that they were given beside.
    """
    shares = weights.view(2, -1).sum(0).tolist()
    told = means(learned).mean(0) if learned else np.zeros((5, len(unsound)))
    transferred = efficiencies(answers, taught_by)
    capacity = capacities[teacher]
    return {
        name: PeerReport(
            weight=shares[i],
            loss=losses[i],
            accuracy=accuracies[i],
            temperature=softness[i],
            hard=hard,
            soft=soft,
            total=total,
            divergence=divergence,
            gradient_norm=norm,
            skipped=counts["skipped"],
            rollbacks=counts["rolled_back"],
            restarts=counts["restarted"],
            capacity_ratio=capacities[i] / capacity if capacities[i] and capacity else nan,
            transfer_efficiency=transferred[i],
        )
        for i, ((name, counts), (hard, soft, divergence, total, norm)) in enumerate(
            zip(unsound.items(), told.T.tolist(), strict=True)
        )
    }


def by_name(alphas: Mapping[tuple[int, int], float], names: Sequence[str]) -> dict[tuple[str, str], float]:
    """Return the weights by names of source and student instead of their indices."""
    return {(names[source], names[student]): alpha for (source, student), alpha in alphas.items()}


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


class Later(Mapping[K, V]):
    """A mapping that is worked out when somebody first looks into it: after most batches nobody does.

    Args:
        work_out: returns it; it may look at nothing that changes.
    """

    __slots__ = ("_made", "_work_out")

    def __init__(self, work_out: Callable[[], dict[K, V]]) -> None:
        self._work_out = work_out
        self._made: dict[K, V] | None = None

    def _all(self) -> dict[K, V]:
        if self._made is None:
            self._made = self._work_out()
        return self._made

    def __getitem__(self, key: K) -> V:
        """Return the value of a key."""
        return self._all()[key]

    def __iter__(self) -> Iterator[K]:
        """Yield the keys."""
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __reduce__(self) -> tuple[type[dict[K, V]], tuple[dict[K, V]]]:
        """Go into a pickle as what was worked out."""
        return dict, (self._all(),)


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


class Report(NamedTuple):
    """One batch through the engine.

    It is made after every batch, and as a tuple in half of the time that a frozen dataclass takes; but it is like no
    other.

    Attributes:
        step: batches so far; the first is 1.
        updates: optimizer steps so far, of each peer.
        records: records so far.
        size: records in this batch.
        unlabelled: of them, without a label.
        faults: labelled records that could not be learned.
        classes: classes seen so far.
        rate: factor on every learning rate, raised at an alarm and then fading to 1.
        accuracy: of the served answer, running over 1,000 labelled records.
        position: where the feed stands after this batch.
        log_p: `[sources, n, classes]`, what was said of the batch before any label of it was known: by the peers, then
            by their averages, then by what a pool adds.
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
    seconds: Mapping[str, float]

    @property
    def trained(self) -> int:
        """Labelled records, of those in `scored`, that were learned on this batch: none where no peer took a step."""
        stepped = any(isfinite(norm) for update in self.learned for norm in update.norms)
        return self.scored.y.shape[0] - len(self.faults) if stepped else 0

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


for _comparison in ("__eq__", "__ne__", "__hash__"):  # not a tuple's, which would compare tensors
    setattr(Report, _comparison, getattr(object, _comparison))

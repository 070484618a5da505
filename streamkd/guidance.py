"""How much every student listens, to whom, and how softly: what the schedules make of what was measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from streamkd import schemes
from streamkd.capacity import Capacity
from streamkd.distillation import Distillation
from streamkd.schedules import Signals


@dataclass(frozen=True, eq=False, slots=True)
class Pairs:
    """Who teaches whom now, and what the schedules said of it.

    Attributes:
        betas: `[peers, 1]`, the weights of the labels.
        teach: whether any alpha is more than 0.
        sources, students: `[pairs]`, indices.
        ends: `[2 * pairs]`, both of these, one after the other.
        alphas: `[pairs, 1]`, shared out among a student's teachers.
        portions: `[pairs, 1]`, the share of each among them.
        temperatures: `[pairs, 1]`.
        dealt: `[peers, pairs]`, 1 where the student of a pair is the peer, else 0.
    """

    betas: Tensor
    teach: bool
    sources: Tensor
    students: Tensor
    ends: Tensor
    alphas: Tensor
    portions: Tensor
    temperatures: Tensor
    dealt: Tensor


class Wiring(NamedTuple):
    """What of `Pairs` hangs on nothing but who teaches whom, `pairs` of (source, student); portions as `shares` too."""

    pairs: tuple[tuple[int, int], ...]
    shares: NDArray[np.float64]
    portions: Tensor
    sources: Tensor
    students: Tensor
    ends: Tensor
    dealt: Tensor


@dataclass(frozen=True, slots=True)
class Said:
    """What the schedules said last, before it was weakened: alphas by (source, student), betas by student."""

    alphas: dict[tuple[int, int], float]
    betas: dict[int, float]


class Guidance:
    """What is measured of the peers, and what the schedules say to it.

    Args:
        rule: how peers teach one another.
        capacities: of the peers, in order.
        capacity: what measures them, started; None where they stay as they are.

    Attributes:
        losses, accuracies: a value a peer, running means over 50 batches, in nats and as a share.
        updates: that were made.
        drift_update: after which of them the world changed last.
        temperatures, softness: a value a peer, as scheduled, and as it is in force: boosted after an alarm.
        alphas, feature_weights: a value a pair (source, student), as they are in force.
        betas: a value a peer, the weight of the labels.
        slopes: a value a peer, of the distillation loss by ln T, for a curriculum.
    """

    def __init__(self, rule: Distillation, capacities: Sequence[float], capacity: Capacity | None = None) -> None:
        size = len(capacities)
        self.rule = rule
        self.capacities = list(capacities)
        self.capacity = capacity
        self.losses = [0.0] * size
        self.accuracies = [0.0] * size
        self.observed = 0
        self.updates = 0
        self.drift_update = -1_000_000
        self.temperatures: list[float | None] = [None] * size
        self.softness = [1.0] * size
        self.alphas: dict[tuple[int, int], float] = {}
        self.betas = [1.0] * size
        self.feature_weights: dict[tuple[int, int], float] = {}
        self._said = Said({}, {})
        self.slopes = [0.0] * size
        self._prepared: Pairs | None = None
        self._wiring: Wiring | None = None

    def __len__(self) -> int:
        return len(self.capacities)

    def observe(self, losses: Sequence[float], accuracies: Sequence[float]) -> None:
        """Take in the prequential loss and accuracy of each peer in one batch."""
        self.observed += 1
        share = max(1 / self.observed, 1 / 50)
        self.losses = [old + share * (new - old) for old, new in zip(self.losses, losses, strict=True)]
        self.accuracies = [old + share * (new - old) for old, new in zip(self.accuracies, accuracies, strict=True)]

    def measure(self, p: Tensor, y: Tensor, features: Callable[[], Sequence[Tensor | None]]) -> None:
        """Let capacities follow what the peers say as they learn, where they are estimated from it; see `Capacity`."""
        if self.capacity is not None and self.capacity.online:
            self.capacity.update(p, y, features())
            self.capacities = list(self.capacity.values)

    def alarm(self) -> None:
        """The world has changed: schedules count from here."""
        self.drift_update = self.updates

    def schedule(self, teacher: int, classes: int) -> None:
        """Set temperatures, alphas and betas for the next lessons."""
        rule = self.rule
        self._prepared = None
        burning_in = self.updates < rule.burn_in
        boost = 1 + (rule.temperature_boost - 1) * self._alertness()
        before, weights, self._said = self._said, self.feature_weights, Said({}, {})
        self.alphas, self.betas = {}, [1.0] * len(self)  # who listens to nobody has its labels alone
        self.feature_weights = {}
        heard: dict[int, list[float]] = {}
        for source, student in self.pairs(teacher):
            if burning_in:
                self.alphas[source, student] = 0.0
                continue
            # The served answer is as good as the teacher in office, for want of a measure of its own.
            by = teacher if source == 2 * len(self) else source % len(self)
            signals = self._signals(student, by, classes, previous=before.alphas.get((source, student)))
            said = self._said.alphas[source, student] = rule.alpha(signals)
            alpha = said * min(1.0, rule.widest_gap * signals.capacity / signals.teacher_capacity)
            self.alphas[source, student] = alpha
            heard.setdefault(student, []).append(alpha)
            signals.alpha, signals.previous = fmean(heard[student]), before.betas.get(student)
            self.betas[student] = self._said.betas[student] = rule.beta(signals)
            if rule.features is not None:
                signals.previous = weights.get((source, student))
                self.feature_weights[source, student] = rule.feature_weight(signals)
        self.temperatures = [
            rule.temperature(self._signals(student, teacher, classes, previous=previous))
            for student, previous in enumerate(self.temperatures)
        ]
        self.softness = [(value or 1.0) * boost for value in self.temperatures]

    def pairs(self, teacher: int) -> list[tuple[int, int]]:
        """Return who teaches whom, as (source, student); see `schemes`."""
        scheme: Callable[[int, int], schemes.Pairs] = getattr(schemes, self.rule.scheme)
        return scheme(len(self), teacher)

    def prepared(self, device: torch.device) -> Pairs:
        """Return what the schedules said as tensors, gathered once for all the updates until they are asked again."""
        if self._prepared is None:
            self._prepared = self._prepare(device)
        return self._prepared

    def _prepare(self, device: torch.device) -> Pairs:
        def column(values: NDArray[np.float64]) -> Tensor:
            return torch.from_numpy(values.astype(np.float32)[..., None]).to(device)

        pairs = tuple(self.alphas)
        students = [student for _, student in pairs]
        wiring = self._wiring
        if wiring is None or wiring.pairs != pairs:
            shares = np.array([1 / students.count(student) for student in students])
            ends = torch.tensor([*zip(*pairs, strict=True)] or [[], []], device=device).long()
            dealt = functional.one_hot(ends[1], len(self)).T.float()
            sources, taught = ends
            wiring = self._wiring = Wiring(pairs, shares, column(shares), sources, taught, ends.flatten(), dealt)
        said = np.array([[*self.alphas.values()], [self.softness[student] for student in students]])
        said[0] *= wiring.shares
        alphas, temperatures = column(said).unbind()
        return Pairs(
            betas=column(np.array(self.betas)),
            teach=bool(said[0].any()),
            sources=wiring.sources,
            students=wiring.students,
            ends=wiring.ends,
            alphas=alphas,
            portions=wiring.portions,
            temperatures=temperatures,
            dealt=wiring.dealt,
        )

    def frozen(self, index: int, teacher: int, ahead: int = 0) -> bool:
        """Whether a peer learns nothing any more, now or so many updates ahead."""
        rule = self.rule
        return rule.scheme == "static" and index == teacher and self.updates + ahead >= rule.freeze_after

    def rate(self, ahead: int = 0) -> float:
        """The factor on every learning rate, now or so many updates ahead: raised at an alarm, then fading to 1."""
        return 1 + (self.rule.rate_boost - 1) * self._alertness(ahead)

    @property
    def effort(self) -> float:
        """The factor on the updates a batch now: a new world is learned by more steps, not by longer ones."""
        return 1 + (self.rule.effort_boost - 1) * self._alertness()

    def _alertness(self, ahead: int = 0) -> float:
        """1 at an alarm, halving every `boost_half_life` updates; now or so many updates ahead."""
        return float(0.5 ** ((self.updates + ahead - self.drift_update) / self.rule.boost_half_life))

    def _signals(self, student: int, teacher: int, classes: int, *, previous: float | None) -> Signals:
        capacity, teacher_capacity = self.capacities[student], self.capacities[teacher]
        known = capacity and teacher_capacity
        return Signals(
            update=self.updates,
            updates_since_drift=self.updates - self.drift_update,
            classes=max(2, classes),
            loss=self.losses[student],
            teacher_loss=self.losses[teacher],
            accuracy=self.accuracies[student],
            teacher_accuracy=self.accuracies[teacher],
            capacity=capacity if known else 1,
            teacher_capacity=teacher_capacity if known else 1,
            slope=self.slopes[student],
            previous=previous,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was observed, and what the schedules said last."""
        return {
            "losses": list(self.losses),
            "accuracies": list(self.accuracies),
            "observed": self.observed,
            "updates": self.updates,
            "drift_update": self.drift_update,
            "temperatures": list(self.temperatures),
            "softness": list(self.softness),
            "alphas": [[source, student, alpha] for (source, student), alpha in self.alphas.items()],
            "betas": list(self.betas),
            "said_alphas": [[*pair, alpha] for pair, alpha in self._said.alphas.items()],
            "said_betas": [[student, beta] for student, beta in self._said.betas.items()],
            "feature_weights": [[*pair, weight] for pair, weight in self.feature_weights.items()],
            "slopes": list(self.slopes),
            "capacity": {} if self.capacity is None else self.capacity.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._prepared = None
        self.losses, self.accuracies = list(state["losses"]), list(state["accuracies"])
        self.observed, self.updates = state["observed"], state["updates"]
        self.drift_update = state["drift_update"]
        self.temperatures, self.betas = list(state["temperatures"]), list(state["betas"])
        self.softness = list(state["softness"])
        self.slopes = list(state["slopes"])
        if self.capacity is not None:
            self.capacity.load_state_dict(state["capacity"])
            self.capacities = list(self.capacity.values)
        self.feature_weights = {(source, student): weight for source, student, weight in state["feature_weights"]}
        self.alphas = {(source, student): alpha for source, student, alpha in state["alphas"]}
        self._said = Said(
            {(source, student): alpha for source, student, alpha in state["said_alphas"]}, dict(state["said_betas"])
        )

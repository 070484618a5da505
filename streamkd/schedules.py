"""Temperature, alpha and beta: how soft a lesson is, how much a student listens, how much the labels count.

A schedule is a plain function `Signals -> float`, and each function below makes one from its options. What it
remembers is the value it gave last, which comes back to it as `signals.previous`: so schedules hold no state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, exp, log, log2, pi
from typing import Annotated

from pydantic import Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Growth = Annotated[float, Field(gt=1, allow_inf_nan=False)]


@dataclass(slots=True)
class Signals:
    """What a schedule may know of one student and its teacher.

    Attributes:
        update: optimizer steps taken so far.
        updates_since_drift: likewise, since the last alarm; very large before the first.
        classes: classes seen so far, at least 2.
        loss, teacher_loss: running mean cross entropy, in nats.
        accuracy, teacher_accuracy: running prequential accuracy, 0 to 1.
        capacity, teacher_capacity: in the unit of the measure, by default parameters, frozen ones included.
        alpha: the weight of the distillation, for the schedule of the hard loss (beta).
        slope: derivative of the student's last distillation loss by the logarithm of its temperature, measured for a
            `Curriculum` only.
        previous: what this schedule said last; None at first.
    """

    update: int = 0
    updates_since_drift: int = 1_000_000
    classes: int = 2
    loss: float = log(2)
    teacher_loss: float = log(2)
    accuracy: float = 0.5
    teacher_accuracy: float = 0.5
    capacity: float = 1.0
    teacher_capacity: float = 1.0
    alpha: float = 0.0
    slope: float = 0.0
    previous: float | None = None

    @property
    def difficulty(self) -> float:
        """The student's loss as a share of a blind guess's, so that it means the same for any K."""
        return self.loss / log(self.classes)

    @property
    def teacher_difficulty(self) -> float:
        """The teacher's loss as a share of a blind guess's."""
        return self.teacher_loss / log(self.classes)


Schedule = Callable[[Signals], float]


def constant(value: NotNegative) -> Schedule:
    """Always the same value.

    Args:
        value: the value.
    """
    return lambda _: value


def mission_temperature(
    start: Positive = 5.0,
    low: NotNegative = 0.1,
    high: NotNegative = 0.5,
    minimum: Positive = 1.0,
    maximum: Positive = 10.0,
) -> Schedule:
    """T * 0.9 when the loss is under `low`, T * 1.1 when it is over `high` (the articles that streamkd follows).

    Kept as it was written, flaws included: the thresholds are in nats whatever the number of classes, so two
    classes seldom move it and a hundred saturate it at once; and 0.9 * 1.1 < 1 drifts downward.

    Args:
        start: T at first.
        low: loss, in nats, under which T falls.
        high: loss over which it rises.
        minimum: of T.
        maximum: of T.
    """

    def temperature(signals: Signals) -> float:
        value = start if signals.previous is None else signals.previous
        factor = 0.9 if signals.loss < low else 1.1 if signals.loss > high else 1.0
        return min(max(value * factor, minimum), maximum)

    return temperature


def loss_driven(
    low: NotNegative = 0.1, high: NotNegative = 0.5, maximum: Positive | None = None, rate: Growth = 1.1
) -> Schedule:
    """Softer lessons while the student finds the world hard, plain ones (T = 1) when it knows it.

    The target is T_max ** clip((rho - low) / (high - low), 0, 1), with rho the running loss over ln K; the
    temperature moves towards it by at most the factor `rate` a step, up or down.

    Args:
        low: rho under which T is 1.
        high: rho over which T is T_max.
        maximum: T_max; by default clip(1 + log2(K / 2), 1, 4), since with two classes there is no dark knowledge
            to soften and a high T only ties the scales of the logits together.
        rate: largest change a step, as a factor.

    Raises:
        ValueError: `low` is not under `high`.
    """
    if low >= high:
        raise ValueError(f"low = {low} must be under high = {high}")

    def temperature(signals: Signals) -> float:
        top = maximum or min(max(1 + log2(signals.classes / 2), 1.0), 4.0)
        target: float = top ** _clip((signals.difficulty - low) / (high - low))
        value = 1.0 if signals.previous is None else signals.previous
        return min(max(target, value / rate), value * rate)

    return temperature


def annealing(start: Positive = 4.0, end: Positive = 1.0, half_life: Positive = 500.0) -> Schedule:
    """T = end + (start - end) * 0.5 ** (updates / half_life): soft lessons first (after Jafari et al. 2021).

    Counted from the last alarm on, since a world that has changed is as new as the first one. The published schedule
    falls along a line and ends; on a stream nothing may.

    Args:
        start: T at first, and at an alarm.
        end: T in the long run.
        half_life: in updates.
    """

    def temperature(signals: Signals) -> float:
        updates = min(signals.update, signals.updates_since_drift)
        value: float = end + (start - end) * 0.5 ** (updates / half_life)
        return value

    return temperature


@dataclass(frozen=True, slots=True)
class Curriculum:
    """A temperature that climbs the student's distillation loss; see `curriculum`."""

    start: float
    minimum: float
    maximum: float
    rate: float
    growth: float
    largest: float = 1.1

    def __call__(self, signals: Signals) -> float:
        """See `Schedule`."""
        value = self.start if signals.previous is None else signals.previous
        harder = (1 - cos(pi * min(1.0, signals.update / self.growth))) / 2
        bound = log(self.largest)
        move = min(max(self.rate * harder * signals.slope, -bound), bound)
        return min(max(value * exp(move), self.minimum), self.maximum)


def curriculum(
    start: Positive = 2.0,
    minimum: Positive = 1.0,
    maximum: Positive = 10.0,
    rate: NotNegative = 0.1,
    growth: Positive = 1_000.0,
) -> Schedule:
    """T learned against the student, T * exp(rate * lambda * dL / d ln T): lessons grow harder (Li et al. 2023).

    The student descends its distillation loss L, and the temperature climbs it: gradient reversal with the strength
    lambda = (1 - cos(pi * min(1, updates / growth))) / 2. By no more than a factor 1.1 a step.

    Args:
        start: T at first.
        minimum: of T.
        maximum: of T.
        rate: how far it climbs.
        growth: updates until it climbs at full strength.
    """
    return Curriculum(start, minimum, maximum, rate, growth)


def mission_alpha() -> Schedule:
    """The solution of alpha = sigmoid(C_S / C_T * beta) with beta = 1 - alpha (the articles that streamkd follows).

    As written it is circular, so it is solved: alpha is the fixed point, found by bisection. That makes it nearly
    constant: 0.529 at a capacity ratio of 0.25, 0.555 at 0.5, 0.599 at 1, 0.739 at 4.
    """

    def alpha(signals: Signals) -> float:
        ratio = signals.capacity / signals.teacher_capacity
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if _sigmoid(ratio * (1 - middle)) > middle else (low, middle)
        return low

    return alpha


def capacity_ratio(beta: NotNegative = 1.0) -> Schedule:
    """A strength of sigmoid(C_S / C_T * beta), beta given (the articles that streamkd follows).

    Never under 1/2; and the more able the student, the more it listens.

    Args:
        beta: how much the ratio of capacities counts.
    """
    return lambda signals: _sigmoid(signals.capacity / signals.teacher_capacity * beta)


def capacity_prior(maximum: NotNegative = 1.0, steepness: NotNegative = 0.5) -> Schedule:
    """An alpha of maximum * min(1, 2 sigmoid(steepness * ln(C_T / C_S))): `capacity_ratio`, corrected.

    The more able the teacher, the more is heard of it; among equals and under abler ones all of it. Capacities are
    compared by their ratio, so that doubling both changes nothing.

    Args:
        maximum: of alpha.
        steepness: how soon a less able teacher is no longer heard.
    """
    return lambda signals: (
        maximum * min(1.0, 2 * _sigmoid(steepness * log(signals.teacher_capacity / signals.capacity)))
    )


def competence(
    maximum: NotNegative = 1.0, steepness: NotNegative = 8.0, prior: NotNegative = 0.5, half_life: Positive = 32.0
) -> Schedule:
    """Listen to a competent teacher, the more so the further one lags, and not while the world is drifting.

    alpha = maximum * min(1, 2 c sigmoid(steepness * (rho_student - rho_teacher) + prior * ln(C_T / C_S)))
    * (1 - d): c = clip(1 - rho_teacher, 0, 1) is the teacher's competence (after the scheduled data prior of
    Koh et al. 2023), the ratio of capacities is the belief held before there is evidence, and d is 1 at an alarm
    and halves every `half_life` updates.

    Args:
        maximum: of alpha.
        steepness: how much evidence moves it.
        prior: how much capacity does.
        half_life: of the damping after an alarm, in updates.
    """

    def alpha(signals: Signals) -> float:
        trust = _clip(1 - signals.teacher_difficulty)
        lag = steepness * (signals.difficulty - signals.teacher_difficulty)
        lag += prior * log(signals.teacher_capacity / signals.capacity)
        calm: float = 1 - 0.5 ** (signals.updates_since_drift / half_life)
        return maximum * min(1.0, 2 * trust * _sigmoid(lag)) * calm

    return alpha


def complement() -> Schedule:
    """For beta, the weight of the hard loss: 1 - alpha (the articles that streamkd follows)."""
    return lambda signals: 1 - signals.alpha


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _sigmoid(value: float) -> float:
    return 1 / (1 + exp(-max(min(value, 60.0), -60.0)))

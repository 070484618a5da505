"""Temperature, alpha and beta: how soft a lesson is, how much a student listens, how much the labels count.

A schedule is a plain function `Signals -> float`, and each function below makes one from its options. What it
remembers is the value it gave last, which comes back to it as `signals.previous`: so schedules hold no state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, log2
from typing import Annotated

from pydantic import Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Growth = Annotated[float, Field(gt=1, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Signals:
    """What a schedule may know of one student and its teacher.

    Attributes:
        update: optimizer steps taken so far.
        updates_since_drift: likewise, since the last alarm; very large before the first.
        classes: classes seen so far, at least 2.
        loss, teacher_loss: running mean cross entropy, in nats.
        accuracy, teacher_accuracy: running prequential accuracy, 0 to 1.
        capacity, teacher_capacity: parameters, frozen ones included.
        alpha: the weight of the distillation, for the schedule of the hard loss (beta).
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


def mission_alpha() -> Schedule:
    """Alpha = sigmoid(C_S / C_T * beta) with beta = 1 - alpha (the articles that streamkd follows).

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

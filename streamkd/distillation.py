"""How peers teach one another: what a cohort is told, and what follows from that alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamkd import schemes, stream_classes
from streamkd.features import FeatureLoss
from streamkd.losses import Loss, kd
from streamkd.parts import public_functions
from streamkd.schedules import Schedule, competence, constant, loss_driven
from streamkd.views import View

GATES = ("better", "soft", "open")
SCHEMES = tuple(public_functions(schemes))


@dataclass(frozen=True, slots=True)
class Distillation:
    """How peers teach one another.

    Attributes:
        scheme: who teaches whom: the name of one of the functions of `schemes`.
        loss: what a student learns, per example.
        temperature: a schedule, a value a student.
        per_record: from that to a value a record, of the functions of `per_record`; None for all alike.
        alpha: a schedule, a value a pair: the weight of the distillation.
        widest_gap: the ratio of a teacher's capacity to its student's past which alpha is weakened, by the ratio of
            this to it.
        beta: a schedule, a value a student: the weight of the labels.
        features: what a student learns from the features of its teacher, per example, of the functions of `features`;
            None for nothing. It needs `Tapped` models, and teachers that are peers themselves.
        feature_weight: a schedule, a value a pair: the weight of that.
        gate: `better` drops a lesson on records where the teacher is not closer to the label than the student; `soft`
            weighs it by 2 sigmoid(2 (CE_student - CE_teacher)); `open` takes every lesson.
        cap: on no record may the distillation's gradient at the logits outweigh the label's.
        stream_classes: among which classes the labels of a batch are told apart: one of the functions of
            `stream_classes`.
        views: each makes, of raw inputs `[n, ...]`, harder ones. The first is given the records, every other what the
            one before it made; all these views are learned, and what a student learns on each is what its teacher
            says of the next harder one, of the hardest on itself (the distillation chain of Wang et al. 2024, there
            between two peers; what weighs there by the sum over views does here by their mean). None: no views.
        burn_in: updates before any distillation.
        freeze_after: for `static`, in updates.
        unlabelled: the weight of records that will never have a label: beside records that have one, all peers learn
            the served answer to them where it gives a class at least `confidence` (Lee 2013, softly). 0: nothing is
            learned from them, and the pool does not count what was answered to them.
        confidence: likewise.
        doubt: the share of that answer which is spread evenly over the classes instead.
        interpolate: up to which share such a record is mixed with another one, inputs and answers alike; 0 for none.
        temperature_boost, rate_boost, effort_boost: factors on temperature, learning rate and updates a batch at an
            alarm, fading by half every `boost_half_life` updates.
    """

    scheme: str = "leader"
    loss: Loss = kd
    temperature: Schedule = field(default_factory=loss_driven)
    per_record: Loss | None = None
    alpha: Schedule = field(default_factory=competence)
    widest_gap: float = math.inf
    beta: Schedule = field(default_factory=lambda: constant(1.0))
    features: FeatureLoss | None = None
    feature_weight: Schedule = field(default_factory=lambda: constant(1.0))
    gate: str = "better"
    cap: bool = True
    stream_classes: Callable[[Tensor, int], Tensor | None] = stream_classes.seen
    views: Sequence[View] = ()
    burn_in: int = 10
    freeze_after: int = 1_000
    unlabelled: float = 1.0
    confidence: float = 0.0
    doubt: float = 0.1
    interpolate: float = 0.5
    temperature_boost: float = 1.0
    rate_boost: float = 1.0
    effort_boost: float = 3.0
    boost_half_life: int = 64

    def __post_init__(self) -> None:
        for name, known in (("scheme", SCHEMES), ("gate", GATES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: there is no such one; use {', '.join(known)}")

    @property
    def by_peers(self) -> bool:
        """Whether what is learned is what peers say as they learn, and not their averages or the served answer."""
        return self.scheme in {"leader", "static", "mutual"}

    def weighed(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return what the gate makes of each lesson, of the same shape as the two hard losses of it."""
        return gated(self.gate, student, teacher)


def gated(gate: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the weight of each lesson by the hard losses of both sides; see `Distillation.gate`."""
    match gate:
        case "better":
            return (teacher < student).to(student)
        case "soft":
            return 2 * torch.sigmoid(2 * (student - teacher))
        case _:
            return torch.ones_like(student)

"""What a student learns from its teacher, per example.

A loss is a function `(student, teacher, y, temperature) -> [..., n]` of two `Output`s, the labels `[n]` (`UNLABELLED`
where there is none) and a temperature that broadcasts against `[..., n]`. Leading dimensions count pairs of peers, so
one call serves the whole cohort. The teacher comes detached. Options are keyword-only, after these four.

Classes that were never met are ruled out in the logits (`logits.mask_unseen`), and take no part in any of these.
Hinton's mix of soft and hard labels is `kd` with the schedules of alpha and beta: a student minimises
beta * CE + alpha * loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from streamkd.batch import UNLABELLED, Output
from streamkd.logits import UNSEEN

Loss = Callable[[Output, Output, Tensor, Tensor], Tensor]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]

FLAT = 1e-4
"""A pattern whose length about its mean is less than this is none: there is nothing in it to follow."""


@dataclass(frozen=True, slots=True)
class Sum:
    """A weighted sum of losses, itself a loss.

    Attributes:
        parts: each with its weight.
    """

    parts: Sequence[tuple[float, Loss]]

    def __call__(self, student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
        """Return the sum, `[..., n]`."""
        first, *others = (weight * loss(student, teacher, y, temperature) for weight, loss in self.parts)
        return sum(others, first)


def kd(student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), summed over classes (Hinton et al. 2015).

    T^2 keeps the gradient at the logits of the same size whatever the temperature.
    """
    return _divergence(*_softened(student, teacher, temperature)) * temperature**2


def dml(student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)): deep mutual learning (Zhang et al. 2018).

    `kd` at T = 1, whatever the schedule says of the temperature. As published with `scheme = "mutual"`.
    """
    return kd(student, teacher, y, torch.ones_like(temperature))


def separate_temperatures(
    student: Output,
    teacher: Output,
    y: Tensor,
    temperature: Tensor,
    *,
    student_factor: Factor = 1.0,
    teacher_factor: Factor = 1.0,
) -> Tensor:
    """T_S * T_T * KL(softmax(teacher / T_T) || softmax(student / T_S)): a temperature for each side (Wei and Bai 2024).

    Args:
        student: as for every loss.
        teacher: likewise.
        y: likewise.
        temperature: T, of which both are multiples.
        student_factor: T_S / T.
        teacher_factor: T_T / T. At equal factors this is `kd` at that multiple of T.
    """
    own, other = temperature * student_factor, temperature * teacher_factor
    log_p = (student.logits / own[..., None]).log_softmax(-1)
    log_q = (teacher.logits / other[..., None]).log_softmax(-1)
    return _divergence(log_p, log_q) * own * other


def sharpness(student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
    """T_S * T_T * KL, with the temperatures of each record after how sharp both answers are (Wei and Bai 2024).

    T_S = 2 T s / (s + t) and T_T = 2 T t / (s + t), with s and t the largest logits of student and teacher on the
    record: what is softened to the same sharpness is compared in its shape. The published ratio breaks down where the
    largest logits are near zero or negative; here they are counted from the mean, which no logits fall under.
    """
    with torch.no_grad():
        peaks = _centred(student.logits).amax(-1), _centred(teacher.logits).amax(-1)
        own, other = (2 * temperature * (peak + FLAT) / (sum(peaks) + 2 * FLAT) for peak in peaks)
    log_p = (student.logits / own[..., None]).log_softmax(-1)
    log_q = (teacher.logits / other[..., None]).log_softmax(-1)
    return _divergence(log_p, log_q) * own * other


def standardised(student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
    """`kd` between logits that have mean 0 and deviation 1 over the classes (Sun et al. 2024).

    Invariant to the scale of the logits of either side. Two classes have no shape but their sign, so that the
    gradient would be exactly zero: with no more than two met, this is `kd`.
    """
    if int((teacher.logits > UNSEEN / 2).sum(-1).amax()) <= 2:  # noqa: PLR2004 - two classes
        return kd(student, teacher, y, temperature)
    return kd(Output(_scaled(student.logits)), Output(_scaled(teacher.logits)), y, temperature)


def decoupled_kd(
    student: Output, teacher: Output, y: Tensor, temperature: Tensor, *, target: Weight = 1.0, others: Weight = 8.0
) -> Tensor:
    """T^2 * (target * TCKD + others * NCKD): `kd` taken apart at the class of the label (Zhao et al. 2022).

    TCKD is the divergence of (q_y, 1 - q_y) from the student's, NCKD that among the other classes alone;
    kd = T^2 * (TCKD + (1 - q_y) * NCKD). Without a label the teacher's answer stands in for it. With two classes NCKD
    vanishes, and what is left is `kd` times `target`.

    Args:
        student: as for every loss.
        teacher: likewise.
        y: likewise.
        temperature: likewise.
        target: weight of TCKD; the published alpha.
        others: weight of NCKD; the published beta.
    """
    label = torch.where(y == UNLABELLED, teacher.logits.argmax(-1), y)[..., None]
    targets, rests = [], []
    for logits in (student.logits, teacher.logits):
        softened = logits / temperature[..., None]
        log_p = softened.log_softmax(-1)
        rest = log_p.scatter(-1, label, UNSEEN).logsumexp(-1, keepdim=True)
        targets.append(torch.cat([log_p.gather(-1, label), rest], -1))
        rests.append(softened.scatter(-1, label, UNSEEN).log_softmax(-1))
    return (target * _divergence(*targets) + others * _divergence(*rests)) * temperature**2


def dist(
    student: Output, teacher: Output, y: Tensor, temperature: Tensor, *, between: Weight = 1.0, within: Weight = 1.0
) -> Tensor:
    """T^2 * (between * (1 - r of rows) + within * (1 - r of columns)), r Pearson's correlation (Huang et al. 2022).

    Of the softened probabilities `[n, classes]`: a row is what is said of one record, a column what is said of one
    class over the records at hand, and is charged to all of them alike. A pattern that does not vary in the teacher's
    answer teaches nothing: columns of classes that no record calls up, and all columns of a single record. With two
    classes a row's correlation is always 1 or -1 and has no gradient: the columns alone teach.

    Args:
        student: as for every loss.
        teacher: likewise.
        y: likewise.
        temperature: likewise.
        between: weight of the rows, relations between classes; the published beta.
        within: weight of the columns, relations within a class; the published gamma.
    """
    p, q = (log_p.exp() for log_p in _softened(student, teacher, temperature))
    met = (teacher.logits > UNSEEN / 2).to(p)
    rows, _ = _apart(p, q, met, -1)
    columns, told = _apart(p, q, torch.ones_like(met), -2)
    mean = columns.sum(-1) / told.sum(-1).clamp(min=1)
    return (between * rows + within * mean[..., None]) * temperature**2


def mse_logits(student: Output, teacher: Output, y: Tensor, temperature: Tensor, *, centred: bool = False) -> Tensor:
    """Half the mean squared difference of the logits, over classes (Ba and Caruana 2014; Buzzega et al. 2020).

    The temperature plays no part.

    Args:
        student: as for every loss.
        teacher: likewise.
        y: likewise.
        temperature: likewise.
        centred: count each side's logits from their mean, so that a constant added to them changes nothing, as it
            changes no answer; this is the limit of `kd` as T grows (Kim et al. 2021).
    """
    met = teacher.logits > UNSEEN / 2
    sides = (_centred(side.logits) if centred else side.logits for side in (student, teacher))
    own, other = (side.where(met, 0.0) for side in sides)
    return (own - other).square().sum(-1) / met.sum(-1) / 2


def jensen_shannon(student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
    """T^2 * (KL(p || m) + KL(q || m)) / 2, with m = (p + q) / 2 of the softened answers (Lin 1991).

    Symmetric, and never more than T^2 ln 2: a teacher that is certain and wrong costs no more than that.
    """
    log_p, log_q = _softened(student, teacher, temperature)
    log_m = torch.logaddexp(log_p, log_q) - log(2)
    return (_divergence(log_m, log_p) + _divergence(log_m, log_q)) / 2 * temperature**2


def hard_pseudo_label(student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
    """Cross entropy of the student against the class that the teacher would answer (Lee 2013).

    The temperature plays no part.
    """
    log_p = student.logits.log_softmax(-1)
    return -log_p.gather(-1, teacher.logits.argmax(-1, keepdim=True))[..., 0]


def soft_label(student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
    """T^2 * CE of the student's softened answer against the teacher's (Hinton et al. 2015).

    Differs from `kd` by the entropy of the teacher, which has no gradient: it is what the three-stage protocol of
    soft-label training minimises.
    """
    log_p, log_q = _softened(student, teacher, temperature)
    return -(log_q.exp() * log_p).sum(-1) * temperature**2


def _softened(student: Output, teacher: Output, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of both at the temperature."""
    warmth = temperature[..., None]
    return (student.logits / warmth).log_softmax(-1), (teacher.logits / warmth).log_softmax(-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p), over the last dimension."""
    return functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def _centred(logits: Tensor) -> Tensor:
    """Count logits from the mean of the classes met; those of the others become 0."""
    met = logits > UNSEEN / 2
    mean = logits.where(met, 0.0).sum(-1, keepdim=True) / met.sum(-1, keepdim=True)
    return (logits - mean).where(met, 0.0)


def _scaled(logits: Tensor) -> Tensor:
    """Give logits mean 0 and deviation 1 over the classes met; those of the others stay ruled out."""
    met = logits > UNSEEN / 2
    centred = _centred(logits)
    variance = centred.square().sum(-1, keepdim=True) / met.sum(-1, keepdim=True)
    return (centred / (variance + FLAT**2).sqrt()).where(met, UNSEEN)


def _apart(p: Tensor, q: Tensor, part: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return 1 - Pearson's correlation along `dim`, 0 where `q` is flat; and where it is not.

    Args:
        p: patterns of the student.
        q: those of the teacher.
        part: 1 for the places that belong to them, 0 for the others, where both are 0.
        dim: along which.
    """
    count = part.sum(dim, keepdim=True)
    p, q = ((side - side.sum(dim, keepdim=True) / count) * part for side in (p, q))
    own, other = (side.norm(dim=dim) for side in (p, q))
    told = other > FLAT
    correlation = (p * q).sum(dim) / (own.clamp(min=FLAT) * other.clamp(min=FLAT))
    return (1 - correlation).where(told, 0.0), told

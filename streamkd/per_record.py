"""From the temperature of a student to that of each record: some lessons are to be softer than others.

Each is a function `(student, teacher, y, temperature) -> [..., n]` of what a loss is given, and what it returns is
what the loss is given then. Options are keyword-only, after these four.
"""

from math import log
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from streamkd.batch import UNLABELLED, Output
from streamkd.logits import UNSEEN, cross_entropy

Share = Annotated[float, Field(ge=0, le=1)]


def even(student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
    """All records have the temperature of the student."""
    return temperature


def certainty(student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
    """T ** (1 - H / ln K): only what the teacher is certain of is softened.

    H is the entropy of the teacher's answer. What it doubts is soft already, and is left at T = 1.
    """
    log_q = teacher.logits.log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    return temperature ** (1 - entropy / _blind(teacher.logits)).clamp(0, 1)


def difficulty(
    student: Output, teacher: Output, y: Tensor, temperature: Tensor, *, low: Share = 0.1, high: Share = 0.5
) -> Tensor:
    """T ** clip((rho - low) / (high - low), 0, 1): `loss_driven`, record by record.

    rho is the student's loss on the record over ln K. A record without a label has the temperature of the student.

    Args:
        student: as for a loss.
        teacher: likewise.
        y: likewise.
        temperature: likewise.
        low: rho up to which T is 1.
        high: rho from which on T is the student's.
    """
    rho = cross_entropy(student.logits.detach(), y) / _blind(student.logits)
    share = ((rho - low) / max(high - low, 1e-6)).clamp(0, 1)
    return temperature ** torch.where(y == UNLABELLED, 1.0, share)


def _blind(logits: Tensor) -> Tensor:
    """Ln K, K the classes met; never less than ln 2."""
    return (logits > UNSEEN / 2).sum(-1).to(logits).log().clamp(min=log(2))

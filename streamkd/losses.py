"""What a student learns from its teacher, per example.

A loss is a function `(student, teacher, y, temperature) -> [..., n]` of two `Output`s, the labels `[n]` (`UNLABELLED`
where there is none) and a temperature that broadcasts against `[..., n]`. Leading dimensions count pairs of peers, so
one call serves the whole cohort. The teacher comes detached. Options are keyword-only, after these four.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from streamkd.batch import Output

Loss = Callable[[Output, Output, Tensor, Tensor], Tensor]


def kd(student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), summed over classes (Hinton et al. 2015).

    T^2 keeps the gradient at the logits of the same size whatever the temperature. At T = 1 this is the loss of
    deep mutual learning (Zhang et al. 2018).
    """
    temperature = temperature[..., None]
    log_q = (teacher.logits / temperature).log_softmax(-1)
    log_p = (student.logits / temperature).log_softmax(-1)
    return functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) * temperature[..., 0] ** 2


def hard_pseudo_label(student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
    """Cross entropy against the class that the teacher would answer; the temperature plays no part."""
    log_p = student.logits.log_softmax(-1)
    return -log_p.gather(-1, teacher.logits.argmax(-1, keepdim=True))[..., 0]


def soft_label(student: Output, teacher: Output, y: Tensor, temperature: Tensor) -> Tensor:
    """Cross entropy of the student against the teacher's softened answer, T^2 scaled.

    Differs from `kd` by the entropy of the teacher, which has no gradient: it is what the three-stage protocol of
    soft-label training minimises.
    """
    temperature = temperature[..., None]
    q = (teacher.logits / temperature).softmax(-1)
    log_p = (student.logits / temperature).log_softmax(-1)
    return -(q * log_p).sum(-1) * temperature[..., 0] ** 2

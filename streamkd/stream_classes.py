"""Among which classes the labels of a batch are told apart.

Each is a function `(y, classes)` of the labels `[n]` learned together, and of how many classes were met so far; it
returns a mask `[n, classes]` of those that the loss of each record's label is over, or None for all of them. Memories
are always told apart among all classes met, and distillation compares all of them.
"""

import torch
from torch import Tensor


def seen(y: Tensor, classes: int) -> Tensor | None:
    """All classes met so far (streamkd)."""
    return None


def present(y: Tensor, classes: int) -> Tensor | None:
    """Those that occur in the batch: asymmetric cross entropy, ER-ACE (Caccia et al. 2022).

    While old classes are absent, what is new would push them down in every answer; it is left to the memories to say
    what lies between old and new. Meant for classes that come one after the other, with a memory of all of them; in
    a batch of one class its labels teach nothing.
    """
    mask = torch.zeros(classes, dtype=torch.bool, device=y.device)
    mask[y] = True
    return mask.expand(len(y), -1)

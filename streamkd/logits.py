"""Logits: classes that were never seen are ruled out, and the labels are held against the rest."""

import torch
from torch import Tensor

from streamkd.batch import UNLABELLED

UNSEEN = -1e9
"""The logit of a class that was never seen: its probability is exactly zero, and so is its gradient."""


def mask_unseen(logits: Tensor, seen: Tensor) -> Tensor:
    """Return the logits `[..., classes]` with the classes that are not `seen` `[classes]` ruled out."""
    # Only the CPU is asked, here and below: to ask a device would be to wait for it.
    return logits if seen.is_cpu and seen.numpy().all() else logits.masked_fill(~seen, UNSEEN)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Hard loss, in nats: `[..., n, classes]` logits against labels `[n]`; zero where there is no label."""
    log_p = logits.log_softmax(-1)
    y = y.expand(logits.shape[:-1])
    picked = log_p.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return torch.where(y == UNLABELLED, 0.0, -picked)


def labels_loss(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy as above, its gradient at the logits, and the probabilities: one log-softmax gives all three."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    known = None if y.is_cpu and int(y.min()) >= 0 else y != UNLABELLED
    picked = (y if known is None else y.clamp(min=0)).expand(logits.shape[:-1])[..., None]
    loss = -log_p.gather(-1, picked)[..., 0]
    gradient = p.scatter_add(-1, picked, p.new_full((1,), -1.0).expand(picked.shape))
    if known is not None:
        loss, gradient = torch.where(known, loss, 0.0), torch.where(known[:, None], gradient, 0.0)
    return loss, gradient, p

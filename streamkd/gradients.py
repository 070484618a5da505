"""What a student's logits are to change by."""

import torch
from torch import Tensor

from streamkd.batch import Output
from streamkd.losses import Loss, kd


def with_gradient(
    loss: Loss, student: Tensor, teacher: Tensor, y: Tensor, *, temperature: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a loss, and the gradient at the student's logits of its sum weighted by `weights` `[..., n]`.

    That of `kd` is written out, T (softmax(student / T) - softmax(teacher / T)); others are left to autograd.
    """
    if loss is not kd:
        leaf = student.detach().requires_grad_()
        said = loss(Output(leaf), Output(teacher), y, temperature)
        (gradient,) = torch.autograd.grad((weights * said).sum(), leaf)
        return said.detach(), gradient
    log_q = (teacher / temperature[..., None]).log_softmax(-1)
    log_p = (student / temperature[..., None]).log_softmax(-1)
    q = log_q.exp()
    said = torch.linalg.vecdot(q, log_q - log_p) * (temperature * temperature)
    return said, log_p.exp_().sub_(q).mul_((weights * temperature)[..., None])


def slope(loss: Loss, student: Tensor, teacher: Tensor, y: Tensor, *, temperature: Tensor) -> Tensor:
    """Return the derivative of the mean loss by ln T, `[...]`, for `temperature` `[..., 1]`."""
    with torch.enable_grad():
        log_t = temperature.log().requires_grad_()
        said = loss(Output(student.detach()), Output(teacher), y, log_t.exp())
        if not said.requires_grad:  # a loss in which the temperature plays no part
            return torch.zeros_like(temperature[..., 0])
        (gradient,) = torch.autograd.grad(said.mean(-1).sum(), log_t)
    return gradient[..., 0]

"""Layers of several networks of one architecture, answering and learning together.

Each is called with `[peers, n, width]` and goes back with the gradient at its output, of the same shape. The ways back
are written out: at the size of a stream's batches, what autograd keeps of every operation costs more than the
operation. Gradients at the weights are written where the caller said, not added up.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layer(Protocol):
    """One layer of all peers."""

    def __call__(self, x: Tensor) -> Tensor:
        """Answer, and keep what the way back needs."""

    def back(self, gradient: Tensor) -> Tensor:
        """Take the gradient at the output of the last call, and return that at its input."""


class Linear:
    """One matrix a peer.

    Args:
        weight: `[peers, out, in]`.
        bias: `[peers, out]`, or None.
        slots: where the gradients of both are written, of the same shapes.
        first: nobody asks for the gradient at its input: what goes back is that at its output.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, slots: list[Tensor], *, first: bool = False) -> None:
        self._whole = weight, bias, slots
        self._first = first
        self._use(weight, bias, slots)

    def _use(self, weight: Tensor, bias: Tensor | None, slots: list[Tensor]) -> None:
        self._weight, self._turned = weight, weight.transpose(1, 2)
        self._bias = None if bias is None else bias[:, None]
        self._slots = slots

    def narrow(self, outputs: int) -> None:
        """Answer by the first `outputs` alone from here on; the gradient at the weights of the others is 0."""
        weight, bias, slots = self._whole
        if min(outputs, weight.shape[1]) == self._weight.shape[1]:
            return
        for slot in slots:
            slot[:, outputs:] = 0.0
        kept = None if bias is None else bias[:, :outputs]
        self._use(weight[:, :outputs], kept, [slot[:, :outputs] for slot in slots])

    def __call__(self, x: Tensor) -> Tensor:
        """See `Layer`; records that all peers are given alike are `[n, in]`."""
        x = self._x = x.expand(len(self._weight), -1, -1)
        return torch.bmm(x, self._turned) if self._bias is None else torch.baddbmm(self._bias, x, self._turned)

    def back(self, gradient: Tensor) -> Tensor:
        """See `Layer`."""
        torch.bmm(gradient.transpose(1, 2), self._x, out=self._slots[0])
        if self._bias is not None:
            torch.sum(gradient, 1, out=self._slots[1])
        return gradient if self._first else torch.bmm(gradient, self._weight)


class Norm:
    """Layer norm over the last dimension.

    Args:
        scale, shift: `[peers, width]`, or None.
        slots: as for `Linear`.
        eps: as torch's.
    """

    def __init__(self, scale: Tensor | None, shift: Tensor | None, slots: list[Tensor], eps: float) -> None:
        self._scale = None if scale is None else scale[:, None]
        self._shift = None if shift is None else shift[:, None]
        # Torch's kernel is half as slow again without a scale and a shift, even if they do nothing.
        self._idle = (None, None) if scale is None else (torch.ones_like(scale[0]), torch.zeros_like(scale[0]))
        self._slots = slots
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """See `Layer`."""
        self._x = x
        scale, shift = self._idle
        self._normal, self._mean, self._spread = torch.native_layer_norm(x, x.shape[-1:], scale, shift, self._eps)
        if self._scale is None:
            return self._normal
        if self._shift is None:
            return self._normal * self._scale
        return torch.addcmul(self._shift, self._normal, self._scale)

    def back(self, gradient: Tensor) -> Tensor:
        """See `Layer`."""
        if self._scale is not None:
            torch.sum(gradient * self._normal, 1, out=self._slots[0])
            if self._shift is not None:
                torch.sum(gradient, 1, out=self._slots[1])
            gradient = gradient * self._scale
        back: Tensor = torch.ops.aten.native_layer_norm_backward(
            gradient, self._x, self._x.shape[-1:], self._mean, self._spread, None, None, [True, False, False]
        )[0]
        return back


class Rectifier:
    """The positive part."""

    def __call__(self, x: Tensor) -> Tensor:
        """See `Layer`."""
        self._y = functional.relu(x)
        return self._y

    def back(self, gradient: Tensor) -> Tensor:
        """See `Layer`."""
        back: Tensor = torch.ops.aten.threshold_backward(gradient, self._y, 0)
        return back


class Elementwise:
    """Any function of one number at a time, by torch's own derivative."""

    def __init__(self, function: nn.Module) -> None:
        self._function = function

    def __call__(self, x: Tensor) -> Tensor:
        """See `Layer`."""
        self._x = x.detach().requires_grad_()
        with torch.enable_grad():
            self._y: Tensor = self._function(self._x)
        y: Tensor = self._y.detach()
        return y

    def back(self, gradient: Tensor) -> Tensor:
        """See `Layer`."""
        back: Tensor = torch.autograd.grad(self._y, self._x, gradient)[0]
        return back

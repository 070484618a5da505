"""Peers evaluated group by group: those of one architecture together, the others one by one."""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamkd.peer import Peer
from streamkd.river_peer import RiverPeer

_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Identity)
_STACKED = (nn.Flatten, nn.Linear, nn.LayerNorm, *_ELEMENTWISE)


class Group(Protocol):
    """Peers that are asked and taught together. Every tensor has them in the order of `members`."""

    members: list[int]

    def predict(self, x: Tensor) -> Tensor:
        """Answer `x` `[n, ...]`: logits `[2 * members, n, classes]`, the peers' first, then their averages'."""

    def learn(self, x: Tensor) -> Tensor:
        """Answer `x` in training mode, with a gradient: logits `[members, n, classes]`."""

    def clip_gradients(self) -> list[float]:
        """Shorten each member's gradient to its `clip`; return the norms before."""

    def step(self, norms: Sequence[float | None], rate: float) -> None:
        """Take one optimizer step with each member; none with one whose norm is None, or not finite, which counts."""

    def discard(self) -> None:
        """Throw away all gradients."""

    def adopt(self) -> None:
        """Take in the members' models anew, some of which were replaced."""


def grouped(peers: Sequence[Peer | RiverPeer]) -> list[Group]:
    """Put peers of one architecture into a `Stack`, where their layers are known, and each other peer by itself."""
    alike: dict[str, list[int]] = {}
    for index, peer in enumerate(peers):
        alike.setdefault(_architecture(peer) or f"{index}", []).append(index)
    groups: list[Group] = []
    for members in alike.values():
        chosen = [peers[index] for index in members]
        stackable = [peer for peer in chosen if isinstance(peer, Peer)]
        groups.append(Stack(members, stackable) if len(stackable) > 1 else Single(members[0], chosen[0]))
    return groups


class Single:
    """A peer by itself."""

    def __init__(self, index: int, peer: Peer | RiverPeer) -> None:
        self.members = [index]
        self.peer = peer

    def predict(self, x: Tensor) -> Tensor:
        """See `Group`."""
        return torch.stack([self.peer.predict(x).logits, self.peer.predict_average(x).logits])

    def learn(self, x: Tensor) -> Tensor:
        """See `Group`."""
        return self.peer.learn(x).logits[None]

    def clip_gradients(self) -> list[float]:
        """See `Group`."""
        return [self.peer.clip_gradient()]

    def step(self, norms: Sequence[float | None], rate: float) -> None:
        """See `Group`."""
        if norms[0] is not None:
            self.peer.step(norms[0], rate)

    def discard(self) -> None:
        """See `Group`."""
        self.peer.discard()

    def adopt(self) -> None:
        """See `Group`."""


class Stack:
    """Peers of one architecture, whose weights lie side by side: one batched product a layer serves them all.

    The weights of all members are the rows of one matrix, and those of their averages the rows below; the members'
    own parameters are views into it. So a norm, a step of plain gradient descent and the averaging are one operation
    each, and peers and averages answer together. What each member comes to is what it would have come to alone, but
    for the last digits.

    Args:
        members: the peers' indices in the cohort.
        peers: of one architecture, see `grouped`.
    """

    def __init__(self, members: list[int], peers: Sequence[Peer]) -> None:
        self.members = members
        self.peers = list(peers)
        self._layers = list(_leaves(peers[0].module))
        self.adopt()

    def adopt(self) -> None:
        """Gather the members' weights, and make their parameters views of what was gathered."""
        size, models = len(self.peers), [peer.module for peer in self.peers] + [peer.average for peer in self.peers]
        self._weights = torch.stack([nn.utils.parameters_to_vector(model.parameters()).detach() for model in models])
        self._gradient = torch.zeros_like(self._weights[:size])
        for model, row in zip(models, self._weights, strict=True):
            for parameter, values in zip(model.parameters(), self._cut(row), strict=True):
                parameter.data = values
        self._rows, self._averages = self._weights[:size], self._weights[size:]
        self._all = self._ready(self._cut(self._weights))
        self._current = [values.requires_grad_() for values in self._ready(self._cut(self._rows))]
        self._gradients = [self._cut(row) for row in self._gradient]
        self._clips = self._weights.new_tensor([peer.clip for peer in self.peers])
        self._rates = self._weights.new_tensor([peer.rates[:1] for peer in self.peers])
        self._descends = all(_plain(peer.optimizer) for peer in self.peers)

    def _cut(self, rows: Tensor) -> list[Tensor]:
        """Cut rows of weights `[..., all]` into one tensor a parameter, `[..., *its shape]`."""
        parameters = list(self.peers[0].module.parameters())
        parts = torch.split(rows.detach(), [parameter.numel() for parameter in parameters], dim=-1)
        return [part.view(*rows.shape[:-1], *p.shape) for part, p in zip(parts, parameters, strict=True)]

    def _ready(self, weights: list[Tensor]) -> list[Tensor]:
        """Give vectors `[peers, n]` the shape in which they are added to what is said of a batch."""
        return [values[:, None] if values.dim() == len(("peers", "n")) else values for values in weights]

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """See `Group`."""
        return self._forward(self._all, x)

    def learn(self, x: Tensor) -> Tensor:
        """See `Group`."""
        return self._forward(self._current, x)

    def _forward(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        left = iter(weights)
        expanded = False
        for layer in self._layers:
            if isinstance(layer, nn.Linear):
                weight = next(left).transpose(1, 2)
                if not expanded:
                    x, expanded = x.expand(len(weight), *x.shape), True
                x = torch.bmm(x, weight) if layer.bias is None else torch.baddbmm(next(left), x, weight)
            elif isinstance(layer, nn.LayerNorm):
                x = functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
                if layer.elementwise_affine:
                    scale = next(left)
                    x = x * scale if layer.bias is None else torch.addcmul(next(left), x, scale)
            else:
                x = layer(x)
        return x

    @torch.no_grad()
    def clip_gradients(self) -> list[float]:
        """See `Group`."""
        parts = []
        for leaf in self._current:
            parts.append(torch.as_tensor(leaf.grad).flatten(1))
            leaf.grad = None
        torch.cat(parts, 1, out=self._gradient)
        norms = self._gradient.norm(dim=1)
        self._gradient.mul_((self._clips / norms).clamp(max=1.0)[:, None])
        said: list[float] = norms.tolist()
        return said

    @torch.no_grad()
    def step(self, norms: Sequence[float | None], rate: float) -> None:
        """See `Group`."""
        for peer, norm in zip(self.peers, norms, strict=True):
            if norm is not None and not math.isfinite(norm):
                peer.skip()
        going = [norm is not None and math.isfinite(norm) for norm in norms]
        if not any(going):
            return
        if not all(going):  # 0 times what is not finite would not be 0
            self._gradient[[not goes for goes in going]] = 0.0
        chosen = [index for index, goes in enumerate(going) if goes]
        if self._descends:
            self._rows.addcmul_(self._gradient, self._rates, value=-rate)
        else:
            self._optimize(chosen, rate)
        shares = [peer.share if goes else 0.0 for peer, goes in zip(self.peers, going, strict=True)]
        self._averages.lerp_(self._rows, self._weights.new_tensor(shares)[:, None])
        for index in chosen:
            self.peers[index].stepped()

    def _optimize(self, chosen: Sequence[int], rate: float) -> None:
        """Let the members' own optimizers step, each along its row of the gradient."""
        for index in chosen:
            peer = self.peers[index]
            for parameter, gradient in zip(peer.module.parameters(), self._gradients[index], strict=True):
                parameter.grad = gradient
            peer.optimize(rate)

    def discard(self) -> None:
        """See `Group`."""
        for leaf in self._current:
            leaf.grad = None


def _plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is nothing but the gradient times the rate."""
    (group, *others) = optimizer.param_groups
    kept = ("momentum", "weight_decay", "maximize")
    return type(optimizer) is torch.optim.SGD and not others and not any(group[name] for name in kept)


def _architecture(peer: Peer | RiverPeer) -> str | None:
    """Describe a model so that those of one description can be stacked; None if it has layers that cannot be."""
    if not isinstance(peer, Peer):
        return None
    layers, parameters = list(_leaves(peer.module)), list(peer.module.parameters())
    weighted = [layer for layer in layers if isinstance(layer, nn.Linear | nn.LayerNorm)]
    flattens = [layer for layer in layers if isinstance(layer, nn.Flatten)]
    known = (
        all(type(layer) in _STACKED and not _hooked(layer) for layer in layers)
        and flattens == layers[: len(flattens)]
        and all(layer.start_dim == 1 and layer.end_dim == -1 for layer in flattens)
        and weighted[:1] == [layer for layer in weighted[:1] if isinstance(layer, nn.Linear)]
        and all(len(layer.normalized_shape) == 1 for layer in weighted if isinstance(layer, nn.LayerNorm))
        and len(parameters) == sum(len(list(layer.parameters())) for layer in layers)
        and all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in parameters)
    )
    return f"{peer.module!r} {peer.shapes()}" if known and weighted else None


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is not nn.Sequential or _hooked(module):
        yield module
    else:
        for layer in module:
            yield from _leaves(layer)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)  # noqa: SLF001

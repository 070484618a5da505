"""Peers evaluated group by group: those of one architecture together, the others one by one."""

import math
from collections.abc import Iterator, Sequence
from operator import gt
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from streamkd import layers
from streamkd.peer import Peer
from streamkd.river_peer import RiverPeer

_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Identity)
_STACKED = (nn.Flatten, nn.Linear, nn.LayerNorm, *_ELEMENTWISE)


class Group(Protocol):
    """Peers that are asked and taught together. Every tensor has them in the order of `members`."""

    members: list[int]
    features: list[Tensor | None]
    """What each member's model told in `learn` beside its logits, `[n, ...]`, with its gradient; or None."""
    by_hand: bool
    """Whether nothing of an update is left to torch's autograd."""

    def predict(self, x: Tensor, classes: int) -> Tensor:
        """Answer `x` `[n, ...]`: logits `[2 * members, n, classes]`, the peers' first, then their averages'.

        Of a model's outputs these are the first; all, if there are fewer.
        """

    def learn(self, x: Tensor, classes: int) -> Tensor:
        """Answer `x` in training mode: logits `[members, n, classes]`, likewise, and be ready for `back`."""

    def back(self, gradient: Tensor, hint: Tensor | None = None, *, add: bool = False) -> None:
        """Bring each member its gradient, from that at the logits of `learn`.

        Args:
            gradient: `[members, n, classes]`.
            hint: a loss made from `features`, whose gradient is added.
            add: to the gradient that was brought last, for records that are learned together and fit no memory at once.
        """

    def clip(self) -> Tensor:
        """Shorten each member's gradient to its `clip`; return the norms before, `[members]`."""

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
        self.features: list[Tensor | None] = [None]
        self.by_hand = False
        self.peer = peer

    def predict(self, x: Tensor, classes: int) -> Tensor:
        """See `Group`."""
        return torch.stack([self.peer.predict(x).logits, self.peer.predict_average(x).logits])[..., :classes]

    def learn(self, x: Tensor, classes: int) -> Tensor:
        """See `Group`."""
        said = self.peer.learn(x)
        self._logits, self.features = said.logits[..., :classes], [said.features]
        return self._logits.detach()[None]

    def back(self, gradient: Tensor, hint: Tensor | None = None, *, add: bool = False) -> None:  # noqa: ARG002 - it does
        """See `Group`."""
        if self._logits.requires_grad:
            self._logits.backward(gradient[0], retain_graph=hint is not None)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if hint is not None and hint.requires_grad:
            hint.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def clip(self) -> Tensor:
        """See `Group`."""
        return self.peer.clip_gradient().reshape(1).to(self._logits.device)

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
    for the last digits. Nothing here has a gradient of torch's own: the layers know their way back.

    Args:
        members: the peers' indices in the cohort.
        peers: of one architecture, see `grouped`.

    Attributes:
        descends: whether every step is nothing but the gradient times the rate.
    """

    def __init__(self, members: list[int], peers: Sequence[Peer]) -> None:
        self.members = members
        self.features: list[Tensor | None] = [None] * len(members)  # of these nobody asks: a `Tapped` model is no stack
        self.peers = list(peers)
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
        self._gradients = [
            list(zip(peer.module.parameters(), self._cut(row), strict=True))
            for peer, row in zip(self.peers, self._gradient, strict=True)
        ]
        slots = self._cut(self._gradient)
        self._members = self._layers(self._cut(self._rows), slots)
        self._everyone = self._layers(self._cut(self._weights), slots)
        self._longest = [peer.clip for peer in self.peers]
        self._clips = self._weights.new_tensor(self._longest)
        self._rates = self._weights.new_tensor([peer.rates[:1] for peer in self.peers])
        self.descends = all(_plain(peer.optimizer) for peer in self.peers)
        self.by_hand = not any(isinstance(layer, layers.Elementwise) for layer in self._members)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """All weights `[2 * members, all]`, the averages' last; gradients `[members, all]`; clips `[members]`."""
        return self._weights, self._gradient, self._clips

    def _cut(self, rows: Tensor) -> list[Tensor]:
        """Cut rows of weights `[..., all]` into one tensor a parameter, `[..., *its shape]`."""
        parameters = list(self.peers[0].module.parameters())
        parts = torch.split(rows.detach(), [parameter.numel() for parameter in parameters], dim=-1)
        return [part.view(*rows.shape[:-1], *p.shape) for part, p in zip(parts, parameters, strict=True)]

    def _layers(self, weights: Sequence[Tensor], slots: Sequence[Tensor]) -> list[layers.Layer]:
        """Build the layers from all the weights; gradients are written to `slots`."""
        left = iter(zip(weights, slots, strict=True))
        made: list[layers.Layer] = []
        for layer in leaves(self.peers[0].module):
            own = [next(left) for _ in layer.parameters()]
            (first, second), places = [*(weight for weight, _ in own), None, None][:2], [slot for _, slot in own]
            if isinstance(layer, nn.Linear):
                made.append(layers.Linear(torch.as_tensor(first), second, places, first=not made))
            elif isinstance(layer, nn.LayerNorm):
                made.append(layers.Norm(first, second, places, layer.eps))
            elif isinstance(layer, nn.ReLU):
                made.append(layers.Rectifier())
            elif not isinstance(layer, nn.Flatten | nn.Identity):
                made.append(layers.Elementwise(layer))
        return made

    def predict(self, x: Tensor, classes: int) -> Tensor:
        """See `Group`."""
        return _through(self._everyone, x, classes)[..., :classes]

    def learn(self, x: Tensor, classes: int) -> Tensor:
        """See `Group`."""
        logits = _through(self._members, x, classes)
        self._unasked = max(0, logits.shape[-1] - classes)
        return logits[..., :classes]

    def back(self, gradient: Tensor, hint: Tensor | None = None, *, add: bool = False) -> None:  # noqa: ARG002 - there are no features
        """See `Group`."""
        before = self._gradient.clone() if add else None
        if self._unasked:
            gradient = functional.pad(gradient, (0, self._unasked))
        for layer in reversed(self._members):
            gradient = layer.back(gradient)
        if before is not None:
            self._gradient.add_(before)

    def clip(self) -> Tensor:
        """See `Group`."""
        norms: Tensor = torch.linalg.vector_norm(self._gradient, dim=1)
        if not norms.is_cpu or any(map(gt, norms.tolist(), self._longest)):  # to ask a device would be to wait for it
            self._gradient.mul_((self._clips / norms).clamp(max=1.0)[:, None])
        return norms

    def step(self, norms: Sequence[float | None], rate: float) -> None:
        """See `Group`."""
        for peer, norm in zip(self.peers, norms, strict=True):
            if norm is not None and not math.isfinite(norm):
                peer.skip()
        going = [norm is not None and math.isfinite(norm) for norm in norms]
        if not any(going):
            return
        if not all(going):  # 0 times what is not finite would not be 0
            self._gradient[torch.tensor(going, device=self._gradient.device).logical_not()] = 0.0
        chosen = [index for index, goes in enumerate(going) if goes]
        if self.descends:
            self._rows.addcmul_(self._gradient, self._rates, value=-rate)
        else:
            self._optimize(chosen, rate)
        shares = np.array([[self.peers[index].share()] for index in chosen], np.float32)
        blend = torch.from_numpy(shares).to(self._weights.device)
        if all(going):
            self._averages.lerp_(self._rows, blend)
        else:  # a share of 0 would not keep out what is not finite
            self._averages[chosen] = self._averages[chosen].lerp(self._rows[chosen], blend)
        for index in chosen:
            self.peers[index].stepped()

    def _optimize(self, chosen: Sequence[int], rate: float) -> None:
        """Let the members' own optimizers step, each along its row of the gradient."""
        with torch.inference_mode(mode=False):  # what they gather is there to stay
            for index in chosen:
                for parameter, gradient in self._gradients[index]:
                    parameter.grad = gradient
                self.peers[index].optimize(rate)

    def discard(self) -> None:
        """See `Group`."""
        self._gradient.zero_()


def _through(made: Sequence[layers.Layer], x: Tensor, classes: int) -> Tensor:
    if isinstance(made[-1], layers.Linear):
        made[-1].narrow(classes)
    x = x.flatten(1)
    for layer in made:
        x = layer(x)
    return x


def _plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is nothing but the gradient times the rate."""
    (group, *others) = optimizer.param_groups
    kept = ("momentum", "weight_decay", "maximize")
    return type(optimizer) is torch.optim.SGD and not others and not any(group[name] for name in kept)


def _architecture(peer: Peer | RiverPeer) -> str | None:
    """Describe a model so that those of one description can be stacked; None if it has layers that cannot be."""
    if not isinstance(peer, Peer) or peer.precision != torch.float32:
        return None
    layers, parameters = list(leaves(peer.module)), list(peer.module.parameters())
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


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a model in order, those of sequences in it included."""
    if type(module) is not nn.Sequential or _hooked(module):
        yield module
    else:
        for layer in module:
            yield from leaves(layer)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)  # noqa: SLF001 - there is no public way to ask

"""One model, its optimizer, and the running average of its weights."""

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamkd.batch import Output
from streamkd.taps import Tapped, as_output, plain

KEEP_EVERY = 128
"""Steps between two copies of the weights, to which a peer can be rolled back."""

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Peer:
    """A member of the cohort.

    The average follows the weights with decay min(1 - 1 / (t + 1), 1 - 1 / horizon): a plain mean at first, then an
    exponential one (the warm-up of Arani et al. 2022). Buffers are copied, not averaged.

    Args:
        name: appears in metrics and reports.
        build: makes the model; called once, with torch's generator seeded.
        optimizer: makes the optimizer from the parameters, e.g. `partial(torch.optim.SGD, lr=0.1)`.
        horizon: of the average, in updates.
        clip: largest norm of the gradient; what is longer is shortened to it.
        seed: of the initial weights.
        precision: in which the model answers where torch knows how (autocast); weights, averages, losses and optimizer
            stay as they are.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], nn.Module],
        optimizer: MakeOptimizer = partial(torch.optim.SGD, lr=0.1),  # noqa: B008 - an immutable default
        *,
        horizon: float = 10.0,
        clip: float = 2.0,
        seed: int = 0,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.name = name
        self.clip = clip
        self.precision = precision
        self.skipped = 0
        self.stuck = 0  # steps skipped one after the other, through no fault of the records
        self.rollbacks = 0
        self.restarts = 0
        self.futile = 0  # of them, since a step was taken
        self._build, self._make_optimizer, self._horizon, self._seed = build, optimizer, horizon, seed
        self._device = torch.device("cpu")
        self._start({})
        self.capacity = max(1, sum(p.numel() for p in plain(self.module).parameters()))

    def _start(self, weights: Mapping[str, Any]) -> None:
        self.stuck = self.taken = 0
        self.good: dict[str, Any] = {}
        with torch.random.fork_rng():
            torch.manual_seed(self._seed + self.restarts * 1_000_003)
            self.module = self._build().to(self._device)
        if _alike(weights, self.module.state_dict()) and _sound(weights):
            self.module.load_state_dict(weights)
        self.average = deepcopy(self.module).requires_grad_(requires_grad=False).eval()
        self._gather()

    def _gather(self) -> None:
        """Note all weights where they lie, and make the optimizer for them, some of which gather at once."""
        self._parameters = list(self.module.parameters())
        self.optimizer = self._make_optimizer(self._parameters)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self._averaged: list[Tensor] = list(self.average.parameters())
        self._current: list[Tensor] = list(self._parameters)
        # The buffers as they were after the last step, of which the average has copies, beside those in use.
        self._buffers = list(zip(self.average.buffers(), self.module.buffers(), strict=True))

    @property
    def learns_by(self) -> str:
        """Optimizer and learning rates, for people."""
        return f"{type(self.optimizer).__name__} at {', '.join(f'{rate:g}' for rate in self.rates)}"

    def to(self, device: torch.device) -> "Peer":
        """Move the model and its average; call before the first update."""
        if device != self._device:
            self._device = device
            self.module.to(device)
            self.average.to(device)
            self._gather()
        return self

    def roll_back(self) -> None:
        """Go back to the weights that were kept last, `good`; optimizer and average begin anew."""
        self.rollbacks += 1
        self._start(self.good)

    def restart(self, source: "Peer") -> None:
        """Begin anew: with the weights of `source` where it is of the same shape and sound, from a fresh start if not.

        Optimizer and average begin anew too.
        """
        self.restarts += 1
        self.futile += 1
        self._start(source.module.state_dict())

    def learn(self, x: Tensor) -> Output:
        """Answer `x` `[n, ...]` in training mode, with a gradient; a single record has no batch statistics."""
        _switch(self.module, training=len(x) > 1 or not self._buffers)
        return self._ask(self.module, x)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Output:
        """Answer `x` in evaluation mode, without a gradient."""
        _switch(self.module, training=False)
        return self._ask(self.module, x)

    @torch.no_grad()
    def predict_average(self, x: Tensor) -> Output:
        """Answer `x` with the averaged weights."""
        return self._ask(self.average, x)

    def _ask(self, module: nn.Module, x: Tensor) -> Output:
        if self.precision == torch.float32:
            return as_output(module(x))
        with torch.autocast(x.device.type, dtype=self.precision):
            said = as_output(module(x))
        return Output(said.logits.float(), None if said.features is None else said.features.float())

    @torch.no_grad()
    def clip_gradient(self) -> Tensor:
        """Shorten the gradient at hand to `clip`.

        Returns:
            Its norm before, `[]`, infinity where the buffers broke down. It lies where the gradient does: to read it is
            to wait for the device.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if not norm.is_cpu or self.clip < norm:  # to ask a device would be to wait for it
            nn.utils.clip_grads_with_norm_(self._parameters, self.clip, norm)
        for before, now in self._buffers:
            norm = torch.where((before.isfinite() & ~now.isfinite()).any(), math.inf, norm)
        return norm

    @torch.no_grad()
    def step(self, norm: float, rate: float = 1.0) -> None:
        """Take one optimizer step with the gradient at hand; or none, if it is not finite, and count that.

        Args:
            norm: what `clip_gradient` returned, read.
            rate: factor on every learning rate, for this step.
        """
        if not math.isfinite(norm):
            self.skip()
            return
        self.optimize(rate)
        torch._foreach_lerp_(self._averaged, self._current, self.share())
        for before, now in self._buffers:
            before.copy_(now)
        self.stepped()

    def optimize(self, rate: float) -> None:
        """Let the optimizer step along the gradient at hand, and throw it away."""
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Take no step, and count that."""
        self.discard()
        self.skipped += 1
        self.stuck += 1

    def stepped(self) -> None:
        """Count a step that was taken, and keep a copy of the weights now and then."""
        self.stuck = self.futile = 0
        self.taken += 1
        if self.taken % KEEP_EVERY == 0 and _sound(weights := self.module.state_dict()):
            with torch.inference_mode(mode=False):  # they go into checkpoints, to whoever reads them
                self.good = {name: _copy(weight) for name, weight in weights.items()}

    def share(self, ahead: int = 0) -> float:
        """Of the weights in their average after the step that is being taken, or so many steps ahead."""
        return max(1 / (self.taken + ahead + 1), 1 / self._horizon)

    def discard(self) -> None:
        """Throw away the gradient at hand, and what the way to it did to the buffers (batch norm's statistics)."""
        self.optimizer.zero_grad(set_to_none=True)
        for before, now in self._buffers:
            now.copy_(before)

    def adapt(self, teacher: str, own: Tensor, other: Tensor) -> Tensor:
        """Take own features to the shape of the teacher's; see `Tapped`."""
        return self.module.adapt(teacher, own, other) if isinstance(self.module, Tapped) else own

    def shapes(self) -> dict[str, Any]:
        """Return what must be the same for a checkpoint to fit: the shape of every weight, by name."""
        return _shapes(self.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return weights, average, optimizer and counters."""
        return {
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": self.skipped,
            "stuck": self.stuck,
            "rollbacks": self.rollbacks,
            "restarts": self.restarts,
            "futile": self.futile,
            "taken": self.taken,
            "good": self.good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.module.load_state_dict(state["module"])
        self.average.load_state_dict(state["average"])
        # What the optimizer has gathered goes on; its options are those that it was made with.
        options = self.optimizer.state_dict()["param_groups"]
        gathered = deepcopy(state["optimizer"]["state"])  # torch would go on in the very tensors it is given
        self.optimizer.load_state_dict({"state": gathered, "param_groups": options})
        self.skipped, self.stuck = state["skipped"], state["stuck"]
        self.rollbacks, self.restarts = state["rollbacks"], state["restarts"]
        self.taken, self.good, self.futile = state["taken"], state["good"], state["futile"]


def _switch(module: nn.Module, *, training: bool) -> None:
    if module.training != training:  # walks through all layers, so only when it changes anything
        module.train(training)


def _alike(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    return _shapes(theirs) == _shapes(ours)


def _shapes(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shape of every weight by name; of what a module adds to its state, whatever it is, the type."""
    return {
        name: list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        for name, weight in weights.items()
    }


def _sound(weights: Mapping[str, Any]) -> bool:
    return all(bool(weight.isfinite().all()) for weight in weights.values() if isinstance(weight, Tensor))


def _copy(weight: Any) -> Any:
    return weight.clone() if isinstance(weight, Tensor) else deepcopy(weight)

"""One model, its optimizer, and the running average of its weights."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from streamkd.batch import Output

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
    ) -> None:
        self.name = name
        self.clip = clip
        self.skipped = 0
        self.stuck = 0  # steps skipped one after the other
        self.restarts = 0
        self._build, self._make_optimizer, self._horizon, self._seed = build, optimizer, horizon, seed
        self._device = torch.device("cpu")
        self._start(None)
        self.capacity = max(1, sum(p.numel() for p in self._parameters))

    def _start(self, weights: dict[str, Any] | None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(self._seed + self.restarts * 1_000_003)
            self.module = self._build().to(self._device)
        if weights is not None and _fits(weights, self.module.state_dict()):
            self.module.load_state_dict(weights)
        self._parameters = list(self.module.parameters())
        self.optimizer = self._make_optimizer(self._parameters)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self._average_by = ema(1 - 1 / self._horizon)
        self.average = AveragedModel(self.module, multi_avg_fn=self._average_by)
        self.average.requires_grad_(requires_grad=False)
        self.average.eval()
        self._averaged: list[Tensor] = list(self.average.module.parameters())
        self._current: list[Tensor] = list(self._parameters)

    def to(self, device: torch.device) -> "Peer":
        """Move the model and its average; call before the first update."""
        self._device = device
        self.module.to(device)
        self.average.to(device)
        return self

    def restart(self, source: "Peer") -> None:
        """Begin anew: with the weights of `source` where it is of the same shape and sound, from a fresh start if not.

        Optimizer and average begin anew too.
        """
        self.restarts += 1
        self.stuck = 0
        self._start(source.module.state_dict())

    def learn(self, x: Tensor) -> Output:
        """Answer `x` `[n, ...]` in training mode, with a gradient."""
        _switch(self.module, training=True)
        return as_output(self.module(x))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Output:
        """Answer `x` in evaluation mode, without a gradient."""
        _switch(self.module, training=False)
        return as_output(self.module(x))

    @torch.no_grad()
    def predict_average(self, x: Tensor) -> Output:
        """Answer `x` with the averaged weights."""
        return as_output(self.average(x))

    @torch.no_grad()
    def step(self, rate: float = 1.0) -> float:
        """Take one optimizer step with the gradients at hand; return their norm before clipping.

        A gradient that is not finite is never stepped on: it is counted in `skipped` and thrown away.

        Args:
            rate: factor on every learning rate, for this step.
        """
        norm = self._clipped()
        if norm < float("inf"):  # false for NaN as well
            for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = base * rate
            self.optimizer.step()
            self._follow()
            self.stuck = 0
        else:
            self.skipped += 1
            self.stuck += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clipped(self) -> float:
        """Shorten the gradient where it is too long; return its norm before."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self.clip < float(norm) < float("inf"):
            nn.utils.clip_grads_with_norm_(self._parameters, self.clip, norm)
        return float(norm)

    def _follow(self) -> None:
        """Let the average follow the weights, as `AveragedModel` does, but without its walk through all layers."""
        updates = self.average.n_averaged
        if int(updates):
            self._average_by(self._averaged, self._current, updates)
        else:
            torch._foreach_copy_(self._averaged, self._current)
        updates += 1
        for ours, theirs in zip(self.average.module.buffers(), self.module.buffers(), strict=True):
            ours.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """Return weights, average, optimizer and counters."""
        return {
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": self.skipped,
            "stuck": self.stuck,
            "restarts": self.restarts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.module.load_state_dict(state["module"])
        self.average.load_state_dict(state["average"])
        # What the optimizer has gathered goes on; its options are those that it was made with.
        options = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": options})
        self.skipped, self.stuck, self.restarts = state["skipped"], state["stuck"], state["restarts"]


def _switch(module: nn.Module, *, training: bool) -> None:
    if module.training != training:  # walks through all layers, so only when it changes anything
        module.train(training)


def ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """Make the update of an exponential moving average with warm-up, for `AveragedModel`."""

    @torch.no_grad()
    def update(average: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        share = max(1 / (int(updates) + 1), 1 - decay)
        torch._foreach_lerp_(average, current, share)  # what torch's own averages call

    return update


def as_output(said: Any) -> Output:
    """Accept a model that returns plain logits, or logits among other things (torchvision's auxiliary outputs)."""
    if isinstance(said, Output):
        return said
    if isinstance(said, tuple):
        return Output(cast("Tensor", getattr(said, "logits", said[0])))
    return Output(said)


def _fits(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    alike = {name: w.shape for name, w in theirs.items()} == {name: w.shape for name, w in ours.items()}
    return alike and all(bool(weight.isfinite().all()) for weight in theirs.values())

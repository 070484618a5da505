"""What the default cohort computes, written by hand with nothing around it: what `bench overhead` holds the engine to.

The arithmetic alone, in torch, at constant schedules: no check of what comes in or goes wrong, no scores, no detector,
no roles, no report. Records in, answers and updates out.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

MEMORIES = 2_000
DRAWN = 32
UPDATES = 2
CLIP = 2.0
DECAY = 0.95
ALPHA = 0.5
TEMPERATURE = 2.0


class Learners(Protocol):
    """Three networks and their averages."""

    def predict(self, x: Tensor) -> Tensor:
        """Logits of all six, `[6, n, classes]`."""

    def learn(self, x: Tensor) -> Tensor:
        """Logits of the three, with a gradient."""

    def step(self) -> None:
        """Clip, step, average."""


class Memory:
    """A ring of the latest records, drawn from in proportion to the loss they had."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.x, self.y = torch.zeros(MEMORIES, *shape), torch.zeros(MEMORIES, dtype=torch.int64)
        self.priorities = torch.zeros(MEMORIES)
        self.added = 0

    def draw(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return slots, records, labels and importance weights."""
        mass = self.priorities[: min(self.added, MEMORIES)] ** 0.6
        slots = torch.multinomial(mass, n, replacement=True)
        weights = mass[slots] ** -0.5
        return slots, self.x[slots], self.y[slots], weights / weights.max()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Remember, at the highest priority."""
        slots = (self.added + torch.arange(len(y))) % MEMORIES
        self.x[slots], self.y[slots] = x, y
        self.priorities[slots] = float(self.priorities.max()) or 1.0
        self.added += len(y)


class Scaling:
    """Running means and variances of the features, or of the channels of images."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.around = (1, shape[0], *(1 for _ in shape[1:]))
        self.count = 0.0
        self.mean, self.square = torch.zeros(2, shape[0], dtype=torch.float64)
        self.centre, self.scale = torch.zeros(self.around), torch.ones(self.around)

    def __call__(self, x: Tensor) -> Tensor:
        """Scale a batch, missing values and outliers seen to."""
        return ((x - self.centre) * self.scale).nan_to_num_(0.0).clamp_(-8, 8)

    def update(self, x: Tensor) -> None:
        """Learn from a batch."""
        values = x.transpose(0, 1).flatten(1).double()
        count = values.shape[1]
        mean = values.sum(1) / count
        share, apart = count / (self.count + count), mean - self.mean
        self.square += (values - mean[:, None]).square_().sum(1) + apart * apart * (self.count * share)
        self.mean += apart * share
        self.count += count
        spread = (self.square / self.count).sqrt_().clamp_(min=1e-12)
        self.centre, self.scale = (each.float().view(self.around) for each in (self.mean, 1 / spread))


class Mixture:
    """Answers weighed by their discounted log-loss."""

    def __init__(self, members: int, gamma: float) -> None:
        self.gamma = gamma
        self.scores = torch.zeros(members)
        self.weights = torch.full((members,), 1 / members)

    def __call__(self, log_p: Tensor) -> Tensor:
        """Mix log-probabilities `[members, n, classes]`."""
        return (self.weights @ log_p.exp().flatten(1)).view(log_p.shape[1:])

    def update(self, said: Tensor) -> None:
        """Learn from the log-probabilities `[members, n]` of what was true."""
        self.scores = self.gamma ** said.shape[1] * self.scores + said.clamp(min=-14).sum(1)
        self.weights = 0.99 * self.scores.softmax(0) + 0.01 / len(self.scores)


class Answer:
    """The members' mixture, and beside it the log-linear pool of them and of how common the classes were of late."""

    def __init__(self, members: int, classes: int) -> None:
        self.memories = torch.tensor([[0.9], [0.98], [0.998]])
        self.rates = torch.full((len(self.memories), classes), 1 / classes)
        self.powers = torch.cat([torch.full((members,), 1 / members), torch.zeros(len(self.memories))])
        self.members, self.both = Mixture(members, 0.99), Mixture(2, 0.998)
        self.truth = torch.eye(classes)

    def __call__(self, logits: Tensor) -> Tensor:
        """Answer by the logits `[members, n, classes]`."""
        self.said = logits.log_softmax(-1)
        rates = self.rates.clamp(min=1e-6).log_()[:, None].expand(-1, logits.shape[1], -1)
        self.opinions = torch.cat([self.said, rates]).clamp_(min=-8).flatten(1)
        pooled = (self.powers @ self.opinions).view(logits.shape[1:]).log_softmax(-1)
        self.verdict = torch.stack([self.members(self.said).clamp_(min=1e-30).log_(), pooled])
        return self.both(self.verdict)

    def update(self, y: Tensor) -> None:
        """Learn from the labels of what was answered last."""
        n, truth = len(y), self.truth[y]
        self.members.update((self.said * truth).sum(-1))
        self.both.update((self.verdict * truth).sum(-1))
        self.powers += 0.002 * (self.opinions @ (truth - self.verdict[1].exp()).flatten())
        fading = self.memories ** torch.arange(n - 1, -1, -1)
        self.rates = self.rates * self.memories**n + (1 - self.memories) * (fading @ truth)


class Networks:
    """Predict, draw, learn: the first network teaches the others where it is closer to the label, capped.

    Of the default cohort this is the networks alone: inputs as they come, and an answer that weighs all alike.
    """

    def __init__(self, learners: Learners, shape: Sequence[int]) -> None:
        self.learners = learners
        self.memory = Memory(shape)

    def scaled(self, x: Tensor) -> Tensor:
        """Make inputs ready."""
        return x

    def served(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 - for those who learn from it
        """Answer, then be told what was true."""
        return self.learners.predict(x).softmax(-1).mean(0)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One batch; returns the served probabilities."""
        with torch.no_grad():
            served = self.served(x, y)
        if not self.memory.added:
            self.memory.add(x, y)
        slots, old_x, old_y, weights = self.memory.draw(UPDATES * DRAWN)
        even = torch.full((len(y),), 1 / len(y))
        new_x, old_x = self.scaled(x), self.scaled(old_x)
        losses = []
        for part in torch.arange(UPDATES * DRAWN).view(UPDATES, DRAWN):
            xs, ys = torch.cat([old_x[part], new_x]), torch.cat([old_y[part], y])
            losses.append(self._update(xs, ys, torch.cat([weights[part] / DRAWN, even]))[:DRAWN])
        self.memory.priorities[slots] = torch.cat(losses) + 1e-3
        self.memory.add(x, y)
        return served

    def _update(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        logits = self.learners.learn(x)
        hard, gradient = lesson(logits.detach(), y)
        logits.backward(gradient * weights[:, None])  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.learners.step()
        return hard.mean(0)


@torch.no_grad()
def lesson(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hard losses `[peers, m]`, and the gradient at the logits, of which that of distillation is capped."""
    log_p = logits.log_softmax(-1)
    index = y.expand(len(logits), -1)[..., None]
    hard = -log_p.gather(-1, index)[..., 0]
    gradient = log_p.exp().scatter_add(-1, index, torch.full(index.shape, -1.0))
    p = (logits / TEMPERATURE).log_softmax(-1).exp()
    gate = hard[:1] < hard[1:]
    taught = (p[1:] - p[:1]) * (ALPHA * TEMPERATURE * gate)[..., None]
    room = gradient[1:].norm(dim=-1) / taught.norm(dim=-1).clamp(min=1e-12)
    gradient[1:] += taught * room.clamp(max=1.0)[..., None]
    return hard, gradient


class ByHand(Networks):
    """All of it: inputs scaled, and the answer of whom the stream proved right."""

    def __init__(self, learners: Learners, shape: Sequence[int], classes: int) -> None:
        super().__init__(learners, shape)
        self.scaling, self.answer = Scaling(shape), Answer(6, classes)

    def scaled(self, x: Tensor) -> Tensor:
        """See `Networks`."""
        return self.scaling(x)

    def served(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Networks`."""
        served = self.answer(self.learners.predict(self.scaling(x)))
        self.scaling.update(x)
        self.answer.update(y)
        return served


class Stacked:
    """Perceptrons with layer norm, of one shape: one batched product a layer, one operation a step."""

    def __init__(self, models: Sequence[nn.Module], rates: Sequence[float]) -> None:
        vectors = torch.stack([nn.utils.parameters_to_vector(model.parameters()).detach() for model in models])
        self.flat = torch.cat([vectors, vectors])
        self.shapes = [parameter.shape for parameter in models[0].parameters()]
        self.current = [part.requires_grad_() for part in self._cut(self.flat[: len(models)])]
        self.all = self._cut(self.flat)
        self.rates = torch.tensor(rates)[:, None]

    def _cut(self, rows: Tensor) -> list[Tensor]:
        parts = torch.split(rows.detach(), [shape.numel() for shape in self.shapes], dim=1)
        shaped = [part.view(len(rows), *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return [part[:, None] if part.dim() < len(("peers", "out", "in")) else part for part in shaped]

    def predict(self, x: Tensor) -> Tensor:
        """See `Learners`."""
        return self._forward(self.all, x)

    def learn(self, x: Tensor) -> Tensor:
        """See `Learners`."""
        return self._forward(self.current, x)

    def _forward(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        x = x.expand(len(weights[0]), *x.shape)
        *hidden, last, bias = weights
        for start in range(0, len(hidden), 4):
            weight, shift, scale, offset = hidden[start : start + 4]
            x = torch.baddbmm(shift, x, weight.transpose(1, 2))
            x = torch.addcmul(offset, functional.layer_norm(x, x.shape[-1:]), scale).relu()
        return torch.baddbmm(bias, x, last.transpose(1, 2))

    @torch.no_grad()
    def step(self) -> None:
        """See `Learners`."""
        size = len(self.rates)
        gradient = torch.cat([torch.as_tensor(part.grad).flatten(1) for part in self.current], 1)
        for part in self.current:
            part.grad = None
        gradient *= (CLIP / gradient.norm(dim=1, keepdim=True)).clamp(max=1)
        self.flat[:size].addcmul_(gradient, self.rates, value=-1)
        self.flat[size:].lerp_(self.flat[:size], 1 - DECAY)


class Separate:
    """Any networks, one after the other, each with an optimizer of its own."""

    def __init__(self, models: Sequence[nn.Module], rates: Sequence[float]) -> None:
        self.models = [deepcopy(model) for model in models]
        self.averages = [deepcopy(model).requires_grad_(requires_grad=False) for model in models]
        self.optimizers = [
            torch.optim.SGD(model.parameters(), lr=rate) for model, rate in zip(self.models, rates, strict=True)
        ]

    def predict(self, x: Tensor) -> Tensor:
        """See `Learners`."""
        return torch.stack([model(x) for model in [*self.models, *self.averages]])

    def learn(self, x: Tensor) -> Tensor:
        """See `Learners`."""
        return torch.stack([model(x) for model in self.models])

    def step(self) -> None:
        """See `Learners`."""
        for model, average, optimizer in zip(self.models, self.averages, self.optimizers, strict=True):
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - DECAY)


class Plain:
    """The loop that one would write without streamkd: torch's modules, losses, optimizers and averages as they come."""

    def __init__(self, build: Callable[[], nn.Module], rates: Sequence[float], shape: Sequence[int]) -> None:
        self.models = [build() for _ in rates]
        averaging = get_ema_multi_avg_fn(DECAY)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.averages = [AveragedModel(model, multi_avg_fn=averaging) for model in self.models]
        self.optimizers = [
            torch.optim.SGD(model.parameters(), lr=rate) for model, rate in zip(self.models, rates, strict=True)
        ]
        self.memory = Memory(shape)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One batch; returns the mean answer."""
        with torch.no_grad():
            served = torch.stack([model(x).softmax(-1) for model in [*self.models, *self.averages]]).mean(0)
        if not self.memory.added:
            self.memory.add(x, y)
        for _ in range(UPDATES):
            slots, old_x, old_y, weights = self.memory.draw(DRAWN)
            self.memory.priorities[slots] = self._update(
                torch.cat([old_x, x]),
                torch.cat([old_y, y]),
                torch.cat([weights / DRAWN, torch.full((len(y),), 1 / len(y))]),
            )[:DRAWN]
        self.memory.add(x, y)
        return served

    def _update(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        logits = [model(x) for model in self.models]
        teacher = (logits[0].detach() / TEMPERATURE).log_softmax(-1)
        losses = []
        for index, (model, average, optimizer) in enumerate(
            zip(self.models, self.averages, self.optimizers, strict=True)
        ):
            hard = functional.cross_entropy(logits[index], y, reduction="none")
            loss = (weights * hard).sum()
            if index:
                student = (logits[index] / TEMPERATURE).log_softmax(-1)
                soft = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
                loss = loss + ALPHA * TEMPERATURE**2 * soft
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            average.update_parameters(model)
            losses.append(hard.detach())
        return torch.stack(losses).mean(0) + 1e-3

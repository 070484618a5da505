"""The peers together: what they answer, who teaches whom, and one simultaneous update of them all."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from streamkd.batch import Output
from streamkd.logits import UNSEEN, cross_entropy, mask_unseen
from streamkd.losses import Loss, kd
from streamkd.peer import Peer
from streamkd.report import SERVED
from streamkd.schedules import Schedule, Signals, competence, constant, loss_driven

STUCK = 8
"""Updates in a row without a finite gradient after which a peer is restarted."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """How peers teach one another.

    Attributes:
        scheme: who teaches whom. `leader`: the teacher in office teaches all others and listens to nobody; `mutual`:
            every peer learns from every other (Zhang et al. 2018); `ensemble`: all learn from the served answer;
            `average`: from the averaged weights of the others (Wu and Gong 2021); `static`: from a teacher that stops
            learning after `freeze_after` updates; `none`.
        loss: what a student learns, per example.
        temperature: a schedule, a value a student.
        alpha: a schedule, a value a pair: the weight of the distillation.
        beta: a schedule, a value a student: the weight of the labels.
        gate: `better` drops a lesson on records where the teacher is not closer to the label than the student; `soft`
            weighs it by 2 sigmoid(2 (CE_student - CE_teacher)); `open` takes every lesson.
        cap: on no record may the distillation's gradient at the logits outweigh the label's.
        burn_in: updates before any distillation.
        freeze_after: for `static`, in updates.
        temperature_boost, rate_boost, effort_boost: factors on temperature, learning rate and updates a batch at an
            alarm, fading by half every `boost_half_life` updates.
    """

    scheme: str = "leader"
    loss: Loss = kd
    temperature: Schedule = field(default_factory=loss_driven)
    alpha: Schedule = field(default_factory=competence)
    beta: Schedule = field(default_factory=lambda: constant(1.0))
    gate: str = "better"
    cap: bool = True
    burn_in: int = 10
    freeze_after: int = 1_000
    temperature_boost: float = 1.0
    rate_boost: float = 1.0
    effort_boost: float = 3.0
    boost_half_life: int = 64


@dataclass(frozen=True, eq=False, slots=True)
class Lesson:
    """What one update learns from: `x` `[m, ...]` ready for the models, labels `y` `[m]`, weights `[m]`."""

    x: Tensor
    y: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Learned:
    """What one update did.

    Attributes:
        losses: `[m]`, hard loss of each example, the mean over peers, before the step.
        hard, soft, total: `[peers]`, mean hard loss, weighted distillation, and the sum that was minimised, as it
            is before distillation is capped.
        divergence: `[peers]`, mean distillation loss from the teachers, unweighted.
        norms: `[peers]`, norm of the gradient before clipping.
        agreed, compared: pairs of peers that gave the same answer to a record, and pairs compared.
    """

    losses: Tensor
    hard: Tensor
    soft: Tensor
    total: Tensor
    divergence: Tensor
    norms: Tensor
    agreed: int
    compared: int


class Cohort:
    """Two to N peers and the lessons between them.

    Updates are simultaneous: every student learns from what its teachers said before anyone's step (the paper of deep
    mutual learning alternates). The gradient at the logits is computed first, so that distillation can be held to the
    size of the hard gradient on every record; then one backward pass serves all peers.
    """

    def __init__(self, peers: Sequence[Peer], distillation: Distillation | None = None) -> None:
        self.peers = list(peers)
        if len({peer.name for peer in self.peers}) < len(self.peers):
            raise ValueError(f"peers need names of their own; these are {[peer.name for peer in self.peers]}")
        self.distillation = distillation or Distillation()
        size = len(self.peers)
        self.names = [peer.name for peer in self.peers]
        self.losses = torch.zeros(size)  # running means over 50 batches, in nats
        self.accuracies = torch.zeros(size)
        self.observed = 0
        self.updates = 0
        self.drift_update = -1_000_000
        self.temperatures: list[float | None] = [None] * size
        self.alphas: dict[tuple[int, int], float] = {}
        self.betas: list[float] = [1.0] * size
        self.softness = [1.0] * size  # temperatures, boosted after an alarm

    def __len__(self) -> int:
        return len(self.peers)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Answer `x` `[n, ...]`: logits `[2 * peers, n, classes]`, the peers' first, then their averages'."""
        answers = [peer.predict(x).logits for peer in self.peers]
        answers += [peer.predict_average(x).logits for peer in self.peers]
        return torch.stack(answers)

    def observe(self, losses: Tensor, accuracies: Tensor) -> None:
        """Take in the prequential loss and accuracy `[peers]` of one batch."""
        self.observed += 1
        share = max(1 / self.observed, 1 / 50)
        self.losses = self.losses.lerp(losses.cpu(), share)
        self.accuracies = self.accuracies.lerp(accuracies.cpu(), share)

    def alarm(self) -> None:
        """The world has changed: schedules count from here."""
        self.drift_update = self.updates

    def schedule(self, teacher: int, classes: int) -> None:
        """Set temperatures, alphas and betas for the next lessons."""
        rule = self.distillation
        burning_in = self.updates < rule.burn_in
        boost = 1 + (rule.temperature_boost - 1) * self._alertness()
        alphas, betas = self.alphas, self.betas
        self.alphas, self.betas = {}, [1.0] * len(self)  # who listens to nobody has its labels alone
        for source, student in self.pairs(teacher):
            # The served answer is as good as the teacher in office, for want of a measure of its own.
            signals = self._signals(student, teacher if source == 2 * len(self) else source % len(self), classes)
            if burning_in:
                self.alphas[source, student] = 0.0
                continue
            alpha = rule.alpha(replace(signals, previous=alphas.get((source, student))))
            self.alphas[source, student] = alpha
            self.betas[student] = rule.beta(replace(signals, alpha=alpha, previous=betas[student]))
        for student in range(len(self)):
            signals = self._signals(student, teacher, classes)
            value = rule.temperature(replace(signals, previous=self.temperatures[student]))
            self.temperatures[student] = value
        self.softness = [(value or 1.0) * boost for value in self.temperatures]

    def learn(self, lesson: Lesson, *, teacher: int, seen: Tensor, weights: Tensor) -> Learned:
        """Take one step with every peer.

        Args:
            lesson: the examples.
            teacher: index of the peer in office.
            seen: `[classes]` bool, classes met so far; the others are ruled out.
            weights: `[2 * peers]`, of the members in the served answer, for the `ensemble` scheme.
        """
        logits = mask_unseen(torch.stack([peer.learn(lesson.x).logits for peer in self.peers]), seen)
        leaf = logits.detach().requires_grad_()
        hard = cross_entropy(leaf, lesson.y)  # [peers, m]
        (hard_gradient,) = torch.autograd.grad(hard.sum(), leaf)
        hard = hard.detach()
        betas = torch.tensor(self.betas).to(leaf)[:, None]
        gradient = hard_gradient * betas[..., None]
        soft, divergence = torch.zeros_like(hard), torch.zeros_like(hard)
        if any(self.alphas.values()):
            soft, divergence, soft_gradient = self._distil(leaf, hard, lesson, seen=seen, weights=weights)
            # Where it is capped, distillation is cut to the length of the label's gradient, record by record.
            room = gradient.norm(dim=-1) / soft_gradient.norm(dim=-1).clamp(min=1e-12)
            share = room.clamp(max=1.0) if self.distillation.cap else torch.ones_like(room)
            gradient = gradient + soft_gradient * share[..., None]
        logits.backward(gradient * lesson.weights[:, None])  # type: ignore[no-untyped-call]
        norms = torch.tensor([self._step(index, teacher) for index in range(len(self))])
        self._restart_stuck(teacher)
        self.updates += 1
        answers = leaf.detach().argmax(-1)
        return Learned(
            losses=hard.nanmean(0),
            hard=hard.mean(1),
            soft=soft.mean(1),
            total=((betas * hard + soft) * lesson.weights).sum(1),
            divergence=divergence.mean(1),
            norms=norms,
            agreed=int(sum((answers[i] == answers[:i]).sum() for i in range(1, len(self)))),
            compared=answers.shape[1] * len(self) * (len(self) - 1) // 2,
        )

    def pairs(self, teacher: int) -> list[tuple[int, int]]:
        """Return who teaches whom, as (source, student).

        Sources 0 to P - 1 are the peers, P to 2 P - 1 their averages, and 2 P is the served answer.
        """
        size = len(self)
        others = [(i, j) for i in range(size) for j in range(size) if i != j]
        match self.distillation.scheme:
            case "leader" | "static":
                return [(i, j) for i, j in others if i == teacher]
            case "mutual":
                return others
            case "average":
                return [(size + i, j) for i, j in others]
            case "ensemble":
                return [(2 * size, j) for j in range(size)]
            case _:
                return []

    def source_name(self, source: int) -> str:
        """Return the name of a source of `pairs`."""
        return SERVED if source == 2 * len(self) else self.names[source % len(self)]

    def _distil(
        self, leaf: Tensor, hard: Tensor, lesson: Lesson, *, seen: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted and plain distillation loss `[peers, m]`, and its gradient at the logits `[peers, m, classes]`."""
        sources, students = (list(side) for side in zip(*self.alphas, strict=True))
        taught = self._sources(leaf.detach(), lesson.x, seen=seen, weights=weights)[sources]
        sound = taught.isfinite().all(-1)  # a teacher that broke down teaches nothing
        taught = torch.where(sound[..., None], taught, 0.0)
        temperature = torch.tensor([self.softness[student] for student in students]).to(leaf)[:, None]
        loss = self.distillation.loss(Output(leaf[students]), Output(taught), lesson.y, temperature)
        # A student of several teachers hears their mean (1 / (P - 1) in deep mutual learning).
        shares = torch.tensor([alpha / students.count(j) for (_, j), alpha in self.alphas.items()]).to(leaf)
        gate = self._gate(hard[students], cross_entropy(taught, lesson.y)) * sound
        weighted = shares[:, None] * gate * loss
        (gradient,) = torch.autograd.grad(weighted.sum(), leaf)
        index = torch.tensor(students, device=leaf.device)
        soft = torch.zeros_like(hard).index_add_(0, index, weighted.detach())
        counts = torch.tensor([students.count(j) for j in students]).to(leaf)[:, None]
        divergence = torch.zeros_like(hard).index_add_(0, index, loss.detach() / counts)
        return soft, divergence, gradient

    @torch.no_grad()
    def _sources(self, logits: Tensor, x: Tensor, *, seen: Tensor, weights: Tensor) -> Tensor:
        """All that can teach, as logits `[sources, m, classes]`; only what the scheme asks for is computed."""
        if self.distillation.scheme in {"leader", "static", "mutual"}:
            return logits
        averages = mask_unseen(torch.stack([peer.predict_average(x).logits for peer in self.peers]), seen)
        members = torch.cat([logits, averages])
        log_p = members.log_softmax(-1) + weights.to(logits).log()[:, None, None]
        served = log_p.nan_to_num(nan=UNSEEN).logsumexp(0)
        return torch.cat([members, served[None]])

    def _gate(self, student: Tensor, teacher: Tensor) -> Tensor:
        match self.distillation.gate:
            case "better":
                return (teacher < student).to(student)
            case "soft":
                return 2 * torch.sigmoid(2 * (student - teacher))
            case _:
                return torch.ones_like(student)

    def _step(self, index: int, teacher: int) -> float:
        rule = self.distillation
        if rule.scheme == "static" and index == teacher and self.updates >= rule.freeze_after:
            self.peers[index].optimizer.zero_grad(set_to_none=True)
            return 0.0
        return self.peers[index].step(self.rate)

    @property
    def rate(self) -> float:
        """The factor on every learning rate now: raised at an alarm, then fading to 1."""
        return 1 + (self.distillation.rate_boost - 1) * self._alertness()

    @property
    def effort(self) -> float:
        """The factor on the updates a batch now: a new world is learned by more steps, not by longer ones."""
        return 1 + (self.distillation.effort_boost - 1) * self._alertness()

    def _restart_stuck(self, teacher: int) -> None:
        """Give a peer that stays non-finite the weights of the teacher in office, or of any peer that is well."""
        for peer in self.peers:
            if peer.stuck >= STUCK:
                healthy = [self.peers[teacher], *self.peers]
                peer.restart(next((other for other in healthy if not other.stuck), peer))

    def _alertness(self) -> float:
        """1 at an alarm, halving every `boost_half_life` updates."""
        return float(0.5 ** ((self.updates - self.drift_update) / self.distillation.boost_half_life))

    def _signals(self, student: int, teacher: int, classes: int) -> Signals:
        return Signals(
            update=self.updates,
            updates_since_drift=self.updates - self.drift_update,
            classes=max(2, classes),
            loss=float(self.losses[student]),
            teacher_loss=float(self.losses[teacher]),
            accuracy=float(self.accuracies[student]),
            teacher_accuracy=float(self.accuracies[teacher]),
            capacity=self.peers[student].capacity,
            teacher_capacity=self.peers[teacher].capacity,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the peers, what was observed of them, and what the schedules said last."""
        return {
            "peers": {peer.name: peer.state_dict() for peer in self.peers},
            "losses": self.losses,
            "accuracies": self.accuracies,
            "observed": self.observed,
            "updates": self.updates,
            "drift_update": self.drift_update,
            "temperatures": list(self.temperatures),
            "softness": list(self.softness),
            "alphas": [[source, student, alpha] for (source, student), alpha in self.alphas.items()],
            "betas": list(self.betas),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for peer in self.peers:
            peer.load_state_dict(state["peers"][peer.name])
        self.losses, self.accuracies = state["losses"], state["accuracies"]
        self.observed, self.updates = state["observed"], state["updates"]
        self.drift_update = state["drift_update"]
        self.temperatures, self.betas = list(state["temperatures"]), list(state["betas"])
        self.softness = list(state["softness"])
        self.alphas = {(source, student): alpha for source, student, alpha in state["alphas"]}

"""The peers together: what they answer, who teaches whom, and one simultaneous update of them all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streamkd.batch import Output, labelled
from streamkd.logits import UNSEEN, cross_entropy, mask_unseen
from streamkd.losses import Loss, kd
from streamkd.peer import Peer
from streamkd.report import SERVED
from streamkd.river_peer import RiverPeer
from streamkd.schedules import Schedule, Signals, competence, constant, loss_driven

STUCK = 8
"""Updates in a row without a finite gradient after which a peer is rolled back, or restarted."""


FUTILE = 8
"""Restarts of every peer, without one step between them, after which learning is given up."""


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
        unlabelled: the weight of records that will never have a label, from which all peers learn the served answer
            where it gives a class at least `confidence` (Lee 2013, softly). 0: nothing is learned from them.
        confidence: likewise.
        doubt: the share of that answer which is spread evenly over the classes instead.
        interpolate: up to which share such a record is mixed with another one, inputs and answers alike; 0 for none.
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
    unlabelled: float = 3.0
    confidence: float = 0.0
    doubt: float = 0.1
    interpolate: float = 0.5
    temperature_boost: float = 1.0
    rate_boost: float = 1.0
    effort_boost: float = 3.0
    boost_half_life: int = 64


@dataclass(frozen=True, eq=False, slots=True)
class Lesson:
    """What one update learns from.

    Attributes:
        x: `[m, ...]`, ready for the models.
        y: `[m]`, class indices, or `UNLABELLED`.
        weights: `[m]`.
        targets: `[m, classes]`, probabilities, for examples without a label; rows of the others are passed over. None
            where every example has a label.
    """

    x: Tensor
    y: Tensor
    weights: Tensor
    targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, rows: Sequence[int]) -> "Lesson":
        """Return the chosen examples."""
        index = torch.tensor(rows, device=self.y.device)
        targets = None if self.targets is None else self.targets[index]
        return Lesson(self.x[index], self.y[index], self.weights[index], targets)


@dataclass(frozen=True, eq=False, slots=True)
class Learned:
    """What one update did.

    Attributes:
        losses: `[m]`, hard loss of each example, the mean over peers, before the step; NaN for one at fault.
        hard, soft, total: `[peers]`, mean hard loss, weighted distillation, and the sum that was minimised, as it
            is before distillation is capped.
        divergence: `[peers]`, mean distillation loss from the teachers, unweighted.
        norms: `[peers]`, norm of the gradient before clipping; NaN where the loss is not finite.
        agreed, compared: pairs of peers that gave the same answer to a record, and pairs compared.
        faulty: rows of examples that were left out, because an update on one of them alone is not finite.
    """

    losses: Tensor
    hard: Tensor
    soft: Tensor
    total: Tensor
    divergence: Tensor
    norms: Tensor
    agreed: int
    compared: int
    faulty: tuple[int, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether every peer has a gradient to step along."""
        return bool(self.norms.isfinite().all())


class Cohort:
    """Two to N peers and the lessons between them.

    Updates are simultaneous: every student learns from what its teachers said before anyone's step (the paper of deep
    mutual learning alternates). The gradient at the logits is computed first, so that distillation can be held to the
    size of the hard gradient on every record; then one backward pass serves all peers.
    """

    def __init__(self, peers: Sequence[Peer | RiverPeer], distillation: Distillation | None = None) -> None:
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
        backward = partial(self._backward, teacher=teacher, seen=seen, weights=weights)
        learned = backward(lesson)
        if not learned.finite:
            learned = self._without_faulty(lesson, learned, backward)
        if len(learned.faulty) < len(lesson):
            self._step(learned.norms.tolist(), teacher)
        self.mend(teacher)
        self.updates += 1
        return learned

    def absorb(self, x: Tensor, y: Tensor, *, teacher: int) -> None:
        """Let the peers that learn record by record have the records `x` `[n, ...]` with their labels `y` `[n]`."""
        for index, peer in enumerate(self.peers):
            if isinstance(peer, RiverPeer) and not self._frozen(index, teacher):
                peer.absorb(x, y)

    def _backward(self, lesson: Lesson, *, teacher: int, seen: Tensor, weights: Tensor) -> Learned:
        """Bring every peer its gradient, clipped; take no step yet."""
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
        known = labelled(lesson.y)
        if lesson.targets is not None:  # the gradient of KL(target || answer) where there is no label
            gradient = torch.where(known[:, None], gradient, leaf.detach().softmax(-1) - lesson.targets)
        logits.backward(gradient * lesson.weights[:, None])  # type: ignore[no-untyped-call]
        norms = torch.tensor(
            [0.0 if self._frozen(index, teacher) else peer.clip_gradient() for index, peer in enumerate(self.peers)]
        )
        norms[~hard.isfinite().all(1).cpu()] = torch.nan  # a loss that is not finite may have a gradient that is
        answers = leaf.detach().argmax(-1)
        return Learned(
            losses=hard.nanmean(0),
            hard=hard.sum(1) / known.sum().clamp(min=1),
            soft=soft.mean(1),
            total=((betas * hard + soft) * lesson.weights).sum(1),
            divergence=divergence.mean(1),
            norms=norms,
            agreed=int(sum((answers[i] == answers[:i]).sum() for i in range(1, len(self)))),
            compared=answers.shape[1] * len(self) * (len(self) - 1) // 2,
        )

    def _without_faulty(self, lesson: Lesson, learned: Learned, backward: Callable[[Lesson], Learned]) -> Learned:
        """Leave out the examples that are at fault, and bring the gradient of the others."""
        faulty = self._at_fault(lesson, learned.norms, backward)
        self._discard()
        if faulty:
            for peer, norm in zip(self.peers, learned.norms.tolist(), strict=True):
                peer.skipped += not math.isfinite(norm)
        kept = [row for row in range(len(lesson)) if row not in faulty]
        losses = torch.full_like(learned.losses, torch.nan)
        if kept:
            learned = backward(lesson.rows(kept))
            losses[kept] = learned.losses
        return replace(learned, losses=losses, faulty=tuple(faulty))

    def _at_fault(self, lesson: Lesson, norms: Tensor, backward: Callable[[Lesson], Learned]) -> list[int]:
        """Find, by bisection, the examples on which alone an update is not finite.

        A peer that breaks down on every one of them, and on an example of zeros, around which all inputs are scaled,
        has itself to blame.
        """

        def broken(part: Lesson, peer: int) -> bool:
            self._discard()
            return not math.isfinite(float(backward(part).norms[peer]))

        def search(rows: list[int], peer: int) -> list[int]:
            if not broken(lesson.rows(rows), peer):
                return []
            half = len(rows) // 2
            return rows if len(rows) == 1 else search(rows[:half], peer) + search(rows[half:], peer)

        neutral = Lesson(torch.zeros_like(lesson.x[:1]), lesson.y[:1], torch.ones_like(lesson.weights[:1]))
        everything = list(range(len(lesson)))
        faulty: set[int] = set()
        for peer in (~norms.isfinite()).nonzero()[:, 0].tolist():
            found = search(everything, peer)
            if len(found) < len(lesson) or not broken(neutral, peer):
                faulty |= set(found)
        return sorted(faulty)

    def _discard(self) -> None:
        """Throw away all gradients."""
        for peer in self.peers:
            peer.discard()

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

    def _frozen(self, index: int, teacher: int) -> bool:
        rule = self.distillation
        return rule.scheme == "static" and index == teacher and self.updates >= rule.freeze_after

    def _step(self, norms: Sequence[float], teacher: int) -> None:
        for index, (peer, norm) in enumerate(zip(self.peers, norms, strict=True)):
            if self._frozen(index, teacher):
                peer.discard()
            else:
                peer.step(norm, self.rate)

    @property
    def rate(self) -> float:
        """The factor on every learning rate now: raised at an alarm, then fading to 1."""
        return 1 + (self.distillation.rate_boost - 1) * self._alertness()

    @property
    def effort(self) -> float:
        """The factor on the updates a batch now: a new world is learned by more steps, not by longer ones."""
        return 1 + (self.distillation.effort_boost - 1) * self._alertness()

    def mend(self, teacher: int) -> None:
        """Roll a peer that stays non-finite back; if that was no help, give it the weights of one that is well."""
        for peer in self.peers:
            if isinstance(peer, RiverPeer) or peer.stuck < STUCK:
                continue
            if peer.good:
                peer.roll_back()
            elif all(isinstance(other, Peer) and other.futile >= FUTILE for other in self.peers):
                raise ArithmeticError(
                    f"no peer has had a finite loss and gradient, though each was restarted {FUTILE} times"
                )
            else:
                others = [other for other in (self.peers[teacher], *self.peers) if isinstance(other, Peer)]
                peer.restart(next((other for other in others if not other.stuck), peer))

    def _alertness(self) -> float:
        """1 at an alarm, halving every `boost_half_life` updates."""
        return float(0.5 ** ((self.updates - self.drift_update) / self.distillation.boost_half_life))

    def _signals(self, student: int, teacher: int, classes: int) -> Signals:
        capacity, teacher_capacity = self.peers[student].capacity, self.peers[teacher].capacity
        known = capacity and teacher_capacity
        return Signals(
            update=self.updates,
            updates_since_drift=self.updates - self.drift_update,
            classes=max(2, classes),
            loss=float(self.losses[student]),
            teacher_loss=float(self.losses[teacher]),
            accuracy=float(self.accuracies[student]),
            teacher_accuracy=float(self.accuracies[teacher]),
            capacity=capacity if known else 1,
            teacher_capacity=teacher_capacity if known else 1,
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

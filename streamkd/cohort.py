"""The peers together: what they answer, who teaches whom, and one simultaneous update of them all."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional

from streamkd import schemes, stream_classes
from streamkd.batch import Output, labelled
from streamkd.capacity import Capacity
from streamkd.distillation import Distillation
from streamkd.faults import at_fault
from streamkd.fitting import Fitting
from streamkd.fused import Fused, fits
from streamkd.gradients import TINY, Pairs, in_arrays, slope, with_gradient
from streamkd.lesson import Learned, Lesson, side_by_side
from streamkd.logits import UNSEEN, cross_entropy, labels_loss, mask_unseen
from streamkd.losses import kd
from streamkd.peer import Peer
from streamkd.report import SERVED
from streamkd.river_peer import RiverPeer
from streamkd.schedules import Curriculum, Signals
from streamkd.stack import Stack, grouped

STUCK = 8
"""Updates in a row without a finite gradient after which a peer is rolled back, or restarted."""
UNFIT = (
    "it takes peers of one architecture, made of linear layers, layer norm and functions of one number, that teach one "
    "another by the loss kd at one temperature for all records, among all classes, without views, features or "
    "capacities measured meanwhile"
)
"""What stands in the way of compiling an update."""
FUTILE = 8
"""Restarts of every peer, without one step between them, after which learning is given up."""


class Cohort:
    """Two to N peers and the lessons between them.

    Updates are simultaneous: every student learns from what its teachers said before anyone's step (the paper of deep
    mutual learning alternates). The gradient at the logits is computed first, so that distillation can be held to the
    size of the hard gradient on every record; then one backward pass serves all peers.

    Args:
        peers: with names of their own.
        distillation: how they teach one another.
        capacity: what their capacities are measured by, started; by default they are numbers of parameters.
        compiled: whether updates are compiled, those that can be.
    """

    def __init__(
        self,
        peers: Sequence[Peer | RiverPeer],
        distillation: Distillation | None = None,
        capacity: Capacity | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.peers = list(peers)
        if len({peer.name for peer in self.peers}) < len(self.peers):
            raise ValueError(f"peers need names of their own; these are {[peer.name for peer in self.peers]}")
        self.distillation = distillation or Distillation()
        size = len(self.peers)
        self.names = [peer.name for peer in self.peers]
        self.source_names = [*self.names, *self.names, SERVED]  # by the indices in `pairs`
        self.losses = [0.0] * size  # running means over 50 batches, in nats
        self.accuracies = [0.0] * size
        self.observed = 0
        self.updates = 0
        self.drift_update = -1_000_000
        self.temperatures: list[float | None] = [None] * size
        self.alphas: dict[tuple[int, int], float] = {}
        self.betas: list[float] = [1.0] * size
        self.feature_weights: dict[tuple[int, int], float] = {}
        self.softness = [1.0] * size  # temperatures, boosted after an alarm
        self.capacity = capacity
        self.capacities = list(capacity.values) if capacity else [float(peer.capacity) for peer in self.peers]
        self.slopes = [0.0] * size  # of the distillation loss by ln T, for a curriculum
        self.groups = grouped(self.peers)
        order = [index for group in self.groups for index in group.members]
        self.places = None if order == list(range(size)) else torch.tensor(order).argsort()
        self.fitting = Fitting(self._discard)
        self._wanted = compiled
        self._plain = self._by_itself()
        self.fused = self._fused() if compiled else None
        self._scheduled: Pairs | None = None
        self._pairs: tuple[tuple[tuple[int, int], ...], Tensor, Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.peers)

    @torch.no_grad()
    def predict(self, x: Tensor, classes: int = sys.maxsize) -> Tensor:
        """Answer `x` `[n, ...]`: logits `[2 * peers, n, classes]`, the peers' first, then their averages'.

        Args:
            x: as above.
            classes: how many of the first ones are asked for; all, if there are fewer.
        """

        def answer() -> Tensor:
            if x.shape[0] <= self.fitting.at_once:
                return self._predict(x, classes)
            return torch.cat([self._predict(part, classes) for part in torch.split(x, self.fitting.at_once)], 1)

        return self.fitting(answer, x.shape[0])

    def _predict(self, x: Tensor, classes: int) -> Tensor:
        said = [group.predict(x, classes) for group in self.groups]
        if len(said) == 1:
            return said[0]
        peers, averages = zip(*(answers.chunk(2) for answers in said), strict=True)
        return torch.cat([self._in_order(peers), self._in_order(averages)])

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Put what the groups said `[members, ...]` in the order of the peers."""
        said = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return said if self.places is None else said[self.places.to(said.device)]

    def observe(self, losses: Sequence[float], accuracies: Sequence[float]) -> None:
        """Take in the prequential loss and accuracy of each peer in one batch."""
        self.observed += 1
        share = max(1 / self.observed, 1 / 50)
        self.losses = [old + share * (new - old) for old, new in zip(self.losses, losses, strict=True)]
        self.accuracies = [old + share * (new - old) for old, new in zip(self.accuracies, accuracies, strict=True)]

    def alarm(self) -> None:
        """The world has changed: schedules count from here."""
        self.drift_update = self.updates

    def schedule(self, teacher: int, classes: int) -> None:
        """Set temperatures, alphas and betas for the next lessons."""
        rule = self.distillation
        self._scheduled = None
        burning_in = self.updates < rule.burn_in
        boost = 1 + (rule.temperature_boost - 1) * self._alertness()
        alphas, betas, weights = self.alphas, self.betas, self.feature_weights
        self.alphas, self.betas = {}, [1.0] * len(self)  # who listens to nobody has its labels alone
        self.feature_weights = {}
        for source, student in self.pairs(teacher):
            if burning_in:
                self.alphas[source, student] = 0.0
                continue
            # The served answer is as good as the teacher in office, for want of a measure of its own.
            by = teacher if source == 2 * len(self) else source % len(self)
            signals = self._signals(student, by, classes, previous=alphas.get((source, student)))
            alpha = rule.alpha(signals) * min(1.0, rule.widest_gap * signals.capacity / signals.teacher_capacity)
            self.alphas[source, student] = alpha
            signals.alpha, signals.previous = alpha, betas[student]
            self.betas[student] = rule.beta(signals)
            if rule.features is not None:
                signals.previous = weights.get((source, student))
                self.feature_weights[source, student] = rule.feature_weight(signals)
        self.temperatures = [
            rule.temperature(self._signals(student, teacher, classes, previous=previous))
            for student, previous in enumerate(self.temperatures)
        ]
        self.softness = [(value or 1.0) * boost for value in self.temperatures]

    def learn(self, lessons: Sequence[Lesson], *, teacher: int, seen: Tensor, weights: Tensor) -> list[Learned]:
        """Take one step with every peer for each of the lessons, up to the first with examples that are at fault.

        What comes after that is not learned: it is the caller's to leave these examples out of it.

        Args:
            lessons: the examples, one at least.
            teacher: index of the peer in office.
            seen: bool, which of the first classes were met so far; all others are ruled out.
            weights: `[2 * peers]`, of the members in the served answer, for the `ensemble` scheme.
        """
        backward = partial(self._backward, teacher=teacher, seen=seen, weights=weights)
        learned = list[Learned]()
        while len(learned) < len(lessons) and not (learned and learned[-1].faulty):
            rest = lessons[len(learned) :]
            learned += self._compiled(rest, teacher, seen) or [self._update(rest[0], teacher, backward)]
        return learned

    def _update(self, lesson: Lesson, teacher: int, backward: Callable[[Lesson], Learned]) -> Learned:
        learned = self.fitting(lambda: backward(lesson), len(lesson))
        if not learned.finite:
            learned = self._without_faulty(lesson, learned, backward)
        if len(learned.faulty) < len(lesson):
            self._step(learned.norms, teacher)
        self.mend(teacher)
        self.updates += 1
        return learned

    @property
    def uncompiled(self) -> str:
        """Why updates that were to be compiled are not; empty where they are, or were not to be."""
        if not self._wanted:
            return ""
        return self.fused.trouble if self.fused else UNFIT

    @property
    def by_hand(self) -> bool:
        """Whether nothing of an update is left to torch's autograd."""
        return self._plain and all(group.by_hand for group in self.groups)

    def _by_itself(self) -> bool:
        """Whether an update can be worked out in one go, for nothing in it has to be looked at on the way."""
        rule = self.distillation
        by_itself = rule.per_record is None and rule.features is None and not isinstance(rule.temperature, Curriculum)
        plain = rule.stream_classes is stream_classes.seen and not rule.views
        measured = self.capacity is not None and self.capacity.online
        return rule.loss is kd and by_itself and plain and not measured

    def _fused(self) -> Fused | None:
        """Return what compiles updates; None where they cannot be."""
        rule = self.distillation
        if not (self._plain and rule.by_peers and fits(self.groups)):
            return None
        return Fused(cast("Stack", self.groups[0]), gate=rule.gate, cap=rule.cap)

    def _compiled(self, lessons: Sequence[Lesson], teacher: int, seen: Tensor) -> list[Learned]:
        """Take the first steps by the compiled function, as many as it takes in one call.

        None of them, if they are not for it, or if anything in them is not finite.
        """
        fused = self.fused
        if fused is None:
            return []
        rule = self._scheduled = self._scheduled or self._prepare(lessons[0].weights.device)
        lessons = lessons[: fused.at_once]
        if not (rule.teach and all(lesson.plain for lesson in lessons) and fused.serves(lessons, seen)):
            return []
        paces = self._paces(teacher, len(lessons)).to(seen.device) if fused.steps else None
        longest = max(map(len, lessons))
        told = self.fitting(
            lambda: fused(lessons, seen, rule, paces) if longest <= self.fitting.at_once else None, longest
        )
        learned = list[Learned]()
        for lesson, (losses, parts, answers, norms) in zip(lessons, told or (), strict=False):
            if self._frozen(teacher, teacher):
                norms[teacher] = 0.0
            learned.append(Learned(lesson.y, lesson.weights, losses, parts, answers, rule.betas, norms))
            if paces is None:
                self._step(norms, teacher)
            else:
                fused.stepped([not self._frozen(index, teacher) for index in range(len(self))])
            self.updates += 1
        return learned

    def _paces(self, teacher: int, updates: int) -> Tensor:
        """How far each step goes, and by how much averages follow, `[2, updates, peers, 1]`; 0 for who is frozen."""
        paces = np.zeros((2, updates, len(self), 1), np.float32)
        for ahead in range(updates):
            rate = self._rate(ahead)
            for index, peer in enumerate(self.peers):
                if isinstance(peer, Peer) and not self._frozen(index, teacher, ahead):
                    paces[:, ahead, index, 0] = rate * peer.rates[0], peer.share(ahead)
        return torch.from_numpy(paces)

    def absorb(self, records: Callable[[], tuple[Tensor, Tensor]], *, teacher: int) -> None:
        """Let the peers that learn record by record have them.

        Args:
            records: makes them ready, for those who ask: `[n, ...]`, with their labels `[n]`.
            teacher: index of the peer in office.
        """
        going = [peer for index, peer in enumerate(self.peers) if not self._frozen(index, teacher)]
        by_record = [peer for peer in going if isinstance(peer, RiverPeer)]
        if by_record:
            x, y = records()
            for peer in by_record:
                peer.absorb(x, y)

    def _backward(self, lesson: Lesson, *, teacher: int, seen: Tensor, weights: Tensor) -> Learned:
        """Bring every peer its gradient, clipped; take no step yet."""
        parts = lesson.split(self.fitting.at_once)
        brought = [self._bring(part, seen=seen, weights=weights, add=part is not parts[0]) for part in parts]
        found = self._in_order([group.clip() for group in self.groups])
        for _, sound in brought:
            if sound is not None:
                found = torch.where(sound, found, math.nan)
        norms: list[float] = found.tolist()  # all that has to be known of an update on its way is read here, at once
        if self._frozen(teacher, teacher):
            norms[teacher] = 0.0
        told = [learned(norms) for learned, _ in brought]
        return told[0] if len(told) == 1 else side_by_side(lesson, told)

    def _bring(
        self, lesson: Lesson, *, seen: Tensor, weights: Tensor, add: bool
    ) -> tuple[Callable[[Sequence[float]], Learned], Tensor | None]:
        """Bring every peer its gradient, or add it to the last one.

        Returns:
            What it did, but for the norms; and whose loss is finite, `[peers]` bool, or None where all are.
        """
        asked, lesson = lesson, lesson.unrolled()
        logits = self._in_order([group.learn(lesson.x, len(seen)) for group in self.groups])
        rule = self._scheduled = self._scheduled or self._prepare(logits.device)
        hints: dict[int, Tensor] = {}
        how, told, sound = self.distillation, None, None
        if self._plain and asked.plain and logits.is_cpu and (how.by_peers or not rule.teach):
            told = in_arrays(logits, seen, lesson, rule, gate=how.gate, cap=how.cap)
        if told is not None:
            parts, gradient, answers = told
        else:
            parts, gradient, answers, hints = self._gradient(logits, asked, lesson, rule, seen=seen, weights=weights)
            sound = parts[0].sum(1).isfinite()  # a loss that is not finite may have a gradient that is
        for group in self.groups:
            own = gradient if len(self.groups) == 1 else gradient[group.members]
            hint = hints.get(group.members[0]) if hints else None
            group.back(own, hint, add=add)
        if asked.views:  # what is told of an example is the mean over its views; its answer, that to it as it came
            shape = (1 + len(asked.views), len(asked))
            parts = parts.reshape(3, len(self), *shape).mean(2)
            answers = answers[:, : len(asked)]
        losses = parts[0].sum(0) / len(self)
        return partial(Learned, asked.y, asked.weights, losses, parts, answers, rule.betas), sound

    def _gradient(
        self, logits: Tensor, asked: Lesson, lesson: Lesson, rule: Pairs, *, seen: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
        """Work out any lesson: like `in_arrays`, and what each student is to learn from features."""
        leaf = mask_unseen(logits, seen)
        hard, gradient, p = labels_loss(_among(leaf, lesson.among), lesson.y)
        gradient = gradient * rule.betas[..., None]
        parts = hard.new_zeros(3, *hard.shape)
        parts[0] = hard
        if rule.teach:
            harder = asked.harder() if asked.views else None
            soft_gradient = self._distil(leaf, parts, lesson, rule, seen=seen, weights=weights, harder=harder)
            if self.distillation.cap:  # cut to the length of the label's gradient, record by record
                room = vector_norm(gradient, dim=-1) / vector_norm(soft_gradient, dim=-1).clamp_(min=TINY)
                soft_gradient *= room.clamp_(max=1.0)[..., None]
            gradient += soft_gradient
        hints: dict[int, Tensor] = {}
        if self.feature_weights:
            hints, told = self._hints(hard, lesson)
            parts[1] += told
        if lesson.targets is not None:  # the gradient of KL(target || answer) where there is no label
            gradient = torch.where(labelled(lesson.y)[:, None], gradient, p - lesson.targets)
        if self.capacity is not None and self.capacity.online:
            self.capacity.update(p, lesson.y, self._features())
            self.capacities = list(self.capacity.values)
        return parts, gradient * lesson.weights[:, None], leaf.argmax(-1), hints

    def _without_faulty(self, lesson: Lesson, learned: Learned, backward: Callable[[Lesson], Learned]) -> Learned:
        """Leave out the examples that are at fault, and bring the gradient of the others."""

        def broken(part: Lesson, peer: int) -> bool:
            self._discard()
            return not math.isfinite(backward(part).norms[peer])

        stopped = [index for index, norm in enumerate(learned.norms) if not math.isfinite(norm)]
        faulty = at_fault(lesson, stopped, broken)
        self._discard()
        if faulty:
            for index in stopped:
                self.peers[index].skipped += 1
        kept = [row for row in range(len(lesson)) if row not in faulty]
        losses = torch.full_like(learned.losses, torch.nan)
        if kept:
            learned = backward(lesson.rows(kept))
            losses[kept] = learned.parts[0].nanmean(0)
        return replace(learned, losses=losses, faulty=tuple(faulty))

    def _discard(self) -> None:
        """Throw away all gradients."""
        for group in self.groups:
            group.discard()

    def pairs(self, teacher: int) -> list[tuple[int, int]]:
        """Return who teaches whom, as (source, student); see `schemes`."""
        scheme: Callable[[int, int], schemes.Pairs] = getattr(schemes, self.distillation.scheme)
        return scheme(len(self), teacher)

    def _prepare(self, device: torch.device) -> Pairs:
        """Gather what the schedules said into tensors, once for all the updates until they are asked again."""

        def column(values: Sequence[float]) -> Tensor:
            return torch.from_numpy(np.array(values, np.float32)[:, None]).to(device)

        pairs = tuple(self.alphas)
        if self._pairs is None or self._pairs[0] != pairs:
            ends = torch.tensor([*zip(*pairs, strict=True)] or [[], []], device=device).long()
            self._pairs = pairs, *ends, ends.flatten(), functional.one_hot(ends[1], len(self)).T.float()
        _, sources, taught, ends, dealt = self._pairs
        students = [student for _, student in pairs]
        portions = [1 / students.count(student) for student in students]
        alphas = [alpha * share for alpha, share in zip(self.alphas.values(), portions, strict=True)]
        return Pairs(
            betas=column(self.betas),
            teach=any(alphas),
            sources=sources,
            students=taught,
            ends=ends,
            alphas=column(alphas),
            portions=column(portions),
            temperatures=column([self.softness[student] for student in students]),
            dealt=dealt,
        )

    def _distil(
        self,
        logits: Tensor,
        parts: Tensor,
        lesson: Lesson,
        rule: Pairs,
        *,
        seen: Tensor,
        weights: Tensor,
        harder: Tensor | None,
    ) -> Tensor:
        """The gradient of distillation at the logits `[peers, m, classes]`; its losses are added to the `parts`."""
        hard = parts[0]
        taught, charged = self._taught(logits, hard, lesson, rule, seen=seen, weights=weights)
        if harder is not None:
            taught, charged = taught[:, harder], charged[:, harder]
        gate = self.distillation.weighed(hard[rule.students], charged)
        sound = taught.isfinite().all(-1)  # a teacher that broke down teaches nothing
        taught, gate = torch.where(sound[..., None], taught, 0.0), gate.nan_to_num(0.0) * sound
        # A student of several teachers hears their mean (1 / (P - 1) in deep mutual learning).
        weights = gate * rule.alphas
        student = logits[rule.students]
        temperature = rule.temperatures
        if self.distillation.per_record is not None:
            temperature = self.distillation.per_record(Output(student), Output(taught), lesson.y, temperature)
        loss, gradient = with_gradient(
            self.distillation.loss, student, taught, lesson.y, temperature=temperature, weights=weights
        )
        if isinstance(self.distillation.temperature, Curriculum):
            slopes = slope(self.distillation.loss, student, taught, lesson.y, temperature=rule.temperatures)
            shares = slopes.nan_to_num(0.0) * rule.portions[:, 0]  # a student that broke down has none
            self.slopes = shares.new_zeros(len(self)).index_add_(0, rule.students, shares).tolist()
        parts[1].index_add_(0, rule.students, weights * loss)
        parts[2].index_add_(0, rule.students, loss * rule.portions)
        return torch.zeros_like(logits).index_add_(0, rule.students, gradient)

    def _features(self) -> list[Tensor | None]:
        """What each peer's model told beside its logits when it last learned."""
        told = {i: said for group in self.groups for i, said in zip(group.members, group.features, strict=True)}
        return [told[index] for index in range(len(self))]

    def _hints(self, hard: Tensor, lesson: Lesson) -> tuple[dict[int, Tensor], Tensor]:
        """What each student is to learn from features: a loss with its gradient; and `[peers, m]`, weighted."""
        compared, features = self.distillation.features, self._features()
        students = [student for _, student in self.feature_weights]
        hints: dict[int, Tensor] = {}
        told = torch.zeros_like(hard)
        for (source, student), weight in self.feature_weights.items():
            own, taught, peer = features[student], features[source], self.peers[student]
            if not weight or own is None or taught is None or compared is None or not isinstance(peer, Peer):
                continue
            taught = taught.detach()
            gate = (
                self.distillation.weighed(hard[student], hard[source])
                * labelled(lesson.y)
                * weight
                / students.count(student)
            )
            if not bool(taught.isfinite().all()):  # a teacher that broke down teaches nothing
                continue
            loss = compared(peer.adapt(self.names[source], own, taught), taught)
            told[student] += gate * loss.detach()
            hints[student] = hints.get(student, 0) + (lesson.weights * gate * loss).sum()
        return hints, told

    @torch.no_grad()
    def _taught(
        self, logits: Tensor, hard: Tensor, lesson: Lesson, rule: Pairs, *, seen: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each pair's teacher: its logits `[pairs, m, classes]`, and what the labels charge it with, `[pairs, m]`."""
        if self.distillation.by_peers:
            return logits[rule.sources], hard[rule.sources]
        averages = mask_unseen(self.predict(lesson.x, len(seen))[len(self) :], seen)
        members = torch.cat([logits, averages])
        log_p = members.log_softmax(-1) + weights.to(logits).log()[:, None, None]
        served = log_p.nan_to_num(nan=UNSEEN).logsumexp(0)
        taught = torch.cat([members, served[None]])[rule.sources]
        return taught, cross_entropy(_among(taught, lesson.among), lesson.y)

    def _frozen(self, index: int, teacher: int, ahead: int = 0) -> bool:
        """Whether a peer learns nothing any more, now or so many updates ahead."""
        rule = self.distillation
        return rule.scheme == "static" and index == teacher and self.updates + ahead >= rule.freeze_after

    def _step(self, norms: Sequence[float], teacher: int) -> None:
        for group in self.groups:
            group.step([None if self._frozen(i, teacher) else norms[i] for i in group.members], self.rate)
        if self._frozen(teacher, teacher):
            self.peers[teacher].discard()

    @property
    def rate(self) -> float:
        """The factor on every learning rate now: raised at an alarm, then fading to 1."""
        return self._rate()

    def _rate(self, ahead: int = 0) -> float:
        return 1 + (self.distillation.rate_boost - 1) * self._alertness(ahead)

    @property
    def effort(self) -> float:
        """The factor on the updates a batch now: a new world is learned by more steps, not by longer ones."""
        return 1 + (self.distillation.effort_boost - 1) * self._alertness()

    def mend(self, teacher: int) -> None:
        """Roll a peer that stays non-finite back; if that was no help, give it the weights of one that is well."""
        if any(peer.stuck >= STUCK for peer in self.peers):
            with torch.inference_mode(mode=False):  # models made here are there to stay
                self._mend(teacher)

    def _mend(self, teacher: int) -> None:
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
        for group in self.groups:
            group.adopt()

    def _alertness(self, ahead: int = 0) -> float:
        """1 at an alarm, halving every `boost_half_life` updates; now or so many updates ahead."""
        return float(0.5 ** ((self.updates + ahead - self.drift_update) / self.distillation.boost_half_life))

    def _signals(self, student: int, teacher: int, classes: int, *, previous: float | None) -> Signals:
        capacity, teacher_capacity = self.capacities[student], self.capacities[teacher]
        known = capacity and teacher_capacity
        return Signals(
            update=self.updates,
            updates_since_drift=self.updates - self.drift_update,
            classes=max(2, classes),
            loss=self.losses[student],
            teacher_loss=self.losses[teacher],
            accuracy=self.accuracies[student],
            teacher_accuracy=self.accuracies[teacher],
            capacity=capacity if known else 1,
            teacher_capacity=teacher_capacity if known else 1,
            slope=self.slopes[student],
            previous=previous,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the peers, what was observed of them, and what the schedules said last."""
        return {
            "peers": {peer.name: peer.state_dict() for peer in self.peers},
            "losses": list(self.losses),
            "accuracies": list(self.accuracies),
            "observed": self.observed,
            "updates": self.updates,
            "drift_update": self.drift_update,
            "temperatures": list(self.temperatures),
            "softness": list(self.softness),
            "alphas": [[source, student, alpha] for (source, student), alpha in self.alphas.items()],
            "betas": list(self.betas),
            "feature_weights": [[*pair, weight] for pair, weight in self.feature_weights.items()],
            "slopes": list(self.slopes),
            "capacity": {} if self.capacity is None else self.capacity.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._scheduled = None
        for peer in self.peers:
            peer.load_state_dict(state["peers"][peer.name])
        self.losses, self.accuracies = list(state["losses"]), list(state["accuracies"])
        self.observed, self.updates = state["observed"], state["updates"]
        self.drift_update = state["drift_update"]
        self.temperatures, self.betas = list(state["temperatures"]), list(state["betas"])
        self.softness = list(state["softness"])
        self.slopes = list(state["slopes"])
        if self.capacity is not None:
            self.capacity.load_state_dict(state["capacity"])
            self.capacities = list(self.capacity.values)
        self.feature_weights = {(source, student): weight for source, student, weight in state["feature_weights"]}
        self.alphas = {(source, student): alpha for source, student, alpha in state["alphas"]}


def _among(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Rule all but these classes out, for the labels' loss alone."""
    return logits if classes is None else mask_unseen(logits, classes)

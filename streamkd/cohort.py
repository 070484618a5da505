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

from streamkd.capacity import Capacity
from streamkd.distillation import Distillation
from streamkd.faults import at_fault
from streamkd.fitting import Fitting
from streamkd.fused import Fused, fits
from streamkd.gradients import Gradients
from streamkd.guidance import Guidance
from streamkd.lesson import Learned, Lesson, side_by_side
from streamkd.peer import Peer
from streamkd.report import SERVED
from streamkd.river_peer import RiverPeer
from streamkd.stack import Stack, grouped

STUCK = 8
"""Updates in a row without a finite gradient after which a peer is rolled back, or restarted."""
UNFIT = (
    "it takes peers of one architecture, made of linear layers, layer norm and functions of one number, that teach one "
    "another by the loss kd at one temperature for all records, among all classes, without views, features or "
    "capacities measured meanwhile"
)
"""What stands in the way of compiling an update, and all that goes with it."""
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

    Attributes:
        by_hand: whether nothing of an update is left to torch's autograd.
        fused: what compiles updates; None where they are not, or cannot be.
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
        if SERVED in {peer.name for peer in self.peers}:
            raise ValueError(f"{SERVED!r} is the answer of all; give that peer another name")
        self.distillation = distillation or Distillation()
        self.names = [peer.name for peer in self.peers]
        self.source_names = [*self.names, *self.names, SERVED]  # by the indices in `pairs`
        capacities = capacity.values if capacity else [float(peer.capacity) for peer in self.peers]
        self.guidance = Guidance(self.distillation, capacities, capacity)
        self.groups = grouped(self.peers)
        order = [index for group in self.groups for index in group.members]
        self.places = None if order == list(range(len(self))) else torch.tensor(order).argsort()
        self.fitting = Fitting(self._discard)
        self._wanted = compiled
        self._gradients = Gradients(self.guidance, self.peers, self._averages, self._features)
        self.by_hand = self._gradients.plain and all(group.by_hand for group in self.groups)
        self.fused = self._fused() if compiled else None

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

    def _averages(self, x: Tensor, classes: int) -> Tensor:
        return self.predict(x, classes)[len(self) :]

    def _features(self) -> list[Tensor | None]:
        told = {i: said for group in self.groups for i, said in zip(group.members, group.features, strict=True)}
        return [told[index] for index in range(len(self))]

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
        self.guidance.updates += 1
        return learned

    @property
    def uncompiled(self) -> str:
        """Why updates that were to be compiled are not; empty where they are, or were not to be."""
        if not self._wanted:
            return ""
        return self.fused.take.trouble if self.fused else UNFIT

    def _fused(self) -> Fused | None:
        """Return what compiles updates; None where they cannot be."""
        rule = self.distillation
        if not (self._gradients.plain and rule.by_peers and fits(self.groups)):
            return None
        return Fused(cast("Stack", self.groups[0]), gate=rule.gate, cap=rule.cap)

    def _compiled(self, lessons: Sequence[Lesson], teacher: int, seen: Tensor) -> list[Learned]:
        """Take the first steps by the compiled function, as many as it takes in one call.

        None of them, if they are not for it, or if anything in them is not finite.
        """
        fused = self.fused
        if fused is None:
            return []
        rule = self.guidance.prepared(lessons[0].weights.device)
        lessons = lessons[: fused.at_once]
        if not (rule.teach and all(lesson.plain for lesson in lessons)):
            return []
        paces = self._paces(teacher, len(lessons)).to(seen.device) if fused.steps else None
        longest = max(map(len, lessons))
        told = self.fitting(
            lambda: fused(lessons, seen, rule, paces) if longest <= self.fitting.at_once else None, longest
        )
        learned = list[Learned]()
        for lesson, (losses, parts, answers, norms) in zip(lessons, told or (), strict=False):
            if self.guidance.frozen(teacher, teacher):
                norms[teacher] = 0.0
            learned.append(Learned(lesson.y, lesson.weights, losses, parts, answers, rule.betas, norms))
            if paces is None:
                self._step(norms, teacher)
            else:
                fused.stepped([not self.guidance.frozen(index, teacher) for index in range(len(self))])
            self.guidance.updates += 1
        return learned

    def _paces(self, teacher: int, updates: int) -> Tensor:
        """How far each step goes, and by how much averages follow, `[2, updates, peers, 1]`; 0 for who is frozen."""
        paces = np.zeros((2, updates, len(self), 1), np.float32)
        for ahead in range(updates):
            rate = self.guidance.rate(ahead)
            for index, peer in enumerate(self.peers):
                if isinstance(peer, Peer) and not self.guidance.frozen(index, teacher, ahead):
                    paces[:, ahead, index, 0] = rate * peer.rates[0], peer.share(ahead)
        return torch.from_numpy(paces)

    def absorb(self, records: Callable[[], tuple[Tensor, Tensor]], *, teacher: int) -> None:
        """Let the peers that learn record by record have them.

        Args:
            records: makes them ready, for those who ask: `[n, ...]`, with their labels `[n]`.
            teacher: index of the peer in office.
        """
        going = [peer for index, peer in enumerate(self.peers) if not self.guidance.frozen(index, teacher)]
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
        if self.guidance.frozen(teacher, teacher):
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
        logits = self._in_order([group.learn(lesson.unrolled().x, len(seen)) for group in self.groups])
        told = self._gradients(logits, lesson, seen=seen, weights=weights)
        for group in self.groups:
            own = told.gradient if len(self.groups) == 1 else told.gradient[group.members]
            hint = told.hints.get(group.members[0]) if told.hints else None
            group.back(own, hint, add=add)
        losses, betas = told.parts[0].sum(0) / len(self), self.guidance.prepared(logits.device).betas
        return partial(Learned, lesson.y, lesson.weights, losses, told.parts, told.answers, betas), told.sound

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

    def _step(self, norms: Sequence[float], teacher: int) -> None:
        for group in self.groups:
            going = [None if self.guidance.frozen(index, teacher) else norms[index] for index in group.members]
            group.step(going, self.guidance.rate())
        if self.guidance.frozen(teacher, teacher):
            self.peers[teacher].discard()

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

    def state_dict(self) -> dict[str, Any]:
        """Return the peers, and what guides their lessons."""
        return {"peers": {peer.name: peer.state_dict() for peer in self.peers}, **self.guidance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: it is of other peers, or has them in another order, by which roles and weights go.
        """
        if list(state["peers"]) != self.names:
            raise ValueError(f"this is of the peers {', '.join(state['peers'])}, and not of {', '.join(self.names)}")
        for peer in self.peers:
            peer.load_state_dict(state["peers"][peer.name])
        self.guidance.load_state_dict(state)

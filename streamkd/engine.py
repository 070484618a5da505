"""One batch through all of it: predict, join, score, adapt, recall, learn, remember, report."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamkd import chance
from streamkd.batch import UNLABELLED, Batch, labelled
from streamkd.capacity import Capacity
from streamkd.checkpoint import copied
from streamkd.cohort import Cohort
from streamkd.distillation import Distillation
from streamkd.drift import DriftWatch, adwin
from streamkd.fused import AT_ONCE
from streamkd.inputs import Raw, Standardiser
from streamkd.labels import Answers, Pending
from streamkd.lesson import Learned
from streamkd.lessons import Lessons
from streamkd.logits import UNSEEN
from streamkd.panel import Panel
from streamkd.peer import Peer
from streamkd.pool import Pool
from streamkd.replay import Memories, Recall, ReplayBuffer
from streamkd.report import (
    DriftReport,
    Fault,
    Later,
    ReplayReport,
    Report,
    Scored,
    SwapReport,
    by_name,
    of_truth,
    peer_reports,
    score,
    unsound,
)
from streamkd.river_peer import RiverPeer
from streamkd.roles import Election, Swap
from streamkd.served import Served
from streamkd.transfer import TransferEfficiency


class Engine:
    """Predicts every batch before it learns it. It is one thread's at a time, to predict with as well.

    Args:
        peers: two or more, of one output width; one alone has nobody to learn from.
        classes: that width.
        distillation: how peers teach one another.
        capacity: what their capacities are measured by, see `Cohort`.
        replay: the memory; `ReplayBuffer(0)` for none.
        recall: how the memory is rehearsed.
        drift: what is watched for drift, on the served answer.
        election: who becomes teacher.
        served: how members are weighted; over `2 * len(peers)` members, the peers and their averages.
        pool: a second opinion, which pools the same members by learned coefficients; none by default.
        pending: predictions that wait for their labels.
        inputs: scaling of the raw inputs, or `Raw()` for none.
        augment: changes raw inputs a little before they are learned, anew for every update; none by default.
        device: where models and batches are computed.
        compiled: whether what `step` does is, where it can be; `uncompiled` tells what stands in the way.
        clock: reads seconds, for `Report.seconds`; streamkd itself never looks at a clock.
    """

    def __init__(
        self,
        peers: Sequence[Peer | RiverPeer],
        classes: int,
        *,
        distillation: Distillation | None = None,
        capacity: Capacity | None = None,
        replay: ReplayBuffer | None = None,
        recall: Recall | None = None,
        drift: DriftWatch | None = None,
        election: Election | None = None,
        served: Served | None = None,
        pool: Pool | None = None,
        pending: Pending | None = None,
        inputs: Standardiser | Raw | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str = "cpu",
        compiled: bool = False,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.device = torch.device(device)
        self.cohort = Cohort([peer.to(self.device) for peer in peers], distillation, capacity, compiled=compiled)
        self.guidance = self.cohort.guidance
        self.classes = classes
        self.replay = ReplayBuffer() if replay is None else replay
        self.recall = recall or Recall()
        self.drift = drift or DriftWatch(adwin())
        self.roles = election or Election(len(peers))
        self.served = served or Served(2 * len(peers))
        self.pool = pool
        self.pending = Pending() if pending is None else pending
        self.inputs = inputs or Standardiser()
        self.augment = augment
        self.panel = Panel(self.cohort, self.inputs, self.served, self.pool)
        fused = self.cohort.fused is not None
        self._lessons = Lessons(self.inputs, augment, self.cohort.distillation, self.device, compiled=fused)
        self.transfer = TransferEfficiency(len(peers))
        self.clock = clock
        self.seen = torch.zeros(classes, dtype=torch.bool)
        self._look()
        self.steps = 0
        self.records = 0
        self.scored = 0
        self.accuracy = 0.0  # of the served answer, running over 1,000 records
        self._lap = 0.0
        self._seconds: dict[str, float] = {}

    @property
    def uncompiled(self) -> str:
        """Why what was to be compiled is not; empty where it is, or was not to be."""
        return self.cohort.uncompiled or self.panel.uncompiled or self._lessons.uncompiled

    def run(self, feed: Iterable[Batch]) -> Iterator[Report]:
        """Step through every batch of `feed`."""
        for batch in feed:
            yield self.step(batch)

    def step(self, batch: Batch) -> Report:
        """Predict one batch, then learn what labels have come; return what happened.

        Raises:
            ValueError: a label is not a class index.
        """
        self._seconds = {}
        self._lap = self.clock()
        said, unlabelled = self._predict(batch)
        self._note("predict")
        answers = self.pending.join(batch, said, self._width)
        scored = self._score(answers)
        self._note("score")
        drifts, swap = self._adapt(scored)
        self._note("adapt")
        untold = self._untold(said) if unlabelled and not batch.ids else None
        if self.pool is not None and untold is not None:
            self.pool.assume(untold.log_p)
        learned, faulty, priorities, ages = self._rehearse(answers, untold)
        self._note("remember")  # what was drawn is let go of by now
        return self._report(
            batch,
            said,
            unlabelled=unlabelled,
            scored=scored,
            drifts=drifts,
            swap=swap,
            ages=ages,
            priorities=priorities,
            learned=learned,
            taught=len(untold) if learned and untold else 0,
            faults=_faults(batch, answers, faulty) if faulty else (),
        )

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return the served probabilities `[n, classes]` for raw inputs `x`; changes nothing."""
        return self._answer(x.to(self.device))[1]

    def _answer(self, x: Tensor, *, again: bool = False) -> tuple[Tensor, Tensor]:
        """What all say of raw inputs, as log-probabilities `[sources, n, classes]`, and what is served.

        The sources are the members, and whatever the pool adds to them.
        """
        log_p, served = self.panel(x, self.seen[: self._width], again=again)
        if rest := self.classes - self._width:
            return functional.pad(log_p, (0, rest), value=UNSEEN), functional.pad(served, (0, rest))
        return log_p, served

    def _untracked(self) -> AbstractContextManager[None]:
        """Keep nothing for autograd where nobody asks for it: what it keeps costs some 4 % of a step."""
        return torch.inference_mode(self.cohort.by_hand and self.augment is None)  # which may be anyone's

    def _look(self) -> None:
        """Note the classes up to the last one that was seen: nothing is computed for those after it."""
        (met,) = self.seen.nonzero(as_tuple=True)
        self._met, self._width = len(met), int(met[-1]) + 1 if len(met) else self.classes
        self._seen = self.seen[: self._width].to(self.device)

    def _predict(self, batch: Batch) -> tuple[Answers, int]:
        """Answer a batch; return how many of its records have no label, too."""
        x, y = batch.x.detach().cpu(), batch.y.to("cpu", torch.int64, copy=True)  # reports keep the labels
        labels = y.tolist()
        self._check([*labels, *batch.late.values()])
        said = Answers(x, y, *self._answer(x.to(self.device, non_blocking=True), again=True))
        self.inputs.update(x)
        self.steps += 1
        self.records += len(batch)
        return said, labels.count(UNLABELLED)

    def _check(self, labels: Iterable[int]) -> None:
        wrong = [k for k in set(labels) if k != UNLABELLED and not 0 <= k < self.classes]
        if wrong:
            raise ValueError(
                f"label {wrong[0]}: class indices go from 0 to {self.classes - 1}, or UNLABELLED ({UNLABELLED})"
            )

    def _score(self, answers: Answers) -> Scored:
        """Score what was said when asked, and let members, roles and schedules learn from it."""
        peers, y = len(self.cohort), answers.y
        spoken, n = answers.log_p[:peers], len(answers)
        log_p = of_truth(answers.log_p[: 2 * peers], y)
        own = log_p[:peers]
        scored = score(self.cohort.names, y, spoken, answers.served, own)
        if not n:
            return scored
        right = scored.answers.numpy() == y.numpy()
        *accuracies, accuracy = (right.sum(1) / n).tolist()
        self.served.update(log_p)
        if not self.seen.numpy()[y.numpy()].all():
            self.seen[y] = True
            self._look()
        if self.pool is not None:
            self.pool.update(answers.log_p[..., : self._width], y)
        self.roles.update(own, torch.from_numpy(right[:-1]), spoken)
        self.guidance.observe((own.numpy().sum(1) / -n).tolist(), accuracies)
        self.transfer.update(scored.answers[:-1], self.roles.teacher)
        self.scored += n
        share = min(1.0, n / min(self.scored, 1_000))
        self.accuracy += share * (accuracy - self.accuracy)
        return scored

    def _adapt(self, scored: Scored) -> tuple[tuple[DriftReport, ...], Swap | None]:
        """Let the detector read the served errors; re-elect the teacher, at once after an alarm."""
        alarms = self.drift.read(scored)
        if alarms:
            self.guidance.alarm()
            self.served.shorten()
            if self.pool is not None:
                self.pool.shorten()
            self.replay.forget_schedule()
        before = self.scored - len(scored.y)
        drifts = tuple(
            DriftReport(self.drift.name, self.drift.signal, before + row + 1, self._reaction()) for row in alarms
        )
        parts = -(-len(scored.y) // self.recall.stride)
        swap = self.roles.elect(
            parts * self._effort(),
            drifting=self.guidance.updates - self.guidance.drift_update < self.roles.tenure,
            at_once=bool(alarms),
        )
        return drifts, swap

    def _reaction(self) -> dict[str, float]:
        rule = self.cohort.distillation
        return {
            "memory_window": self._window(),
            "served_gamma": self.served.gamma_drift,
            "temperature_boost": rule.temperature_boost,
            "rate_boost": rule.rate_boost,
            "effort_boost": rule.effort_boost,
        }

    def _window(self) -> int:
        """How many of the latest memories are drawn from: what the detector takes for the present world."""
        if not self.recall.window:
            return self.replay.capacity
        grown = min(self.drift.detector.width, self.recall.window + self.replay.since_drift)
        return min(max(grown, self.recall.window), self.replay.capacity)

    def _untold(self, said: Answers) -> Answers | None:
        """Choose the records that will never have a label, where the served answer is confident; None for none."""
        rule = self.cohort.distillation
        if not rule.unlabelled or self.guidance.updates < rule.burn_in:
            return None
        unknown = ~labelled(said.y)
        return said.rows(unknown & (said.served.max(-1).values >= rule.confidence)) or None

    def _rehearse(
        self, answers: Answers, untold: Answers | None
    ) -> tuple[tuple[Learned, ...], list[int], Tensor, Tensor]:
        """Learn what labels have come for, part by part and beside memories, and remember it.

        Returns:
            What each update did, the rows that no update could be made on, and priorities and ages of what was drawn.
        """
        learned, faulty, priorities, ages = list[Learned](), list[int](), list[Tensor](), list[Tensor]()
        stride = self.recall.stride
        parts = answers.split(stride)
        shares = untold.split(-(-len(untold) // len(parts))) if untold else []
        for first, (part, taught) in enumerate(zip_longest(parts, shares)):
            drawn = self._recall(part)
            self._note("recall")
            if len(part):
                self.guidance.schedule(self.roles.teacher, self._met)
            with self._untracked():
                taken, broken = self._learn(part, drawn, taught)
            self._note("learn")
            priorities.append(self._remember(part.without(broken), drawn, taken))
            ages.append(drawn.ages)
            learned += taken
            faulty += [first * stride + row for row in broken]
            self._note("remember")
        return tuple(learned), faulty, _in_a_row(priorities), _in_a_row(ages)

    def _recall(self, answers: Answers) -> Memories:
        """Draw the memories for all the updates of this batch; where no label came, there is none.

        Where labels are scarce, the same few memories would be learned by heart while records without a label pass by,
        and those records without memories would soon be all that is learned.
        """
        return self.replay.sample(self._effort() * self.recall.records if len(answers) else 0, self._window())

    def _effort(self) -> int:
        """How many optimizer steps this batch is worth: more while the world is new."""
        return round(self.recall.updates * self.guidance.effort)

    def _learn(self, answers: Answers, memories: Memories, untold: Answers | None) -> tuple[list[Learned], list[int]]:
        """One optimizer step a peer for each share of the memories, all the records of the batch in every one of them.

        Returns:
            What each update did, and the rows left out because an update on one alone is not finite.
        """
        updates, learned, faulty = self._effort() if len(answers) else 0, list[Learned](), list[int]()
        each, kept, own = len(memories) // max(1, updates), list(range(len(answers))), answers
        while (done := len(learned)) < updates and (kept or each or untold is not None):
            ready = min(AT_ONCE, updates - done)
            part = memories if ready == updates else memories.rows(slice(done * each, (done + ready) * each))
            learned += self.cohort.learn(
                self._lessons(own, part, untold, updates=ready, seen=self._seen),
                teacher=self.roles.teacher,
                seen=self._seen,
                weights=self.served.weights,
            )
            wrong = [row - each for row in learned[-1].faulty if each <= row < each + len(kept)]
            if wrong:
                faulty += [kept[row] for row in wrong]
                kept = [row for row in kept if row not in faulty]
                own = answers.rows(torch.tensor(kept, dtype=torch.int64))
        self.cohort.absorb(
            lambda: (self.inputs(own.x.to(self.device)), own.y.to(self.device)), teacher=self.roles.teacher
        )
        return learned, faulty

    def _remember(self, answers: Answers, memories: Memories, learned: list[Learned]) -> Tensor:
        """Refresh the priorities of what was recalled, then remember what was learned.

        Returns:
            These priorities, `[m]`.
        """
        if not len(memories):
            self.replay.add(answers.x, answers.y)
            return torch.zeros(0)
        each = len(memories) // len(learned)
        priorities = self.replay.update(memories.slots, _in_a_row([one.losses[:each] for one in learned]).cpu())
        faulty = [each * n + row for n, result in enumerate(learned) for row in result.faulty if row < each]
        if faulty:
            self.replay.bar(memories.slots[faulty])
            priorities = self.replay.priorities_at(memories.slots)
        self.replay.add(answers.x, answers.y)
        return priorities

    def _note(self, stage: str) -> None:
        now = self.clock()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._lap
        self._lap = now

    def _report(
        self,
        batch: Batch,
        said: Answers,
        *,
        unlabelled: int,
        scored: Scored,
        drifts: tuple[DriftReport, ...],
        swap: Swap | None,
        ages: Tensor,
        priorities: Tensor,
        learned: tuple[Learned, ...],
        taught: int,
        faults: tuple[Fault, ...],
    ) -> Report:
        cohort, guidance, names = self.cohort, self.guidance, self.cohort.names
        counts = {peer.name: unsound(peer) for peer in cohort.peers}
        return Report(
            step=self.steps,
            updates=guidance.updates,
            records=self.records,
            size=len(batch),
            unlabelled=unlabelled,
            faults=faults,
            classes=self._met,
            rate=guidance.rate(),
            accuracy=self.accuracy,
            position=batch.position,
            log_p=said.log_p,
            served=said.served,
            taught=taught,
            scored=scored,
            teacher=names[self.roles.teacher],
            # Whatever changes of what these hold is replaced, so it will be the same when they are worked out.
            peers=Later(
                partial(
                    peer_reports,
                    unsound=counts,
                    learned=learned,
                    weights=self.served.weights,
                    losses=guidance.losses,
                    accuracies=guidance.accuracies,
                    softness=guidance.softness,
                    capacities=guidance.capacities,
                    teacher=self.roles.teacher,
                    answers=self.transfer.answers,
                    taught_by=self.transfer.teacher,
                )
            ),
            learned=learned,
            unsound=counts,
            alphas=Later(partial(by_name, guidance.alphas, cohort.source_names)),
            drift=drifts,
            swap=None if swap is None else SwapReport(names[swap.before], names[swap.after], swap.reason),
            replay=ReplayReport(len(self.replay), self.replay.capacity, self._window(), priorities, ages),
            pending=len(self.pending),
            joined=self.pending.joined,
            expired=self.pending.expired,
            seconds=self._seconds,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all state that determines the future, as plain values and tensors: a copy, which later steps leave."""
        state = {
            "cohort": self.cohort.state_dict(),
            "replay": self.replay.state_dict(),
            "drift": self.drift.detector.state_dict(),
            "roles": self.roles.state_dict(),
            "served": self.served.state_dict(),
            "pool": None if self.pool is None else self.pool.state_dict(),
            "pending": self.pending.state_dict(),
            "inputs": self.inputs.state_dict(),
            "transfer": self.transfer.state_dict(),
            "seen": self.seen.clone(),
            "steps": self.steps,
            "records": self.records,
            "scored": self.scored,
            "accuracy": self.accuracy,
            "chance": chance.state(),
        }
        return {name: copied(part) for name, part in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.cohort.load_state_dict(state["cohort"])
        self.replay.load_state_dict(state["replay"])
        self.drift.detector.load_state_dict(state["drift"])
        self.roles.load_state_dict(state["roles"])
        self.served.load_state_dict(state["served"])
        if self.pool is not None:
            self.pool.load_state_dict(state["pool"])
        self.pending.load_state_dict(state["pending"])
        self.inputs.load_state_dict(state["inputs"])
        self.transfer.load_state_dict(state["transfer"])
        self.seen = state["seen"].clone()
        self._look()
        self.steps, self.records = state["steps"], state["records"]
        self.scored, self.accuracy = state["scored"], state["accuracy"]
        chance.restore(state["chance"])

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Begin with what was learned elsewhere: models, scaling of the inputs, classes met, memories, the teacher.

        What belongs to the present of another stream begins anew: the weights of the answer, the detector, the evidence
        for roles, schedules, counters.

        Args:
            state: what `state_dict` returned, of an engine with all the peers of this one, and perhaps others.
        """
        theirs = state["cohort"]["peers"]
        for peer in self.cohort.peers:
            peer.load_state_dict(theirs[peer.name])
        teacher = list(theirs)[state["roles"]["teacher"]]
        if teacher in self.cohort.names:
            self.roles.teacher = self.cohort.names.index(teacher)
        self.inputs.load_state_dict(state["inputs"])
        self.seen = state["seen"].clone()
        self._look()
        self.replay.begin_with(state["replay"])


def _faults(batch: Batch, answers: Answers, faulty: list[int]) -> tuple[Fault, ...]:
    """Tell which records no update could be made on; those that waited for their labels come first in `answers`."""
    own = labelled(batch.y).nonzero()[:, 0].tolist()
    waited = len(answers) - len(own)
    return tuple(
        Fault(own[row - waited] if row >= waited else None, answers.x[row], int(answers.y[row])) for row in faulty
    )


def _in_a_row(parts: Sequence[Tensor]) -> Tensor:
    """Put the parts of a batch one after the other; most batches have one, which needs no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))

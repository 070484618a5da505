"""One batch through all of it: predict, join, score, adapt, recall, learn, remember, report."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from streamkd.batch import UNLABELLED, Batch
from streamkd.cohort import Cohort, Distillation, Learned, Lesson
from streamkd.drift import DriftWatch, adwin
from streamkd.inputs import Raw, Standardiser
from streamkd.labels import Answers, Pending
from streamkd.logits import mask_unseen
from streamkd.peer import Peer
from streamkd.pool import Pool
from streamkd.replay import Memories, Recall, ReplayBuffer
from streamkd.report import SERVED, DriftReport, PeerReport, ReplayReport, Report, Scored, SwapReport
from streamkd.roles import Election, Swap
from streamkd.served import FLOOR, Served
from streamkd.transfer import TransferEfficiency


class Engine:
    """Predicts every batch before it learns it.

    Args:
        peers: two or more, of one output width.
        classes: that width.
        distillation: how peers teach one another.
        replay: the memory; `ReplayBuffer(0)` for none.
        recall: how the memory is rehearsed.
        drift: what is watched for drift, on the served answer.
        election: who becomes teacher.
        served: how members are weighted; over `2 * len(peers)` members, the peers and their averages.
        pool: a second opinion, which pools the same members by learned coefficients; none by default.
        pending: predictions that wait for their labels.
        inputs: scaling of the raw inputs, or `Raw()` for none.
        device: where models and batches are computed.
        clock: reads seconds, for `Report.seconds`; streamkd itself never looks at a clock.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        classes: int,
        *,
        distillation: Distillation | None = None,
        replay: ReplayBuffer | None = None,
        recall: Recall | None = None,
        drift: DriftWatch | None = None,
        election: Election | None = None,
        served: Served | None = None,
        pool: Pool | None = None,
        pending: Pending | None = None,
        inputs: Standardiser | Raw | None = None,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.device = torch.device(device)
        self.cohort = Cohort([peer.to(self.device) for peer in peers], distillation)
        self.classes = classes
        self.replay = ReplayBuffer() if replay is None else replay
        self.recall = recall or Recall()
        self.drift = drift or DriftWatch(adwin())
        self.roles = election or Election(len(peers))
        self.served = served or Served(2 * len(peers))
        self.pool = pool
        self.pending = Pending() if pending is None else pending
        self.inputs = inputs or Standardiser()
        self.transfer = TransferEfficiency(len(peers))
        self.clock = clock
        self.seen = torch.zeros(classes, dtype=torch.bool)
        self.steps = 0
        self.records = 0
        self.scored = 0
        self._lap = 0.0
        self._seconds: dict[str, float] = {}

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
        said = self._predict(batch)
        self._note("predict")
        answers = self.pending.join(batch, said)
        scored = self._score(answers)
        self._note("score")
        drifts, swap = self._adapt(scored)
        self._note("adapt")
        memories: list[Memories] = []
        learned: list[Learned] = []
        for part in answers.split(self.recall.stride):
            drawn = self._recall(part)
            self._note("recall")
            taken = self._learn(part, drawn)
            self._note("learn")
            self._remember(part, drawn, taken)
            self._note("remember")
            memories += drawn
            learned += taken
        return self._report(batch, said, scored=scored, drifts=drifts, swap=swap, memories=memories, learned=learned)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return the served probabilities `[n, classes]` for raw inputs `x`; changes nothing."""
        return self._answer(x.to(self.device))[1]

    def _answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What all say of raw inputs, as log-probabilities `[sources, n, classes]`, and what is served.

        The sources are the members, and whatever the pool adds to them.
        """
        seen = self.seen.to(self.device)
        if len(x):
            logits = self.cohort.predict(self.inputs(x))
        else:
            logits = torch.zeros(2 * len(self.cohort), 0, self.classes, device=self.device)
        log_p = mask_unseen(logits, seen).log_softmax(-1)
        mixture = self.served.answer(log_p)
        return (log_p, mixture) if self.pool is None else self.pool.serve(log_p, mixture, seen)

    @torch.no_grad()
    def _predict(self, batch: Batch) -> Answers:
        x, y = batch.x.to(self.device), batch.y.to(self.device, torch.int64)
        self._check(y, batch.late.values())
        said = Answers(x, y, *self._answer(x))
        self.inputs.update(x)
        self.steps += 1
        self.records += len(batch)
        return said

    def _check(self, y: Tensor, late: Iterable[int]) -> None:
        wrong = [k for k in {*y.tolist(), *late} if k != UNLABELLED and not 0 <= k < self.classes]
        if wrong:
            raise ValueError(
                f"label {wrong[0]}: class indices go from 0 to {self.classes - 1}, or UNLABELLED ({UNLABELLED})"
            )

    @torch.no_grad()
    def _score(self, answers: Answers) -> Scored:
        """Score what was said when asked, and let members, roles and schedules learn from it."""
        peers, y = len(self.cohort), answers.y
        if not len(y):
            everyone = [*self.cohort.names, SERVED]
            return Scored(y, dict.fromkeys(everyone, y), dict.fromkeys(everyone, y.float()))
        index = y[None, :, None].expand(len(answers.log_p), -1, 1)
        log_p = answers.log_p.gather(2, index)[..., 0]  # [members, m]
        log_p = log_p.nan_to_num(nan=_LOG_FLOOR).clamp(min=_LOG_FLOOR)  # who says nothing is charged the most
        predicted = answers.log_p[:peers].argmax(-1)
        correct = predicted == y
        served_loss = -answers.served.gather(1, y[:, None])[:, 0].clamp(min=FLOOR).log()
        self.served.update(log_p[: 2 * peers])
        if self.pool is not None:
            self.pool.update(answers.log_p, y)
        self.roles.update(log_p[:peers], correct)
        self.cohort.observe(-log_p[:peers].mean(1), correct.float().mean(1))
        self.transfer.update(predicted, self.roles.teacher)
        self.seen[y.cpu()] = True
        self.scored += len(y)
        names = self.cohort.names
        return Scored(
            y,
            {**dict(zip(names, predicted, strict=True)), SERVED: answers.served.argmax(-1)},
            {**dict(zip(names, -log_p[:peers], strict=True)), SERVED: served_loss},
        )

    def _adapt(self, scored: Scored) -> tuple[tuple[DriftReport, ...], Swap | None]:
        """Let the detector read the served errors; re-elect the teacher, at once after an alarm."""
        alarms = self.drift.read(scored)
        if alarms:
            self.cohort.alarm()
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
            drifting=self.cohort.updates - self.cohort.drift_update < self.roles.tenure,
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

    def _recall(self, answers: Answers) -> list[Memories]:
        """Draw the memories for each update of this batch."""
        if not len(answers):
            return []
        updates = self._effort()
        return self.replay.sample(updates * self.recall.records, self._window()).split(updates)

    def _effort(self) -> int:
        """How many optimizer steps this batch is worth: more while the world is new."""
        return round(self.recall.updates * self.cohort.effort)

    def _learn(self, answers: Answers, memories: list[Memories]) -> list[Learned]:
        """One optimizer step a peer for each draw of memories, the labelled records in every one of them."""
        classes = int(self.seen.sum())
        if len(answers):
            self.cohort.schedule(self.roles.teacher, classes)
        x = self.inputs(answers.x)
        weights = torch.full((len(answers),), 1 / max(1, len(answers)), device=self.device)
        learned = []
        for drawn in memories:
            recalled = self.inputs(drawn.x.to(self.device, x.dtype)) if len(drawn) else x[:0]
            lesson = Lesson(
                torch.cat([x, recalled]),
                torch.cat([answers.y, drawn.y.to(self.device)]),
                torch.cat([weights, (drawn.weights / max(1, len(drawn))).to(self.device)]),
            )
            learned.append(
                self.cohort.learn(
                    lesson,
                    teacher=self.roles.teacher,
                    seen=self.seen.to(self.device),
                    weights=self.served.weights,
                )
            )
        return learned

    def _remember(self, answers: Answers, memories: list[Memories], learned: list[Learned]) -> None:
        """Refresh the priorities of what was recalled, then remember what was learned."""
        for drawn, result in zip(memories, learned, strict=True):
            self.replay.update(drawn.slots, result.losses[len(answers) :].cpu())
        self.replay.add(answers.x.cpu(), answers.y.cpu())

    def _note(self, stage: str) -> None:
        now = self.clock()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._lap
        self._lap = now

    def _report(
        self,
        batch: Batch,
        said: Answers,
        *,
        scored: Scored,
        drifts: tuple[DriftReport, ...],
        swap: Swap | None,
        memories: list[Memories],
        learned: list[Learned],
    ) -> Report:
        cohort, names = self.cohort, self.cohort.names
        return Report(
            step=self.steps,
            updates=cohort.updates,
            records=self.records,
            size=len(batch),
            unlabelled=int((batch.y < 0).sum()),
            trained=len(scored.y),
            classes=int(self.seen.sum()),
            rate=cohort.rate,
            position=batch.position,
            served=said.served,
            scored=scored,
            teacher=names[self.roles.teacher],
            peers=self._peer_reports(learned),
            alphas={(cohort.source_name(i), names[j]): value for (i, j), value in cohort.alphas.items()},
            agreed=sum(result.agreed for result in learned),
            compared=sum(result.compared for result in learned),
            drift=drifts,
            swap=None if swap is None else SwapReport(names[swap.before], names[swap.after], swap.reason),
            replay=ReplayReport(
                len(self.replay),
                self.replay.capacity,
                self._window(),
                _joined([self.replay.priorities[drawn.slots] for drawn in memories]),
                _joined([drawn.ages for drawn in memories]),
            ),
            pending=len(self.pending),
            joined=self.pending.joined,
            expired=self.pending.expired,
            seconds=self._seconds,
        )

    def _peer_reports(self, learned: list[Learned]) -> dict[str, PeerReport]:
        cohort, size = self.cohort, len(self.cohort)
        parts = torch.zeros(5, size)
        if learned:
            rows = [torch.stack([r.hard, r.soft, r.total, r.divergence, r.norms.to(r.hard)]) for r in learned]
            parts = torch.stack(rows).mean(0).cpu()
        weights = self.served.weights.view(2, size).sum(0).tolist()
        transferred = self.transfer.values.tolist()
        capacity = cohort.peers[self.roles.teacher].capacity
        return {
            peer.name: PeerReport(
                weight=weights[i],
                loss=float(cohort.losses[i]),
                accuracy=float(cohort.accuracies[i]),
                temperature=cohort.softness[i],
                hard=hard,
                soft=soft,
                total=total,
                divergence=divergence,
                gradient_norm=norm,
                skipped=peer.skipped,
                restarts=peer.restarts,
                capacity_ratio=peer.capacity / capacity,
                transfer_efficiency=transferred[i],
            )
            for i, (peer, (hard, soft, total, divergence, norm)) in enumerate(
                zip(cohort.peers, parts.T.tolist(), strict=True)
            )
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all state that determines the future, as plain values and tensors."""
        return {
            "cohort": self.cohort.state_dict(),
            "replay": self.replay.state_dict(),
            "drift": self.drift.detector.state_dict(),
            "roles": self.roles.state_dict(),
            "served": self.served.state_dict(),
            "pool": None if self.pool is None else self.pool.state_dict(),
            "pending": self.pending.state_dict(),
            "inputs": self.inputs.state_dict(),
            "transfer": self.transfer.state_dict(),
            "seen": self.seen,
            "steps": self.steps,
            "records": self.records,
            "scored": self.scored,
            "chance": torch.get_rng_state(),  # dropout and the like draw from torch's own generator
        }

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
        self.seen = state["seen"]
        self.steps, self.records, self.scored = state["steps"], state["records"], state["scored"]
        torch.set_rng_state(state["chance"])


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0)


_LOG_FLOOR = float(torch.tensor(FLOOR).log())

"""A teacher learns a history, and students learn it from the teacher; its last part measures them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runners import saver, session
from runners.history import History
from runners.settings import Configuration
from streamkd import checkpoint
from streamkd.batch import labelled
from streamkd.config import build_engine
from streamkd.engine import Engine
from streamkd.errors import CheckpointError, ConfigError, TrainingError, reason
from streamkd.logits import mask_unseen
from streamkd.peer import Peer
from streamkd.protocols import LABELS, PROTOCOLS, Course, Stage, Taught
from streamkd.report import of_truth
from streamkd.river_peer import RiverPeer
from streamkd.settings import did_you_mean


@dataclass(frozen=True, slots=True)
class Plan:
    """Who teaches whom, how, and for how long.

    Attributes:
        protocol: one of `PROTOCOLS`.
        epochs: passes of the teacher, and then of each stage of the students.
        teacher, students: names of peers; all others learn from the labels for as long as the teacher does.
        temperature: at which answers are compared.
        alpha: weight of the teacher where a student learns from it and from the labels at once.
        holdout: the last share of the history, which measures and is not learned.
    """

    protocol: str
    epochs: tuple[int, ...]
    teacher: str
    students: tuple[str, ...]
    temperature: float
    alpha: float
    holdout: float

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What a student goes through."""
        return PROTOCOLS[self.protocol](self.alpha)

    def as_json(self) -> dict[str, Any]:
        """Return all of it, as plain values."""
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in _PLAN}


_PLAN = tuple(Plan.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Measured:
    """How a peer stands after some passes.

    Attributes:
        peer: its name.
        learned: what from.
        passes: over the history.
        alone: whether it is the student without a teacher, as a measure for the one with.
        parameters: 0 where that is not known.
        accuracy: share of the held-out labels that it answered; None where there are none.
        log_loss: in nats, cut at -ln(1e-6); likewise.
        records_per_second: answered, in batches; likewise.
    """

    peer: str
    learned: str
    passes: int
    alone: bool
    parameters: int
    accuracy: float | None
    log_loss: float | None
    records_per_second: float | None


@dataclass(frozen=True, eq=False, slots=True)
class Distilled:
    """What came of one plan with one seed.

    Attributes:
        rows: the teacher, the peers that learned beside it, and each student after each stage: first alone, then
            taught.
        engine: with all peers as they are now.
        learned, held_out: records.
        faulty: of those to be learned, the rows of records on which alone an update is not finite: these were not.
    """

    configuration: Configuration
    plan: Plan
    rows: Sequence[Measured]
    engine: Engine
    learned: int
    held_out: int
    faulty: frozenset[int]


def make_plan(  # noqa: D417 - the others are those of Plan
    engine: Engine,
    *,
    protocol: str,
    epochs: Sequence[int],
    teacher: str | None,
    students: Sequence[str],
    temperature: float,
    alpha: float,
    holdout: float,
) -> Plan:
    """Settle what is left open.

    Args:
        engine: whose peers they are.
        epochs: one number for all, or one for the teacher and one for each stage.
        teacher: None for the one of the greatest capacity.
        students: none for all others that can be taught.

    Raises:
        ConfigError: it does not fit.
    """
    peers = {peer.name: peer for peer in engine.cohort.peers}
    for option, names in (("--teacher", [teacher] if teacher else []), ("--student", students)):
        for name in names:
            if name not in peers:
                hint = did_you_mean(name, peers) or f"; there are {', '.join(peers)}"
                raise ConfigError(f"{option} {name}: no peer of that name{hint}")
    chosen = teacher or max(peers.values(), key=lambda peer: peer.capacity).name
    taught = tuple(dict.fromkeys(students)) or tuple(
        name for name, peer in peers.items() if name != chosen and isinstance(peer, Peer)
    )
    if not taught:
        raise ConfigError(f"peers: there is nobody for {chosen} to teach; configure one more, with a model of torch")
    for name in taught:
        if name == chosen:
            raise ConfigError(f"--student {name}: is the teacher; name another, or another --teacher")
        if isinstance(peers[name], RiverPeer):
            raise ConfigError(f"--student {name}: is one of river's, which nobody can teach; name another")
    parts = 1 + len(PROTOCOLS[protocol](alpha))
    if len(epochs) not in {1, parts}:
        raise ConfigError(
            f"--epochs {' '.join(map(str, epochs))}: give one number, or {parts}: the teacher's, and one for each "
            f"stage of {protocol}"
        )
    passes = tuple(epochs) * (parts if len(epochs) == 1 else 1)
    return Plan(protocol, passes, chosen, taught, temperature, alpha, holdout)


def distill(configuration: Configuration, history: History, plan: Plan, told: Callable[[float], None]) -> Distilled:
    """Let the teacher learn the history, and the students from it.

    Args:
        configuration: of peers and their scaling.
        history: all of it.
        plan: who, how and for how long.
        told: called now and then with the share that is done.

    Raises:
        ConfigError: the history has not two classes.
        TrainingError: a peer cannot go on.
    """
    session.prepare_torch(configuration)
    earlier, later = history.parted(plan.holdout)
    engine = build_engine(configuration, history.shape)
    _look_through(engine, earlier, configuration.batch)
    work = _Work(_total(engine, plan, measured=bool(len(later))) * len(earlier), told)
    course = Course(
        engine.inputs(earlier.x.to(engine.device)),
        earlier.y.to(engine.device),
        engine.seen[: int(engine.seen.nonzero()[-1]) + 1],
        batch=configuration.batch,
        seed=configuration.seed,
        told=work.done,
    )
    try:
        rows = list(_taught(configuration, engine, course, plan, later))
    except Exception as error:
        raise TrainingError(
            f"distill: {reason(error)}; a model or loss of your own may be at fault; streamkd check tries them"
        ) from error
    sound = labelled(earlier.y)
    sound[sorted(course.faulty)] = False
    latest = sound.nonzero()[:, 0][-engine.replay.capacity :]
    engine.replay.add(earlier.x[latest], earlier.y[latest])
    engine.roles.teacher = engine.cohort.names.index(plan.teacher)
    engine.records, engine.steps = len(earlier), -(-len(earlier) // configuration.batch)
    learned = len(earlier) if any(plan.epochs) else 0
    return Distilled(configuration, plan, rows, engine, learned, len(later), frozenset(course.faulty))


def _look_through(engine: Engine, history: History, batch: int) -> None:
    """Learn scales and classes, in the order of time."""
    for x in torch.split(history.x, batch):
        engine.inputs.update(x)
    engine.seen[history.y[labelled(history.y)]] = True


def _taught(
    configuration: Configuration, engine: Engine, course: Course, plan: Plan, later: History
) -> Iterator[Measured]:
    """Take everyone through what is planned; tell how they stand."""
    peers = {peer.name: peer for peer in engine.cohort.peers}
    for name in [plan.teacher, *(name for name in peers if name not in {plan.teacher, *plan.students})]:
        peer, passes = peers[name], plan.epochs[0]
        if isinstance(peer, Peer):
            course.learn(peer, range(passes))
        elif passes := min(1, passes):
            course.absorb(peer)
        yield _measured(peer, engine, later, configuration.batch, learned=LABELS, passes=passes)
    taught = Taught(course.answers(peers[plan.teacher]), plan.temperature, engine.cohort.distillation.loss)
    # The same weights to begin with, the same orders, as many updates: what differs is the teacher.
    twins = {peer.name: peer for peer in build_engine(configuration, later.shape).cohort.peers} if len(later) else {}
    for name in plan.students:
        passes, lessons = 0, list[str]()
        for stage, epochs in zip(plan.stages, plan.epochs[1:], strict=True):
            numbers = range(passes, passes + epochs)
            passes += epochs
            lessons.append(stage.name)
            for student, alone in ((twins.get(name), True), (peers[name], False)):
                if isinstance(student, Peer):
                    course.learn(student, numbers, alpha=0.0 if alone else stage.alpha, taught=taught)
                    learned = LABELS if alone else ", ".join(lessons)
                    yield _measured(
                        student, engine, later, configuration.batch, learned=learned, passes=passes, alone=alone
                    )


def _measured(
    peer: Peer | RiverPeer,
    engine: Engine,
    later: History,
    batch: int,
    *,
    learned: str,
    passes: int,
    alone: bool = False,
) -> Measured:
    accuracy = log_loss = speed = None
    if len(later):
        x, known = engine.inputs(later.x.to(engine.device)), labelled(later.y)
        began = time.perf_counter()
        logits = torch.cat([peer.predict(part).logits.cpu() for part in torch.split(x, batch)])
        speed = len(x) / max(time.perf_counter() - began, 1e-9)
        log_p, y = mask_unseen(logits, engine.seen)[known].log_softmax(-1), later.y[known]
        accuracy = float((log_p.argmax(-1) == y).double().mean())
        log_loss = -float(of_truth(log_p[None], y).double().mean())
    return Measured(peer.name, learned, passes, alone, peer.capacity, accuracy, log_loss, speed and round(speed, 1))


def _total(engine: Engine, plan: Plan, *, measured: bool) -> int:
    """How many passes there are in all."""
    others = [peer for peer in engine.cohort.peers if peer.name not in plan.students]
    first = sum(min(1, plan.epochs[0]) if isinstance(peer, RiverPeer) else plan.epochs[0] for peer in others)
    return first + sum(plan.epochs[1:]) * len(plan.students) * (2 if measured else 1)


class _Work:
    """Tells of every hundredth part that is done."""

    def __init__(self, total: int, told: Callable[[float], None]) -> None:
        self._total, self._told = total, told
        self._done = self._last = 0

    def done(self, records: int) -> None:
        self._done += records
        if 100 * (self._done - self._last) >= self._total:
            self._last = self._done
            self._told(self._done / self._total)


def check_empty(directory: Path) -> None:
    """Refuse a folder that a checkpoint could not be written to, or that has some already.

    Raises:
        ConfigError: it is one.
    """
    try:
        saver.probe(directory)
    except ConfigError:
        raise ConfigError(
            f"--out {str(directory)!r}: cannot be written; name a folder that can, or can be made"
        ) from None
    if directory.exists() and checkpoint.found(directory):
        raise ConfigError(f"--out {str(directory)!r}: has checkpoints already; name a folder that has none")


def write(directory: Path, distilled: Distilled, history: History) -> Path:
    """Write a checkpoint that a run can begin with, see `checkpoint.warm_start`; return its path.

    Raises:
        CheckpointError: it cannot be written.
    """
    engine, plan = distilled.engine, distilled.plan
    learned = engine.state_dict()
    memories = learned.pop("replay")
    state = {"tensors": {"engine": learned, "position": {}}, "memories": memories}
    last = {row.peer: row for row in distilled.rows if not row.alone}
    about = saver.describe(engine, {}, history.known) | saver.lasting(distilled.configuration, engine)
    about |= {
        "accuracy": last[plan.teacher].accuracy,
        "peers": {
            name: {"accuracy": row.accuracy, "loss": row.log_loss, "parameters": row.parameters}
            for name, row in last.items()
        },
        "protocol": plan.as_json(),
    }
    try:
        return checkpoint.save(directory, engine.steps, state, about)
    except OSError as error:
        raise CheckpointError(
            f"--out {str(directory)!r}: could not be written ({error}); name another folder"
        ) from None

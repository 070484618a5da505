"""Checkpoints of a running engine: staged between two batches, written on a thread, taken up again at start."""

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from structlog.stdlib import BoundLogger

from monitoring.metrics import Metrics
from runners import session, warm_start
from runners.feeds import NONE
from runners.folders import can_be_written, sole
from runners.history import known
from runners.session import Session
from runners.settings import Configuration
from streamkd import checkpoint
from streamkd.checkpoint import copied
from streamkd.engine import Engine
from streamkd.errors import CheckpointError, ConfigError, DamagedError, one_screen, reason, short
from streamkd.report import unsound


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is on disk, whole.

    Attributes:
        path: of its directory.
        steps, records: taken and learned when it was staged.
        position: of the feed, likewise.
        size: in bytes.
        seconds: it took to write.
    """

    path: Path
    steps: int
    records: int
    position: Mapping[str, Any]
    size: int
    seconds: float


class Saver:
    """Saves when it is time, and tells the feed only what is safe.

    Learning waits for a copy of the state in memory, not for the disk. A save that fails is logged, counted and tried
    again; learning goes on.

    Args:
        running: feed and engine.
        metrics: to be told.
        log: structlog's.

    Attributes:
        resets: how often the feed's position was lost by falling back to an earlier checkpoint, by reason.
    """

    def __init__(self, running: Session, metrics: Metrics, log: BoundLogger) -> None:
        self._session = running
        self.settings = running.configuration.checkpoint
        self._metrics = metrics
        self._log = log
        self._failure = ""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Saved] | None = None
        self._refused: set[Path] = set()
        self._staged_records, self._staged_at = 0, time.monotonic()
        self._covered_steps = 0
        self.covered = 0
        self.position: Mapping[str, Any] = {}
        self.resets = NONE
        self._lasting = lasting(running.configuration, running.engine)
        probe(self.settings.directory)
        self._lock = sole(self.settings.directory, key="checkpoint.directory", does="saves")

    def restore(self) -> None:
        """Go on from the newest checkpoint that is whole; from the beginning, if there is none at all.

        The beginning may be what was learned elsewhere, see `warm_start.begin`.

        Raises:
            CheckpointError: there are checkpoints and none is whole, or they are of other models.
        """
        damage: list[DamagedError] = []
        for attempt, path in enumerate(checkpoint.found(self.settings.directory)):
            try:
                position = self._read(path)
            except DamagedError as error:
                self._log.error("checkpoint refused", path=str(path), reason=str(error))
                self._refused.add(path)
                damage.append(error)
                continue
            self._take_up(position, "fallback" if attempt else "success")
            if attempt and not self._session.feed.capabilities.replayable:
                # A group is told of the newest checkpoint all the same: to tell it one later would bring all records
                # between the two again at every start, for the sake of a disk that hardly ever fails.
                self.resets = {"acknowledged": 1}
            self._log.info("restored", path=str(path), records=self._session.engine.records)
            return
        if damage:
            raise none_whole(self.settings.directory, damage)
        begun = warm_start.begin(self._session)
        if begun is not None:
            self._log.info("warm start", path=str(begun))

    def _read(self, path: Path) -> Mapping[str, Any]:
        """Put feed and engine into the state of a checkpoint; return the feed's position.

        Raises:
            DamagedError: it is not whole, or is not what it says it is.
            CheckpointError: it is of other models.
        """
        state, about = checkpoint.load(path)
        position: Mapping[str, Any] = state["tensors"]["position"]
        check_same(about, position, self._session, path)
        learned = {**state["tensors"]["engine"], "replay": state["memories"]}
        try:
            self._session.engine.load_state_dict(learned)
        except Exception as error:
            raise DamagedError(f"{path}: cannot be restored: {type(error).__name__}: {error}") from error
        return position

    def _take_up(self, position: Mapping[str, Any], result: str) -> None:
        engine = self._session.engine
        self.position = position
        self._commit(position)  # whoever was killed between a save and this never did
        self.covered, self._covered_steps = engine.records, engine.steps
        self._staged_records = engine.records
        self._metrics.observe_restore(
            result,
            unsound={
                (peer.name, action): count for peer in engine.cohort.peers for action, count in unsound(peer).items()
            },
            joined=engine.pending.joined,
            expired=engine.pending.expired,
        )

    def after(self, position: Mapping[str, Any]) -> None:
        """Take in what was learned up to `position`; save, if it is time and the last save is done.

        Called while the feed is idle, too, so that it hears of the last save without another record.
        """
        self.position = position
        if self._writing is not None and self._writing.done():
            self._collect()
        records = self._session.engine.records
        self._metrics.uncovered.set(records - self.covered)
        if self._writing is not None or self._session.engine.steps == self._covered_steps:
            return
        if self._due(records):
            self._stage()

    def _due(self, records: int) -> bool:
        every = self.settings  # which a reload may change
        late = every.every_seconds and time.monotonic() - self._staged_at >= every.every_seconds
        return bool(late) or records - self._staged_records >= every.every_records

    def save(self) -> None:
        """Save all that was learned since the last save, and wait until it is on disk.

        Raises:
            CheckpointError: it could not be saved.
        """
        engine = self._session.engine
        if self._writing is not None:
            self._collect()
        if engine.steps > self._covered_steps:
            self._stage()
            self._collect()
        if engine.steps > self._covered_steps:
            raise CheckpointError(
                f"checkpoint.directory = {str(self.settings.directory)!r}: the last save failed ({self._failure}); "
                f"what was learned after record {self.covered:,} will be learned again by the next run"
            )

    def close(self) -> None:
        """Wait for the save that is under way, and let others save there."""
        if self._writing is not None:
            self._collect()
        self._thread.shutdown()
        self._lock.close()

    def _stage(self) -> None:
        engine, began = self._session.engine, time.perf_counter()
        self._staged_records, self._staged_at = engine.records, time.monotonic()
        try:
            self._session.flush()
        except OSError as error:
            self._fail(error)
            return
        learned = engine.state_dict()
        memories = learned.pop("replay")
        state = {"tensors": {"engine": learned, "position": copied(self.position)}, "memories": memories}
        about = describe(engine, self.position, known(self._session.feed)) | self._lasting
        self._writing = self._thread.submit(self._write, engine.steps, state, about)
        self._metrics.observe_stage(time.perf_counter() - began)

    def _write(self, step: int, state: Mapping[str, Any], about: Mapping[str, Any]) -> Saved:
        began = time.perf_counter()
        path = checkpoint.save(self.settings.directory, step, state, about)
        size = sum(file.stat().st_size for file in path.iterdir())
        self._refused.discard(path)  # it was replaced
        settings = self.settings
        checkpoint.prune(settings.directory, settings.keep, best=settings.keep_best, refused=self._refused)
        return Saved(path, step, about["records"], about["position"], size, time.perf_counter() - began)

    def _collect(self) -> None:
        writing, self._writing = self._writing, None
        try:
            saved = writing.result() if writing else None
        except Exception as error:  # noqa: BLE001 - a feed of one's own may have a position that cannot be written
            self._fail(error)
            return
        if saved is not None:
            self.covered, self._covered_steps = saved.records, saved.steps
            self._metrics.uncovered.set(self._session.engine.records - self.covered)
            self._commit(saved.position)
            self._metrics.observe_save(seconds=saved.seconds, size=saved.size, now=time.time())
            self._log.info("checkpoint", path=str(saved.path), records=saved.records, bytes=saved.size)

    def _commit(self, position: Mapping[str, Any]) -> None:
        try:
            self._session.feed.commit(position)
        except Exception as error:  # noqa: BLE001 - what is not told now is told with the next checkpoint
            self._log.error("commit failed", reason=reason(error))

    def _fail(self, error: Exception) -> None:
        self._failure = str(error) if isinstance(error, OSError) else reason(error)
        self._metrics.observe_failed_save()
        self._log.error("checkpoint failed", directory=str(self.settings.directory), reason=self._failure)


def learned(directory: Path) -> Sequence[str]:
    """Return the columns that the newest whole checkpoint has learned, in order; none where there is none."""
    with suppress(OSError):  # of such a directory more is said when it is saved in
        for path in checkpoint.found(directory):
            with suppress(DamagedError):
                checkpoint.verify(path)
                columns: list[str] = checkpoint.about(path).get("feed", {}).get("columns", [])
                return columns
    return ()


def none_whole(directory: Path, damage: Sequence[DamagedError]) -> CheckpointError:
    """Return what is said of a directory in which no checkpoint can be used; what is wrong, the newest's first."""
    return CheckpointError(
        f"checkpoint.directory = {str(directory)!r}: none of its {len(damage)} checkpoints can be used; the newest: "
        f"{damage[0]}; restore one from a backup, or start afresh in an empty directory"
    )


def describe(engine: Engine, position: Mapping[str, Any], feed: Mapping[str, Any]) -> dict[str, Any]:
    """Return what people, and checks at start, want to know of a checkpoint, as it stands now; see `lasting`, too.

    Args:
        engine: whose state it holds.
        position: of the feed.
        feed: what it knows of its records, see `history.known`.
    """
    cohort, guidance = engine.cohort, engine.guidance
    return {
        "records": engine.records,
        "accuracy": engine.accuracy,
        "position": dict(position),
        "feed": dict(feed),
        "teacher": cohort.names[engine.roles.teacher],
        "peers": {
            peer.name: {"accuracy": float(accuracy), "loss": float(loss), "parameters": peer.capacity}
            for peer, accuracy, loss in zip(cohort.peers, guidance.accuracies, guidance.losses, strict=True)
        },
    }


def lasting(configuration: Configuration, engine: Engine) -> dict[str, Any]:
    """Return what they want to know that learning does not change: gathered once, for it takes as long as a copy."""
    return {
        "models": {peer.name: peer.shapes() for peer in engine.cohort.peers},
        "settings": state_bearing(configuration),
        "configuration": session.fingerprint(configuration),
        "versions": {
            "streamkd": version("streamkd"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def state_bearing(configuration: Configuration) -> dict[str, str]:
    """Return the settings that a checkpoint's state depends on; all others may change between two runs."""
    served = configuration.served
    return {
        "feed.kind": configuration.feed.kind if configuration.feed else "",
        "labels.delay": "some" if configuration.labels.delay else "none",
        "max_classes": str(configuration.max_classes),
        "inputs.standardise": str(configuration.inputs.standardise),
        "replay.capacity": str(configuration.replay.capacity),
        "distillation.capacity": configuration.distillation.capacity.kind,
        "drift.detector": str(configuration.drift.detector.model_dump()),
        "peers": ", ".join(peer.name for peer in configuration.peers),  # their order is who has which role and weight
        "served.pool": str(served.pool),
        "served.label_memories": str(list(served.label_memories)),
        "served.answer_memories": str(list(served.answer_memories)),
        **{f"peers.{peer.name}.optimizer": warm_start.gathers(peer.optimizer) for peer in configuration.peers},
    }


def check_same(about: Mapping[str, Any], position: Mapping[str, Any], running: Session, path: Path) -> None:
    """Refuse a checkpoint whose state would not fit, and let the feed go to its position.

    Settings come first, then the feed with its columns and classes, then the shapes of the models: what is told is
    near to what was changed.

    Raises:
        CheckpointError: says where they differ.
        FeedError: what is to be read on is not what it was.
    """
    if "protocol" in about:
        raise CheckpointError(
            f"{path}: is of streamkd distill, and has no position to go on from; name it in checkpoint.warm_start, "
            "and another folder in checkpoint.directory"
        )
    _refuse_other({"settings": about["settings"]}, {"settings": state_bearing(running.configuration)}, path)
    running.seek(position)
    _refuse_other(about["models"], {peer.name: peer.shapes() for peer in running.engine.cohort.peers}, path)


def _refuse_other(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    lines = list(_differences(saved, wanted))
    if lines:
        raise CheckpointError(
            f"{path}: was made by another configuration\n{one_screen(lines)}\n"
            "give back the old settings, or start afresh with another checkpoint.directory"
        )


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*saved, *wanted}):
        before, now = saved.get(name, {}), wanted.get(name, {})
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                was, is_ = before.get(key, "absent"), now.get(key, "absent")
                shown = key if name == "settings" else f"{name}.{key}"
                yield f"  {shown}: {was} in the checkpoint, {is_} configured"


def probe(directory: Path) -> None:
    """Find out whether checkpoints could be written, without writing one.

    Raises:
        ConfigError: they could not.
    """
    if not can_be_written(directory) or (directory.exists() and not directory.is_dir()):
        raise ConfigError(
            f"checkpoint.directory = {short(str(directory))}: cannot be written; name a folder that can, or can be made"
        )

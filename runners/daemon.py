"""The long-running process: poll, step, observe, save, and then tell the feed."""

import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from types import FrameType
from typing import Any

import torch
from structlog.stdlib import BoundLogger

from monitoring.health import Health
from monitoring.metrics import Metrics
from monitoring.server import Server
from runners import session
from runners.feeds import REASONS
from runners.session import Session
from streamkd import checkpoint
from streamkd.engine import Engine
from streamkd.errors import CheckpointError
from streamkd.report import Report

IDLE_SECONDS = 0.05
"""How long to wait when the feed has nothing yet."""
MOST_LINES = 12
"""Of a difference between two architectures, in a message."""

Observer = Callable[[Report], None]


class Daemon:
    """Learns a feed until it ends or a signal comes.

    Positions are stored inside the checkpoint, beside everything that the engine knows; the feed is told only when
    the checkpoint is on disk. So a crash repeats work and never loses it.

    Args:
        running: feed and engine.
        log: structlog's.
        observers: called with every report; one that fails is logged and never stops the work.
        resume: go on from the newest checkpoint, if there is one, and save new ones.
    """

    def __init__(self, running: Session, log: BoundLogger, *observers: Observer, resume: bool = True) -> None:
        self._session = running
        self._settings = running.configuration
        self._log = log
        self._observers = observers
        self._resume = resume
        self._stop = False
        self._position: Mapping[str, Any] = {}
        self._saved_records = self._tried_records = 0
        self._last_line = 0
        self.on_listening: Callable[[int], None] = lambda _: None
        engine, watch = running.engine, running.engine.drift
        self.health = Health(time.monotonic, self._settings.http.stalled_seconds)
        self.metrics = Metrics(
            peers=engine.cohort.names,
            sources=teaching_pairs(engine),
            feed=running.feed.name,
            reasons=REASONS,
            detector=watch.name,
            signal=watch.signal,
            version=version("streamkd"),
        )

    def run(self) -> None:
        """Serve, restore, learn, and save at the end."""
        http = self._settings.http
        with ExitStack() as stack:
            stack.callback(self._session.close)
            self._enter("starting")
            server = stack.enter_context(Server(http.host, http.port, self.metrics.registry, self.health))
            self._log.info("listening", host=server.host, port=server.port)
            self.on_listening(server.port)
            stack.enter_context(_signals(self._on_signal))
            try:
                self._enter("restoring")
                self._restore()
                self._enter("running")
                self._loop()
                self._enter("draining")
                self._save()
            except BaseException:
                self._enter("failed")
                raise
            self._enter("stopped")
            engine = self._session.engine
            self._log.info("stopped", records=engine.records, steps=engine.steps)

    def _loop(self) -> None:
        feed, engine, every = (
            self._session.feed,
            self._session.engine,
            self._settings.checkpoint.every_records,
        )
        while not self._stop:
            batch = feed.poll(self._settings.batch)
            self.health.progress()
            if batch is None:
                self._log.info("feed ended", records=engine.records)
                return
            if not len(batch) and not batch.late:
                time.sleep(IDLE_SECONDS)
                continue
            report = engine.step(batch)
            self._position = report.position
            self._observe(report)
            if engine.records - self._tried_records >= every:
                self._save()
        self._log.info("stopping", reason="signal")

    def _observe(self, report: Report) -> None:
        self.metrics.observe(report, now=time.time(), refused=self._session.dead_letters.counts)
        self.metrics.uncovered.set(report.records - self._saved_records)
        self._tell(report)
        for observer in self._observers:
            try:
                observer(report)
            except Exception:  # noqa: BLE001 - whatever it is, watching must not stop the work
                self._log.exception("observer failed", observer=repr(observer))

    def _tell(self, report: Report) -> None:
        """Log what a person would want to know."""
        for alarm in report.drift:
            self._log.warning(
                "drift", detector=alarm.detector, signal=alarm.signal, record=alarm.record, **alarm.reaction
            )
        if report.swap is not None:
            self._log.info("role swap", before=report.swap.before, after=report.swap.after, reason=report.swap.reason)
        every = self._settings.log.every_records
        if every and report.records // every > self._last_line // every:
            self._log.info(
                "progress",
                records=report.records,
                teacher=report.teacher,
                accuracy={name: round(peer.accuracy, 4) for name, peer in report.peers.items()},
                refused=self._session.dead_letters.total,
            )
        self._last_line = report.records

    def _restore(self) -> None:
        """Go on from the newest checkpoint that is whole."""
        directory = self._settings.checkpoint.directory
        candidates = checkpoint.found(directory) if self._resume else []
        for attempt, path in enumerate(candidates):
            try:
                state, about = checkpoint.load(path)
            except CheckpointError as error:
                self._log.error("checkpoint refused", path=str(path), reason=str(error))
                continue
            _check_same(about["architecture"], architecture(self._session.engine), path)
            self._take_up(state, "fallback" if attempt else "success")
            self._log.info("restored", path=str(path), records=self._session.engine.records)
            break
        else:
            if candidates:
                raise CheckpointError(
                    f"checkpoint.directory = {str(directory)!r}: none of its {len(candidates)} checkpoints is whole; "
                    "restore one from a backup, or start afresh in an empty directory"
                )
        self.health.restored = True

    def _take_up(self, state: Mapping[str, Any], result: str) -> None:
        engine = self._session.engine
        engine.load_state_dict(state["engine"])
        self._position = state["position"]
        self._session.feed.seek(self._position)
        self._saved_records = self._tried_records = self._last_line = engine.records
        self.metrics.observe_restore(
            result,
            unsound={(p.name, "skipped"): p.skipped for p in engine.cohort.peers}
            | {(p.name, "restarted"): p.restarts for p in engine.cohort.peers},
            joined=engine.pending.joined,
            expired=engine.pending.expired,
        )

    def _save(self) -> None:
        """Save everything, and then tell the feed; a save that fails is logged and tried again later."""
        engine, settings = self._session.engine, self._settings.checkpoint
        if not self._resume or engine.records == self._saved_records:
            return
        self._session.dead_letters.flush()
        began = time.perf_counter()
        try:
            path = checkpoint.save(
                settings.directory,
                engine.steps,
                {"engine": engine.state_dict(), "position": dict(self._position)},
                {
                    "records": engine.records,
                    "position": dict(self._position),
                    "teacher": engine.cohort.names[engine.roles.teacher],
                    "peers": {
                        peer.name: {"accuracy": float(accuracy), "loss": float(loss), "parameters": peer.capacity}
                        for peer, accuracy, loss in zip(
                            engine.cohort.peers, engine.cohort.accuracies, engine.cohort.losses, strict=True
                        )
                    },
                    "architecture": architecture(engine),
                    "configuration": session.fingerprint(self._settings),
                    "versions": {
                        "streamkd": version("streamkd"),
                        "torch": torch.__version__,
                        "python": platform.python_version(),
                    },
                },
            )
        except OSError as error:
            self.metrics.observe_failed_save()
            self._log.error("checkpoint failed", directory=str(settings.directory), reason=str(error))
            return
        finally:
            self._tried_records = engine.records
        self._saved_records = engine.records
        checkpoint.prune(settings.directory, settings.keep)
        self._session.feed.commit(self._position)
        size = sum(file.stat().st_size for file in path.iterdir())
        self.metrics.observe_save(seconds=time.perf_counter() - began, size=size, now=time.time())
        self._log.info("checkpoint", path=str(path), records=engine.records, bytes=size)

    def _enter(self, state: str) -> None:
        self.health.state = state
        self.metrics.observe_state(state)

    def _on_signal(self) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True


def architecture(engine: Engine) -> dict[str, dict[str, list[int]]]:
    """Return the shape of every weight of every peer."""
    return {
        peer.name: {name: list(value.shape) for name, value in peer.module.state_dict().items()}
        for peer in engine.cohort.peers
    }


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: Any) -> None:
    """Refuse a checkpoint of other models, saying where they differ."""
    lines = []
    for name in sorted({*saved, *wanted}):
        before, now = saved.get(name, {}), wanted.get(name, {})
        lines += [
            f"  {name}.{key}: {before.get(key, 'absent')} in the checkpoint, {now.get(key, 'absent')} configured"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
    if lines:
        more = len(lines) - MOST_LINES
        shown = "\n".join(lines[:MOST_LINES] + ([f"  and {more} more"] if more > 0 else []))
        raise CheckpointError(
            f"{path}: its models are not the configured ones\n{shown}\n"
            "give back the old models, or start afresh with another checkpoint.directory"
        )


def teaching_pairs(engine: Engine) -> list[tuple[str, str]]:
    """Return every (teacher, student) that can occur, whoever is in office."""
    cohort = engine.cohort
    pairs = {pair for teacher in range(len(cohort)) for pair in cohort.pairs(teacher)}
    return sorted({(cohort.source_name(source), cohort.names[student]) for source, student in pairs})


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Let SIGTERM and SIGINT only ask to stop; put the old handlers back afterwards."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The long-running process: poll, step, observe, save, and then tell the feed."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from threading import Timer
from types import FrameType
from typing import Any

from structlog.stdlib import BoundLogger

from monitoring.delays import LabelDelays
from monitoring.health import Health
from monitoring.metrics import Metrics, starting
from monitoring.server import Server
from runners import logs
from runners.feeds import REASONS, RESETS, STAGES
from runners.notify import WATCHDOG, notify
from runners.saver import Saver
from runners.session import Session
from runners.settings import RELOADABLE, Configuration, changes
from streamkd.batch import Batch
from streamkd.engine import Engine
from streamkd.errors import CheckpointError, ConfigError, StreamkdError
from streamkd.report import SERVED, Report

INTERRUPTED = 130
"""Exit code after a second signal, as a shell would give it."""
IDLE_SECONDS = 0.05
"""How long to wait when the feed has nothing yet."""
Observer = Callable[[Report], None]


@dataclass(slots=True)
class Front:
    """What a process shows and hears from its start on, when it has no feed yet, and no engine.

    Attributes:
        server: answers over HTTP.
        hung_up: whether it was asked to reload.
    """

    server: Server
    hung_up: bool = False

    def hang_up(self) -> None:
        """Leave word that it was."""
        self.hung_up = True


@contextmanager
def fronted(configuration: Configuration, log: BoundLogger) -> Iterator[Front]:
    """Answer over HTTP and heed signals, before a feed is opened and around a daemon; log why it ended by itself.

    Until a daemon runs, there is nothing to finish: a signal ends the process with 0.
    """
    http = configuration.http
    health = Health(time.monotonic, http.stalled_seconds)
    status = {"state": health.state, "version": version("streamkd")}
    try:
        with Server(http.host, http.port, starting(), health, lambda: status) as server:
            front = Front(server)
            with _signals({signal.SIGTERM: _leave, signal.SIGINT: _leave, signal.SIGHUP: front.hang_up}):
                log.info("listening", host=server.host, port=server.port)
                log.info("starting", feed=configuration.feed.kind if configuration.feed else "")
                yield front
    except _LeaveError:
        log.info("stopped", reason="signal")
        sys.exit(0)
    except StreamkdError as error:
        if not sys.stderr.isatty():  # where the command tells it
            log.error("failed", reason=str(error), exit_code=error.exit_code)  # noqa: TRY400 - told without a traceback
        raise


class _LeaveError(KeyboardInterrupt):
    """A signal came; nothing that a feed or a part of the user's own catches."""


def _leave() -> None:
    raise _LeaveError


class Daemon:
    """Learns a feed until it ends or a signal comes.

    Positions are stored inside the checkpoint, beside everything that the engine knows; the feed is told only when
    the checkpoint is on disk. So a crash repeats work and never loses it.

    Args:
        running: feed and engine.
        front: around it, see `fronted`.
        log: structlog's.
        observers: called with every report; one that fails is logged and never stops the work.
        resume: go on from the newest checkpoint, if there is one, and save new ones.
        reload: reads the configuration again, on SIGHUP.
    """

    def __init__(
        self,
        running: Session,
        front: Front,
        log: BoundLogger,
        *observers: Observer,
        resume: bool = True,
        reload: Callable[[], Configuration] | None = None,
    ) -> None:
        self._session = running
        self._front = front
        self._settings = running.configuration
        self._log = log
        self._trouble = ""
        self._observers = observers
        self._reload = reload
        self._stop = self._hung_up = False
        self._patience = Timer(0, self._give_up)
        self._last_line = 0
        self._latest: Report | None = None
        self._told = 0.0
        self._unsound: dict[str, Mapping[str, int]] = {}
        self._resets: dict[str, int] = {}
        self._unwritten = self._refused = 0
        engine, watch = running.engine, running.engine.drift
        self.health = front.server.health
        self.metrics = Metrics(
            peers=engine.cohort.names,
            sources=teaching_pairs(engine),
            feed=running.feed.name,
            reasons=REASONS,
            resets=RESETS,
            stages=STAGES,
            detector=watch.name,
            signal=watch.signal,
            version=version("streamkd"),
        )
        self._delays = LabelDelays(engine.pending.capacity)
        self._saver = Saver(running, self.metrics, log) if resume else None

    def run(self) -> None:
        """Restore, learn, and save at the end."""
        asked = {
            signal.SIGTERM: self._ask_to_stop,
            signal.SIGINT: self._ask_to_stop,
            signal.SIGHUP: self._ask_to_stop if self._reload is None else self._ask_to_reload,
        }
        with _signals(asked):
            if self._front.hung_up:
                asked[signal.SIGHUP]()
            try:
                self._enter("restoring")
                self._front.server.registry, self._front.server.status = self.metrics.registry, self.status
                if self._saver:
                    self._saver.restore()
                self.health.restored = True
                self.health.progress()
                self._enter("running")
                self._log.info("running", records=self._session.engine.records)
                notify("READY=1")
                self._loop()
                self._enter("draining")
                notify("STOPPING=1")
                if self._saver:
                    self._saver.save()
            except BaseException:
                self._enter("failed")
                raise
            finally:
                if self._saver:
                    self._saver.close()
            self._patience.cancel()
            self._enter("stopped")
            engine = self._session.engine
            refused = self._session.dead_letters.total
            self._log.info("stopped", records=engine.records, steps=engine.steps, refused=refused)

    def status(self) -> dict[str, Any]:
        """Return what /v1/status tells."""
        report = self._latest
        return {
            "state": self.health.state,
            "version": version("streamkd"),
            "refused": dict(self._session.dead_letters.counts),
            **({} if report is None else report.summary()),
        }

    def _loop(self) -> None:
        engine = self._session.engine
        self._last_line = engine.records
        # Where a restored run stands already, so that waiting there is no step: an undisturbed run would not take it.
        position: Mapping[str, Any] = self._saver.position if self._saver else {}
        predictions = self._session.predictions
        while not self._stop:
            predictions.catch_up()
            full = predictions.full  # then what comes waits in the feed
            batch = None if full else self._poll()
            self._progress()
            self._observe_feed()
            if self._hung_up:
                self._take_over()
            self._observe_refused()
            self._observe_predictions()
            if batch is None and not full:
                self._log.info("feed ended", records=engine.records)
                return
            if batch is None or (not len(batch) and not batch.late and batch.position == position):
                if self._saver:
                    self._saver.after(position)
                time.sleep(IDLE_SECONDS)
                continue
            position = batch.position  # it moves without records, too, where all were refused
            report = self._session.step(batch)
            self._tell_uncompiled()
            self.metrics.label_delay.observe(self._delays.update(batch, time.monotonic()))
            self.metrics.observe_times(batch.times, now=time.time())
            self._observe(report)
            if self._saver:
                self._saver.after(report.position)
        self._log.info("stopping", reason="signal")

    def _poll(self) -> Batch | None:
        """Return what the feed gives next; where it cannot go on, what was learned is saved first."""
        try:
            return self._session.poll()
        except StreamkdError:  # between two steps: the state is whole, and its position is known
            if self._saver:
                with suppress(CheckpointError):  # which was logged; the feed's error is the one to mend
                    self._saver.save()
            raise

    def _tell_uncompiled(self) -> None:
        trouble = self._session.engine.uncompiled
        if trouble != self._trouble:
            self._trouble = trouble
            self._log.warning("not compiled", reason=trouble, remedy="it learns as without compile = true, only slower")

    def _observe_feed(self) -> None:
        feed = self._session.feed
        changed = self.health.connected != feed.connected
        self.health.connected = feed.connected  # before it is told: who hears of it finds it so
        if changed and feed.connected:
            self._log.warning("feed connected", feed=feed.name)
        elif changed:
            self._log.warning("feed disconnected", feed=feed.name, reason=feed.describe().get("trouble", ""))
        resets = {**feed.resets, **(self._saver.resets if self._saver else {})}
        for why, count in resets.items():
            if count > self._resets.get(why, 0):
                self._log.warning("position lost", feed=feed.name, reason=why, so_far=count)
        self._resets = resets
        self.metrics.observe_feed(connected=feed.connected, lag=feed.lag(), resets=resets, failures=feed.failures)

    def _observe_refused(self) -> None:
        letters = self._session.dead_letters
        self.metrics.observe_refused(letters.counts, unwritten=letters.failures, now=time.time())
        if letters.total > self._refused:
            self._refused = letters.total
            reasons = {reason: count for reason, count in letters.counts.items() if count}
            self._log.warning(
                "records refused", refused=self._refused, reasons=reasons, path=str(letters.settings.path)
            )
        if letters.failure:
            self._log.error("dead letters not written", reason=letters.failure)

    def _observe_predictions(self) -> None:
        predictions = self._session.predictions
        if predictions.failures > self._unwritten:
            self._unwritten = predictions.failures
            self._log.error("predictions not written", reason=predictions.failure, waiting=len(predictions))
        self.metrics.observe_predictions(unwritten=predictions.failures)

    def _progress(self) -> None:
        """Say that the loop went round; systemd's watchdog need not hear it more than once a second."""
        now = self.health.progress()
        if now - self._told >= 1:
            self._told = now
            notify(WATCHDOG)

    def _observe(self, report: Report) -> None:
        self._latest = report
        self.metrics.observe(report, now=time.time())
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
        self._tell_of_unsound(report)
        every = self._settings.log.every_records
        if every and report.records // every > self._last_line // every:
            self._log.info(
                "progress",
                records=report.records,
                teacher=report.teacher,
                accuracy={
                    SERVED: round(report.accuracy, 4),
                    **{name: round(peer.accuracy, 4) for name, peer in report.peers.items()},
                },
                refused=self._session.dead_letters.total,
            )
        self._last_line = report.records

    def _tell_of_unsound(self, report: Report) -> None:
        if report.faults:
            self._log.warning("records not learned", records=len(report.faults), reason="an update is not finite")
        for name, counts in report.unsound.items():
            for action, before in self._unsound.get(name, counts).items():
                if counts[action] > before:
                    self._log.warning(f"steps not finite: {action}", peer=name, so_far=counts[action])
            self._unsound[name] = counts

    def _enter(self, state: str) -> None:
        self.health.state = state
        self.metrics.observe_state(state)

    def _ask_to_stop(self) -> None:
        if self._stop and self._saver:
            os._exit(INTERRUPTED)  # not even for a save: what is on the disk is whole at any moment
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        self._patience = Timer(self._settings.shutdown_timeout_seconds, self._give_up)
        self._patience.daemon = True
        self._patience.start()

    def _give_up(self) -> None:
        """End at once: the last save takes too long, and what is on the disk is whole at any moment."""
        self._log.error(
            "not stopped in time",
            shutdown_timeout_seconds=self._settings.shutdown_timeout_seconds,
            covered=self._saver.covered if self._saver else 0,
            records=self._session.engine.records,
        )
        os._exit(CheckpointError.exit_code)

    def _ask_to_reload(self) -> None:
        self._hung_up = True

    def _take_over(self) -> None:
        """Read the configuration again; take over all that changed, or nothing."""
        self._hung_up = False
        try:
            found = self._reload() if self._reload is not None else self._settings
            changed = changes(self._settings, found)
            fixed = sorted(set(changed) - RELOADABLE)
            if fixed:
                raise ConfigError(f"{', '.join(fixed)}: cannot change while the process runs; start it again")
        except StreamkdError as error:
            self.metrics.reloaded.set(0)
            self._log.error("reload refused", reason=str(error))
            return
        self._settings = found
        self.health.stalled_seconds = found.http.stalled_seconds
        self._session.dead_letters.settings = found.dead_letters
        if self._saver:
            self._saver.settings = found.checkpoint
        logs.limit(found.log.level)
        self.metrics.reloaded.set(1)
        self._log.info("reloaded", changed={key: after for key, (_, after) in changed.items()})


def teaching_pairs(engine: Engine) -> list[tuple[str, str]]:
    """Return every (teacher, student) that can occur, whoever is in office."""
    cohort = engine.cohort
    pairs = {pair for teacher in range(len(cohort)) for pair in engine.guidance.pairs(teacher)}
    return sorted({(cohort.source_names[source], cohort.names[student]) for source, student in pairs})


@contextmanager
def _signals(asked: Mapping[signal.Signals, Callable[[], None]]) -> Iterator[None]:
    """Let signals only leave word with the loop; put the old handlers back afterwards."""

    def handle(number: int, _frame: FrameType | None) -> None:
        asked[signal.Signals(number)]()

    before = {number: signal.signal(number, handle) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""What every command that learns has in common: torch set up, a feed opened, an engine built for it."""

import gc
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from runners.dead_letters import DeadLetters
from runners.feeds import DeadLetter, Feed
from runners.predictions import Predictions, nowhere
from runners.settings import Configuration
from streamkd.batch import Batch
from streamkd.config import build_engine
from streamkd.engine import Engine
from streamkd.errors import CheckpointError, FeedError, StreamkdError, TrainingError, reason
from streamkd.report import Fault, Report


@dataclass(frozen=True, slots=True)
class Session:
    """A feed, the engine that learns it, where its refused records go, and what was answered."""

    configuration: Configuration
    feed: Feed
    engine: Engine
    dead_letters: DeadLetters
    predictions: Predictions = field(default_factory=lambda: Predictions(nowhere()))

    def poll(self) -> Batch | None:
        """Return what the feed gives next; None at its end.

        Raises:
            FeedError: whatever went wrong in it.
        """
        try:
            return self.feed.poll(self.configuration.batch)
        except StreamkdError:
            raise
        except Exception as error:
            raise FeedError(f"feed: cannot be read on: {reason(error)}; mend it, and start again") from error

    def seek(self, position: Mapping[str, Any]) -> None:
        """Let the feed go on after the batch that carried `position`.

        Raises:
            CheckpointError: it cannot make anything of it.
        """
        try:
            self.feed.seek(position)
        except StreamkdError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"feed: cannot go to the checkpoint's position: {reason(error)}; is it of another feed? Give back its "
                "settings, or start afresh with another checkpoint.directory"
            ) from error

    def step(self, batch: Batch) -> Report:
        """Take one step of the engine; records that break the peers go to the dead letters.

        Raises:
            TrainingError: whatever went wrong in it.
            ConfigError: too large a share of the latest records was refused.
        """
        self.dead_letters.accepted(len(batch))
        try:
            report = self.engine.step(batch)
        except Exception as error:
            raise TrainingError(
                f"step {self.engine.steps} on {len(batch)} records: {reason(error)}; "
                "a model, loss or schedule of your own may be at fault; streamkd check tries them"
            ) from error
        for fault in report.faults:
            self.dead_letters(_letter(fault, batch))
        self.predictions.write(batch, report, self.feed.describe)
        return report

    def flush(self) -> None:
        """Make sure that dead letters and predictions are safe; the position may follow them then.

        Raises:
            OSError: one is not.
        """
        self.dead_letters.flush()
        self.predictions.flush()

    def close(self) -> None:
        """Let go of the feed, the dead letters and the predictions.

        Raises:
            FeedError: the feed does not let go.
        """
        gc.unfreeze()
        self.dead_letters.close()
        self.predictions.close()
        try:
            self.feed.close()
        except Exception as error:
            raise FeedError(f"feed: cannot be closed: {reason(error)}") from error


def _letter(fault: Fault, batch: Batch) -> DeadLetter:
    known = fault.row is not None and bool(batch.raw)
    # The bytes of a record that waited for its label are gone.
    raw = batch.raw[fault.row or 0] if known else json.dumps({"x": fault.x.tolist(), "class": fault.y}).encode()
    # Enough to find it by: a position may also carry all labels that are being withheld.
    place = {key: value for key, value in batch.position.items() if isinstance(value, (int, str))}
    return DeadLetter("non_finite_step", "an update on this record alone is not finite", raw, {"batch_position": place})


def start(
    configuration: Configuration, clock: Callable[[], float] = time.perf_counter, *, learned: Sequence[str] = ()
) -> Session:
    """Open the feed and build the engine for it.

    Args:
        configuration: of both.
        clock: reads seconds.
        learned: columns of a checkpoint from which it is to go on, see `Configuration.knowing`.

    Raises:
        StreamkdError: with the exit code of the process.
    """
    prepare_torch(configuration)
    kind = configuration.feed.kind if configuration.feed else ""
    dead_letters = DeadLetters(configuration.dead_letters, kind)
    feed = configuration.knowing(learned).open_feed(dead_letters)
    try:
        engine = build_engine(configuration, feed.shape, clock=clock)
        predictions = configuration.open_predictions()
    except BaseException:
        feed.close()
        raise
    # Else the first full garbage collection, a few batches after the start, goes through all that was ever imported:
    # learning stands still for 0.2 s. To collect here would cost as much at every start.
    gc.freeze()
    return Session(configuration, feed, engine, dead_letters, predictions)


def prepare_torch(configuration: Configuration) -> None:
    """Set threads, the seeds, and whether results must repeat exactly."""
    if configuration.deterministic:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(mode=True)
    elif configuration.threads:
        torch.set_num_threads(configuration.threads)
    torch.manual_seed(configuration.seed)
    random.seed(configuration.seed)
    np.random.seed(configuration.seed)  # noqa: NPY002 - parts of one's own may draw from the shared one


def fingerprint(configuration: Configuration) -> str:
    """Return a digest of all settings, to tell whether a checkpoint was made by the same."""
    settings: Any = configuration.model_dump(mode="json")
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

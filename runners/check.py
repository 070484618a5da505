"""Would it run? The configuration resolved, the first records read, the models tried on them."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tomli_w
import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from monitoring.server import listen
from runners import saver, session, warm_start
from runners.dead_letters import DeadLetters, probe
from runners.feeds import DeadLetter
from runners.passwords import without_secrets
from runners.settings import Configuration
from streamkd import checkpoint
from streamkd.batch import UNLABELLED, Batch
from streamkd.config import build_engine
from streamkd.engine import Engine
from streamkd.errors import DamagedError

FIRST_RECORDS = 3
MOST_COLUMNS = 6
MOST_NAMES = 20


def check(configuration: Configuration, console: Console) -> None:
    """Print what a run would be made of.

    Raises:
        StreamkdError: what a run would end with at its start.
    """
    session.prepare_torch(configuration)
    refused: list[DeadLetter] = []
    configuration.open_predictions().close()
    feed = configuration.knowing(saver.learned(configuration.checkpoint.directory)).open_feed(refused.append)
    try:
        engine = build_engine(configuration, feed.shape)
        few = configuration.model_copy(update={"batch": FIRST_RECORDS})
        probe(configuration.dead_letters.path)
        saver.probe(configuration.checkpoint.directory)
        with TemporaryDirectory() as folder:  # what is only tried leaves no trace
            elsewhere = configuration.dead_letters.model_copy(update={"path": Path(folder, "dead-letters")})
            running = session.Session(few, feed, engine, DeadLetters(elsewhere, "check"))
            if not checkpoint.found(configuration.checkpoint.directory):
                warm_start.begin(running)
            batch = running.poll()
            description = feed.describe()
            if batch is not None:
                running.step(batch)
            running.dead_letters.close()
        _try_process(running)
    finally:
        feed.close()
    resolved = tomli_w.dumps(without_secrets(_without_none(configuration.model_dump(mode="json"))))
    console.print("[bold]Configuration[/], defaults included")
    console.print(Syntax(resolved, "toml", background_color="default"))
    console.print(_feed({**description, "promise": feed.capabilities.promise}))
    if batch is not None:
        console.print(_records(batch, description))
    console.print(_models(engine, feed.shape))
    if refused:
        reason = refused[0].detail
        console.print(
            f"{len(refused)} records before these would go to the dead letters, the first for: {reason}", markup=False
        )
    console.print("[green]It would run.[/]")


def _try_process(running: session.Session) -> None:
    """Find out what a run finds out at its start: the port, and whether its checkpoints could go on."""
    http, directory = running.configuration.http, running.configuration.checkpoint.directory
    listen(http.host, http.port).close()
    damage = []
    for path in checkpoint.found(directory):
        try:
            _, about = checkpoint.load(path)
        except DamagedError as error:  # a run would go on from the one before
            damage.append(error)
            continue
        saver.check_same(about, about["position"], running, path)
        return
    if damage:
        raise saver.none_whole(directory, damage)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def _feed(description: Mapping[str, Any]) -> Table:
    made = Table(title="Feed", title_justify="left", show_header=False)
    for key, value in description.items():
        made.add_row(key, _plain(_listed(value) if isinstance(value, list) else value))
    return made


def _records(batch: Batch, description: Mapping[str, Any]) -> Table:
    numeric = list(description.get("numeric", []))
    width = batch.x.flatten(1).shape[1]
    buckets = max(1, (width - len(numeric)) // max(1, len(description.get("categorical", []))))
    hashed = [f"{name}[{bucket}]" for name in description.get("categorical", []) for bucket in range(buckets)]
    names = [*numeric, *hashed] or [f"feature {index}" for index in range(width)]
    names = names[:MOST_COLUMNS]
    labels = description.get("classes")
    made = Table(title=f"First {len(batch)} records, as decoded", title_justify="left")
    for name in [*names, "label", *(["time"] if batch.times else [])]:
        made.add_column(_plain(name), justify="right")
    times = [[_moment(seconds)] for seconds in batch.times] or [[] for _ in range(len(batch))]
    for x, y, time in zip(batch.x.flatten(1), batch.y.tolist(), times, strict=True):
        label = "(unknown)" if y == UNLABELLED else str(labels[y]) if isinstance(labels, list) else str(y)
        made.add_row(*(f"{value:.6g}" for value in x[: len(names)].tolist()), _plain(label), *time)
    return made


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}Z" if isfinite(seconds) else "(unreadable)"


def _models(engine: Engine, shape: Sequence[int]) -> Table:
    made = Table(title=f"Models, for records of shape {list(shape)}", title_justify="left")
    for heading in ("peer", "output", "parameters", "learns by"):
        made.add_column(heading, justify="right" if heading == "parameters" else "left")
    for peer in engine.cohort.peers:
        output = list(peer.predict(torch.zeros(1, *shape, device=engine.device)).logits.shape)
        made.add_row(_plain(peer.name), str(output), f"{peer.capacity:,}" if peer.capacity else "-", peer.learns_by)
    return made


def _plain(value: object) -> Text:
    """Return what the data or the user called something: no markup, and perhaps not even whole characters."""
    return Text(str(value).encode(errors="backslashreplace").decode())


def _listed(values: Sequence[object]) -> str:
    shown = ", ".join(str(value) for value in values[:MOST_NAMES])
    more = len(values) - MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown or "none so far"

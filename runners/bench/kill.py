"""`streamkd bench kill`: runs killed at any moment, resumed, and held against one that was never disturbed."""

import gc
import os
import random
import shutil
import signal
import socket
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from runners import cli
from runners.feeds.drifting import drifting
from runners.shipped import shipped
from streamkd import checkpoint
from streamkd.errors import ConfigError, StreamkdError

RECORDS = 2_400
OPERATIONS = 45
"""A save, and the pruning after it, are fewer operations on files than this."""
SECONDS = 300
"""A run takes less to start."""
TABLE = Path("table.csv")
SETTINGS = (
    "http.port=0",
    "log.level=error",
    "checkpoint.every_records=160",
    "checkpoint.keep=2",
    "labels.delay=40",
    "deterministic=true",
    # Alarms and swaps that come easily: the law says something only if there is something to forget.
    "drift.detector={kind='adwin', delta=0.2, clock=4, grace_period=4}",
    "peers.0.optimizer.lr=0.01",  # the first teacher is the slowest
    "roles.every=8",
    "roles.tenure=8",
    "roles.margin=0.0",
    "roles.confidence=0.5",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the killed runs of one configuration.

    Attributes:
        kills: runs that were killed.
        inside: of them, right before an operation on a file of a checkpoint.
        resumed: of them, and of those that came to the end, those that went on from a checkpoint.
        ends: runs that came to the end of the feed, each after kills.
        equal: of them, with the digest of the run that was never disturbed.
    """

    kills: int
    inside: int
    resumed: int
    ends: int
    equal: int


def main(configurations: Sequence[str], *, kills: int, seed: int, console: Console) -> None:
    """Kill runs of each configuration, print what became of them.

    Raises:
        StreamkdError: one did not end where the undisturbed one ended.
    """
    unknown = [name for name in configurations if name not in alone()]
    if unknown:
        raise ConfigError(
            f"{unknown[0]}: no shipped configuration of that name that needs no server; there are {', '.join(alone())}"
        )
    made = Table(
        "configuration",
        "kills",
        "inside a save",
        "resumed",
        "runs to the end",
        "digest equal",
        box=None,
        pad_edge=False,
    )
    unequal = 0
    with Progress(console=console) as progress:
        for name in configurations or alone():
            task = progress.add_task(name, total=kills)
            with TemporaryDirectory() as folder, chdir(folder):
                outcome = kill_loop(name, kills, seed, lambda task=task: progress.advance(task))  # type: ignore[misc]  # of a lambda with a default
            made.add_row(name, *map(str, astuple(outcome)))
            unequal += outcome.ends - outcome.equal
    console.print(made)
    if unequal:
        raise StreamkdError(f"{unequal} runs did not end where the undisturbed one ended")


def alone() -> list[str]:
    """Return the names of the shipped configurations that need no server beside them."""
    kinds = {name: tomllib.loads(text)["feed"]["kind"] for name, text in shipped().items()}
    return sorted(name for name, kind in kinds.items() if kind in {"csv", "jsonl", "drifting"})


def kill_loop(
    configuration: str,
    kills: int,
    seed: int,
    killed: Callable[[], None] = lambda: None,
    *,
    feed: Sequence[str] = (),
) -> Outcome:
    """Run a configuration in the current folder, again and again, killing it every time; then let it end.

    Every other kill comes right before an operation on a file of a checkpoint, another operation each time; the others
    come at random moments of the learning. A run that gets to the end before its time is compared, and begun anew.

    Args:
        configuration: name of a shipped one.
        kills: how many.
        seed: of the moments.
        killed: called after each.
        feed: settings of the feed, where it is not to be the table that is written.
    """
    write_table(TABLE)
    with notified() as channel:
        undisturbed = in_a_child(*arguments(configuration, Path("undisturbed"), feed))
        wait_until_ready(channel)
        began = time.monotonic()
        if ended(undisturbed):
            raise StreamkdError(f"{configuration}: the run that nobody disturbs did not end well")
        learning = time.monotonic() - began
        wanted = digest(Path("undisturbed"))
        chance = random.Random(seed)  # noqa: S311 - not for secrets
        folder = Path("killed")
        command = arguments(configuration, folder, feed)
        operations: list[int] = []
        inside = resumed = ends = equal = done = 0
        while True:
            resumed += bool(checkpoint.found(folder))
            drain(channel)
            if done < kills and not done % 2:
                operations = operations or chance.sample(range(1, OPERATIONS + 1), OPERATIONS)
                pid = in_a_child(*command, prepare=partial(die_before, operations.pop(), folder))
            else:
                pid = in_a_child(*command)
            if done < kills and done % 2:
                wait_until_ready(channel)
                time.sleep(chance.uniform(0.0, 0.4) * learning)
                os.kill(pid, signal.SIGKILL)
            status = ended(pid)
            if status == -signal.SIGKILL:
                inside += not done % 2
                done += 1
                killed()
            elif status == 0:
                ends += 1
                equal += digest(folder) == wanted
                if done == kills:
                    return Outcome(kills, inside, resumed, ends, equal)
                shutil.rmtree(folder)
            else:
                raise StreamkdError(f"{configuration}: a run ended with {status} after {done} kills")


@contextmanager
def notified() -> Iterator[socket.socket]:
    """Hear what the runs say of themselves, as systemd would."""
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        os.environ["NOTIFY_SOCKET"] = str(Path(folder, "notify"))
        channel.bind(os.environ["NOTIFY_SOCKET"])
        channel.settimeout(SECONDS)
        try:
            yield channel
        finally:
            del os.environ["NOTIFY_SOCKET"]


def drain(channel: socket.socket) -> None:
    """Forget what earlier runs had to say."""
    channel.settimeout(0)
    with suppress(BlockingIOError):
        while True:
            channel.recv(99)
    channel.settimeout(SECONDS)


def wait_until_ready(channel: socket.socket) -> None:
    """Wait until the run that was started last has restored, and learns."""
    while channel.recv(99) != b"READY=1":
        pass


def arguments(configuration: str, directory: Path, feed: Sequence[str] = ()) -> list[str]:
    """Return the command line of a run that saves its checkpoints in `directory`."""
    given = [*SETTINGS, f"checkpoint.directory={directory}"]
    if feed:
        given += feed
    elif configuration == "demo":
        given += [f"feed.records={RECORDS}"]
    else:
        given += [f"feed.path={TABLE}", "feed.label=y"]
    return ["run", configuration, *(f"--set={setting}" for setting in given)]


def write_table(path: Path, records: int = RECORDS) -> None:
    """Write a stream that drifts as CSV."""
    feed = drifting(records=records)
    batch = feed.poll(records)
    rows = [] if batch is None else zip(batch.x.tolist(), batch.y.tolist(), strict=True)
    header = ",".join([*(f"x{column}" for column in range(feed.shape[0])), "y"])
    path.write_text("\n".join([header, *(",".join(map(str, [*x, y])) for x, y in rows)]) + "\n", encoding="utf-8")


def in_a_child(*arguments: str, prepare: Callable[[], None] = lambda: None) -> int:
    """Start a command in a forked process, which has everything imported already; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    # What the parent left behind is not for its child to finalise: that may wait for a thread that no fork has.
    gc.disable()
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        prepare()
        sys.argv = ["streamkd", *arguments]
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def die_before(operation: int, folder: Path) -> None:
    """Arrange for SIGKILL right before an operation on files, counted from the first that saves within `folder`."""
    left = operation
    saving = False

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left, saving
        if event not in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}:
            return
        path = Path(os.fsdecode(arguments[0])) if isinstance(arguments[0], (str, bytes, os.PathLike)) else Path()
        within = folder in path.parents
        saving = saving or (event == "os.mkdir" and within)
        # What rmtree deletes it names relative to a folder that it holds open.
        if saving and (within or event in {"os.remove", "os.rmdir"}):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def digest(directory: Path) -> str:
    """Return the digest of the newest checkpoint."""
    state, _ = checkpoint.load(checkpoint.found(directory)[0])
    return checkpoint.digest(state)


def ended(pid: int) -> int:
    """Wait for a child; return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

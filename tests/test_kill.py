"""A run killed at any moment and started again ends where an unbroken one ends."""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_commands import table

from runners import cli
from runners.shipped import shipped
from streamkd import checkpoint

KILLS = 30
RECORDS = 2_400
SETTINGS = (
    "http.port=0",
    "log.level=error",
    "checkpoint.every_records=160",
    "checkpoint.keep=2",
    "labels.delay=40",
    "deterministic=true",
    "drift.detector={kind='adwin', delta=0.2, clock=4, grace_period=4}",
    "roles.every=8",
    "roles.tenure=8",
    "roles.margin=0.0",
    "roles.confidence=0.5",
)


def drifting_table(path: Path) -> Path:
    """Write a table whose labels change places halfway."""
    header, *rows = table(path, RECORDS).read_text(encoding="utf-8").splitlines()
    turned = [row[:-1] + str((int(row[-1]) + 1) % 3) for row in rows[RECORDS // 2 :]]
    path.write_text("\n".join([header, *rows[: RECORDS // 2], *turned]) + "\n", encoding="utf-8")
    return path


def in_a_child(*arguments: str, prepare: Callable[[], None] = lambda: None) -> int:
    """Start a command in a forked process, which has everything imported already; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        prepare()
        sys.argv = ["streamkd", *arguments]
        cli.main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child; return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at_operation(number: int) -> None:
    """Arrange for SIGKILL right before the given operation on files of the first save."""
    left = [number]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    checkpoint.os = _Patched(os, fsync=counted(os.fsync))  # type: ignore[attr-defined]
    checkpoint.shutil = _Patched(shutil, rmtree=counted(shutil.rmtree))  # type: ignore[attr-defined]
    checkpoint.torch = _Patched(torch, save=counted(torch.save))  # type: ignore[attr-defined]
    for name in ("mkdir", "rename", "write_text"):
        setattr(Path, name, counted(getattr(Path, name)))


class _Patched:
    """A module with some functions replaced, for one other module only."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def arguments(configuration: str, directory: Path) -> list[str]:
    given = [*SETTINGS, f"checkpoint.directory={directory}"]
    if configuration == "demo":
        given += [f"feed.records={RECORDS}"]
    else:
        given += ["feed.path=d.csv", "feed.label=y"]
    return ["run", configuration, *(f"--set={setting}" for setting in given)]


def digest(directory: Path) -> str:
    state, _ = checkpoint.load(checkpoint.found(directory)[0])
    return checkpoint.digest(state)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", sorted(shipped()))
def test_a_killed_run_ends_where_an_unbroken_one_ends(
    configuration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drifting_table(Path("d.csv"))
    began = time.monotonic()
    assert ended(in_a_child(*arguments(configuration, Path("unbroken")))) == 0
    whole = time.monotonic() - began
    chance = random.Random(7)  # noqa: S311 - not for secrets
    command = arguments(configuration, Path("killed"))
    killed, operation = 0, 0
    while killed < KILLS:
        if killed % 2:
            pid = in_a_child(*command)
            time.sleep(chance.uniform(0.02, 0.25) * whole)
            os.kill(pid, signal.SIGKILL)
        else:
            operation = (operation + 1) % 16
            pid = in_a_child(*command, prepare=partial(die_at_operation, operation))
        status = ended(pid)
        killed += 1
        assert status in {0, -signal.SIGKILL}
        if status == 0:  # it came to the end before its time: once more from the beginning
            assert digest(Path("killed")) == digest(Path("unbroken"))
            shutil.rmtree("killed")
    assert ended(in_a_child(*command)) == 0
    assert digest(Path("killed")) == digest(Path("unbroken"))
    assert len(checkpoint.found(Path("killed"))) <= 2
    assert not list(Path("killed").glob(".step-*"))


@pytest.mark.slow
def test_every_part_is_at_work_in_the_killed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law above says something only if there is something to forget."""
    monkeypatch.chdir(tmp_path)
    drifting_table(Path("d.csv"))
    command = [*arguments("default", Path("saved")), "--set=log.level=info"]
    log = tmp_path / "log"

    def to_a_file() -> None:
        sys.stderr = log.open("w", encoding="utf-8", buffering=1)

    assert ended(in_a_child(*command, prepare=to_a_file)) == 0
    events = [json.loads(line)["event"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert events.count("drift") >= 1
    assert events.count("role swap") >= 1
    state, _ = checkpoint.load(checkpoint.found(Path("saved"))[0])
    assert state["engine"]["pending"]["joined"] == RECORDS
    assert len(state["engine"]["replay"]["y"]) == 2_000

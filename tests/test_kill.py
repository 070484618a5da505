"""A run killed at any moment and started again ends where an unbroken one ends."""

import json
import sys
from pathlib import Path

import pytest

from runners.bench.kill import RECORDS, TABLE, alone, arguments, ended, in_a_child, kill_loop, write_table
from streamkd import checkpoint

KILLS = 20


@pytest.mark.slow
@pytest.mark.parametrize("configuration", alone())
def test_a_killed_run_ends_where_an_unbroken_one_ends(
    configuration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = kill_loop(configuration, KILLS, seed=7)
    assert (outcome.kills, outcome.inside) == (KILLS, KILLS // 2)
    assert outcome.resumed > KILLS // 2  # else nothing is said about resuming
    assert outcome.equal == outcome.ends >= 1
    assert len(checkpoint.found(Path("killed"))) <= 3  # the newest two, and the best
    assert not list(Path("killed").glob(".step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["default", "demo"])
def test_every_part_is_at_work_in_the_killed_runs(
    configuration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The law above says something only if there is something to forget."""
    monkeypatch.chdir(tmp_path)
    write_table(TABLE)
    command = [*arguments(configuration, Path("saved")), "--set=log.level=info"]
    log = tmp_path / "log"

    def to_a_file() -> None:
        sys.stderr = log.open("w", encoding="utf-8", buffering=1)

    assert ended(in_a_child(*command, prepare=to_a_file)) == 0
    events = [json.loads(line)["event"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert events.count("drift") >= 1
    assert events.count("role swap") >= 1
    state, _ = checkpoint.load(checkpoint.found(Path("saved"))[0])
    assert state["tensors"]["engine"]["pending"]["joined"] == RECORDS
    assert len(state["memories"]["y"]) == 2_000

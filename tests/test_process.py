"""A well-behaved process: told to systemd, to scripts, and in logs that do not drown anyone."""

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import structlog
from test_commands import fetched, run_once, started, table, told

from runners import logs
from runners.dead_letters import DeadLetters
from runners.feeds import DeadLetter
from runners.notify import notify
from runners.settings import DeadLetterSettings
from runners.shipped import shipped
from streamkd.errors import ConfigError


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def letter(number: int) -> DeadLetter:
    return DeadLetter("width", "2 cells", b"1,\xff\n", {"line": number, "offset": 7 * number})


@pytest.mark.slow
def test_systemd_hears_of_readiness_progress_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    table(Path("d.csv"), 9_000)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("notify")
        channel.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(Path("notify").absolute()))
        given = [f"--set={pair}" for pair in ("feed.path=d.csv", "feed.label=y", "http.port=0")]
        with started("run", "default", *given) as daemon:
            port = told(daemon, "listening")["port"]
            assert channel.recv(99) == b"READY=1"
            assert channel.recv(99) == b"WATCHDOG=1"
            assert channel.recv(99) == b"WATCHDOG=1"
            status = json.loads(fetched(port, "/v1/status")[1])
            assert status["state"] == "running"
            assert status["teacher"] in status["peers"]
            assert status["position"]["classes"]
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(timeout=20) == 0
        heard = channel.recv(99)
        while heard == b"WATCHDOG=1":
            heard = channel.recv(99)
        assert heard == b"STOPPING=1"


@pytest.mark.slow
def test_a_reload_takes_over_all_that_changed_or_nothing() -> None:
    table(Path("d.csv"), 60_000)
    file = Path("mine.toml")
    default = shipped()["default"].replace("[feed]", '[log]\nlevel = "info"\n\n[feed]\npath = "d.csv"\nlabel = "y"', 1)
    default = default.replace("port = 9464", "port = 0")
    file.write_text(default, encoding="utf-8")
    with started("run", "mine.toml") as daemon:
        port = told(daemon, "listening")["port"]
        while fetched(port, "/readyz")[0] != 200:
            time.sleep(0.05)
        file.write_text(default.replace("every_records = 10_000", "every_records = 500"), encoding="utf-8")
        daemon.send_signal(signal.SIGHUP)
        assert told(daemon, "reloaded")["changed"] == {"checkpoint.every_records": 500}
        assert "streamkd_config_last_reload_successful 1.0" in fetched(port, "/metrics")[1]
        both = default.replace("every_records = 10_000", "every_records = 700").replace("batch = 16", "batch = 8")
        file.write_text(both, encoding="utf-8")
        daemon.send_signal(signal.SIGHUP)
        assert "batch: cannot change while the process runs" in told(daemon, "reload refused")["reason"]
        assert "streamkd_config_last_reload_successful 0.0" in fetched(port, "/metrics")[1]
        first = told(daemon, "checkpoint")["records"]
        assert told(daemon, "checkpoint")["records"] - first < 700


def test_outside_systemd_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")


def test_dead_letters_are_rotated_and_none_is_lost_before_there_are_too_many() -> None:
    letters = DeadLetters(DeadLetterSettings(max_bytes=2_000, keep=50, max_share=1.0), "csv")
    for number in range(100):
        letters(letter(number))
    letters.flush()
    letters.close()
    files = sorted(Path.cwd().glob("dead-letters.jsonl*"))
    assert len(files) > 5
    assert all(file.stat().st_size <= 2_000 for file in files)
    written = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert sorted(entry["line"] for entry in written) == list(range(100))
    assert {entry["raw"] for entry in written} == {"1,\\xff\n"}
    assert letters.counts == {"width": 100}


def test_too_large_a_share_of_refused_records_stops_the_work_with_the_reason() -> None:
    letters = DeadLetters(DeadLetterSettings(window=10, max_share=0.5), "csv")
    for number in range(20):  # half of them: not yet
        letters.accepted(1)
        letters(letter(number))
    with pytest.raises(ConfigError, match=r"max_share = 0\.5: 6 of the last 10 records .* 2 cells"):
        letters(letter(20))
    letters.close()


def test_a_feed_of_broken_rows_stops_the_run_on_one_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 50)
    with Path("d.csv").open("a", encoding="utf-8") as file:
        file.write("broken\n" * 5_000)
    assert run_once(monkeypatch) == 2
    message = capsys.readouterr().err
    assert "dead_letters.max_share = 0.5" in message
    assert "Traceback" not in message


@pytest.mark.skipif(os.geteuid() != 0 and not Path("/dev/full").exists(), reason="needs /dev/full")
def test_dead_letters_that_cannot_be_written_are_counted_and_told() -> None:
    letters = DeadLetters(DeadLetterSettings(path=Path("/dev/full"), max_bytes=0), "csv")
    letters(letter(1))
    letters.flush()
    assert letters.total == 1
    assert "No space left" in letters.failure
    letters.close()


def test_a_warning_is_not_repeated_at_once_and_tells_how_often_it_was_kept_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    log: Any = logs.configure("info")
    for second in range(25):
        now[0] = 100.0 + second
        log.warning("disk full", second=second)
        log.info("progress", second=second)
    structlog.reset_defaults()
    entries = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    warnings = [(entry["second"], entry.get("suppressed")) for entry in entries if entry["event"] == "disk full"]
    assert warnings == [(0, None), (10, 9), (20, 9)]
    assert len([entry for entry in entries if entry["event"] == "progress"]) == 25

"""A well-behaved process: told to systemd, to scripts, and in logs that do not drown anyone."""

import json
import resource
import signal
import socket
import subprocess
import sys
from base64 import b64decode
from contextlib import suppress
from pathlib import Path
from string import ascii_letters
from typing import Any
from urllib.request import urlopen

import pytest
import structlog
from stack import PATIENCE, free_port, waited
from test_commands import fetched, run_once, started, table, told

from runners import logs
from runners.bench.soak import growth, soak
from runners.dead_letters import DeadLetters
from runners.feeds import DeadLetter
from runners.notify import notify
from runners.settings import DeadLetterSettings
from runners.shipped import shipped
from streamkd import checkpoint
from streamkd.errors import ConfigError


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


FOLLOWED = ("feed.kind=tail", "feed.format=csv", "feed.path=d.csv", "feed.label=y", "http.port=0")
"""A feed that waits for more at its end, so that whoever learns it runs until told otherwise."""


def runs(port: int) -> bool:
    return fetched(port, "/readyz")[0] == 200


def letter(number: int) -> DeadLetter:
    return DeadLetter("width", "2 cells", b"1,\xff\n", {"line": number, "offset": 7 * number})


@pytest.mark.slow
def test_systemd_hears_of_readiness_progress_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    table(Path("d.csv"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("notify")
        channel.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(Path("notify").absolute()))
        with started("run", "default", *(f"--set={pair}" for pair in FOLLOWED)) as daemon:
            port = told(daemon, "listening")["port"]
            assert channel.recv(99) == b"READY=1"
            assert channel.recv(99) == b"WATCHDOG=1"
            assert channel.recv(99) == b"WATCHDOG=1"
            status = json.loads(fetched(port, "/v1/status")[1])
            assert status["state"] == "running"
            assert status["teacher"] in status["peers"]
            assert status["position"]["classes"]
            daemon.send_signal(signal.SIGTERM)
            heard = channel.recv(99)
            while heard == b"WATCHDOG=1":
                heard = channel.recv(99)
            assert heard == b"STOPPING=1"
            assert daemon.wait(PATIENCE) == 0


AWAITED = ("feed.kind=http", "feed.spool=spool", "feed.label=y", "feed.wait_seconds=1000", "http.port=0")
"""A feed whose columns are those of its first record, which does not come."""


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_a_daemon_whose_feed_is_not_open_yet_answers_and_heeds_signals() -> None:
    awaited = free_port()
    with started("run", "default", *(f"--set={pair}" for pair in (*AWAITED, f"feed.port={awaited}"))) as daemon:
        port = told(daemon, "listening")["port"]
        assert told(daemon, "starting")["feed"] == "http"
        assert waited(lambda: listens(awaited))
        status, answer = fetched(port, "/healthz")
        assert (status, json.loads(answer)["state"]) == (200, "starting")
        assert fetched(port, "/readyz")[0] == 503
        assert json.loads(fetched(port, "/v1/status")[1])["state"] == "starting"
        assert 'streamkd_state{state="starting"} 1.0' in fetched(port, "/metrics")[1]
        daemon.send_signal(signal.SIGTERM)
        assert told(daemon, "stopped")["reason"] == "signal"
        assert daemon.wait(PATIENCE) == 0


def test_a_reload_that_is_asked_for_too_early_is_made_once_there_is_a_feed() -> None:
    awaited = free_port()
    with started("run", "default", *(f"--set={pair}" for pair in (*AWAITED, f"feed.port={awaited}"))) as daemon:
        told(daemon, "starting")
        assert waited(lambda: listens(awaited))
        daemon.send_signal(signal.SIGHUP)
        with urlopen(f"http://127.0.0.1:{awaited}/v1/records", b'{"a": 1, "y": "b"}', timeout=PATIENCE) as answer:
            assert answer.status == 202
        assert told(daemon, "reloaded")["changed"] == {}


def test_what_ended_a_daemon_is_logged_and_told_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table(Path("d.csv"), 50)
    where = "nowhere/" * 20
    for override, code in (("feed.path=" + where, 3), ("checkpoint.directory=d.csv", 2)):
        assert run_once(monkeypatch, override) == code
        *log, last = capsys.readouterr().err.splitlines()
        failed = json.loads(log[-1])
        assert (failed["event"], failed["exit_code"]) == ("failed", code)
        assert last == f"streamkd: {failed['reason']}"


@pytest.mark.slow
def test_a_reload_takes_over_all_that_changed_or_nothing() -> None:
    header, *rows = table(Path("d.csv"), 1_190).read_text(encoding="utf-8").splitlines(keepends=True)
    Path("d.csv").write_text("".join([header, *rows[:400]]), encoding="utf-8")
    file = Path("mine.toml")
    default = shipped()["default"].replace("[feed]", '[log]\nlevel = "info"\n\n[feed]', 1)
    file.write_text(default, encoding="utf-8")
    with started("run", "mine.toml", *(f"--set={pair}" for pair in FOLLOWED)) as daemon:
        port = told(daemon, "listening")["port"]
        assert waited(lambda: runs(port))
        file.write_text(default.replace("every_records = 10_000", "every_records = 500"), encoding="utf-8")
        daemon.send_signal(signal.SIGHUP)
        assert told(daemon, "reloaded")["changed"] == {"checkpoint.every_records": 500}
        assert waited(lambda: "streamkd_config_last_reload_successful 1.0" in fetched(port, "/metrics")[1])
        both = default.replace("every_records = 10_000", "every_records = 700").replace("batch = 16", "batch = 8")
        file.write_text(both, encoding="utf-8")
        daemon.send_signal(signal.SIGHUP)
        assert "batch: cannot change while the process runs" in told(daemon, "reload refused")["reason"]
        assert waited(lambda: "streamkd_config_last_reload_successful 0.0" in fetched(port, "/metrics")[1])
        at = [0]
        for more in (rows[400:512], rows[512:1_190]):  # the next when the save is done: until then, no other begins
            with Path("d.csv").open("a", encoding="utf-8") as growing:
                growing.writelines(more)
            at.append(told(daemon, "checkpoint")["records"])
            assert 500 <= at[-1] - at[-2] < 700


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


def test_what_was_learned_before_the_feed_could_not_go_on_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    table(Path("d.csv"), 450)
    with Path("d.csv").open("a", encoding="utf-8") as file:
        file.write("broken\n" * 1_000)
    assert run_once(monkeypatch) == 2
    about = checkpoint.about(checkpoint.newest(Path("saved")))
    assert (about["records"], about["position"]["line"]) == (448, 450)  # in batches of 16
    assert run_once(monkeypatch, "dead_letters.max_share=1.0") == 0
    assert checkpoint.about(checkpoint.newest(Path("saved")))["records"] == 450


def test_a_last_save_that_fails_does_not_hide_why_the_feed_could_not_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 450)
    with Path("d.csv").open("a", encoding="utf-8") as file:
        file.write("broken\n" * 1_000)
    assert run_once(monkeypatch, "dead_letters.path=/dev/full", "dead_letters.max_bytes=0") == 2
    log = capsys.readouterr().err
    assert "checkpoint failed" in log
    assert "dead_letters.max_share = 0.5" in log


def test_dead_letters_wait_for_a_disk_that_is_full_and_are_written_whole() -> None:
    letters = DeadLetters(DeadLetterSettings(path=Path("refused")), "csv")
    letters(letter(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path("refused").stat().st_size + 20, before[1]))
    try:
        for number in (2, 3):
            letters(letter(number))
        with pytest.raises(OSError, match=r"refused: .*File too large"):
            letters.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert letters.total == 3
    assert letters.failures == 3
    assert [json.loads(line)["line"] for line in Path("refused").read_text(encoding="utf-8").splitlines()] == [1]
    letters(letter(4))
    letters.flush()
    letters.close()
    assert letters.failure == ""
    written = [json.loads(line) for line in Path("refused").read_text(encoding="utf-8").splitlines()]
    assert [entry["line"] for entry in written] == [1, 2, 3, 4]
    assert b64decode(written[0]["raw_base64"]) == b"1,\xff\n"


def test_no_checkpoint_passes_a_dead_letter_that_is_not_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 400)
    with Path("d.csv").open("a", encoding="utf-8") as file:
        file.write("broken\n")
    overrides = ("dead_letters.path=/dev/full", "dead_letters.max_bytes=0", "checkpoint.every_records=100")
    assert run_once(monkeypatch, *overrides) == 4
    log = capsys.readouterr().err
    assert "dead letters not written" in log
    assert "No space left" in log
    (newest, *_) = checkpoint.found(Path("saved"))
    assert checkpoint.about(newest)["position"]["line"] <= 402  # the broken one is the next to be read, at the latest
    assert run_once(monkeypatch) == 0
    (letter_,) = Path("dead-letters.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(letter_)["raw"] == "broken\n"


def test_a_last_save_that_takes_too_long_is_not_waited_for(tmp_path: Path) -> None:
    table(Path("d.csv"))
    slow = (
        "import sys, time; from runners import cli; from streamkd import checkpoint; save = checkpoint.save;"
        "checkpoint.save = lambda *given: time.sleep(60) or save(*given);"
        "sys.argv = ['streamkd', *sys.argv[1:]]; cli.main()"
    )
    pairs = [*FOLLOWED, "shutdown_timeout_seconds=0.5"]
    command = [sys.executable, "-c", slow, "run", "default", *(f"--set={pair}" for pair in pairs)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as daemon:
        port = told(daemon, "listening")["port"]
        assert waited(lambda: runs(port) and "records" in json.loads(fetched(port, "/v1/status")[1]))
        daemon.send_signal(signal.SIGTERM)
        assert told(daemon, "not stopped in time")["covered"] == 0
        assert daemon.wait(PATIENCE) == 4


@pytest.mark.parametrize("nobody_reads", [False, True])
def test_learning_goes_on_where_the_log_cannot_be_written(*, nobody_reads: bool) -> None:
    table(Path("d.csv"))
    settings = ("feed.path=d.csv", "feed.label=y", "http.port=0", "log.every_records=16", "checkpoint.directory=saved")

    def code(*more: str) -> int:
        pairs = [f"--set={pair}" for pair in (*settings, *more)]
        with (
            Path("/dev/full").open("w", encoding="utf-8") as full,
            subprocess.Popen(
                [sys.executable, "-m", "runners.cli", "run", "default", *pairs],
                stderr=subprocess.PIPE if nobody_reads else full,
            ) as daemon,
        ):
            if daemon.stderr is not None:
                daemon.stderr.close()
            return daemon.wait(PATIENCE)

    assert code() == 0
    assert checkpoint.about(checkpoint.newest(Path("saved")))["records"] == 600
    assert code("batch=0") == 2


def test_learning_goes_on_where_standard_error_is_closed() -> None:
    table(Path("d.csv"))
    settings = ("feed.path=d.csv", "feed.label=y", "http.port=0", "checkpoint.directory=saved")
    command = [sys.executable, "-m", "runners.cli", "run", "default", *(f"--set={pair}" for pair in settings)]
    assert subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], check=False).returncode == 0
    assert checkpoint.about(checkpoint.newest(Path("saved")))["records"] == 600


def test_one_error_of_many_objects_is_one_and_what_was_told_long_ago_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    once, told = logs.Once(), 0
    for address in range(100):
        with suppress(structlog.DropEvent):
            once(None, "", {"level": "error", "event": "closed", "reason": f"<Client object at {4096 * address:#x}>"})
            told += 1
    assert told == 1
    for reason in ascii_letters:
        for _ in range(2):
            with suppress(structlog.DropEvent):
                once(None, "", {"level": "error", "event": "odd", "reason": reason})
        now[0] += 1_000
    assert len(once._last) <= 2  # noqa: SLF001 - all that it holds


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


def test_what_tells_something_else_is_no_repetition_and_a_signal_is_always_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    log: Any = logs.configure("info")
    for peer in ("quick", "steady", "quick"):
        log.warning("steps not finite: skipped", peer=peer)
    for why in ("step-1: disk full", "step-2: disk full", "step-2: not allowed"):
        log.error("checkpoint failed", reason=why)
    for _ in range(2):
        log.error("reload refused", reason="batch: cannot change")
    logs.limit("warning")
    now[0] = 111.0
    log.info("progress")
    log.error("checkpoint failed", reason="step-3: disk full")
    structlog.reset_defaults()
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(one["event"], one.get("peer") or one["reason"], one.get("suppressed")) for one in told] == [
        ("steps not finite: skipped", "quick", None),
        ("steps not finite: skipped", "steady", None),
        ("checkpoint failed", "step-1: disk full", None),
        ("checkpoint failed", "step-2: not allowed", None),
        ("reload refused", "batch: cannot change", None),
        ("reload refused", "batch: cannot change", None),
        ("checkpoint failed", "step-3: disk full", 1),
    ]


@pytest.mark.slow
def test_memory_stays_flat_however_long_the_stream() -> None:
    stretches, held = soak(records=100_000, batch=64)
    assert len(stretches) == 10
    assert growth([stretch.memory for stretch in stretches]) < 0.02
    assert held > 0


def test_dead_letters_go_into_a_folder_that_is_not_there_yet_and_reach_the_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    letters = DeadLetters(DeadLetterSettings(path=Path("new/folder/refused")), "csv")
    letters(letter(1))
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    letters.flush()
    letters.close()
    assert len(synced) == 1
    assert len(Path("new/folder/refused").read_text(encoding="utf-8").splitlines()) == 1


def test_too_many_dead_letters_that_wait_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runners.dead_letters.MOST_UNWRITTEN", 3)
    letters = DeadLetters(DeadLetterSettings(path=Path("/dev/full"), max_bytes=0), "csv")
    for number in range(3):
        letters(letter(number))
    with pytest.raises(ConfigError, match=r"4 refused records could not be written .*No space left"):
        letters(letter(3))
    letters.close()


def test_no_half_line_is_left_when_the_disk_fills_right_after_a_rotation() -> None:
    letters = DeadLetters(DeadLetterSettings(path=Path("refused"), max_bytes=1_000), "csv")
    long = DeadLetter("width", "2 cells", b"x" * 700, {"line": 0})
    letters(long)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        letters(long)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert letters.failures == 1
    assert Path("refused").read_text(encoding="utf-8") == ""
    letters.close()
    assert [len(file.read_text(encoding="utf-8").splitlines()) for file in sorted(Path().glob("refused*"))] == [1, 1]


def test_two_processes_do_not_save_in_one_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 50)
    with started("run", "default", *(f"--set={pair}" for pair in (*FOLLOWED, "checkpoint.directory=saved"))) as first:
        told(first, "running")
        assert run_once(monkeypatch) == 2
        assert "checkpoint.directory = 'saved': another process saves there" in capsys.readouterr().err
    assert run_once(monkeypatch) == 0


def test_systemd_that_has_gone_is_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    notify("READY=1")


@pytest.mark.parametrize("message", ["READY=1", "WATCHDOG=1", "STOPPING=1"])
def test_systemd_that_does_not_listen_is_no_hindrance_either(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, filling = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
    with silent, filling:
        silent.bind("notify")
        monkeypatch.setenv("NOTIFY_SOCKET", str(Path("notify").absolute()))
        filling.settimeout(0)
        with suppress(BlockingIOError):  # until no more is taken
            while True:
                filling.sendto(b"not taken", "notify")
        notify(message)


@pytest.mark.slow
def test_what_cannot_be_compiled_is_told_once_and_learned_all_the_same() -> None:
    table(Path("d.csv"), 2_000)
    settings = ("feed.path=d.csv", "feed.label=y", "http.port=0", "compile=true", "distillation.scheme=ensemble")
    with started("run", "default", *(f"--set={pair}" for pair in settings)) as daemon:
        assert "peers of one architecture" in told(daemon, "not compiled")["reason"]
        assert told(daemon, "feed ended")["records"] == 2_000
        assert daemon.wait(PATIENCE) == 0

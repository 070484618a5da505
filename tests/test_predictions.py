"""What was answered goes out, and no checkpoint passes an answer that did not."""

import json
import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from stack import PATIENCE, waited
from test_commands import fetched, run_once, started, table, told
from worlds import batches, engine

from runners.bench.kill import RECORDS, TABLE, arguments, ended, in_a_child, write_table
from runners.predictions import AT_ONCE, Lines, Predictions
from streamkd import checkpoint


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


JSONL = ("predictions.kind=jsonl", "predictions.path=out/predictions.jsonl")


def written() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_record_has_a_line_with_the_answer_given_before_its_label_was_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table(Path("d.csv"), 400)
    assert run_once(monkeypatch, *JSONL) == 0
    lines = written()
    assert [line["record"] for line in lines] == list(range(1, 401))
    assert [line["step"] for line in lines] == [n // 16 for n in range(400)]
    for line in lines:
        assert line["class"] == max(line["probabilities"], key=line["probabilities"].get)
    assert sum(lines[-1]["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    truth = [row.rpartition(",")[2] for row in Path("d.csv").read_text(encoding="utf-8").splitlines()[1:]]
    right = [line["class"] == label for line, label in zip(lines, truth, strict=True)]
    assert sum(right[200:]) > 150
    accuracy = checkpoint.about(checkpoint.found(Path("saved"))[0])["accuracy"]
    assert sum(right[16:]) / 400 <= accuracy <= sum(right) / 400 + 16 / 400  # before the first lesson nobody knows


@pytest.mark.parametrize("delay", [0, 4])
def test_while_no_label_was_met_there_is_no_class(delay: int, monkeypatch: pytest.MonkeyPatch) -> None:
    header, *rows = table(Path("d.csv"), 80).read_text(encoding="utf-8").splitlines()
    unlabelled = [f"{row.rpartition(',')[0]}," for row in rows[:40]]
    Path("d.csv").write_text("\n".join([header, *unlabelled, *rows[40:]]) + "\n", encoding="utf-8")
    assert run_once(monkeypatch, *JSONL, f"labels.delay={delay}") == 0
    assert [(line["class"], line["probabilities"]) for line in written()[:32]] == [(None, {})] * 32
    assert all(line["class"] in line["probabilities"] for line in written()[32:])


def test_there_is_no_class_before_the_first_label_of_a_feed_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    header, *rows = table(Path("d.csv"), 40).read_text(encoding="utf-8").splitlines()
    named = [f"id,{header}", *(f"n{index},{row}" for index, row in enumerate(rows))]
    Path("d.csv").write_text("\n".join(named) + "\n", encoding="utf-8")
    Path("labels.csv").write_text("id,y\n", encoding="utf-8")
    labels = ("kind=tail", "path=labels.csv", "format=csv", "label=y", "id=id", "follow=false")
    feed = ("feed.label=", "feed.id=id", "feed.ignore=['y']")
    assert run_once(monkeypatch, *JSONL, *feed, *(f"labels.feed.{setting}" for setting in labels)) == 0
    assert [(line["class"], line["probabilities"]) for line in written()] == [(None, {})] * 40


def test_ids_are_told_where_records_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    table(Path("d.csv"), 40)
    header, *rows = Path("d.csv").read_text(encoding="utf-8").splitlines()
    named = [f"id,{header}", *(f"n{index},{row}" for index, row in enumerate(rows))]
    Path("d.csv").write_text("\n".join(named) + "\n", encoding="utf-8")
    assert run_once(monkeypatch, *JSONL, "feed.id=id") == 0
    assert [line["id"] for line in written()] == [f"n{index}" for index in range(40)]


@pytest.mark.slow
def test_killed_runs_leave_no_record_without_an_answer_and_give_the_same_answer_twice() -> None:
    write_table(TABLE)
    header, *rows = TABLE.read_text(encoding="utf-8").splitlines(keepends=True)
    TABLE.write_text(header, encoding="utf-8")
    feed = ["feed.kind=tail", "feed.format=csv", f"feed.path={TABLE}", "feed.label=y", "labels.delay=0"]
    command = [*arguments("default", Path("saved"), feed), *(f"--set={pair}" for pair in JSONL)]
    for begin in range(0, 2_000, 400):  # a run never comes to its end before it is killed
        grow(rows[begin : begin + 400])
        before = len(lines_so_far())
        pid = in_a_child(*command)
        enough = waited(lambda before=before: len(lines_so_far()) >= before + 300, every=0.02)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        assert enough
    grow(rows[2_000:])
    assert ended(in_a_child(*command, "--set=feed.follow=false")) == 0
    answers: dict[int, dict[str, Any]] = {}
    for line in written():
        assert answers.setdefault(line["record"], line) == line
    assert sorted(answers) == list(range(1, RECORDS + 1))
    assert len(written()) > RECORDS


def grow(rows: Sequence[str]) -> None:
    with TABLE.open("a", encoding="utf-8") as file:
        file.writelines(rows)


def lines_so_far() -> list[str]:
    if not Path("out/predictions.jsonl").exists():
        return []
    return Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()


def test_no_checkpoint_passes_an_answer_that_could_not_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 400)
    overrides = ("predictions.kind=jsonl", "predictions.path=/dev/full", "checkpoint.every_records=100")
    assert run_once(monkeypatch, *overrides) == 4
    assert "No space left" in capsys.readouterr().err
    assert not checkpoint.found(Path("saved"))


class Moody:
    """A sink of somebody's own, which raises what it is told to."""

    def __init__(self) -> None:
        self.trouble: Exception | None = None
        self.seconds = 0.0
        self.now = 0.0
        self.asked: list[int] = []
        self.taken: list[int] = []

    def put(self, lines: Sequence[str]) -> None:
        """Take lines, and some time."""
        self.asked.append(len(lines))
        self.now += self.seconds
        if self.trouble is not None:
            raise self.trouble
        self.taken += [json.loads(line)["record"] for line in lines]

    def sync(self) -> None:
        """Complain."""
        if self.trouble is not None:
            raise self.trouble

    def close(self) -> None:
        """Complain once more."""
        self.sync()


def test_a_sink_that_fails_is_left_alone_for_longer_every_time_and_given_little_at_once() -> None:
    sink, made = Moody(), engine()
    predictions = Predictions(sink, clock=lambda: sink.now)

    def learn(records: int) -> None:
        for batch in batches(records):
            predictions.write(batch, made.step(batch), dict)
            sink.now += 0.01

    sink.trouble = KeyError("no room")
    learn(1_600)
    assert len(sink.asked) == predictions.failures == 4  # after 0, 0.1, 0.3 and 0.7 s
    assert predictions.failure == "KeyError: 'no room'"
    with pytest.raises(OSError, match="no room"):
        predictions.flush()
    sink.trouble = None
    sink.now += 5
    learn(16)
    assert sink.asked[-2:] == [AT_ONCE, 16]
    while predictions:
        predictions.catch_up()
    assert sink.taken == list(range(1, 1_617))
    assert max(sink.asked) == AT_ONCE
    sink.trouble, sink.seconds = TimeoutError("hangs"), 5.0
    learn(16)
    begun, asked = sink.now, len(sink.asked)
    while len(sink.asked) == asked:
        learn(16)
    assert sink.now - begun > 4 * sink.seconds  # it has a fifth of the time
    predictions.close()


SHY = """
import os
from runners import predictions

predictions.MOST_WAITING = 64


class Shy(predictions.Lines):
    def put(self, lines):
        if not os.path.exists("open"):
            raise RuntimeError("closed")
        super().put(lines)


def shy():
    return Shy(predictions.Path("out/predictions.jsonl"))
"""


@pytest.mark.slow
def test_learning_waits_for_a_sink_that_too_many_wait_for_and_ends_when_told_to() -> None:
    table(Path("d.csv"), 400)
    Path("own.py").write_text(SHY, encoding="utf-8")
    feed = ("feed.kind=tail", "feed.format=csv", "feed.path=d.csv", "feed.label=y", "http.port=0")
    settings = [f"--set={pair}" for pair in (*feed, "predictions.kind=own:shy")]

    def failures(port: int) -> float:
        text = fetched(port, "/metrics")[1]
        name = 'streamkd_feed_errors_total{error_type="write",feed="tail",stage="predictions"} '
        return float(text.partition(name)[2].split("\n")[0])

    with started("run", "default", *settings) as daemon:
        port = told(daemon, "listening")["port"]
        said = told(daemon, "predictions not written")
        assert (said["level"], said["reason"]) == ("error", "RuntimeError: closed")

        def learned() -> int:
            return int(json.loads(fetched(port, "/v1/status")[1]).get("records", 0))

        assert waited(lambda: learned() == 64)
        before = failures(port)
        assert waited(lambda: failures(port) > before)
        assert learned() == 64
        assert fetched(port, "/healthz")[0] == 200
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE) == 4
        assert daemon.stderr is not None
        assert "the last save failed (RuntimeError: closed)" in " ".join(daemon.stderr.read().split())
    with started("run", "default", *settings) as daemon:
        told(daemon, "predictions not written")
        Path("open").touch()
        assert waited(lambda: len(lines_so_far()) == 400)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE) == 0
    assert [line["record"] for line in written()] == list(range(1, 401))


def test_lines_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    sink = Lines(tmp_path / "out")
    sink.put(["one"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))
    try:
        with pytest.raises(OSError, match="bytes could be written"):
            sink.put(["two", "three"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sink.put(["two", "three"])
    sink.sync()
    sink.close()
    assert (tmp_path / "out").read_text(encoding="utf-8") == "one\ntwo\nthree\n"


def test_a_folder_is_no_file_for_predictions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 40)
    assert run_once(monkeypatch, "predictions.kind=jsonl", "predictions.path=.") == 2
    assert "predictions.path = '.': cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["predictions.path=d.csv"], ["predictions.path = 'd.csv'", "feed.path"]),
        (["predictions.path=also.csv"], ["predictions.path = 'also.csv'", "feed.path"]),
        (["predictions.path=other/../l.csv"], ["predictions.path", "labels.feed.path"]),
        (["dead_letters.path=../{folder}/d.csv"], ["dead_letters.path", "feed.path"]),
        (["dead_letters.path=p.jsonl", "predictions.path=other/../p.jsonl"], ["dead_letters.path", "predictions.path"]),
    ],
)
def test_nothing_is_written_into_a_file_that_something_else_is_read_from_or_written_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: list[str], told: list[str]
) -> None:
    before = table(Path("d.csv"), 40).read_bytes()
    table(Path("l.csv"), 40)
    Path("other").mkdir()
    os.link("d.csv", "also.csv")
    given = [pair.format(folder=Path.cwd().name) for pair in settings]
    labels = "labels.feed={kind='csv', path='l.csv', id='a', label='y'}"
    assert run_once(monkeypatch, *JSONL, "feed.id=a", "feed.label=", labels, *given) == 2
    shown = " ".join(capsys.readouterr().err.split())
    for words in told:
        assert words in shown
    assert Path("d.csv").read_bytes() == before

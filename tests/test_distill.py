"""`streamkd distill`, as a user types it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_commands import run_once, streamkd, table

from runners.distill import Measured
from runners.distill_command import _gain
from streamkd import checkpoint


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def distilled(monkeypatch: pytest.MonkeyPatch, *options: str, config: str = "compact") -> list[dict[str, Any]]:
    """Distil `d.csv`; return the rows of the figures."""
    command = ["distill", config, "d.csv", "--label", "y", "--json", "out.json", *options]
    assert streamkd(monkeypatch, *command) == 0
    rows: list[dict[str, Any]] = json.loads(Path("out.json").read_text(encoding="utf-8"))["rows"]
    return rows


def written(directory: str) -> dict[str, Any]:
    """Return the state in the one checkpoint of a folder."""
    (path,) = checkpoint.found(Path(directory))
    return checkpoint.load(path)[0]


def figures(row: dict[str, Any]) -> tuple[float, float]:
    return row["accuracy"], row["log_loss"]


@pytest.mark.parametrize(
    ("protocol", "stages"), [("three_stage", ["soft", "soft, labels"]), ("static", ["soft + labels"])]
)
def test_each_stage_of_a_student_stands_beside_the_same_student_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], protocol: str, stages: list[str]
) -> None:
    table(Path("d.csv"))
    rows = distilled(monkeypatch, "--protocol", protocol, "--student", "student", "--epochs", "2")
    shown = capsys.readouterr().out
    for word in ("quick (teacher)", "over itself", "480 records learned", "the 120 after them", *stages):
        assert word in shown
    assert [(row["peer"], row["passes"]) for row in rows[:2]] == [("quick", 2), ("steady", 2)]
    pairs = list(zip(rows[2::2], rows[3::2], strict=True))
    assert [(alone["learned"], taught["learned"]) for alone, taught in pairs] == [("labels", stage) for stage in stages]
    for alone, taught in pairs:
        assert (alone["alone"], taught["alone"]) == (True, False)
        assert alone["passes"] == taught["passes"]
        assert alone["peer"] == taught["peer"] == "student"
    assert all(row["accuracy"] > 0.5 for row in rows)


def test_nothing_is_learned_in_no_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table(Path("d.csv"))
    distilled(monkeypatch, "--epochs", "0")
    assert re.search(r"^ *0 records learned", capsys.readouterr().out, re.MULTILINE)
    assert json.loads(Path("out.json").read_text(encoding="utf-8"))["learned"] == 0


def test_several_seeds_give_a_list_and_a_spread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 300)
    command = ["distill", "compact", "d.csv", "--label", "y", "--epochs", "1", "--seed", "3", "4"]
    assert streamkd(monkeypatch, *command) == 0
    assert "±" in capsys.readouterr().out
    assert streamkd(monkeypatch, *command, "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["seed"] for one in found] == [3, 4]
    assert (found[0]["records"], found[0]["learned"], found[0]["held_out"]) == (300, 240, 60)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(monkeypatch: pytest.MonkeyPatch) -> None:
    table(Path("d.csv"), 300)
    for seed, folder in ((0, "one"), (0, "two"), (1, "other")):
        distilled(monkeypatch, "--epochs", "1", "--seed", str(seed), "--out", folder)
    one, two, other = (checkpoint.found(Path(folder))[0] for folder in ("one", "two", "other"))
    for file in sorted(one.iterdir()):
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name
    assert checkpoint.digest(written("one")) != checkpoint.digest(written("other"))
    assert (one / "tensors.pt").read_bytes() != (other / "tensors.pt").read_bytes()


def test_nothing_of_what_measures_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by weights, nor by scales, nor by the memory."""
    lines = table(Path("d.csv"), 300).read_text(encoding="utf-8").splitlines()
    distilled(monkeypatch, "--epochs", "1", "--out", "one")
    others = [",".join(f"{9e6 * float(cell)}" for cell in line.split(",")[:4]) + ",class 1" for line in lines[241:]]
    Path("d.csv").write_text("\n".join([*lines[:241], *others]) + "\n", encoding="utf-8")
    distilled(monkeypatch, "--epochs", "1", "--out", "two")
    assert checkpoint.digest(written("one")) == checkpoint.digest(written("two"))
    assert len(written("one")["memories"]["y"]) == 240


def test_a_stage_without_passes_leaves_what_the_others_did(monkeypatch: pytest.MonkeyPatch) -> None:
    table(Path("d.csv"), 300)
    *_, alone, taught = distilled(monkeypatch, "--student", "student", "--epochs", "2", "0", "2")
    assert figures(alone) == figures(taught)
    *_, soft, _, both = distilled(monkeypatch, "--student", "student", "--epochs", "2", "2", "0")
    assert figures(soft) == figures(both)
    static = ("--protocol", "static", "--student", "student", "--epochs", "2")
    *_, alone, taught = distilled(monkeypatch, *static, "--alpha", "0")
    assert figures(alone) == figures(taught)
    *_, alone, taught = distilled(monkeypatch, *static, "--alpha", "0.5")
    assert figures(alone) != figures(taught)


def test_the_teacher_is_in_the_checkpoint_as_it_was_when_it_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    table(Path("d.csv"), 300)
    states = []
    for stages in ((0, 0), (2, 1)):
        distilled(monkeypatch, "--epochs", "2", *map(str, stages), "--teacher", "steady", "--out", f"out{stages[0]}")
        states.append(written(f"out{stages[0]}")["tensors"]["engine"]["cohort"]["peers"])
    assert checkpoint.digest(states[0]["steady"]) == checkpoint.digest(states[1]["steady"])
    assert checkpoint.digest(states[0]["student"]) != checkpoint.digest(states[1]["student"])


def test_without_a_holdout_all_is_learned_and_nothing_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 300)
    rows = distilled(monkeypatch, "--holdout", "0", "--epochs", "1", "--out", "out")
    assert {row["accuracy"] for row in rows} == {None}
    assert not any(row["alone"] for row in rows)
    assert len(written("out")["memories"]["y"]) == 300
    assert streamkd(monkeypatch, "inspect", "out") == 0
    assert "three_stage" in capsys.readouterr().out


def test_records_that_cannot_be_used_go_to_the_dead_letters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = table(Path("d.csv")).read_text(encoding="utf-8").splitlines()
    lines[100], lines[300] = "1,2", "1,2,inf,4,class 1"
    Path("d.csv").write_text("\n".join(lines), encoding="utf-8")
    assert (
        streamkd(
            monkeypatch,
            *["distill", "compact", "d.csv", "--label", "y", "--epochs", "1", "--seed", "0", "1", "--json", "-"],
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found[0]["records"] == 598
    assert found[0]["dead_letters"] == {"width": 1, "not_finite": 1}
    letters = [json.loads(line) for line in Path("dead-letters.jsonl").read_text().splitlines()]
    assert [letter["line"] for letter in letters] == [101, 301]


def test_records_that_no_update_can_be_made_on_go_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = table(Path("d.csv"), 300).read_text(encoding="utf-8").splitlines()
    lines[100] = "3e38,3e38,3e38,3e38,class 1"
    Path("d.csv").write_text("\n".join(lines), encoding="utf-8")
    distilled(monkeypatch, "--epochs", "1", "--out", "out", "--set", "inputs.standardise=false")
    (letter,) = [json.loads(line) for line in Path("dead-letters.jsonl").read_text().splitlines()]
    assert (letter["reason"], letter["record"]) == ("non_finite_step", 100)
    assert len(written("out")["memories"]["y"]) == 239


def test_a_teacher_may_be_of_another_family(monkeypatch: pytest.MonkeyPatch) -> None:
    table(Path("d.csv"), 300)
    forest = "peers.1={name='forest', model={kind='river:forest.ARFClassifier', n_models=3}}"
    rows = distilled(monkeypatch, "--teacher", "forest", "--epochs", "3", "--set", forest)
    assert [(row["peer"], row["passes"], row["parameters"]) for row in rows[:1]] == [("forest", 1, 0)]
    assert {row["peer"] for row in rows[1:]} == {"quick", "student"}
    assert rows[0]["accuracy"] > 0.8


def test_a_teacher_is_heard_on_records_without_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one label in twenty the student has more to learn from its teacher's answers to all records."""
    lines = table(Path("d.csv"), 1_000).read_text(encoding="utf-8").splitlines()
    scarce = [line if row % 20 < 1 or row > 800 else line.rpartition(",")[0] + "," for row, line in enumerate(lines)]
    Path("d.csv").write_text("\n".join(scarce), encoding="utf-8")
    rows = distilled(monkeypatch, "--student", "student", "--epochs", "5", "5", "0", "--out", "out")
    alone, taught = rows[-4], rows[-3]
    assert taught["log_loss"] < alone["log_loss"]
    assert len(written("out")["memories"]["y"]) == 40  # memories are of labels


def test_what_it_wrote_is_no_place_to_go_on_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 300)
    distilled(monkeypatch, "--epochs", "1", "--out", "saved", config="default")
    capsys.readouterr()
    assert run_once(monkeypatch) == 4
    assert "name it in checkpoint.warm_start" in capsys.readouterr().err


BAD = [
    ("--label z", 2, ["feed.label = 'z'", "no such column"]),
    ("--label y --teacher stedy", 2, ["--teacher stedy", "did you mean steady?"]),
    ("--label y --student zz", 2, ["--student zz", "quick, steady, student"]),
    ("--label y --teacher steady --student steady", 2, ["--student steady", "is the teacher"]),
    ("--label y --epochs 1 2", 2, ["--epochs 1 2", "or 3"]),
    ("--label y --protocol static --epochs 1 2 3", 2, ["--epochs 1 2 3", "or 2"]),
    ("--label y --epochs -1", 2, ["--epochs", ">= 0"]),
    ("--label y --holdout 1.0", 2, ["--holdout", "< 1"]),
    ("--label y --alpha 2", 2, ["--alpha", "<= 1"]),
    ("--label y --temperature 0", 2, ["--temperature", "> 0"]),
    ("--label y --protocol dynamic", 2, ["dynamic", "three_stage"]),
    ("--label y --out d.csv", 2, ["--out 'd.csv'", "cannot be written"]),
    ("--label y --out d.csv/below", 2, ["--out 'd.csv/below'", "cannot be written"]),
    ("--label y --json nowhere/out.json", 2, ["nowhere", "make it first"]),
    ("--label y --set peers=[{name='one'}]", 2, ["peers", "nobody for one to teach"]),
    ("--label y --set feed.path=one.csv", 2, ["feed.label", "'class 1' is the only class", "240 records"]),
    ("--label y --set feed.path=none.csv", 2, ["feed.label", "none of the first 300 records"]),
    ("--label y --set feed.path=first.csv", 2, ["--holdout 0.2", "none of the last 60 records"]),
    ("--label y --set feed.path=other.csv", 2, ["--holdout 0.2", "no class of the last 60 records"]),
    ("--label y --set feed.path=empty.csv", 3, ["feed.path", "empty.csv"]),
]


@pytest.mark.parametrize(("options", "code", "words"), BAD, ids=[options for options, *_ in BAD])
def test_a_mistake_is_told_on_one_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, code: int, words: list[str]
) -> None:
    header, *rows = table(Path("d.csv"), 300).read_text(encoding="utf-8").splitlines()
    bare = [row.rpartition(",")[0] for row in rows]
    Path("one.csv").write_text("\n".join([header, *(f"{row},class 1" for row in bare)]), encoding="utf-8")
    Path("none.csv").write_text("\n".join([header, *(f"{row}," for row in bare)]), encoding="utf-8")
    Path("first.csv").write_text("\n".join([header, *rows[:200], *(f"{row}," for row in bare[200:])]), encoding="utf-8")
    Path("other.csv").write_text(
        "\n".join([header, *rows[:240], *(f"{row},z" for row in bare[240:])]), encoding="utf-8"
    )
    Path("empty.csv").touch()
    data = next((part.rpartition("=")[2] for part in options.split() if part.startswith("feed.path=")), "d.csv")
    assert streamkd(monkeypatch, "distill", "compact", data, *options.split()) == code
    said = capsys.readouterr()
    for word in words:
        assert word in " ".join((said.err + said.out).split())
    assert "Traceback" not in said.err
    assert len(said.err.splitlines()) < 15


def test_a_folder_with_checkpoints_is_not_written_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 300)
    assert run_once(monkeypatch) == 0
    before = checkpoint.found(Path("saved"))
    assert streamkd(monkeypatch, *["distill", "default", "d.csv", "--label", "y", "--out", "saved"]) == 2
    assert "has checkpoints already" in capsys.readouterr().err
    assert checkpoint.found(Path("saved")) == before


def test_a_model_that_fails_while_it_learns_ends_with_exit_code_5(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 300)
    Path("worn.py").write_text(
        "import torch\n\n\nclass Worn(torch.nn.Linear):\n"
        "    def __init__(self, shape, classes):\n        super().__init__(shape[0], classes)\n\n"
        "    def forward(self, x):\n        if len(x) > 10:\n            raise ZeroDivisionError('worn out')\n"
        "        return super().forward(x)\n",
        encoding="utf-8",
    )
    worn = ("--set", "peers.0.model={kind='worn:Worn'}")
    assert streamkd(monkeypatch, "distill", "compact", "d.csv", "--label", "y", *worn) == 5
    assert "ZeroDivisionError: worn out" in capsys.readouterr().err


def test_labels_that_a_daemon_would_wait_for_come_with_the_records_of_a_history(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table(Path("d.csv"), 300)
    plain, delayed = (
        [figures(row) for row in distilled(monkeypatch, "--epochs", "1", *options)]
        for options in ((), ("--set", "labels.delay=50", "--set", "predictions={kind='jsonl', path='said.jsonl'}"))
    )
    assert plain == delayed
    assert not Path("said.jsonl").exists()


def test_a_gain_over_no_right_answer_at_all_is_a_gain() -> None:
    alone = Measured("a", "labels", 1, alone=True, parameters=1, accuracy=0.0, log_loss=1.0, records_per_second=1.0)
    assert _gain([replace(alone, alone=False, accuracy=0.5)], [alone]) == "+50.00"
    assert _gain([replace(alone, alone=False, accuracy=None)], [alone]) == "-"

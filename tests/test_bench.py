"""Benchmarks compare like with like, and say what they say in every form alike."""

import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from test_commands import streamkd, table
from test_engine import assert_same

from monitoring.prequential import NO_CHANGE
from runners.bench import ablation, by_hand, rivals
from runners.bench.learners import COMPILED, OURS, PACE, RIVALS, Ours, Rival
from runners.bench.pairs import Ratio, in_turn, ratio
from runners.bench.rows import DEFAULT, MECHANISMS, Row, from_the_bottom, one_off, rows
from runners.bench.streams import Records, Stream
from runners.evaluate import evaluate
from streamkd import Engine, LabelRates, Pool, Served
from streamkd.batch import UNLABELLED, Batch
from streamkd.config import build_engine
from streamkd.gradients import in_arrays
from streamkd.guidance import Pairs
from streamkd.inputs import Standardiser
from streamkd.lesson import Lesson
from streamkd.models import mlp
from streamkd.report import SERVED, of_truth

TINY = Stream(None, None, 16, 320)
QUICK = [Row(DEFAULT, (), "", DEFAULT), *one_off()[:2], Row("the mission preset", (), "", "instead", "mission")]


class Tape:
    """A learner that writes down what it is asked and told, and answers 0."""

    def __init__(self) -> None:
        self.events: list[tuple[str, list[float], list[int]]] = []

    def prepare(self, batch: Batch, x: NDArray[np.float64]) -> list[float]:
        """Return the first column."""
        assert len(batch) == len(x)
        return [float(value) for value in x[:, 0]]

    def predict(self, prepared: list[float]) -> Sequence[int]:
        """Write down the question."""
        self.events.append(("predict", prepared, []))
        return [0] * len(prepared)

    def learn(self, prepared: list[float], y: Sequence[int]) -> None:
        """Write down the lesson."""
        self.events.append(("learn", prepared, list(y)))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def words(shown: Table) -> list[list[str]]:
    """Return the lines of a table, each as its words."""
    text = StringIO()
    Console(width=400, file=text).print(shown)
    return [line.split() for line in text.getvalue().splitlines()]


@pytest.mark.parametrize("row", rows(1_000, 16), ids=lambda row: row.name)
def test_every_row_names_only_settings_and_parts_that_exist(row: Row) -> None:
    configuration = TINY.configuration(row.source, row.overrides)
    build_engine(configuration, (8,))
    default = TINY.configuration()
    assert (configuration == default) == (not row.overrides and row.source == "default")
    assert (configuration.batch, configuration.seed, configuration.feed) == (default.batch, default.seed, default.feed)


def test_no_two_rows_are_the_same_but_where_the_way_up_meets_the_way_down() -> None:
    every = rows(1_000, 16)
    assert len({row.name for row in every}) == len(every)
    last = MECHANISMS[-1].name
    twins = {DEFAULT, f"+ {last} = {DEFAULT}", f"- {last}", f"+ {MECHANISMS[-2].name}"}
    assert len({(row.source, row.overrides) for row in every if row.name in twins}) == 2
    assert len({(row.source, row.overrides) for row in every}) == len(every) - 2
    assert every[0] == Row(DEFAULT, (), "as it is shipped", DEFAULT)


def test_the_way_up_begins_with_nothing_and_takes_one_mechanism_more_each_time() -> None:
    way = from_the_bottom()
    keys = [{setting.partition("=")[0] for setting in row.overrides} for row in way]
    assert len(way) == len(MECHANISMS) + 1
    assert keys[0] == {setting.partition("=")[0] for part in MECHANISMS for setting in part.off}
    for above, below, part in zip(way[:-1], way[1:], MECHANISMS, strict=True):
        assert set(part.off) <= set(above.overrides)
        assert not set(part.off) & set(below.overrides)
    assert way[-1].overrides == ()


def test_the_static_teacher_is_frozen_after_a_fifth_of_the_stream() -> None:
    static = next(row for row in rows(1_600, 16) if row.name == "static distillation")
    default = TINY.configuration()
    frozen = TINY.configuration(overrides=static.overrides).distillation.freeze_after
    assert frozen == 20 * default.replay.updates


def test_every_rival_sees_the_same_records_and_the_same_baseline() -> None:
    records = TINY.read()
    here = {name: rival for name, rival in RIVALS.items() if name != COMPILED and not rival.missing()}
    done = rivals.race(records, here, [0, 1])
    assert {OURS, PACE} <= set(done.standings)
    passes = [one for standing in done.standings.values() for one in standing.passes]
    evaluation = evaluate(TINY.configuration(), lambda _, __: None, records=TINY.records)
    measures = evaluation.tally.measures()
    assert {(one.scored, one.no_change) for one in passes} == {(320, measures[NO_CHANGE].accuracy)}
    assert done.standings[OURS].passes[0].accuracy == measures[SERVED].accuracy
    assert min(one.accuracy for one in passes) > measures[NO_CHANGE].accuracy
    assert [len(standing.passes) for standing in done.standings.values()] == [
        2 if rival.seeded else 1 for rival in here.values()
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a C++ compiler of another kind")
def test_the_compiled_default_begins_where_the_default_does_and_answers_alike() -> None:
    records = TINY.read()
    plain, compiled = (RIVALS[name].make(records, 0) for name in (OURS, COMPILED))
    assert isinstance(plain, Ours)
    assert isinstance(compiled, Ours)
    assert_same(plain.engine.state_dict(), compiled.engine.state_dict())
    one, other = (rivals.go(made, records.batches, [*rivals.imputed(records.batches)]) for made in (plain, compiled))
    assert one.accuracy == pytest.approx(other.accuracy, abs=0.02)


def test_what_cannot_be_compiled_breaks_off_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "uncompiled", "no compiler")
    done = rivals.race(TINY.read(), {COMPILED: RIVALS[COMPILED]}, [0])
    assert done.failed == {COMPILED: "RuntimeError: not compiled: no compiler"}


def test_a_rival_that_breaks_off_is_told_of_and_the_others_race_on() -> None:
    records = TINY.read()

    def broken(records: Records, seed: int) -> Tape:
        raise ValueError(f"no seed {seed} for {records.classes} classes")

    done = rivals.race(records, {"broken": Rival(broken), OURS: RIVALS[OURS]}, [3])
    assert list(done.standings) == [OURS]
    assert done.failed == {"broken": f"ValueError: no seed 3 for {records.classes} classes"}
    assert done.as_json()["failed"] == done.failed


def test_a_batch_is_predicted_whole_before_its_labels_are_learned() -> None:
    records, tape = TINY.read(), Tape()
    rivals.go(tape, records.batches, list(rivals.imputed(records.batches)))
    assert [event[0] for event in tape.events] == ["predict", "learn"] * 20
    for (_, asked, _), (_, learned, _) in zip(tape.events[::2], tape.events[1::2], strict=True):
        assert asked == learned
    assert [y for _, _, labels in tape.events for y in labels] == torch.cat([b.y for b in records.batches]).tolist()


def test_records_without_a_label_are_predicted_and_neither_learned_nor_scored() -> None:
    x = torch.arange(8.0).reshape(8, 1)
    y = torch.tensor([0, UNLABELLED, 1, 0, UNLABELLED, UNLABELLED, UNLABELLED, UNLABELLED])
    batches = [Batch(x[:4], y[:4]), Batch(x[4:], y[4:])]
    tape = Tape()
    outcome = rivals.go(tape, batches, list(rivals.imputed(batches)))
    assert tape.events == [
        ("predict", [0, 1, 2, 3], []),
        ("learn", [0, 2, 3], [0, 1, 0]),
        ("predict", [4, 5, 6, 7], []),
    ]
    assert (outcome.scored, outcome.accuracy, outcome.no_change) == (3, 2 / 3, 2 / 3)


def test_a_missing_value_is_the_mean_of_those_that_came_in_earlier_batches() -> None:
    x = torch.tensor([[1.0, math.nan], [3.0, math.nan], [math.nan, 5.0], [8.0, math.nan]])
    batches = [Batch(part, torch.zeros(2, dtype=torch.int64)) for part in x.split(2)]
    first, second = rivals.imputed(batches)
    assert first.tolist() == [[1, 0], [3, 0]]
    assert second.tolist() == [[2, 5], [8, 0]]


def test_records_end_with_the_batch_in_which_their_number_is_reached() -> None:
    table(Path("d.csv"), 200)
    stream = Stream(Path("d.csv"), "y", 16, 100)
    records = stream.read()
    assert (records.count, records.classes, records.shape) == (112, 3, (4,))
    assert evaluate(stream.configuration(), lambda _, __: None, records=100).tally.records == 112
    assert Stream(Path("d.csv"), "y", 16, None).read().count == 200


def test_who_is_not_installed_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Rival(lambda *_: pytest.fail("was made"), lambda: "pip install absent")
    chosen = {OURS: RIVALS[OURS], "logistic": RIVALS["logistic (river)"], "one": absent, "two": absent}
    monkeypatch.setattr(rivals, "RIVALS", chosen)
    assert streamkd(monkeypatch, "bench", "rivals", "--records", "160", "--seed", "3", "--json", "out.json") == 0
    assert "not raced: one, two; pip install absent" in capsys.readouterr().out
    result = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert result["missing"] == {"one": "pip install absent", "two": "pip install absent"}
    (stream,) = result["streams"]
    assert set(stream["rivals"]) == {OURS, "logistic"}
    assert stream["rivals"][OURS]["speed_ratio"] is None  # whose speed the others' are told by did not run


def test_the_table_of_rivals_says_what_the_json_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 160)
    chosen = {name: RIVALS[name] for name in (OURS, PACE)}
    monkeypatch.setattr(rivals, "RIVALS", chosen)
    assert streamkd(monkeypatch, "bench", "rivals", "d.csv", "--label", "y", "--seed", "1", "2", "--json", "-") == 0
    said = capsys.readouterr()
    (stream,) = json.loads(said.out)["streams"]
    for name, row in stream["rivals"].items():
        line = next(line for line in said.err.splitlines() if line.strip().startswith(name))
        assert f"{100 * row['accuracy']:.2f}" in line
        assert f"{row['records_per_second']:,.0f}" in line
        assert len(row["accuracies"]) == 2
        assert row["core_share"] > 0
        assert np.mean(row["accuracies"]) == pytest.approx(row["accuracy"])
    assert stream["rivals"][PACE]["speed_ratio"] == 1


def test_the_default_differs_from_itself_by_nothing_and_table_and_json_agree() -> None:
    (done,) = ablation.ablations([(TINY, 320, [*QUICK, from_the_bottom()[-1]])], [0, 1], jobs=1)
    assert [done.differences(row) for row in (QUICK[0], from_the_bottom()[-1])] == [[0, 0], [0, 0]]
    figures = {row["name"]: row for row in done.as_json()["rows"]}
    for row in QUICK:
        differences = np.array(done.accuracies(row)) - np.array(done.accuracies(QUICK[0]))
        assert figures[row.name]["difference"] == pytest.approx(differences.mean())
        assert figures[row.name]["difference_std"] == pytest.approx(differences.std(ddof=1))
    lines = words(ablation.table([done]))
    for name, figure in figures.items():
        line = next(line for line in lines if line[: len(name.split())] == name.split())
        cells = line[len(name.split()) :]
        assert cells[0] == f"{100 * figure['accuracy']:.2f}"
        assert cells[2:3] == (["1.00"] if name == DEFAULT else [f"{100 * figure['difference']:+.2f}"])


def test_the_rows_of_a_small_student_tell_its_own_answer() -> None:
    small = [row for row in rows(320, 16) if row.answer != "served"]
    assert {row.name for row in small} == {
        "student alone",
        "a forest teaches it",
        "large peers beside it",
        "large peers teach it",
    }
    (done,) = ablation.ablations([(TINY, 320, [QUICK[0], *small[:2]])], [0], jobs=1)
    alone, taught = (done.accuracies(row) for row in small[:2])
    assert alone != taught


def test_a_row_is_what_eval_gives_with_its_settings() -> None:
    table(Path("d.csv"), 200)
    stream = Stream(Path("d.csv"), "y", 16, None)
    row = one_off()[0]
    (done,) = ablation.ablations([(stream, 200, [QUICK[0], row])], [5], jobs=1)
    evaluation = evaluate(stream.configuration(overrides=row.overrides, seed=5), lambda _, __: None)
    assert done.accuracies(row) == [evaluation.tally.measures()[SERVED].accuracy]


@pytest.mark.slow
def test_two_processes_give_what_one_gives() -> None:
    chosen = [(TINY, 320, QUICK[:2]), (Stream(None, None, 32, 320), 320, QUICK[:2])]
    alone, together = (list(ablation.ablations(chosen, [0, 1], jobs)) for jobs in (1, 2))
    for one, other in zip(alone, together, strict=True):
        for row in QUICK[:2]:
            assert one.accuracies(row) == other.accuracies(row)


def test_the_ablation_prints_a_table_a_stream_and_one_of_all_and_draws_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablation, "rows", lambda *_: QUICK[:2])
    for name in ("first.csv", "second.csv"):
        table(Path(name), 96)
    options = ["--label", "y", "--seed", "0", "1", "--jobs", "1", "--json", "out.json", "--plot", "out.png"]
    assert streamkd(monkeypatch, "bench", "ablation", "first.csv", "second.csv", *options) == 0
    said = capsys.readouterr().out
    assert said.count(DEFAULT) >= 3
    assert said.count("- distillation") == 3
    result = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert [stream["stream"] for stream in result["streams"]] == ["first", "second"]
    assert result["streams"][0]["rows"][1]["overrides"] == ["distillation.scheme=none"]
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["rivals", "ablation"])
def test_a_file_that_is_not_there_or_cannot_be_written_ends_with_two_or_three(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert streamkd(monkeypatch, "bench", command, "none.csv", "--label", "y") == 3
    assert streamkd(monkeypatch, "bench", command, "--json", "no/such/folder.json") == 2
    assert streamkd(monkeypatch, "bench", command, "--records", "0") == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked",
    [
        ("overhead", "--rounds", "0"),
        ("replay", "--rounds", "-1"),
        ("scale", "--rounds", "0"),
        ("kill", "default", "--kills", "-1"),
        ("soak", "--records", "0"),
        ("soak", "--batch", "0"),
        ("ablation", "--jobs", "0"),
        ("feeds", "d.csv", "--label", "y", "--passes", "0"),
        ("ahead", "--rounds", "0"),
        ("ahead", "--most", "0"),
    ],
)
def test_to_do_nothing_is_refused_before_anything_is_done(
    asked: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert streamkd(monkeypatch, "bench", *asked) == 2
    said = capsys.readouterr().err
    assert asked[-2] in said
    assert "Traceback" not in said


def test_the_loops_by_hand_compute_the_same_together_and_one_by_one() -> None:
    models = [mlp((4,), 3, widths=(6, 5), layer_norm=True) for _ in range(3)]
    together, apart = (kind(models, (0.3, 0.1, 0.03)) for kind in (by_hand.Stacked, by_hand.Separate))
    chance = torch.Generator().manual_seed(1)
    for _ in range(5):
        x, gradient = torch.randn(8, 4, generator=chance), torch.randn(3, 8, 3, generator=chance)
        for learners in (together, apart):
            learners.learn(x).backward(gradient)  # type: ignore[no-untyped-call]
            learners.step()
        with torch.no_grad():
            assert torch.allclose(together.predict(x), apart.predict(x), atol=1e-4)


def test_the_bare_loop_scales_and_answers_as_streamkd_does() -> None:
    chance = torch.Generator().manual_seed(2)
    scaling, inputs = by_hand.Scaling((4,)), Standardiser()
    answer, pool, served = by_hand.Answer(6, 3), Pool(6, LabelRates(3, answered=())), Served(6)
    seen = torch.ones(3, dtype=torch.bool)
    for _ in range(40):
        x, logits = torch.randn(16, 4, generator=chance), torch.randn(6, 16, 3, generator=chance)
        y = torch.randint(0, 3, (16,), generator=chance)
        assert torch.allclose(scaling(x), inputs(x), atol=1e-5)
        log_p = logits.log_softmax(-1)
        sources, expected = pool.serve(log_p, served.answer(log_p), seen)
        assert torch.allclose(answer(logits), expected, atol=1e-5)
        for learner in (scaling, inputs):
            learner.update(x)
        answer.update(y)
        pool.update(sources, y)
        served.update(of_truth(log_p, y))


def test_the_bare_loop_learns_the_lessons_of_streamkd() -> None:
    chance = torch.Generator().manual_seed(3)
    sources, students = torch.tensor([0, 0]), torch.tensor([1, 2])
    same = torch.ones(2, 1)
    pairs = Pairs(
        betas=torch.ones(3, 1),
        teach=True,
        sources=sources,
        students=students,
        ends=torch.cat([sources, students]),
        alphas=by_hand.ALPHA * same,
        portions=same,
        temperatures=by_hand.TEMPERATURE * same,
        dealt=torch.eye(3)[:, 1:],
    )
    for _ in range(10):
        logits, y = 3 * torch.randn(3, 8, 4, generator=chance), torch.randint(0, 4, (8,), generator=chance)
        what = Lesson(torch.zeros(8, 1), y, torch.ones(8))
        told = in_arrays(logits, torch.ones(4, dtype=torch.bool), what, pairs, gate="better", cap=True)
        assert told is not None
        hard, gradient = by_hand.lesson(logits, y)
        assert torch.allclose(hard, told.parts[0], atol=1e-5)
        assert torch.allclose(gradient, told.gradient, atol=1e-5)


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]).median == 3
    assert ratio([2.0], [4.0]) == Ratio(0.5, 0.5, 0.5)
    order: list[str] = []
    taken = in_turn({name: partial(order.append, name) for name in "ab"}, rounds=2, each=3, warm_up=1)
    assert "".join(order) == "ab" + "aaabbb" * 2
    assert [len(seconds) for seconds in taken.values()] == [2, 2]


@pytest.mark.parametrize(
    ("name", "keys"), [pytest.param("overhead", {"plain", "images"}, marks=pytest.mark.slow), ("scale", {"sizes"})]
)
def test_a_bench_of_speed_gives_its_ratio_as_json(
    name: str, keys: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert streamkd(monkeypatch, "bench", name, "--rounds", "1", "--json", "-") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ratio"] > 0
    assert keys <= set(figures)
    assert figures["made"]["cores"] >= 1

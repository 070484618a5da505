"""Classes that come task after task: all rows see the same, and the figures are what they are said to be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_commands import streamkd

from runners.bench import published, split
from runners.bench.learners import OURS
from runners.bench.rows import Row
from runners.bench.split_rows import rows
from runners.settings import load
from streamkd.config import build_engine
from streamkd.errors import ConfigError

SETTINGS = split.Settings(batch=5, memory=30, drawn=8)
ROWS = {row.name: row for row in rows()}


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six classes of 6 x 6 pixels: a sixth is bright, and which one is the class."""
    chance = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 96), ("test", 48)):
        y = np.arange(count) % 6
        x = chance.integers(0, 90, (count, 6, 6))
        for image, label in zip(x, y, strict=True):
            image[2 * (label // 2) :, 3 * (label % 2) :][:2, :3] += 150
        arrays |= {f"x_{part}": x.astype(np.uint8), f"y_{part}": y}
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "sixths.npz"
    np.savez(path, **arrays)
    return path


def test_a_task_has_the_records_of_its_classes_and_each_of_them_once(images: Path) -> None:
    source = split.source_of(images, None, Path(), 2)
    train, test = source.read(3, test=False), source.read(0, test=True)
    assert (train.shape, train.classes) == ((1, 6, 6), 6)
    for records, each in ((train, 48), (test, 24)):
        for number, (x, y) in enumerate(records.tasks):
            assert x.dtype == torch.uint8
            assert len(x) == len(y) == each
            assert set(y.tolist()) == {3 * number, 3 * number + 1, 3 * number + 2}
    again, other = source.read(3, test=False), source.read(4, test=False)
    assert torch.equal(again.tasks[0][0], train.tasks[0][0])
    assert not torch.equal(other.tasks[0][0], train.tasks[0][0])
    few = source.read(3, test=False, records=7)
    assert torch.equal(few.tasks[1][0], train.tasks[1][0][:7])


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_every_row_has_the_same_networks_optimizer_and_memory(row: Row) -> None:
    configuration, ours = (SETTINGS.configuration(each, 6, 0) for each in (row, ROWS[OURS]))
    assert (configuration.peers, configuration.max_classes) == (ours.peers, 6)
    memory = configuration.replay.model_dump(exclude={"updates"})
    assert memory == ours.replay.model_dump(exclude={"updates"})
    assert (memory["evict"], memory["capacity"], memory["alpha"]) == ("reservoir", 30, 0.0)
    assert configuration.drift.effort_boost == 1.0
    build_engine(configuration, (1, 6, 6))


def test_rows_of_one_group_make_the_same_passes(images: Path) -> None:
    source = split.source_of(images, None, Path(), 2)
    train, test = source.read(0, test=False, records=10), source.read(0, test=True)
    passes = {name: split.go(SETTINGS.configuration(row, 6, 0), train, test) for name, row in ROWS.items()}
    work = {name: (one.updates, one.lessons) for name, one in passes.items()}
    once = 2 * (5 + 3 * (5 + 8))  # two networks; the first of four batches finds no memory
    assert {work[name] for name, row in ROWS.items() if "one pass" in row.group} == {(4, once)}
    assert {lessons for name, (_, lessons) in work.items() if "four" in ROWS[name].group} == {4 * once}
    assert work["streamkd, one update"] == (4, once)
    assert work[OURS] == work["streamkd, nobody teaches"] == (16, 4 * once)
    assert {one.records for one in passes.values()} == {20}


def test_the_measures_are_those_of_the_literature() -> None:
    accuracies = np.array([[0.9, 0, 0], [0.95, 0.8, 0], [0.5, 0.7, 1.0]])
    one = split.Pass(accuracies, np.array([10, 10, 20]), 100, 10, 1_000, 1.0)
    assert one.final == pytest.approx((0.5 * 10 + 0.7 * 10 + 1.0 * 20) / 40)
    assert one.forgetting == pytest.approx(((0.95 - 0.5) + (0.8 - 0.7)) / 2)
    assert one.learning == pytest.approx((0.9 + 0.8 + 1.0) / 3)


def test_the_table_says_what_the_json_says(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "split.json"
    alike = ["--tasks", "2", "--records", "10", "--memory", "30", "--drawn", "8", "--seed", "0", "1"]
    assert streamkd(monkeypatch, "bench", "split", str(images), *alike, "--json", str(file)) == 0
    lines = capsys.readouterr().out.splitlines()
    said = json.loads(file.read_text())
    assert [row["name"] for row in said["rows"]] == list(ROWS)
    for row in said["rows"]:
        (line,) = (line for line in lines if line.strip().startswith(f"{row['name']}  "))
        final = 100 * np.mean([one["final"] for one in row["passes"]])
        assert line.removeprefix(" ").removeprefix(row["name"]).split()[0] == f"{final:.2f}"


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        ([], 2, "name an .npz file, or a dataset"),
        (["none.npz"], 2, "none.npz: cannot be read"),
        (["sixths.npz", "--tasks", "7"], 2, "there are 6 classes"),
        (["untested.npz"], 2, "untested.npz: has no images to test on"),
        (["--dataset", "MNISTS"], 2, "did you mean"),
        (["--dataset", "MNIST", "--root", "nowhere"], 3, "nowhere"),
    ],
)
@pytest.mark.usefixtures("images")
def test_what_cannot_be_split_is_refused(
    given: list[str], code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("untested.npz", x=np.zeros((2, 6, 6), np.uint8), y=np.arange(2))
    assert streamkd(monkeypatch, "bench", "split", *given) == code
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("images_too", [False, True])
def test_the_articles_rows_stand_in_their_order_and_add_one_part_each(images_too: bool) -> None:  # noqa: FBT001
    named = published.rows(images=images_too)
    assert [row.name for row in named[:5]] == [row.name for row in named[5:]]
    for row in named:
        build_engine(load(row.source, row.overrides, {"max_classes": 4}), (1, 6, 6))
    for first, second, third in (named[1:4], named[6:9]):
        assert set(second.overrides) == set(first.overrides) - {"roles.rule=never"}
        assert set(third.overrides) == set(second.overrides) - {"replay.capacity=0"}
    flat = {row: [float(number)] for number, row in enumerate(named)}
    done = published.Standing("made", "made up", flat)
    assert [done.place(row) for row in named] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]


def test_the_articles_rows_are_measured_on_images_and_tables(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("a,b,y\n" + "".join(f"{i % 7},{i % 3},{i % 2}\n" for i in range(60)))
    file = tmp_path / "published.json"
    given = [str(images), str(table), "--label", "y", "--records", "40", "--seed", "0", "--json", str(file)]
    assert streamkd(monkeypatch, "bench", "published", *given) == 0
    for stream in json.loads(file.read_text())["streams"]:
        assert len(stream["rows"]) == 10
        assert all(0 <= row["accuracies"][0] <= 1 for row in stream["rows"])


def test_no_images_at_all_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="one of the two"):
        split.source_of(Path("a.npz"), "MNIST", Path(), 5)

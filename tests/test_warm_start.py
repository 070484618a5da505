"""A run may begin with what another one, or `streamkd distill`, has learned."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_commands import run_once, streamkd

from monitoring.metrics import Metrics
from runners import logs, session, warm_start
from runners.daemon import teaching_pairs
from runners.feeds import REASONS, RESETS, STAGES
from runners.saver import Saver
from runners.session import Session
from runners.settings import load
from streamkd import checkpoint
from streamkd.checkpoint import digest
from streamkd.errors import CheckpointError, DamagedError

RINGS = ("green", "blue", "red")
BATCH = 16


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def world(path: str, records: int, *, seed: int, met: tuple[int, ...] = (0, 1, 2), new: int = 0) -> None:
    """Write records of rings about the origin, which take more than a few records to learn.

    Args:
        path: of a CSV.
        records: how many.
        seed: of them.
        met: the rings in the order in which they are met.
        new: so many of the last records are of a class of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(records, 6, generator=generator, dtype=torch.float64)
    rings = torch.bucketize(x.square().sum(1), torch.tensor([3.8, 6.6], dtype=torch.float64))
    first = [int((rings == ring).nonzero()[0]) for ring in met]
    rows = [*first, *(row for row in range(records) if row not in first)]
    labels = [RINGS[int(rings[row])] for row in rows]
    labels[records - new :] = ["violet"] * new
    lines = [
        ",".join(f"{v:.6f}" for v in x[row].tolist()) + f",{label}" for row, label in zip(rows, labels, strict=True)
    ]
    Path(path).write_text("\n".join(["a,b,c,d,e,f,y", *lines]) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was distilled from 2,000 records."""
    folder = tmp_path_factory.mktemp("distilled")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        world("history.csv", 2_000, seed=1, met=(2, 0, 1))
        command = "distill default history.csv --label y --protocol static --holdout 0 --epochs 5 --out warm"
        assert streamkd(patch, *command.split()) == 0
    return folder / "warm"


@pytest.fixture
def warm(distilled: Path) -> Path:
    """It again, beside a stream in `d.csv` that meets the classes in another order."""
    world("d.csv", 1_000, seed=2, met=(0, 1, 2), new=5)
    shutil.copytree(distilled, "warm")
    return Path("warm")


def configured(*overrides: str) -> Any:
    given = ["feed.path=d.csv", "feed.label=y", "deterministic=true", "checkpoint.directory=saved", *overrides]
    return load("default", given)


@contextmanager
def running(*overrides: str) -> Iterator[Session]:
    made = session.start(configured(*overrides))
    try:
        yield made
    finally:
        made.close()


@contextmanager
def saving(made: Session) -> Iterator[Saver]:
    """Restore as a daemon does, and save at the end."""
    engine = made.engine
    metrics = Metrics(
        peers=engine.cohort.names,
        sources=teaching_pairs(engine),
        feed=made.feed.name,
        reasons=REASONS,
        resets=RESETS,
        stages=STAGES,
        detector=engine.drift.name,
        signal=engine.drift.signal,
        version="0",
    )
    saver = Saver(made, metrics, logs.configure("error"))
    try:
        saver.restore()
        yield saver
        saver.save()
    finally:
        saver.close()


def learned(made: Session, saver: Saver, batches: int) -> None:
    for _ in range(batches):
        batch = made.poll()
        if batch is None:
            return
        made.step(batch)
        saver.after(batch.position)


def test_the_first_answers_are_those_of_what_was_distilled(warm: Path) -> None:
    """All members, bit for bit, and what is served of them."""
    state, about = checkpoint.load(checkpoint.newest(warm))
    with running() as cold, running(f"checkpoint.warm_start={warm}") as made:
        whole = {**state["tensors"]["engine"], "replay": state["memories"]}
        cold.engine.load_state_dict(whole)
        assert warm_start.begin(made) == checkpoint.newest(warm)
        batch = made.poll()
        assert batch is not None
        for engine in (cold.engine, made.engine):
            assert engine.cohort.names[engine.roles.teacher] == about["teacher"]
        members = [engine.cohort.predict(engine.inputs(batch.x)) for engine in (cold.engine, made.engine)]
        assert torch.equal(*members)
        assert torch.equal(cold.engine.predict(batch.x), made.engine.predict(batch.x))
        assert digest(cold.engine.replay.state_dict()["x"]) == digest(made.engine.replay.state_dict()["x"])
        assert (made.engine.steps, made.engine.records, made.engine.scored) == (0, 0, 0)


def test_classes_keep_their_numbers_and_new_ones_come_after_them(warm: Path) -> None:
    with running(f"checkpoint.warm_start={warm}") as made, saving(made) as saver:
        learned(made, saver, 10_000)
        assert made.feed.describe()["classes"] == ["red", "green", "blue", "violet"]
        assert made.engine.seen.nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    with running() as cold:
        while cold.poll() is not None:
            pass
        assert cold.feed.describe()["classes"] == ["green", "blue", "red", "violet"]


def test_a_run_that_began_warm_resumes_from_its_own_checkpoints_and_ends_where_an_unbroken_one_ends(warm: Path) -> None:
    ends = []
    with running(f"checkpoint.warm_start={warm}", "checkpoint.directory=unbroken") as made, saving(made) as saver:
        learned(made, saver, 10_000)
        ends.append(digest(made.engine.state_dict()))
    settings = (f"checkpoint.warm_start={warm}", "checkpoint.directory=broken")
    with running(*settings) as made, saving(made) as saver:
        learned(made, saver, 20)
    shutil.rmtree(warm)  # nobody asks for it again
    with running(*settings) as made, saving(made) as saver:
        assert made.engine.records == 20 * BATCH
        learned(made, saver, 10_000)
        ends.append(digest(made.engine.state_dict()))
    assert ends[0] == ends[1]


def test_a_warm_daemon_answers_its_first_thousand_records_better_than_a_cold_one(
    monkeypatch: pytest.MonkeyPatch, warm: Path
) -> None:
    accuracies = []
    for name, settings in (("cold", ()), ("warm", (f"checkpoint.warm_start={warm}",))):
        assert run_once(monkeypatch, f"checkpoint.directory=saved-{name}", *settings) == 0
        about = checkpoint.about(checkpoint.found(Path(f"saved-{name}"))[0])
        assert about["records"] == 1_000
        accuracies.append(about["accuracy"])
    cold, begun_warm = accuracies
    assert begun_warm > cold + 0.05


def test_eval_and_check_begin_warm_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], warm: Path
) -> None:
    found = []
    for settings in ((), ("--set", f"checkpoint.warm_start={warm}")):
        capsys.readouterr()
        assert streamkd(monkeypatch, *["eval", "default", "d.csv", "--label", "y", "--json", "-"], *settings) == 0
        found.append(json.loads(capsys.readouterr().out)["accuracy"])
    assert found[1] > found[0] + 0.05
    given = ("feed.path=d.csv", "feed.label=y", "http.port=0", "checkpoint.warm_start=nowhere")
    command = ("check", "default", *(part for pair in given for part in ("--set", pair)))
    assert streamkd(monkeypatch, *command) == 2
    assert "checkpoint.warm_start = 'nowhere'" in capsys.readouterr().err
    assert streamkd(monkeypatch, *command[:-1], f"checkpoint.warm_start={warm}") == 0


def test_the_checkpoint_of_another_run_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    world("d.csv", 600, seed=1)
    assert run_once(monkeypatch, "checkpoint.directory=first") == 0
    state, _ = checkpoint.load(checkpoint.newest(Path("first")))
    with running("checkpoint.warm_start=first", "replay.capacity=50", "drift.detector.kind=never") as made:
        warm_start.begin(made)
        peers = {peer.name: digest(peer.state_dict()) for peer in made.engine.cohort.peers}
        assert peers == {name: digest(kept) for name, kept in state["tensors"]["engine"]["cohort"]["peers"].items()}
        # The latest records, as many as there is room for now.
        assert torch.equal(made.engine.replay.state_dict()["x"], state["memories"]["x"][-50:])
        batch = made.poll()
        assert batch is not None
        assert made.step(batch).records == BATCH  # the stream begins anew


def test_a_part_of_the_peers_may_go_on_alone(warm: Path) -> None:
    alone = (
        "peers=[{name='steady', model={kind='mlp', widths=[128, 64], layer_norm=true}, optimizer={kind='sgd', lr=1}}]"
    )
    with running(f"checkpoint.warm_start={warm}", alone) as made:
        warm_start.begin(made)
        assert made.engine.cohort.names == ["steady"]
        assert made.engine.roles.teacher == 0


WRONG = [
    (["peers.1.name=other"], ["peers: other is not in the checkpoint; there are quick, middle, steady"]),
    (["peers.0.model={kind='mlp', widths=[7]}"], ["quick.1.weight: [128, 6] in the checkpoint, [7, 6] configured"]),
    (["peers.0.optimizer={kind='adamw', lr=0.1}"], ["peers.quick.optimizer: sgd in the checkpoint, adamw"]),
    (["peers.0.optimizer.amsgrad=true", "peers.0.optimizer.kind=adam"], ["peers.quick.optimizer: sgd in", "adam with"]),
    (["max_classes=7"], ["max_classes: 100 in the checkpoint, 7 configured"]),
    (["inputs.standardise=false"], ["inputs.standardise: True in the checkpoint, False configured"]),
    (["feed.ignore=['c']"], ["columns", "gone: ['c']; new: none"]),
    (["feed.categorical=['a']"], ["columns", "order counts"]),
    (["feed.classes=['green', 'blue', 'red', 'violet']"], ["feed.classes: ['red', 'green', 'blue'] in the checkpoint"]),
]


@pytest.mark.parametrize(("settings", "words"), WRONG, ids=[settings[0] for settings, _ in WRONG])
def test_what_does_not_fit_is_told_and_nothing_is_begun(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    warm: Path,
    settings: list[str],
    words: list[str],
) -> None:
    capsys.readouterr()
    assert run_once(monkeypatch, f"checkpoint.warm_start={warm}", *settings) == 4
    said = capsys.readouterr().err
    message = said[said.index("streamkd:") :]
    for word in ("checkpoint.warm_start = 'warm'", "leave checkpoint.warm_start out", *words):
        assert word in message
    assert len(message.splitlines()) < 16
    assert "Traceback" not in said
    assert checkpoint.found(Path("saved")) == []


@pytest.mark.parametrize("name", ["nowhere", "x" * 300, "d.csv", "a\0b"])
def test_a_place_without_a_checkpoint_is_told(warm: Path, name: str) -> None:
    with running() as made:
        named = made.configuration.checkpoint.model_copy(update={"warm_start": Path(name)})
        elsewhere = replace(made, configuration=made.configuration.model_copy(update={"checkpoint": named}))
        with pytest.raises(CheckpointError, match=r"checkpoint\.warm_start = .*; name a") as told:
            warm_start.begin(elsewhere)
    assert len(str(told.value)) < 600
    assert warm.exists()


def test_given_classes_may_go_on_where_the_history_ended(warm: Path) -> None:
    given = "feed.classes=['red', 'green', 'blue', 'violet', 'black']"
    with running(f"checkpoint.warm_start={warm}", given) as made:
        warm_start.begin(made)
        assert made.feed.describe()["classes"] == ["red", "green", "blue", "violet", "black"]


def test_a_damaged_checkpoint_is_not_begun_with(warm: Path) -> None:
    (checkpoint.newest(warm) / "memories.pt").write_bytes(b"nothing")
    with running(f"checkpoint.warm_start={warm}") as made, pytest.raises(DamagedError, match=r"memories\.pt: damaged"):
        warm_start.begin(made)


def test_a_feed_that_cannot_number_its_labels_is_told(warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(f"checkpoint.warm_start={warm}") as made:
        monkeypatch.delattr(type(made.feed), "adopt")
        with pytest.raises(CheckpointError, match="has no attribute 'adopt'"):
            warm_start.begin(made)


LATE = ("labels.delay=40",)
JOINED = (
    "feed.path=records.csv",
    "feed.label=",
    "feed.id=id",
    "labels.feed={kind='csv', path='labels.csv', id='id', label='y'}",
)
STREAM = ("feed={kind='iterable', source='rows_of_a_stream:rows'}",)


@pytest.mark.parametrize("settings", [LATE, JOINED, STREAM], ids=["late", "on a feed of their own", "a stream"])
def test_labels_are_numbered_alike_whatever_way_they_come(
    warm: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    lines = [line.rpartition(",") for line in Path("d.csv").read_text(encoding="utf-8").splitlines()]
    for name, column in (("records", 0), ("labels", 2)):
        rows = [f"{'id' if row == 0 else row},{line[column]}" for row, line in enumerate(lines)]
        Path(f"{name}.csv").write_text("\n".join(rows), encoding="utf-8")
    Path("rows_of_a_stream.py").write_text(
        "import csv\n\n\ndef rows():\n    with open('d.csv') as file:\n"
        "        for row in csv.DictReader(file):\n            y = row.pop('y')\n            yield row, y\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    with running(*settings, f"checkpoint.warm_start={warm}") as made, saving(made) as saver:
        assert made.feed.describe()["classes"] == ["red", "green", "blue"]
        learned(made, saver, 10_000)
        assert made.feed.describe()["classes"] == ["red", "green", "blue", "violet"]
        assert made.engine.accuracy > 0.75

"""Streams of images: arrays, folders, tables, datasets of torchvision."""

import json
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import feather, parquet
from test_commands import streamkd
from worlds import stored

from runners.bench.kill import RECORDS, kill_loop
from runners.feeds import DeadLetter
from runners.feeds.conformance import CLASSES, LAWS, Law, Row, Stand
from runners.feeds.decode import RefusedError
from runners.feeds.image_files import Fitted
from runners.feeds.image_sets import single, written
from runners.feeds.images import ImageFeed, image_folder, npz, torchvision
from runners.feeds.rows import table_file
from runners.settings import load
from streamkd import Batch
from streamkd.batch import UNLABELLED
from streamkd.config import build_engine
from streamkd.errors import CheckpointError, ConfigError, FeedError, StreamkdError
from streamkd.testing import check_feed

COMMON: dict[str, Any] = {"max_classes": 5}


def nobody(letter: DeadLetter) -> None:
    raise AssertionError(letter.detail)


def drained(feed: ImageFeed, records: int = 7) -> list[Batch]:
    batches = []
    while (batch := feed.poll(records)) is not None:
        batches += [batch] if len(batch) else []
    return batches


def pictures(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def numbered(n: int) -> np.ndarray:
    """Write a number into the pixels of an image [4, 4]."""
    return np.full((4, 4), 0, dtype=np.uint8) + np.frombuffer(n.to_bytes(4, "big"), dtype=np.uint8)


def numbers(x: torch.Tensor) -> list[int]:
    return [int.from_bytes(image[0, 0].numpy().tobytes(), "big") for image in x]


def encoded(image: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()


class Shelf:
    """A source that holds numbered images, written anew whenever there are more."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind
        self.images: list[Any] = []
        self.labels: list[str] = []
        self.ids: list[str] = []

    def publish(self, rows: Sequence[Row]) -> None:
        """Add records."""
        for row in rows:
            image = numbered(int(str(row["a"])))
            self.images.append(image if self.kind == "npz" else encoded(image))
            self.labels.append(str(row["y"]))
            self.ids.append(str(row["id"]))
        self.write()

    def spoil(self) -> None:
        """Add one that cannot be used."""
        self.images.append(numbered(0) if self.kind == "npz" else b"no image at all")
        self.labels.append("z" if self.kind == "npz" else "a")
        self.ids.append("spoilt")
        self.write()

    def write(self) -> None:
        """Write them all."""
        if self.kind == "npz":
            np.savez(self.path, x=np.array(self.images), y=np.array(self.labels), id=np.array(self.ids))
            return
        table = pa.table(
            {"picture": [{"bytes": i, "path": None} for i in self.images], "y": self.labels, "id": self.ids}
        )
        if self.kind == "parquet":
            parquet.write_table(table, self.path)
        else:
            feather.write_feather(table, self.path)

    def open(self, ignore: Sequence[str] = (), **options: Any) -> Any:  # noqa: ARG002 - the filler is not written
        """Open a feed on them."""
        given: dict[str, Any] = {"classes": list(CLASSES), **COMMON, **options}
        if self.kind == "npz":
            return npz(self.path, id="id", **given)
        return table_file(self.path, kind=self.kind, image="picture", label="y", id="id", **given)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["npz", "parquet", "arrow"])
def test_a_set_of_images_keeps_the_laws_of_feeds(law: Law, kind: str, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / f"set.{kind}", kind)
    law(Stand(open=shelf.open, publish=shelf.publish, spoil=shelf.spoil, follows=False, numbers=numbers))


@pytest.mark.parametrize(
    "shape", [(5, 6), (5, 6, 1), (5, 6, 3), (1, 5, 6), (3, 5, 6)], ids=["gray", "last1", "last3", "first1", "first3"]
)
def test_arrays_of_any_layout_come_as_channels_height_and_width(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = pictures(4, *shape)
    np.savez(tmp_path / "d.npz", images=x, labels=[3, 1, 2, 1])
    feed = npz(tmp_path / "d.npz", refuse=nobody, **COMMON)
    (batch,) = drained(feed)
    channels = 3 if 3 in shape else 1
    assert feed.shape == (channels, 5, 6)
    assert batch.x.dtype == torch.uint8
    assert batch.y.tolist() == [2, 0, 1, 0]
    upright = (
        x.reshape(4, 5, 6, channels).transpose(0, 3, 1, 2) if shape[-1] == channels else x.reshape(4, channels, 5, 6)
    )
    assert np.array_equal(batch.x.numpy(), upright)


def test_numbers_from_0_to_1_and_truth_values_are_brought_to_bytes(tmp_path: Path) -> None:
    for x in (np.array([[[0.0, 0.5, 1.0]]]), np.array([[[False, True, True]]]), np.array([[[0, 128, 255]]])):
        np.savez(tmp_path / "d.npz", x=x, y=[0])
        (batch,) = drained(npz(tmp_path / "d.npz", refuse=nobody, **COMMON))
        assert batch.x.dtype == torch.uint8
        assert batch.x.flatten().tolist() in ([0, 128, 255], [0, 255, 255])


def test_an_image_that_is_not_finite_is_refused_and_the_others_come(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((5, 3, 3))
    x[2, 1, 1] = np.nan
    np.savez(tmp_path / "d.npz", x=x, y=[0, 1, 0, 1, 0])
    refused: list[DeadLetter] = []
    batches = drained(npz(tmp_path / "d.npz", refuse=refused.append, **COMMON))
    assert [y for batch in batches for y in batch.y.tolist()] == [0, 1, 1, 0]
    assert [(letter.reason, letter.place["index"]) for letter in refused] == [("not_finite", 2)]


def test_classes_are_in_label_order_however_the_records_come(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=pictures(5, 3, 3), y=[[10], [9], [-1], [2], [10]])
    feed = npz(tmp_path / "d.npz", missing=[-1], refuse=nobody, **COMMON)
    assert feed.describe()["classes"] == ["2", "9", "10"]
    assert [y for batch in drained(feed) for y in batch.y.tolist()] == [2, 1, UNLABELLED, 0, 2]


def test_an_empty_label_is_not_known_whatever_else_means_that(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=pictures(4, 3, 3), y=["cat", "", "?", "dog"])
    feed = npz(tmp_path / "d.npz", missing=["?"], refuse=nobody, **COMMON)
    assert [y for batch in drained(feed) for y in batch.y.tolist()] == [0, UNLABELLED, UNLABELLED, 1]


def test_rows_of_pixels_need_a_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=pictures(4, 12), y=[0, 1, 0, 1])
    with pytest.raises(ConfigError, match=r"feed\.x = 'x': has shape \[4, 12\].*feed\.shape"):
        npz(tmp_path / "d.npz", refuse=nobody, **COMMON)
    feed = npz(tmp_path / "d.npz", shape=(3, 2, 2), refuse=nobody, **COMMON)
    assert feed.shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("arrays", "options", "says"),
    [
        ({"x": pictures(3, 4, 4), "y": [0, 1]}, {}, r"feed\.y = 'y': has shape \[2\].*\[3, 4, 4\]"),
        ({"x": pictures(3, 4, 4)}, {}, r"feed\.y: missing; name the array, of x"),
        ({"x": pictures(3, 4, 4), "y": [0, 1, 2]}, {"x": "z"}, r"feed\.x = 'z': no such array.*x, y"),
        ({"x": pictures(3, 3, 4, 3), "y": [0, 1, 2]}, {}, r"feed\.channels = 'first' or 'last'"),
        ({"x": pictures(3, 4, 4) - 500.0, "y": [0, 1, 2]}, {}, r"feed\.x = 'x': its values go from -4"),
        ({"x": [["a"]], "y": [0]}, {}, r"feed\.x"),
        ({"x": pictures(3, 4, 4), "y": [0, 1, 2]}, {"shape": (1, 4, 5)}, r"feed\.shape = \[1, 4, 5\]"),
        ({"x": pictures(3, 4, 4), "y": [0, 1, 2]}, {"max_classes": 2}, r"3 of them, and max_classes = 2; raise"),
        ({"x": pictures(3, 4, 4), "y": [0, 1, 2]}, {"order": "shuffle"}, r"feed\.order\.kind.*did you mean shuffled\?"),
        (
            {"x": pictures(3, 4, 4), "y": [0, 1, 2]},
            {"order": {"kind": "class_incremental", "tasks": 4}},
            r"feed\.order\.tasks = 4: there are 3 classes",
        ),
        (
            {"x": pictures(3, 4, 4), "y": [0, 1, 2]},
            {"order": {"kind": "class_incremental", "tasks": 0}},
            r"feed\.order\.tasks = 0",
        ),
        ({"x": pictures(3, 4, 4), "y": [0, 1, 2]}, {"label": "y"}, r"feed\.label = 'y': .*leave it out.*feed\.y"),
        ({"x": pictures(3, 4, 4), "y": [0, 1, 2]}, {"ordr": "file"}, r"feed\.ordr: no such setting; did you mean"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_remedy(
    arrays: dict[str, Any], options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ConfigError, match=says) as refusal:
        npz(tmp_path / "d.npz", refuse=nobody, **{**COMMON, **options})
    assert str(refusal.value).count("\n") < 12


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken off", b"\x93NUMPY nonsense", None])
def test_a_file_that_cannot_be_read_is_told(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(FeedError, match=r"feed\.path = .*cannot be read"):
        npz(tmp_path / "d.npz", refuse=nobody, **COMMON)


def folders(path: Path, n: int = 12, size: tuple[int, int] = (6, 5)) -> Path:
    for number in range(n):
        place = path / "abc"[number % 3] / f"{number:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures(1, *size, 3, seed=number)[0]).save(place)
    return path


def test_a_folder_is_read_class_by_class_and_a_broken_image_goes_to_the_dead_letters(tmp_path: Path) -> None:
    path = folders(tmp_path / "set")
    (path / "b" / "01.png").write_bytes((path / "b" / "01.png").read_bytes()[:60])
    (path / "c" / "notes.txt").write_text("no image")
    refused: list[DeadLetter] = []
    feed = image_folder(path, refuse=refused.append, **COMMON)
    batches = drained(feed)
    assert feed.shape == (3, 6, 5)
    assert [name for batch in batches for name in batch.ids] == [
        f"{'abc'[k]}/{number:02}.png" for k in range(3) for number in range(k, 12, 3) if number != 1
    ]
    assert np.array_equal(batches[0].x[1].numpy().transpose(1, 2, 0), pictures(1, 6, 5, 3, seed=3)[0])
    assert [(letter.reason, letter.place["file"]) for letter in refused] == [("malformed", "b/01.png")]
    assert refused[0].raw == (path / "b" / "01.png").read_bytes()
    assert feed.describe()["files that are no images by their name"] == 1
    check_feed(lambda: image_folder(path, order="shuffled", refuse=lambda _: None, **COMMON))


def test_images_of_all_sizes_and_modes_are_made_alike(tmp_path: Path) -> None:
    path = folders(tmp_path / "set", 3)
    Image.fromarray(pictures(1, 20, 30)[0]).save(path / "a" / "gray.jpg")
    Image.new("RGBA", (3, 3)).save(path / "b" / "see-through.webp")
    Image.new("P", (3, 9)).save(path / "c" / "palette.gif")
    Image.fromarray(np.full((6, 5), 32_768, dtype=np.uint16)).save(path / "c" / "zz.png")
    for options, shape in (({}, (3, 6, 5)), ({"size": (8, 8), "channels": 1}, (1, 8, 8))):
        feed = image_folder(path, refuse=nobody, **options, **COMMON)
        assert feed.shape == shape
        batches = drained(feed)
        assert sum(len(batch) for batch in batches) == 7
        assert batches[-1].x[-1].unique().tolist() == [128]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda path: path / "none", FeedError, r"feed\.path.*cannot be read"),
        (lambda path: path, ConfigError, r"has no sub-folder"),
        (lambda path: (path / "a").mkdir() or path, FeedError, r"no image in its sub-folders a"),
    ],
)
def test_a_folder_without_images_is_told(make: Any, error: type[StreamkdError], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        image_folder(make(tmp_path), refuse=nobody, **COMMON)


def test_a_folder_whose_images_are_all_broken_is_told(tmp_path: Path) -> None:
    path = folders(tmp_path / "set", 3)
    for file in path.rglob("*.png"):
        file.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="none of its first images can be read; the first: not an image"):
        image_folder(path, refuse=nobody, **COMMON)


def test_lists_of_pixels_in_a_column_come_in_their_shape(tmp_path: Path) -> None:
    x = pictures(6, 3, 4, 5)
    table = pa.table({"pixels": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 60), "y": list("abcabc")})
    parquet.write_table(table, tmp_path / "d.parquet")
    given: dict[str, Any] = {"kind": "parquet", "image": "pixels", "label": "y", "refuse": nobody, **COMMON}
    feed = table_file(tmp_path / "d.parquet", shape=(3, 4, 5), **given)
    (batch,) = drained(feed)  # type: ignore[arg-type]
    assert np.array_equal(batch.x.numpy(), x)
    with pytest.raises(ConfigError, match=r"feed\.shape"):
        table_file(tmp_path / "d.parquet", **given)
    with pytest.raises(ConfigError, match=r"feed\.image = 'pixel': no such column.*did you mean pixels"):
        table_file(tmp_path / "d.parquet", **{**given, "image": "pixel"})


@pytest.mark.parametrize(
    ("labels", "classes", "y"),
    [
        ([2, None, 10], ["2", "10"], [0, UNLABELLED, 1]),
        ([2.0, 1.0, 2.0], ["1", "2"], [1, 0, 1]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        ([b"b", b"a", b"b"], ["a", "b"], [1, 0, 1]),
        ([["a"], ["a", "b"], ["a"]], ["['a', 'b']", "['a']"], [1, 0, 1]),
    ],
)
def test_labels_of_a_table_are_what_is_written(
    labels: list[Any], classes: list[str], y: list[int], tmp_path: Path
) -> None:
    images = [encoded(image) for image in pictures(3, 3, 3)]
    parquet.write_table(pa.table({"image": images, "label": labels}), tmp_path / "d.parquet")
    options: dict[str, Any] = {"kind": "parquet", "image": "image", "label": "label", "refuse": nobody}
    feed = table_file(tmp_path / "d.parquet", **options, **COMMON)
    assert feed.describe()["classes"] == classes
    assert [label for batch in drained(feed) for label in batch.y.tolist()] == y  # type: ignore[arg-type]


def test_a_dataset_of_torchvision_comes_as_it_is() -> None:
    arguments = {"size": 9, "image_size": [3, 8, 7], "num_classes": 3}
    feed = torchvision("FakeData", arguments=arguments, refuse=nobody, **COMMON)
    assert feed.shape == (3, 8, 7)
    assert sum(len(batch) for batch in drained(feed)) == 9
    check_feed(partial(torchvision, "FakeData", arguments=arguments, order="shuffled", refuse=nobody, **COMMON))


@pytest.mark.parametrize(
    ("dataset", "options", "error", "says"),
    [
        ("CIFAR10", {}, FeedError, r'python -c "from torchvision\.datasets import CIFAR10; .*download=True\)"'),
        ("CIFAR1", {}, ConfigError, r"feed\.dataset = 'CIFAR1': .*did you mean CIFAR10\?"),
        ("CIFAR10", {"arguments": {"download": True}}, ConfigError, r"feed\.arguments\.download"),
        ("CIFAR10", {"arguments": {"tarin": True}}, ConfigError, r"feed\.arguments = .*do not fit CIFAR10"),
    ],
)
def test_a_dataset_that_is_not_there_is_told_with_the_way_to_get_it(
    dataset: str, options: dict[str, Any], error: type[StreamkdError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        torchvision(dataset, root=tmp_path, refuse=nobody, **COMMON, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "d.npz"
    np.savez(path, x=pictures(60, 4, 4), y=np.arange(60) % 5)
    return path


@pytest.mark.slow
def test_a_killed_run_ends_where_an_unbroken_one_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that draws: an order, a reservoir, augmentations."""
    monkeypatch.chdir(tmp_path)
    y = np.arange(RECORDS) % 4
    x = pictures(RECORDS, 8, 8) // 4
    for image, label in zip(x, y, strict=True):
        image[2 * label : 2 * label + 2] += 150
    np.savez("set.npz", x=x, y=y)
    net = "={kind='cnn', channels=[4], width=8}"
    outcome = kill_loop(
        "images",
        6,
        seed=3,
        feed=[
            *("feed.kind=npz", "feed.path=set.npz", "feed.order={kind='class_incremental', tasks=2}", "max_classes=4"),
            *("inputs.augment=['crop', 'flip', 'RandomErasing']", f"peers.0.model{net}", f"peers.1.model{net}"),
        ],
    )
    assert outcome.resumed > 2
    assert outcome.equal == outcome.ends >= 1


ORDERS = ["file", "shuffled", "class_incremental", "domain_incremental"]


@settings(max_examples=15, deadline=None)
@given(order=st.sampled_from(ORDERS), polls=st.integers(0, 30), records=st.integers(1, 9))
def test_a_set_in_any_order_goes_on_where_it_stood(order: str, polls: int, records: int, small: Path) -> None:
    make = partial(npz, small, order=order, refuse=nobody, **COMMON)
    feed = make()
    position = feed.position()
    for _ in range(polls):
        batch = feed.poll(records)
        position = batch.position if batch is not None else position
    again = make()
    again.seek(json.loads(json.dumps(position)))
    left, wanted = drained(again), drained(feed)
    assert [batch.x.tolist() for batch in left] == [batch.x.tolist() for batch in wanted]
    assert [batch.y.tolist() for batch in left] == [batch.y.tolist() for batch in wanted]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": {"kind": "shuffled", "seed": 1}}, r"feed\.order = .*it was .*give it back, or start afresh"),
        ({"classes": list("01234"), "order": "shuffled"}, None),
        ({"classes": list("43210"), "order": "shuffled"}, r"feed\.classes: is not the checkpoint's class map"),
    ],
)
def test_another_order_or_other_classes_than_the_checkpoints_are_refused(
    options: dict[str, Any], says: str | None, small: Path
) -> None:
    position = npz(small, order="shuffled", refuse=nobody, **COMMON).position()
    feed = npz(small, refuse=nobody, **COMMON, **options)
    if says is None:
        feed.seek(position)
        return
    with pytest.raises(CheckpointError, match=says):
        feed.seek(position)


def test_another_set_than_the_checkpoints_is_refused(small: Path, tmp_path: Path) -> None:
    position = npz(small, refuse=nobody, **COMMON).position()
    np.savez(tmp_path / "d.npz", x=pictures(60, 4, 4), y=np.arange(60)[::-1] % 5)
    with pytest.raises(CheckpointError, match="not the set of images that it was"):
        npz(tmp_path / "d.npz", refuse=nobody, **COMMON).seek(position)


@pytest.mark.parametrize("name", ["images", "npz"])
def test_an_image_stays_bytes_in_memory_in_what_waits_and_in_checkpoints(name: str, small: Path) -> None:
    configuration = load(name, ["feed.kind=npz", f"feed.path={small}", "max_classes=5", "labels.delay=7"])
    feed = configuration.open_feed(nobody)
    engine = build_engine(configuration, feed.shape)
    while (batch := feed.poll(16)) is not None:
        engine.step(batch)
        waiting = engine.pending.state_dict()["answers"]
        assert waiting is None or waiting["x"].dtype == torch.uint8
    state = stored(engine.state_dict())
    assert state["replay"]["x"].dtype == torch.uint8
    assert len(state["replay"]["x"]) == 60
    assert engine.replay.sample(4).x.dtype == torch.uint8


def test_classes_are_seen_task_by_task_and_keep_their_numbers(small: Path) -> None:
    configuration = load(
        "npz", [f"feed.path={small}", "feed.order={kind='class_incremental', tasks=3}", "max_classes=5"]
    )
    feed = configuration.open_feed(nobody)
    engine = build_engine(configuration, feed.shape)
    seen = []
    while (batch := feed.poll(12)) is not None:
        engine.step(batch)
        seen.append(int(engine.seen.sum()))
    assert seen == [2, 2, 4, 4, 5]
    assert feed.describe()["classes"] == list("01234")


def test_a_set_is_evaluated_checked_run_and_inspected_by_its_name_alone(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def said(*command: str) -> str:
        assert streamkd(monkeypatch, *command) == 0
        return capsys.readouterr().out

    folder = folders(tmp_path / "set", 24)
    for data, records in ((small, 60), (folder, 24)):
        assert (
            json.loads(said("eval", "images", str(data), "--json", "-", "--set", "max_classes=5"))["records"] == records
        )
    settings = ["--set", f"feed.path={folder}", "--set", "feed.order=shuffled", "--set", "http.port=0"]
    assert "It would run" in said("check", "images", *settings)
    said("run", "images", *settings)
    found = json.loads(said("inspect", "checkpoints", "--json"))
    assert found["position"]["place"] == found["records"] == 24


def test_a_class_may_be_written_with_white_space_around_it(tmp_path: Path) -> None:
    for name in ("cat", "dog ", "nan"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encoded(pictures(1, 3, 3)[0]))
    feed = image_folder(tmp_path, refuse=nobody, **COMMON)
    assert [label for batch in drained(feed) for label in batch.y.tolist()] == [0, 1, 2]
    assert feed.describe()["classes"] == ["cat", "dog ", "nan"]


def test_every_file_of_a_folder_is_learned_refused_or_counted(tmp_path: Path) -> None:
    for name in ("a/0.png", "a/deep/1.png", "b/2.png", "loose.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(pictures(1, 3, 3)[0]))
    (tmp_path / "b" / "empty.png").touch()
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b" / "notes.txt").touch()
    refused: list[DeadLetter] = []
    feed = image_folder(tmp_path, refuse=refused.append, **COMMON)
    assert sum(len(batch) for batch in drained(feed)) == 3
    assert [letter.place["file"] for letter in refused] == ["b/empty.png", "b/gone.png"]
    assert [value for key, value in feed.describe().items() if "no " in key] == [1, 1]
    assert "0x" not in refused[0].detail


def test_a_folder_with_other_files_of_the_same_classes_is_not_the_checkpoints(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[number % 2] / f"{number}.png").write_bytes(encoded(pictures(1, 3, 3)[0]))
    position = image_folder(tmp_path, refuse=nobody, **COMMON).position()
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "9.png")
    with pytest.raises(CheckpointError, match="not the set of images that it was"):
        image_folder(tmp_path, refuse=nobody, **COMMON).seek(position)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (pictures(1, 3, 3)[0], 1, r"feed\.y = 'y': has shape"),
        (pictures(2, 3, 3), 1, r"feed\.y = 'y': has shape"),
        (np.uint8(3), [1], r"feed\.y = 'y': has shape"),
        (pictures(2, 0, 3), [0, 1], r"feed\.x = 'x': has shape \[2, 0, 3\]; its images have no pixels"),
    ],
)
def test_arrays_that_are_no_set_of_images_are_refused(x: Any, y: Any, says: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=x, y=y)
    with pytest.raises(ConfigError, match=says):
        npz(tmp_path / "d.npz", refuse=nobody, **COMMON)


@pytest.mark.parametrize(
    ("pixels", "options", "error", "says"),
    [
        (False, {"shape": [1, 3, 3]}, ConfigError, r"feed\.shape = \[1, 3, 3\]: 'image' holds encoded images"),
        (
            True,
            {"shape": [1, 3, 3], "size": 3},
            ConfigError,
            r"feed\.size, feed\.channels: .*lists of pixels",
        ),
        (True, {"shape": [1, 3, 4]}, ConfigError, r"feed\.shape = \[1, 3, 4\]: none of .*the first: 9 pixels"),
        (None, {}, FeedError, "there is no image in it"),
    ],
)
def test_no_setting_of_a_column_of_images_is_passed_over(
    pixels: bool | None,  # noqa: FBT001 - a case
    options: dict[str, Any],
    error: type[StreamkdError],
    says: str,
    tmp_path: Path,
) -> None:
    images = [] if pixels is None else list(pictures(3, 3, 3))
    held = pa.array([list(image.ravel()) if pixels else encoded(image) for image in images])
    table = pa.table({"image": held if images else pa.array([], pa.binary()), "label": list("aba")[: len(images)]})
    if pixels:
        table = table.set_column(0, "image", held.cast(pa.list_(pa.uint8())))
    parquet.write_table(table, tmp_path / "d.parquet")
    given: dict[str, Any] = {"image": "image", "label": "label", **COMMON, **options}
    with pytest.raises(error, match=says):
        table_file(tmp_path / "d.parquet", kind="parquet", refuse=nobody, **given)


@settings(max_examples=20, deadline=None)
@given(labels=st.lists(st.integers(-9, 9), min_size=2, max_size=5, unique=True), unknown=st.booleans())
def test_a_whole_number_is_the_same_class_whatever_type_holds_it(labels: list[int], unknown: bool) -> None:  # noqa: FBT001
    gap = [None] if unknown else []
    names = [[written(label) for label in single([*map(kind, labels), *gap]).tolist()] for kind in (int, float, str)]
    assert names[0] == names[1] == names[2] == [*map(str, labels), *([""] if unknown else [])]


def test_what_a_dataset_gives_is_held_to_the_same_as_files() -> None:
    fitted = Fitted((2, 2), 1)
    gray = Image.fromarray(np.full((2, 2), 40_000, dtype=np.uint16))
    assert fitted(gray).tolist() == [[[156, 156], [156, 156]]]
    with pytest.raises(RefusedError, match="not a finite number"):
        fitted(torch.tensor([[[0.5, float("nan")], [0.0, 1.0]]]))


def test_a_set_of_which_every_record_is_refused_is_told_as_such(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert streamkd(monkeypatch, "eval", "images", str(small), "--set", "feed.classes=[x, y]") == 2
    assert "60 records were refused" in " ".join(capsys.readouterr().err.split())

import json
import os
import resource
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from streamkd import checkpoint
from streamkd.errors import DamagedError

TENSORS = {"weights": torch.arange(1000.0), "nested": {"list": [1, 2.5, "three", None]}, "position": {"line": 7}}
STATE = {"tensors": TENSORS, "memories": {"y": torch.arange(9)}}


def saved(directory: Path, step: int = 3) -> Path:
    return checkpoint.save(directory, step, STATE, {"records": 48})


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    state, about = checkpoint.load(saved(tmp_path))
    assert torch.equal(state["tensors"]["weights"], TENSORS["weights"])
    assert state["tensors"]["nested"] == TENSORS["nested"]
    assert torch.equal(state["memories"]["y"], torch.arange(9))
    assert (about["step"], about["records"]) == (3, 48)


@pytest.mark.parametrize("name", ["tensors.pt", "memories.pt", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path = saved(tmp_path)
    content = bytearray((path / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    (path / name).write_bytes(content[: len(content) // 2] if damage == "truncate" else content)
    if damage == "remove":
        (path / name).unlink()
    with pytest.raises(DamagedError, match=f"step-.*{name}|step-.*manifest|step-.*whole"):
        checkpoint.load(path)


@pytest.mark.parametrize("room", [0, 2_000, 5_000])
def test_a_disk_that_is_full_leaves_nothing_behind_and_is_told(tmp_path: Path, room: int) -> None:
    first = saved(tmp_path, 1)
    assert (first / "tensors.pt").stat().st_size > 5_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match=r"tensors\.pt could not be written: File too large"):
            saved(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [first]


def test_what_is_half_written_is_never_found(tmp_path: Path) -> None:
    whole = saved(tmp_path)
    shutil.copytree(whole, tmp_path / ".step-000000000009.1")
    assert checkpoint.found(tmp_path) == [whole]


def test_the_newest_are_kept_in_order_of_their_steps(tmp_path: Path) -> None:
    for step in (9, 10, 100, 11):
        saved(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert [json.loads((path / "state.json").read_text())["step"] for path in checkpoint.found(tmp_path)] == [100, 11]


def test_a_checkpoint_of_the_same_step_is_replaced_whatever_it_is(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for damage in (b"", (path / "tensors.pt").read_bytes()):
        (path / "tensors.pt").write_bytes(damage)
        checkpoint.save(tmp_path, 3, {**STATE, "memories": {"y": torch.arange(2)}}, {"records": 49})
        state, about = checkpoint.load(path)
        assert (about["records"], len(state["memories"]["y"])) == (49, 2)
        assert list(tmp_path.iterdir()) == [path]


def test_what_an_earlier_attempt_of_this_process_left_is_no_hindrance(tmp_path: Path) -> None:
    for suffix in ("", ".replaced"):
        (tmp_path / f".step-000000000003.{os.getpid()}{suffix}").mkdir()
    assert list(tmp_path.iterdir()) != [saved(tmp_path)]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000003"]


def test_everything_is_on_the_disk_before_it_is_renamed_and_the_rename_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (done.append(str(Path(f"/proc/self/fd/{handle}").readlink())), real(handle))
    )
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: (done.append("rename"), rename(self, target))[1])
    checkpoint.save(tmp_path / "new", 3, STATE, {})
    names = [Path(path).name for path in done]
    aside = f".step-000000000003.{os.getpid()}"
    assert names.index("new") > names.index("rename") > names.index(aside)
    assert {"tensors.pt", "memories.pt", "state.json", "MANIFEST.json"} <= set(names[: names.index(aside)])
    assert names[0] == tmp_path.name  # that holds the new folder


@pytest.mark.parametrize("shape", ["[1]", "{}", "null", "3", '{"tensors.pt": 3}'])
@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json"])
def test_json_of_an_odd_shape_is_damage(tmp_path: Path, name: str, shape: str) -> None:
    path = saved(tmp_path)
    (path / name).write_text(shape, encoding="utf-8")
    if name == "state.json":
        seal(path)
    with pytest.raises(DamagedError):
        checkpoint.load(path)


def test_a_checkpoint_under_another_name_or_of_another_format_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(DamagedError, match="is step-000000000003 under another name"):
        checkpoint.load(path.rename(tmp_path / "step-000000000004"))
    (tmp_path / "step-000000000004").rename(path)
    about = {**checkpoint.about(path), "format": 99}
    (path / "state.json").write_text(json.dumps(about), encoding="utf-8")
    seal(path)
    with pytest.raises(DamagedError, match="has format 99"):
        checkpoint.load(path)


def test_what_could_not_be_restored_makes_no_other_one_go(tmp_path: Path) -> None:
    good, refused = saved(tmp_path, 1), saved(tmp_path, 2)
    checkpoint.prune(tmp_path, 1, refused={refused})
    assert checkpoint.found(tmp_path) == [good]


def test_what_is_half_written_is_cleared_away(tmp_path: Path) -> None:
    whole = saved(tmp_path)
    shutil.copytree(whole, tmp_path / ".step-000000000009.1")
    checkpoint.prune(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [whole]


def test_the_only_whole_checkpoint_is_never_pruned(tmp_path: Path) -> None:
    paths = [saved(tmp_path, step) for step in (1, 2, 3)]
    for damaged in paths[1:]:
        (damaged / "tensors.pt").write_bytes(b"")
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.found(tmp_path) == paths[:1]
    (paths[0] / "tensors.pt").write_bytes(b"")
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.found(tmp_path) == paths[:1]


def test_a_manifest_that_leaves_a_file_out_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "MANIFEST.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"memories\.pt"):
        checkpoint.load(path)


def test_folders_of_other_names_are_neither_found_nor_pruned(tmp_path: Path) -> None:
    ours = saved(tmp_path)
    theirs = shutil.copytree(ours, tmp_path / "step-000000000003.bak")
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.found(tmp_path) == [ours]
    assert theirs.exists()


def test_what_is_copied_is_not_reached_by_later_steps() -> None:
    live = {"weights": torch.zeros(3), "list": [torch.zeros(2)], "pair": (1, 2)}
    copy = checkpoint.copied(live)
    before = checkpoint.digest(copy)
    live["weights"] += 1  # type: ignore[operator]
    live["list"][0] += 1  # type: ignore[index]
    assert checkpoint.digest(copy) == before
    assert copy["pair"] == (1, 2)


def test_a_memory_that_holds_nothing_has_a_digest() -> None:
    empty = {"x": torch.zeros(2000, 5)[:0, ::2]}
    assert checkpoint.digest(empty) != checkpoint.digest({"x": torch.zeros(0)})


def test_a_digest_tells_any_difference_and_no_order() -> None:
    one = {"a": torch.arange(4.0), "b": [1, 2.0, None], "c": {"x": "1", "y": True}}
    same = {"c": {"y": True, "x": "1"}, "b": [1, 2.0, None], "a": torch.arange(4.0)}
    assert checkpoint.digest(one) == checkpoint.digest(same)
    others = [
        {**one, "a": torch.arange(4.0).double()},
        {**one, "a": torch.arange(4.0)[None]},
        {**one, "a": torch.tensor([0.0, 1, 2, 3.0000002])},
        {**one, "b": [1, 2, None]},
        {**one, "b": [1, 2.0]},
        {**one, "c": {"x": 1, "y": True}},
        {**one, "d": {}},
        {**one, "d": []},
        {"a": one["a"], "b": [1, 2.0], "b/2": None, "c": one["c"]},
    ]
    assert len({checkpoint.digest(state) for state in [one, *others]}) == 10


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, accuracy in enumerate([0.5, 0.9, 0.7, 0.6, 0.8], start=1):
        checkpoint.save(tmp_path, step, STATE, {"accuracy": accuracy})
        checkpoint.prune(tmp_path, 2, best=True)
    assert [checkpoint.about(path)["step"] for path in checkpoint.found(tmp_path)] == [5, 4, 2]
    checkpoint.prune(tmp_path, 2)
    assert [checkpoint.about(path)["step"] for path in checkpoint.found(tmp_path)] == [5, 4]


class Planted:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("part", checkpoint.PARTS)
def test_a_pickle_planted_in_a_checkpoint_does_not_run(tmp_path: Path, part: str) -> None:
    mark = tmp_path / "ran"
    path = saved(tmp_path / "saved")
    torch.save({"y": Planted(mark)}, path / f"{part}.pt")
    seal(path)
    with pytest.raises(DamagedError, match=rf"{part}\.pt: holds more than tensors and plain values"):
        checkpoint.load(path)
    assert not mark.exists()
    torch.load(path / f"{part}.pt", weights_only=False)  # it would have run
    assert mark.exists()


def seal(path: Path) -> None:
    """Write a manifest that fits, as whoever plants something would."""
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.name != checkpoint.MANIFEST}
    told = {name: {"sha256": sha256(raw).hexdigest(), "bytes": len(raw)} for name, raw in files.items()}
    (path / checkpoint.MANIFEST).write_text(json.dumps(told), encoding="utf-8")

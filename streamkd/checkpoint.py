"""The whole state on disk, or nothing: a directory written aside, hashed, and renamed.

step-000000000123/
    tensors.pt      models, optimizers, averages, statistics, detectors: readable with torch.load(weights_only=True)
    memories.pt     likewise, the records remembered with their priorities
    state.json      for people and for checks at start: position, versions, accuracy, a digest of the configuration
    MANIFEST.json   sha256 and size of every file; written last
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from streamkd.errors import CheckpointError, DamagedError

PARTS = ("tensors", "memories")
ABOUT = "state.json"
MANIFEST = "MANIFEST.json"
FORMAT = 5
_NAME = re.compile(r"step-\d{12}")


def save(directory: Path, step: int, state: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Write a checkpoint; it is there whole, or not at all, whatever happens meanwhile.

    Args:
        directory: of all checkpoints; made if it is not there.
        step: names the checkpoint; one of the same step is replaced.
        state: plain values and tensors, in any nesting, under `tensors` and `memories`: a file each.
        about: plain values, for people and for checks at start.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    final = directory / f"step-{step:012d}"
    aside, replaced = (directory / f".{final.name}.{os.getpid()}{suffix}" for suffix in ("", ".replaced"))
    if not directory.exists():
        directory.mkdir(parents=True)
        _sync(directory.parent)
    for path in (aside, replaced):
        shutil.rmtree(path, ignore_errors=True)
    aside.mkdir()
    try:
        for part in PARTS:
            _write_tensors(aside / f"{part}.pt", state[part])
        _write_json(aside / ABOUT, {"format": FORMAT, "step": step, **about})
        _write_json(aside / MANIFEST, {file.name: _measure(file) for file in sorted(aside.iterdir())})
        for path in [*aside.iterdir(), aside]:
            _sync(path)
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        _sync(directory)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `(state, about)` of one checkpoint, once every file has been found unchanged.

    Raises:
        DamagedError: a file is missing, differs from the manifest, or holds more than tensors and plain values.
    """
    verify(path)
    return {part: _read_tensors(path / f"{part}.pt") for part in PARTS}, about(path)


def about(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself, unverified."""
    said: dict[str, Any] = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    return said


def verify(path: Path) -> None:
    """Hold every file of a checkpoint against its manifest, and its name and format against what it says.

    Raises:
        DamagedError: names the file that is missing or differs.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        names = sorted({*(f"{part}.pt" for part in PARTS), ABOUT, *manifest})
        differ = [name for name in names if _measure(path / name) != manifest.get(name)]
        said = {} if differ else about(path)
        named, made = f"step-{said.get('step', 0):012d}", said.get("format")
    except Exception as error:  # noqa: BLE001 - JSON may be of any shape
        raise DamagedError(f"{path}: not a whole checkpoint: {type(error).__name__}: {error}") from None
    if differ:
        raise DamagedError(f"{path / differ[0]}: damaged; its sha256 is not the manifest's")
    if path.name != named:
        raise DamagedError(f"{path}: is {named} under another name")
    if made != FORMAT:
        raise DamagedError(f"{path}: has format {made}, and this version of streamkd reads {FORMAT}")


def _whole(path: Path) -> bool:
    try:
        verify(path)
    except DamagedError:
        return False
    return True


def digest(state: Any) -> str:
    """Return a sha256 over a nested state, in a fixed order: equal for two runs whose futures are equal."""
    total = hashlib.sha256()
    for path, value in _leaves(state, ""):
        if isinstance(value, torch.Tensor):
            content = value.detach().cpu().contiguous().reshape(-1)
            total.update(f"{path}:{value.dtype}{list(value.shape)}:".encode())
            if len(content):  # bytes of nothing cannot be viewed
                total.update(content.view(torch.uint8).numpy().tobytes())
        else:
            total.update(f"{path}:{type(value).__name__}:{value!r};".encode())
    return total.hexdigest()


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield f"{path}{{}}", len(value)
        for key in sorted(value, key=repr):
            yield from _leaves(value[key], f"{path}/{key!r}")
    elif isinstance(value, (list, tuple)):
        yield f"{path}#", len(value)
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}/{index}")
    else:
        yield path, value


def found(directory: Path) -> list[Path]:
    """Return the checkpoints in a directory, the newest first, verified or not."""
    named = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, reverse=True)


def newest(directory: Path) -> Path:
    """Return a checkpoint itself, or the newest in a directory of them, verified or not.

    Raises:
        CheckpointError: there is none.
    """
    if (directory / MANIFEST).exists():
        return directory
    candidates = found(directory)
    if not candidates:
        raise CheckpointError(f"{directory}: there is no checkpoint in it; name a checkpoint or a folder of them")
    return candidates[0]


def prune(directory: Path, keep: int, *, best: bool = False, refused: Collection[Path] = ()) -> None:
    """Delete all but the newest `keep` checkpoints that are whole, and what earlier attempts left half-written.

    Nothing is deleted while none is whole.

    Args:
        directory: of all checkpoints.
        keep: how many.
        best: keep that of the highest `accuracy` too.
        refused: those that could not be restored, whatever their manifests say.
    """
    whole = [path for path in found(directory) if path not in refused and _whole(path)]
    kept = whole[:keep]
    if best:
        kept += sorted(whole, key=lambda path: float(about(path).get("accuracy") or 0.0))[-1:]
    if whole:
        for path in [*found(directory), *directory.glob(".step-*")]:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


def copied(state: Any) -> Any:
    """Return a copy of a nested state, on the CPU, that later steps do not reach."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copied(value) for value in state)
    return state


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _write_tensors(path: Path, state: Mapping[str, Any]) -> None:
    try:
        with path.open("wb") as file:
            torch.save(dict(state), file)
    except (OSError, RuntimeError) as error:
        # Of a disk that is full torch tells where it stood in the file; why is in the error that it met.
        met = error if isinstance(error, OSError) else error.__context__
        raise OSError(f"{path.name} could not be written: {getattr(met, 'strerror', None) or error}") from error


def _read_tensors(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001 - a file may be wrong in many ways, each with an exception of its own
        raise DamagedError(f"{path}: holds more than tensors and plain values, or is none: {error}") from None
    return state


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

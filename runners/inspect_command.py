"""`streamkd inspect`: what is in a checkpoint, and whether it is whole."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from streamkd import checkpoint
from streamkd.errors import CheckpointError


def main(directory: Path, *, as_json: bool) -> None:
    """Print what a checkpoint holds.

    Args:
        directory: a checkpoint, or a folder of them, of which the newest is taken.
        as_json: for machines.

    Raises:
        CheckpointError: there is none, or it is not whole.
    """
    path = checkpoint.newest(directory)
    try:
        state, about = checkpoint.load(path)
    except CheckpointError as error:
        if as_json:
            sys.stdout.write(json.dumps({"path": str(path), "verified": False, "reason": str(error)}, indent=2) + "\n")
        raise
    found = {
        "path": str(path),
        "verified": True,
        **about,
        "files": {file.name: file.stat().st_size for file in sorted(path.iterdir())},
        "digest": checkpoint.digest(state),
    }
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        _print(found, Console())


def _print(found: dict[str, Any], console: Console) -> None:
    overview = Table(title=Text(found["path"]), title_justify="left", show_header=False)
    overview.add_column()
    overview.add_column(overflow="fold")  # a digest with an end missing is none
    accuracy = None if found["accuracy"] is None else f"{100 * found['accuracy']:.1f} %"
    for key in ("step", "records", "accuracy", "teacher", "digest", "configuration"):
        value = accuracy if key == "accuracy" else found[key]
        overview.add_row(key, Text("-" if value is None else str(value)))
    overview.add_row("verified", "every file is as the manifest says")
    for key in ("versions", "protocol", "feed", "position", "files"):
        for name, value in found.get(key, {}).items():
            overview.add_row(Text(f"{key}: {name}"), Text(_short(value)))
    console.print(overview)
    peers = Table(title="Peers", title_justify="left")
    for heading in ("", "accuracy %", "loss", "parameters"):
        peers.add_column(heading, justify="right" if heading else "left")
    for name, figures in found["peers"].items():
        accuracy, loss = figures["accuracy"], figures["loss"]
        told = ("-", "-") if accuracy is None else (f"{100 * accuracy:.1f}", f"{loss:.3f}")
        peers.add_row(Text(name), *told, f"{figures['parameters']:,}")
    console.print(peers)


def _short(value: object, most: int = 90) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= most else f"{text[:most]}..."

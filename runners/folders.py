"""Folders: whether they can be written, and by whom."""

import fcntl
import os
from pathlib import Path
from typing import TextIO

from streamkd.errors import ConfigError, short


def sole(directory: Path, *, key: str, does: str) -> TextIO:
    """Keep all other processes off a directory, until the handle that is returned is closed.

    Args:
        directory: made, if need be.
        key: of the setting that names it.
        does: what a process that has it does, for the others.

    Raises:
        ConfigError: another one keeps us off, or the directory cannot be made.
    """
    named = f"{key} = {short(str(directory))}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = (directory / ".lock").open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{named}: {error.strerror}; name another") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise ConfigError(f"{named}: another process {does} there; end it, or name another") from None
    return handle


def can_be_written(path: Path) -> bool:
    """Say whether a file or folder could be written, or else made."""
    try:
        nearest = next(place for place in [path.absolute(), *path.absolute().parents] if place.exists())
        return (
            (nearest == path.absolute() or nearest.is_dir()) and os.access(nearest, os.W_OK) and "\0" not in str(path)
        )
    except OSError:  # no file system has room for such a name
        return False

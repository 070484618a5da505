"""Folders that only one process may have at a time."""

import fcntl
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

"""Everything that can go wrong in a way the user can mend, with the exit code of the process it ends.

StreamkdError
 +- ConfigError      2  a setting, an argument or a model that does not fit
 +- FeedError        3  the feed cannot be reached or read at start
 +- CheckpointError  4  no checkpoint can be read, or it belongs to another configuration
 |   +- DamagedError    one of them is not whole; the one before it may be
 +- TrainingError    5  learning cannot go on
"""

import reprlib
from collections.abc import Iterable

MOST_LINES = 12


class StreamkdError(Exception):
    """A mistake that names its key, its value and its remedy; never shown with a traceback."""

    exit_code = 1


class ConfigError(StreamkdError):
    """A setting is misspelt, out of range or does not fit the others."""

    exit_code = 2


class FeedError(StreamkdError):
    """The feed cannot be opened."""

    exit_code = 3


class CheckpointError(StreamkdError):
    """A checkpoint is damaged, or was written by another configuration."""

    exit_code = 4


class DamagedError(CheckpointError):
    """A checkpoint is not what its manifest says, or holds what no checkpoint holds."""


class TrainingError(StreamkdError):
    """Learning cannot go on."""

    exit_code = 5


def one_screen(lines: Iterable[str]) -> str:
    """Join the first lines of a message, and say how many more there are."""
    told = list(lines)
    more = len(told) - MOST_LINES
    return "\n".join(told[:MOST_LINES] + ([f"and {more} more"] if more > 0 else []))


def short(value: object, most: int = 80) -> str:
    """Return a value as it would be written, cut where it is long."""
    try:
        text = repr(value)
    except RecursionError:  # nested as deeply as a parser can read, from further down
        text = reprlib.repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def reason(error: BaseException) -> str:
    """Return what went wrong in code that is not ours, on one line."""
    said = (str(error) or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {said}"

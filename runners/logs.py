"""Logs: JSON to standard error, or lines for a person where it is a terminal."""

import logging
import re
import sys
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, TextIO

import structlog

from runners.passwords import without_secrets

QUIET_SECONDS = 10.0
"""A warning or error is not repeated sooner; how many were kept back is told with the next one."""
FORGOTTEN_SECONDS = 100 * QUIET_SECONDS
"""After so long, how many were kept back is told no more."""
TELLING = ("feed", "peer", "path", "reason")
"""Fields by which two of the same event tell different things."""
EACH = frozenset({"reload refused", "drift"})
"""Events of which none is a repetition: what answers a signal, and what the world does."""
NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")
"""Steps, records and addresses: with others of these, a reason is still the same."""


def configure(level: str) -> structlog.stdlib.BoundLogger:
    """Set up logging for this process and return its logger."""
    for_people = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            Once(),
            structlog.processors.TimeStamper(fmt="iso", utc=not for_people),
            structlog.processors.dict_tracebacks,
            _masked,
            structlog.dev.ConsoleRenderer() if for_people else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(Unfailing(sys.stderr)),  # type: ignore[arg-type]  # no more is asked of it
        cache_logger_on_first_use=False,
    )
    limit(level)
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    return log


def limit(level: str) -> None:
    """Let every logger tell what is of a level and above, from now on; what was kept back stays counted."""
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(number))


def _masked(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Return an event without passwords."""
    return {key: without_secrets(value, key.rpartition(".")[2]) for key, value in event.items()}


class Unfailing:
    """Passes over what a file does not take, on a full disk or in a pipe that nobody reads: learning goes on."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """Write, if it can be."""
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        """Likewise."""
        with suppress(OSError):
            self._file.flush()


class Once:
    """Lets a warning or error through once in `QUIET_SECONDS`, with the number kept back since.

    Those are the same that have an event in common and what is `TELLING`.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], tuple[float, int]] = {}

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Return the event, or drop it."""
        if event.get("level") not in {"warning", "error"} or event.get("event") in EACH:
            return event
        now = time.monotonic()
        told = [str(event.get(field, "")) for field in ("event", *TELLING)]
        key = (*told[:-1], NUMBERS.sub("", told[-1]))
        last, suppressed = self._last.get(key, (float("-inf"), 0))
        if now - last < QUIET_SECONDS:
            self._last[key] = last, suppressed + 1
            raise structlog.DropEvent
        # Others that were told long ago and never again are forgotten: reasons may be without number.
        self._last = {one: kept for one, kept in self._last.items() if now - kept[0] < FORGOTTEN_SECONDS}
        self._last[key] = now, 0
        return {**event, "suppressed": suppressed} if suppressed else event

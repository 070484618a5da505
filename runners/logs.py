"""Logs: JSON to standard error, or lines for a person where it is a terminal."""

import logging
import sys
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, TextIO

import structlog

from runners.passwords import without_secrets

QUIET_SECONDS = 10.0
"""A warning or error is not repeated sooner; how many were kept back is told with the next one."""


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
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(Unfailing(sys.stderr)),  # type: ignore[arg-type]  # no more is asked of it
        cache_logger_on_first_use=False,
    )
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    return log


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
    """Lets a warning or error of one name through once in `QUIET_SECONDS`, with the number kept back since."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._suppressed: dict[str, int] = {}

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Return the event, or drop it."""
        name, now = str(event.get("event")), time.monotonic()
        if event.get("level") not in {"warning", "error"}:
            return event
        if now - self._last.get(name, float("-inf")) < QUIET_SECONDS:
            self._suppressed[name] = self._suppressed.get(name, 0) + 1
            raise structlog.DropEvent
        self._last[name] = now
        suppressed = self._suppressed.pop(name, 0)
        return {**event, "suppressed": suppressed} if suppressed else event

"""A spool that knows which requests of which client are in it, so that one sent again is not kept twice."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from runners.feeds.spool import MOST_BYTES, SEGMENT_BYTES, Spool
from streamkd.errors import ConfigError, reason

CLIENTS = 10_000
"""Of which the last request is known: those heard last."""
NAME = re.compile(r"[\w.:@-]{1,64}", re.ASCII)
"""What a client may be called."""
MARK = b"\x1e"
"""Encloses whose a line is; no record begins with it."""
FILE = "clients.json"


class NumberedSpool(Spool):
    """Each line tells the client's request that it is of, and its place there; so one that a kill cut short is mended.

    Args:
        directory, most_bytes, segment_bytes: as for `Spool`.

    Raises:
        ConfigError: it cannot be made, or another process has it.
    """

    def __init__(self, directory: Path, most_bytes: int = MOST_BYTES, segment_bytes: int = SEGMENT_BYTES) -> None:
        super().__init__(directory, most_bytes, segment_bytes, whole=True)
        self._known = directory / FILE
        self._one = Lock()
        try:
            self._look()
        except (OSError, ValueError) as error:
            self.close()
            raise ConfigError(f"feed.spool = {str(directory)!r}: {reason(error)}; name another") from None

    def _look(self) -> None:
        """Find out the last request of every client, and how many of its lines have come."""
        known = json.loads(self._known.read_bytes()) if self._known.exists() else {}
        self._clients = {client: (sequence, lines) for client, (sequence, lines) in known.items()}
        for line, _ in self.lines(self.first()):
            if line.startswith(MARK):
                client, sequence, index = line[1:].split(MARK, 1)[0].decode().split(" ")
                self._heard(client, int(sequence), int(index) + 1)

    def _heard(self, client: str, sequence: int, lines: int) -> None:
        self._clients.pop(client, None)
        self._clients[client] = (sequence, lines)
        if len(self._clients) > CLIENTS:
            del self._clients[next(iter(self._clients))]

    def append_once(self, client: str, sequence: int, lines: Sequence[bytes]) -> int:
        """Append the lines of a request that have not come yet; return how many.

        Raises:
            LookupError: the client's last request is a later one; its number.
        """
        with self._one:
            last, come = self._clients.get(client, (-1, 0))
            if sequence < last:
                raise LookupError(last)
            begin = come if sequence == last else 0
            marked = [
                b"%b%b %d %d%b%b" % (MARK, client.encode(), sequence, n, MARK, line) for n, line in enumerate(lines)
            ]
            try:
                self.append(b"".join(marked[begin:]))
            except OSError:
                self._look()  # some segments may have taken theirs
                raise
            if begin < len(lines):
                self._heard(client, sequence, len(lines))
            return max(0, len(lines) - begin)

    def prune(self, place: Mapping[str, Any]) -> None:
        """Remove the segments that end before a place, once it is written down whose requests were in them."""
        if self.first()["segment"] < place["segment"]:
            with self._one:
                self._write_down()
            super().prune(place)

    def _write_down(self) -> None:
        new = self._known.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(self._clients, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._known)
        self._sync_directory()


def record_of(line: bytes) -> bytes:
    """Return a line without what tells whose it is."""
    return line.split(MARK, 2)[2] if line.startswith(MARK) else line

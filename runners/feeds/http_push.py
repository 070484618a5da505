"""HTTP: any program may push its records; they are answered for when they are on our disk."""

import asyncio
import hmac
import json
import re
import socket
import time
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, Literal

import uvicorn
from pydantic import Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from monitoring.server import listen
from runners.feeds import Refuse
from runners.feeds.formats import decoder
from runners.feeds.numbered import MARK, NAME, NumberedSpool, record_of
from runners.feeds.spool import MOST_BYTES, Spool
from runners.feeds.spooled import Arrivals, Spooled, as_line, from_line
from runners.feeds.stream import StreamFeed, open_stream, reading
from runners.passwords import from_environment
from streamkd.errors import ConfigError, FeedError

PATH = "/v1/records"
MOST_BODY = 16 << 20
"""Bytes of one request."""
CLIENT, SEQUENCE = "Streamkd-Client", "Streamkd-Sequence"
"""Headers of a client that never wants a request taken twice."""
SEQUENCES = re.compile(r"[0-9]{1,18}")
RETRY_SECONDS = 1
"""What a client is asked to wait when there is no room."""
SECONDS = 5.0
"""For the server to start, and to answer the last requests when it ends."""


class Door:
    """Takes records from whoever posts them, on a thread of its own.

    Args:
        host, port: to listen on; port 0 picks a free one, which `port` then tells.
        lines: whether a body is lines, of a record each; else a body is one payload.
        json_lines: whether these are JSON; then a body may also be one value, an object or a list of them.
        token: that a client has to show; empty: none.
        spool: for what comes.
    """

    def __init__(
        self, host: str, port: int, spool: NumberedSpool, *, lines: bool, json_lines: bool, token: str = ""
    ) -> None:
        self.ended = False
        self.host, self.port = host, port
        self._lines, self._json, self._token = lines, json_lines, token
        self._arrivals = Arrivals()
        self._socket: socket.socket | None = None
        self._spool = spool

    def listen(self, spool: Spool) -> None:  # noqa: ARG002 - it is the one it was made with
        """Open the port, unless it is open.

        Raises:
            FeedError: it is taken, or not for this user.
        """
        if self._socket is not None:
            return
        try:
            self._socket = listen(self.host, self.port, part="feed")
        except ConfigError as error:  # who has it may end: a start that fails for it is worth another
            raise FeedError(str(error)) from None
        self.port = self._socket.getsockname()[1]
        routes = [Route(PATH, self._records, methods=["POST"])]
        config = uvicorn.Config(
            Starlette(routes=routes),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=int(SECONDS),
        )
        self._server = uvicorn.Server(config)
        self._thread = Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="http feed", daemon=True
        )
        self._thread.start()
        patience = time.monotonic() + SECONDS
        while not self._server.started and time.monotonic() < patience:
            time.sleep(0.01)
        self._arrivals.note(0)

    async def _records(self, request: Request) -> JSONResponse:
        shown = request.headers.get("authorization", "").encode()
        if self._token and not hmac.compare_digest(shown, f"Bearer {self._token}".encode()):
            return _answer(401, "Authorization: Bearer and the token is needed")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BODY:
                return _answer(413, f"more than {MOST_BODY} bytes; send fewer records at once")
        records = self._taken_apart(bytes(body))
        client, sequence = (request.headers.get(name, "") for name in (CLIENT, SEQUENCE))
        if not records:
            return _answer(400, "no record in the body")
        if (client or sequence) and not (NAME.fullmatch(client) and SEQUENCES.fullmatch(sequence)):
            return _answer(400, f"{CLIENT} (of {NAME.pattern}) and {SEQUENCE} (a number) go together")
        return await asyncio.to_thread(self._take, records, client, sequence)

    def _take(self, records: list[bytes], client: str, sequence: str) -> JSONResponse:
        """Write records to the spool, where there is room, and say so."""
        accepted = len(records)
        try:
            if not self._spool.has_room():
                return _answer(429, "as many wait as may; send these again later")
            if client:
                accepted = self._spool.append_once(client, int(sequence), records)
            else:
                self._spool.append(b"".join(records))
        except LookupError as last:
            return _answer(409, f"request {last} of {client} has come already; the next needs a greater number")
        except (OSError, ValueError) as error:  # the latter where it was closed meanwhile
            return _answer(503, f"cannot be written: {error}; send these again later")
        if accepted:
            self._arrivals.note()
        return JSONResponse({"accepted": accepted}, status_code=202)

    def _taken_apart(self, body: bytes) -> list[bytes]:
        """Return the lines of a body."""
        if not self._lines:
            return [as_line(body)] if body else []
        lines = [line.lstrip(MARK) + b"\n" for line in body.splitlines() if line.strip(MARK + b" \t")]
        if self._json and (len(lines) > 1 or body.lstrip().startswith(b"[")):
            try:
                value = json.loads(body)
            except (ValueError, RecursionError):
                return lines
            return [json.dumps(one).encode() + b"\n" for one in (value if isinstance(value, list) else [value])]
        return lines

    def fill(self, spool: Spool) -> bool:  # noqa: ARG002 - the thread fills it
        """Say whether more has come."""
        return self._arrivals.wait()

    def close(self) -> None:
        """Answer the requests under way, and close the port."""
        if self._socket is not None:
            self._server.should_exit = True
            self._thread.join()
            self._socket.close()
            self._socket = None


def _answer(status: int, error: str) -> JSONResponse:
    later = {"retry-after": str(RETRY_SECONDS)} if status in {429, 503} else {}
    return JSONResponse({"error": error}, status_code=status, headers=later)


def http(
    *,
    spool: Path,
    host: str = "127.0.0.1",
    port: Annotated[int, Field(ge=0, le=65_535)] = 9465,
    token_env: str = "",
    spool_bytes: Annotated[int, Field(ge=1 << 16)] = MOST_BYTES,
    format: Literal["json", "csv", "msgpack", "arrow"] = "json",  # noqa: A002 - the user's word for it
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ",",
    max_classes: int,
    refuse: Refuse,
    **options: Any,
) -> StreamFeed:
    """Take records that are posted to `/v1/records`.

    The answer is 202 when they are on the disk, and 429 with `Retry-After` when there is no room. A client that gets no
    answer should send them again; if they had come, they are learned twice, unless it names itself and numbers its
    requests in ascending order (`Streamkd-Client`, `Streamkd-Sequence`): those that came are not taken again then.

    Args:
        spool: a folder in which records are kept until they are in two checkpoints.
        host: address to listen on.
        port: likewise.
        token_env: name of the environment variable that holds the token which clients show (`Authorization: Bearer`).
        spool_bytes: that may wait there.
        format: of a body: JSON lines, one JSON object or a list of them; rows of CSV without a header; one msgpack
            object; an Arrow stream.
        delimiter: of CSV.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be used.
        options: those of `runners.feeds.stream.Reading`.

    Raises:
        FeedError: the port cannot be opened, or no record came in time.
        ConfigError: a setting does not fit.
    """
    settings = reading(options)
    lines = format in {"json", "csv"}
    token = from_environment(token_env, "feed.token_env")
    kept = NumberedSpool(spool, spool_bytes)
    door = Door(host, port, kept, lines=lines, json_lines=format == "json", token=token)
    return open_stream(
        Spooled(door, kept, record_of if lines else lambda line: from_line(record_of(line))),
        decoder(format, columns=settings.columns, delimiter=delimiter),
        settings,
        about={"kind": "http", "key": "port", "stream": str(port), "address": "port", "at": f"{host}:{port}"},
        max_classes=max_classes,
        refuse=refuse,
    )

"""What tests wait for, and a real Prometheus, a real Alertmanager and a webhook, on free ports of the loopback."""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from runners.feeds import Feed
from streamkd import Batch

PATIENCE = 120.0
"""Seconds for what takes a moment: the machine may be busy, and only a test that fails waits for so long."""
OWN = range(10_000 + os.getpid() % 200 * 100, 10_000 + os.getpid() % 200 * 100 + 100)
"""Ports that no system gives out by itself, and no other process of these tests is likely to ask for."""
PORTS = cycle(OWN)


def needs(program: str, package: str) -> None:
    """Skip the test where a program is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (Debian: apt-get install {package})")


def free_port() -> int:
    """Return a port that stays free until somebody is told of it."""
    for port in islice(PORTS, len(OWN)):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError(f"of the ports {OWN} none is free")


def got(url: str) -> Any:
    """Return what a server tells in JSON; None while it is not there yet."""
    try:
        with urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310 - one of the servers below
            return json.load(answer)
    except OSError:
        return None


def waited(for_what: Callable[[], Any], *, every: float = 0.1) -> Any:
    """Ask again and again until the answer is true; return the last one."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := for_what()) and time.monotonic() < deadline:
        time.sleep(every)
    return answer


def taken(feed: Feed, records: int) -> list[Batch]:
    """Poll a feed until it has given so many records; some may be under way still, or the server be slow to answer."""
    batches: list[Batch] = []

    def enough() -> bool:
        batch = feed.poll(records - sum(map(len, batches)))
        assert batch is not None, "the feed has ended"
        batches.extend([batch] if len(batch) else [])
        return sum(map(len, batches)) == records

    assert waited(enough, every=0.01), f"{sum(map(len, batches))} of {records} records came"
    return batches


def names(batches: Sequence[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.ids]


@contextmanager
def process(*command: str) -> Iterator[None]:
    """Run a server; it is ended when the block is left."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


@contextmanager
def prometheus(configuration: Path, storage: Path) -> Iterator[str]:
    """Start Prometheus; yields its address."""
    port = free_port()
    with process(
        "prometheus",
        f"--config.file={configuration}",
        f"--storage.tsdb.path={storage}",
        f"--web.listen-address=127.0.0.1:{port}",
    ):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def webhook() -> Iterator[tuple[str, list[Any]]]:
    """Listen for alerts; yields the address, and the list that they are put into."""
    heard: list[Any] = []

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            heard.extend(json.loads(body)["alerts"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", heard
    finally:
        server.shutdown()
        server.server_close()

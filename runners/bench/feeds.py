"""`streamkd bench feeds`: is a broker as fast as a file? A table published at full speed, and learned meanwhile."""

import csv
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from runners import session
from runners.feeds.blocks import ReadBlock, line_by_line
from runners.feeds.files import FileFeed
from runners.feeds.formats import imported
from runners.feeds.lines import opened
from runners.settings import load
from streamkd.errors import ConfigError, FeedError

STREAM = "streamkd-bench"
AT_ONCE = 500
"""Records of one request of the publisher."""
SECONDS = 10.0
"""For a server to start."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over all records: how many, in how many seconds, and how many waited at its end."""

    records: int
    seconds: float
    lag: int


def main(data: Path, label: str, *, passes: int, url: str, console: Console) -> None:
    """Learn a table from its file and from Redis, in turn, and print how fast.

    Raises:
        ConfigError: there is neither a server nor a program to start one.
    """
    for name, one in decoding(data, label, passes).items():
        console.print(f"{name}, {one:,.0f} records per second")
    file: list[Pass] = []
    stream: list[Pass] = []
    with server(url) as at:
        for _ in range(passes):
            file.append(learn([f"feed.path={data}", f"feed.label={label}"]))
            stream.append(published(data, label, at))
    made = Table("feed", "records", "records per second", "waiting at the end", box=None, pad_edge=False)
    speeds = []
    for name, run in (("file", file), ("redis", stream)):
        speeds.append(median(one.records / one.seconds for one in run))
        made.add_row(name, f"{run[0].records:,}", f"{speeds[-1]:,.0f}", str(max(one.lag for one in run)))
    console.print(made)
    console.print(f"redis over file: {speeds[1] / speeds[0]:.3f}, medians of {passes} passes each, in turn")


def decoding(data: Path, label: str, passes: int) -> dict[str, float]:
    """Read a file to its end without learning it, and line by line; return the best of the passes of each, in turn."""
    ways: dict[str, ReadBlock | None] = {"file alone": None, "file alone, line by line": line_by_line}
    speeds: dict[str, float] = dict.fromkeys(ways, 0.0)
    configuration = load("default", [f"feed.path={data}", f"feed.label={label}"])
    for _, (name, way) in product(range(passes), ways.items()):
        with closing(configuration.open_feed(lambda _: None)) as feed:
            if isinstance(feed, FileFeed) and way is not None:
                feed.read_block = way
            records, began = 0, time.process_time()
            while (batch := feed.poll(configuration.batch)) is not None:
                records += len(batch)
            speeds[name] = max(speeds[name], records / (time.process_time() - began))
    return speeds


def learn(settings: Sequence[str], records: int | None = None) -> Pass:
    """Learn a feed with the shipped default, to its end or up to so many records."""
    given = ["dead_letters.path=/dev/null", "dead_letters.max_bytes=0", *settings]
    with closing(session.start(load("default", given))) as running:
        began = 0.0
        while records is None or running.engine.records < records:
            batch = running.poll()
            if batch is None:
                break
            began = began or time.perf_counter()
            if len(batch):
                running.step(batch)
            else:
                time.sleep(0.001)
        seconds = time.perf_counter() - began
        running.feed.poll(1)
        return Pass(running.engine.records, seconds, sum(running.feed.lag().values()))


def published(data: Path, label: str, url: str) -> Pass:
    """Learn a table from Redis while a process of its own publishes it there, as fast as it can."""
    redis = imported("redis", "redis", "streamkd bench feeds")
    with closing(redis.Redis.from_url(url)) as client:
        client.delete(STREAM)
        with opened(data) as file:
            records = sum(1 for line in file if line.strip()) - 1
        publisher = subprocess.Popen([sys.executable, "-m", "runners.bench.feeds", str(data), url])  # noqa: S603 - ourselves
        try:
            settings = ["feed.kind=redis", f"feed.url={url}", f"feed.stream={STREAM}", f"feed.label={label}"]
            return learn(settings, records)
        finally:
            publisher.wait()
            client.delete(STREAM)


def publish(data: Path, url: str) -> None:
    """Append every row of a table to the stream."""
    redis = imported("redis", "redis", "streamkd bench feeds")
    with closing(redis.Redis.from_url(url)) as client, opened(data) as file:
        rows: Iterator[dict[str, Any]] = csv.DictReader(line.decode() for line in file)
        while some := list(islice(rows, AT_ONCE)):
            with client.pipeline(transaction=False) as pipeline:
                for row in some:
                    pipeline.xadd(STREAM, row)
                pipeline.execute()


@contextmanager
def server(url: str) -> Iterator[str]:
    """Give the address of a server: the user's, or one that is started for as long as it is needed."""
    if url:
        yield url
        return
    program = shutil.which("redis-server")
    if program is None:
        raise ConfigError("--url: missing, and there is no redis-server to start; name a server, or install one")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with TemporaryDirectory() as folder:
        command = [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", folder, "--save", ""]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 - what was found on PATH
        try:
            _wait(port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait()


def _wait(port: int) -> None:
    patience = time.monotonic() + SECONDS
    while time.monotonic() < patience:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise FeedError(f"redis-server does not answer on port {port}, {SECONDS:g} s after its start")


if __name__ == "__main__":
    publish(Path(sys.argv[1]), sys.argv[2])

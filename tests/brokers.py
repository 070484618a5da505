"""Real servers on loopback ports, for tests: started, killed, and started again with what they had."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import pytest
from stack import free_port, waited


class Broker:
    """One server.

    Args:
        package: Debian's, for who lacks it.
        command: of the server, with `{port}` and `{folder}` to be filled in.
        folder: for its data.
        ask: what is sent to find out whether it is ready, and what its answer starts with.
        files: for the folder, name -> text, filled in likewise, with one more free port, `{other}`.
        first: a command that prepares the folder.
        end: the signal that ends it.
    """

    def __init__(
        self,
        package: str,
        command: Sequence[str],
        folder: Path,
        ask: tuple[bytes, bytes] = (b"", b""),
        *,
        files: Mapping[str, str] = MappingProxyType({}),
        first: Sequence[str] = (),
        end: signal.Signals = signal.SIGKILL,
    ) -> None:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed (Debian: apt-get install {package})")
        self.port = free_port()
        folder.mkdir(exist_ok=True)
        filled = partial(str.format, port=self.port, other=free_port(), folder=folder)
        for name, text in files.items():
            (folder / name).write_text(filled(text), encoding="utf-8")
        if first:
            subprocess.run([*map(filled, first)], check=True, capture_output=True)
        self._command = [*map(filled, command)]
        self._ask, self._end = ask, end
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers."""
        if self._process is not None:
            return
        self._process = begun = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        waited(lambda: self._ready() or begun.poll() is not None, every=0.05)
        assert begun.poll() is None, f"{self._command[0]} did not start"
        assert self._ready(), f"{self._command[0]} does not answer"

    def _ready(self) -> bool:
        question, answer = self._ask
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as line:
                line.sendall(question)
                return not answer or line.recv(99).startswith(answer)
        except OSError:
            return False

    def hang(self, *, on: bool = True) -> None:
        """Let it keep its connections and say nothing on them, or go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if on else signal.SIGCONT)
        if on:
            os.waitpid(self._process.pid, os.WUNTRACED)  # until all its threads have stopped

    def stop(self) -> None:
        """End it; as its crash would, unless another signal was given."""
        if self._process is not None:
            self._process.send_signal(self._end)
            self._process.wait()
            self._process = None


def redis_server(folder: Path, *options: str) -> Broker:
    command = ["redis-server", "--bind", "127.0.0.1", "--port", "{port}", "--dir", "{folder}", "--save", "", *options]
    return Broker("redis-server", command, folder, (b"PING\r\n", b"+PONG"))


def nats_server(folder: Path) -> Broker:
    return Broker("nats-server", ["nats-server", "-a", "127.0.0.1", "-p", "{port}", "-js", "-sd", "{folder}"], folder)


MOSQUITTO = """
listener {port} 127.0.0.1
allow_anonymous true
user root
persistence true
persistence_location {folder}/
max_queued_messages 0
"""


def mosquitto(folder: Path, option: str = "", **files: str) -> Broker:
    """One that is told to end rather than killed, as it keeps what sessions have not acknowledged only then."""
    return Broker(
        "mosquitto",
        ["mosquitto", "-c", "{folder}/mosquitto.conf"],
        folder,
        files={"mosquitto.conf": MOSQUITTO + option, **files},
        end=signal.SIGTERM,
    )


JARS = os.environ.get("KAFKA_JARS", str(Path(__file__).parent / "kafka" / "jars"))
JAVA = ["java", "-Xmx384m", "-XX:TieredStopAtLevel=1", "-cp", f"{JARS}/*"]
PROPERTIES = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{other}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{other}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={folder}/data
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
"""


def kafka(folder: Path) -> Broker:
    """A broker that is its own controller (KRaft)."""
    if not list(Path(JARS).glob("kafka_*.jar")):
        pytest.skip(f"no jars of Kafka in {JARS} (mvn -f tests/kafka dependency:copy-dependencies; or set KAFKA_JARS)")
    properties = "{folder}/server.properties"
    return Broker(
        "default-jre-headless",
        [*JAVA, "kafka.Kafka", properties],
        folder,
        files={"server.properties": PROPERTIES},
        first=[*JAVA, "kafka.tools.StorageTool", "format", "-t", "U3RyZWFta2QgVGVzdHMhIQ", "-c", properties],
    )

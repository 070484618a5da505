"""Real servers on loopback ports, for tests: started, killed, and started again with what they had."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


class Broker:
    """One server.

    Args:
        package: Debian's, for who lacks it.
        command: of the server, with `{port}` and `{folder}` to be filled in.
        folder: for its data.
        ask: what is sent to find out whether it is ready, and what its answer starts with.
    """

    def __init__(
        self, package: str, command: Sequence[str], folder: Path, ask: tuple[bytes, bytes] = (b"", b"")
    ) -> None:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed (Debian: apt-get install {package})")
        self.port = free_port()
        folder.mkdir(exist_ok=True)
        self._command = [word.format(port=self.port, folder=folder) for word in command]
        self._ask = ask
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers."""
        if self._process is not None:
            return
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        patience = time.monotonic() + 20
        while time.monotonic() < patience and self._process.poll() is None:
            if self._ready():
                return
            time.sleep(0.05)
        raise AssertionError(f"{self._command[0]} did not start")

    def _ready(self) -> bool:
        question, answer = self._ask
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as line:
                line.sendall(question)
                return not answer or line.recv(99).startswith(answer)
        except OSError:
            return False

    def stop(self) -> None:
        """End it as its crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

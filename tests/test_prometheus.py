import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from test_commands import started, table, told


@contextmanager
def prometheus(folder: Path, target: int) -> Iterator[int]:
    """Start a real Prometheus that scrapes `target` each second; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = folder / "prometheus.yml"
    file.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: streamkd, static_configs: [{{targets: ['127.0.0.1:{target}']}}]}}]\n",
        encoding="utf-8",
    )
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield port
    finally:
        server.terminate()
        server.wait()


def asked(port: int, query: str) -> dict[str, float]:
    """Ask Prometheus; return the value of each series, by its peer or state."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urlencode({'query': query})}"
    try:
        with urlopen(url, timeout=5) as answer:
            found = json.load(answer)["data"]["result"]
    except (URLError, ConnectionError):
        return {}
    return {
        series["metric"].get("peer", series["metric"].get("state", "")): float(series["value"][1]) for series in found
    }


@pytest.mark.slow
def test_a_real_prometheus_sees_the_cohort_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    monkeypatch.chdir(tmp_path)
    table(Path("d.csv"), 60_000)
    settings = [f"--set={pair}" for pair in ("feed.path=d.csv", "feed.label=y", "http.port=0")]
    with started("run", "default", *settings) as daemon:
        target = told(daemon, "listening")["port"]
        with prometheus(tmp_path, target) as port:
            accuracy = "rate(streamkd_prequential_correct_total[10s]) / rate(streamkd_prequential_evaluated_total[10s])"
            seen: dict[str, float] = {}
            deadline = time.monotonic() + 30
            while len(seen) < 4 and time.monotonic() < deadline:
                time.sleep(0.5)
                seen = asked(port, accuracy)
            assert set(seen) == {"served", "quick", "middle", "steady"}
            assert all(0.5 < value <= 1 for value in seen.values())
            assert sum(asked(port, "streamkd_teacher").values()) == 1
            assert asked(port, "streamkd_state == 1") == {"running": 1}
            assert asked(port, "rate(streamkd_feed_records_total[10s]) > 0")

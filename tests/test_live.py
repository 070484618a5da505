"""The whole chain: a real daemon on a drifting stream, Prometheus, Alertmanager, and someone who is told."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any
from urllib.parse import urlencode

import pytest
from paced import LATE
from stack import free_port, got, needs, process, prometheus, waited, webhook
from test_commands import told

from monitoring.dashboards.ask import Question, Window, ask, questions
from runners.dashboards_command import main as write_folder

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent
RECORDS = 60_000
FIRST_DRIFT = RECORDS // 5
SETTINGS = (
    "feed.kind=paced:feed",
    f"feed.records={RECORDS}",
    "feed.pace=1500",
    "feed.gate=gate",
    "http.port=0",
    "checkpoint.every_records=2000",
    "labels.delay=64",
    "roles.every=4",
)
MAY_BE_EMPTY: dict[str, str] = {}
"""Panel, variable or annotation -> why it may have nothing to show. Here, after a drift, all have."""


@dataclass
class Watched:
    """A daemon, and who watches it.

    Attributes:
        daemon: its process.
        began: when it was started, in seconds since the epoch.
        address: of Prometheus.
        heard: the alerts that were delivered; None without an Alertmanager.
    """

    daemon: subprocess.Popen[str]
    began: float
    address: str
    heard: list[Any] | None

    def asked(self, query: str, **more: str) -> dict[str, str]:
        """Return the value of each series, by its peer, according to Prometheus."""
        answer = got(f"{self.address}/api/v1/query?{urlencode({'query': query, **more})}")
        found = answer["data"]["result"] if answer else []
        return {series["metric"].get("peer", ""): series["value"][1] for series in found}

    def firing(self) -> dict[str, dict[str, Any]]:
        """Return the alerts that fire by their names, according to Prometheus."""
        answer = got(f"{self.address}/api/v1/alerts")
        alerts = answer["data"]["alerts"] if answer else []
        return {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Start everything, from the folder that users mount; only addresses and waiting times are others."""
    needs("prometheus", "prometheus")
    folder = tmp_path_factory.mktemp("watched")
    write_folder(folder / "monitoring")
    with ExitStack() as stack:
        command = [sys.executable, "-m", "runners.cli", "run", "demo", *(f"--set={setting}" for setting in SETTINGS)]
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        began = time()
        daemon = stack.enter_context(
            subprocess.Popen(
                command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
            )
        )
        stack.callback(daemon.kill)
        heard, alertmanager = None, f"127.0.0.1:{free_port()}"
        if shutil.which("prometheus-alertmanager"):
            told_at, heard = stack.enter_context(webhook())
            file = folder / "monitoring" / "alertmanager" / "alertmanager.yml"
            text = file.read_text(encoding="utf-8").replace("http://localhost:5001", told_at)
            file.write_text(re.sub(r"group_(wait|interval): \w+", r"group_\1: 1s", text), encoding="utf-8")
            stack.enter_context(
                process(
                    "prometheus-alertmanager",
                    f"--config.file={file}",
                    f"--storage.path={folder / 'alerts'}",
                    f"--web.listen-address={alertmanager}",
                    "--cluster.listen-address=",
                )
            )
        file = folder / "monitoring" / "prometheus" / "prometheus.yml"
        text = file.read_text(encoding="utf-8").replace("interval: 5s", "interval: 1s")
        text = text.replace("streamkd:9464", f"127.0.0.1:{told(daemon, 'listening')['port']}")
        file.write_text(text.replace("alertmanager:9093", alertmanager), encoding="utf-8")
        rules = file.parent / "rules" / "alerts.yml"
        text = re.sub(r"for: \w+", "for: 1s", rules.read_text(encoding="utf-8"))
        rules.write_text(text, encoding="utf-8")
        address = stack.enter_context(prometheus(file, folder / "tsdb"))
        made = Watched(daemon, began, address, heard)
        assert waited(lambda: made.asked("streamkd_feed_records_total")), "Prometheus does not see the daemon"
        (folder / "gate").touch()  # from here on there is something to see, from its first record on
        yield made


def test_the_drift_alert_fires_on_the_drift_and_not_before(watched: Watched) -> None:
    assert told(watched.daemon, "drift")["record"] > FIRST_DRIFT
    assert waited(lambda: "StreamkdDriftDetected" in watched.firing())
    alert = watched.firing()["StreamkdDriftDetected"]
    assert (alert["labels"]["detector"], alert["labels"]["severity"]) == ("adwin", "info")
    (come,) = watched.asked("streamkd_feed_records_total", time=alert["activeAt"]).values()
    assert int(come) > FIRST_DRIFT


def test_every_panel_variable_and_mark_has_something_to_show(watched: Watched) -> None:
    boards = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in (TESTS.parent / "monitoring" / "grafana" / "dashboards").glob("*.json")
    ]
    asked = [question for board in boards for question in questions(board) if question.where not in MAY_BE_EMPTY]
    assert len(asked) > 60

    def empty() -> list[Question]:
        window = Window(watched.began, time(), step=1, scrape=1)
        return [question for question in asked if not ask(watched.address, question, window)]

    still: list[Question] = []

    def all_answered() -> bool:
        still[:] = empty()
        return not still

    assert waited(all_answered, every=2), still


def test_what_is_watched_is_what_was_learned(watched: Watched) -> None:
    accuracy: dict[str, float] = {}

    def learned() -> bool:
        shares = watched.asked("instance_peer:streamkd_prequential_accuracy:ratio_rate1h")
        accuracy.update({peer: float(share) for peer, share in shares.items()})
        return len(accuracy) == 4 and all(0.5 < share < 1 for share in accuracy.values())

    assert waited(learned), accuracy
    assert set(accuracy) == {"served", "quick", "middle", "steady"}
    ages = waited(lambda: watched.asked("streamkd_record_age_seconds_sum / streamkd_record_age_seconds_count > 0"))
    assert LATE < float(ages[""]) < 2 * LATE


def test_someone_is_told_of_the_drift(watched: Watched) -> None:
    needs("prometheus-alertmanager", "prometheus-alertmanager")
    assert waited(lambda: "StreamkdDriftDetected" in delivered(watched)), delivered(watched)


def test_a_daemon_that_is_killed_is_missed_and_someone_is_told(watched: Watched) -> None:
    assert waited(lambda: "StreamkdDown" not in watched.firing())
    watched.daemon.kill()
    assert waited(lambda: "StreamkdDown" in watched.firing())
    needs("prometheus-alertmanager", "prometheus-alertmanager")
    assert waited(lambda: "StreamkdDown" in delivered(watched)), delivered(watched)


def delivered(watched: Watched) -> set[str]:
    return {alert["labels"]["alertname"] for alert in watched.heard or []}

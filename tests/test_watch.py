"""The view of a daemon: of this process's metrics and of another's, by the same reading."""

import io
import re
import socket
import time
from contextlib import suppress
from dataclasses import replace

import pytest
from prometheus_client import Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from stack import PATIENCE, free_port
from test_commands import streamkd
from test_metrics import metrics_of
from worlds import batches, lively

from monitoring.health import Health
from monitoring.metrics import Metrics, starting
from monitoring.server import Server
from monitoring.standing import Reader
from runners.view import View
from runners.watch import Watcher
from streamkd.errors import ConfigError
from streamkd.report import Report


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runners.watch.TIMEOUT_SECONDS", PATIENCE)


def learned(metrics: Metrics, reports: int = 100) -> list[Report]:
    made = lively()
    taken = [made.step(batch) for batch in batches(late=True)[:reports]]
    for report in taken:
        metrics.observe(report, now=time.time())
    return taken


def served(metrics: Metrics, port: int = 0, host: str = "127.0.0.1") -> Server:
    return Server(host, port, metrics.registry, Health(time.monotonic, 60.0), dict)


def test_a_registry_and_what_it_tells_over_http_read_the_same() -> None:
    metrics = metrics_of(lively())
    learned(metrics)
    text = generate_latest(metrics.registry).decode()
    one, other = (
        Reader().read(metrics.registry.collect(), 2e9),
        Reader().read(text_string_to_metric_families(text), 2e9),
    )
    assert one.peers == other.peers
    assert (one.accuracy, one.agreement, one.drifts, one.swaps) == (
        other.accuracy,
        other.agreement,
        other.drifts,
        other.swaps,
    )


def test_accuracy_is_that_of_the_last_thousand_labelled_records_or_a_few_more() -> None:
    metrics, reader, made = metrics_of(lively()), Reader(), lively()
    answers: list[bool] = []
    for count, batch in enumerate(batches(3200)):
        report = made.step(batch)
        metrics.observe(report, now=1.0)
        answers += (report.scored.predicted["served"] == report.scored.y).tolist()
        standing = reader.read(metrics.registry.collect(), 1e9 + count)
    recent = answers[-1008:]  # batches have 16 records
    assert standing.accuracy == pytest.approx(sum(recent) / len(recent))
    assert standing.records == 3200


def test_what_is_shown_is_what_the_reports_say() -> None:
    metrics = metrics_of(lively())
    reports = learned(metrics)
    standing = Reader().read(metrics.registry.collect(), time.time())
    last = reports[-1]
    assert [name for name, peer in standing.peers.items() if peer.teacher] == [last.teacher]
    assert {name: peer.weight for name, peer in standing.peers.items()} == {
        name: peer.weight for name, peer in last.peers.items()
    }
    assert standing.swaps == sum(report.swap is not None for report in reports) > 0
    assert standing.pending == last.pending
    for name, peer in standing.peers.items():
        heard = [alpha for (_, student), alpha in last.alphas.items() if student == name and alpha]
        assert peer.alpha == (pytest.approx(sum(heard) / len(heard)) if heard else None)


def test_another_process_at_the_same_place_starts_afresh() -> None:
    first, second, reader = metrics_of(lively()), metrics_of(lively()), Reader()
    learned(first)
    reader.read(first.registry.collect(), 1e9)
    learned(second, reports=20)
    standing = reader.read(second.registry.collect(), 1e9 + 1)
    assert standing.accuracy == Reader().read(second.registry.collect(), 1e9 + 1).accuracy


def test_a_daemon_that_has_no_feed_yet_is_told_from_what_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server("127.0.0.1", 0, starting(), Health(time.monotonic, 60.0), dict) as server:
        assert streamkd(monkeypatch, "watch", f"127.0.0.1:{server.port}", "--once") == 2
    assert "it is starting" in capsys.readouterr().err


def test_watch_prints_how_a_daemon_stands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = metrics_of(lively())
    learned(metrics)
    metrics.observe_state("running")
    metrics.observe_feed(connected=True, lag={"0": 7}, resets={}, failures={})
    with served(metrics) as server:
        assert streamkd(monkeypatch, "watch", f"127.0.0.1:{server.port}", "--once") == 0
    shown = capsys.readouterr().out
    assert f"http://127.0.0.1:{server.port}/metrics" in shown
    assert "running: 1,600 records" in shown
    assert "7 wait in the feed" in shown
    assert {"served", "teacher", "student"} <= set(shown.split())


def test_a_daemon_may_be_at_an_address_of_ip_version_6() -> None:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        metrics = metrics_of(lively())
        learned(metrics)
        with served(metrics, host="::1") as server:
            assert Watcher(f"[::1]:{server.port}").ask().records == 1600
        return
    pytest.skip("this machine has no ::1")


def test_watch_goes_on_while_there_is_no_answer_and_says_so() -> None:
    metrics, port = metrics_of(lively()), free_port()
    learned(metrics)
    watcher = Watcher(f"http://127.0.0.1:{port}/metrics")
    with served(metrics, port):
        standing = watcher.ask()
        assert watcher.heading() == f"http://127.0.0.1:{port}/metrics"
    assert watcher.ask() == replace(standing, state="no answer", speed=0.0)
    assert re.search(r"no answer for \d+ s", watcher.heading())
    with served(metrics, port):
        watcher.ask()
        assert "no answer" not in watcher.heading()


def test_watch_of_nothing_or_of_something_else_is_told_on_one_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert streamkd(monkeypatch, "watch", f"127.0.0.1:{free_port()}", "--once") == 2
    assert "name its http.host and http.port" in " ".join(capsys.readouterr().err.split())
    assert streamkd(monkeypatch, "watch", "nonsense://", "--once") == 2
    with served(others()) as server, pytest.raises(ConfigError, match="it gives other metrics"):
        Watcher(f"127.0.0.1:{server.port}").ask()


def others() -> Metrics:
    """Return metrics of some other program, which call their own what we call ours."""
    made = metrics_of(lively())
    made.registry = type(made.registry)()
    Gauge("state", "", registry=made.registry)
    Gauge("teacher", "", ["x"], registry=made.registry).labels(x="a").set(1)
    return made


def test_watch_goes_on_when_another_program_has_taken_the_port() -> None:
    metrics, port = metrics_of(lively()), free_port()
    learned(metrics)
    watcher = Watcher(f"127.0.0.1:{port}")
    with served(metrics, port):
        standing = watcher.ask()
    with served(others(), port):
        assert watcher.ask() == replace(standing, state="no answer", speed=0.0)
    assert re.search(r"no answer for \d+ s \(it gives other metrics\)", watcher.heading())


def test_the_view_draws_before_the_first_record_and_after() -> None:
    metrics, reader, screen = metrics_of(lively()), Reader(), io.StringIO()
    console = Console(file=screen, width=100)
    view = View(
        console,
        lambda: reader.read(metrics.registry.collect(), time.time()),
        heading=lambda: "a made-up stream [1]",
        total=1600,
    )
    console.print(view.draw())
    learned(metrics)
    console.print(view.draw())
    before, after = screen.getvalue().split("streamkd")[1:]
    assert "a made-up stream [1]" in before
    assert "0/1600" in before
    assert "1600/1600" in after

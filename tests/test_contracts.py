"""Every built-in part passes the checks that authors of plug-ins are given."""

import csv
import gzip
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from runners.feeds import Feed
from runners.feeds.conformance import LAWS, Law, Row, Stand
from runners.feeds.drifting import drifting
from runners.feeds.files import text_file
from streamkd import adapters, capacity, drift, features, losses, per_record, replay, schedules
from streamkd.parts import public_functions
from streamkd.testing import (
    check_adapter,
    check_capacity,
    check_detector,
    check_feature_loss,
    check_feed,
    check_loss,
    check_replay,
    check_schedule,
)


@pytest.mark.parametrize("name", sorted(public_functions(losses)))
@pytest.mark.parametrize("classes", [2, 5])
def test_losses(name: str, classes: int) -> None:
    check_loss(public_functions(losses)[name], classes)


@pytest.mark.parametrize("name", sorted(public_functions(per_record)))
@pytest.mark.parametrize("classes", [2, 5])
def test_temperatures_of_records(name: str, classes: int) -> None:
    check_loss(lambda *said: losses.kd(*said[:3], public_functions(per_record)[name](*said)), classes)


@pytest.mark.parametrize("name", sorted(public_functions(features)))
@pytest.mark.parametrize("shape", [(6, 8), (8, 3, 4)])
def test_feature_losses(name: str, shape: tuple[int, ...]) -> None:
    check_feature_loss(public_functions(features)[name], shape)


@pytest.mark.parametrize("name", sorted(public_functions(adapters)))
def test_adapters(name: str) -> None:
    shapes = [(6, 3, 4), (8, 3, 4)] if name == "convolution" else [(6, 4), (6, 8)]
    check_adapter(public_functions(adapters)[name], *shapes)


@pytest.mark.parametrize("name", sorted(public_functions(capacity)))
def test_capacities(name: str) -> None:
    check_capacity(public_functions(capacity)[name])


@pytest.mark.parametrize("name", sorted(public_functions(schedules)))
def test_schedules(name: str) -> None:
    make = public_functions(schedules)[name]
    check_schedule(make(0.5) if name == "constant" else make())


@pytest.mark.parametrize("name", sorted(public_functions(drift)))
def test_detectors(name: str) -> None:
    check_detector(public_functions(drift)[name])


@pytest.mark.parametrize("name", sorted(public_functions(replay)))
def test_replay(name: str) -> None:
    check_replay(partial(replay.ReplayBuffer, 16, evict=public_functions(replay)[name], seed=3))


def test_a_stateful_schedule_is_caught() -> None:
    calls: list[int] = []

    def counting(_: schedules.Signals) -> float:
        calls.append(1)
        return float(len(calls))

    with pytest.raises(AssertionError, match="schedules hold no state"):
        check_schedule(counting)


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "jsonl.gz", "drifting"])
def test_feeds(kind: str, tmp_path: Path) -> None:
    def make() -> Feed:
        if kind == "drifting":
            return drifting(records=100, seed=2)
        return text_file(path, kind=kind.split(".", maxsplit=1)[0], label="y", max_classes=5, refuse=lambda _: None)

    path = tmp_path / f"data.{kind}"
    rows = [(i, i * 0.5, "abc"[i % 3]) for i in range(60)]
    if kind.startswith("csv"):
        text = "a,b,y\n" + "".join(f"{a},{b},{y}\n" for a, b, y in rows)
    else:
        text = "".join(f'{{"a": {a}, "b": {b}, "y": "{y}"}}\n' for a, b, y in rows)
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    check_feed(make)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_files_keep_the_laws_of_feeds(law: Law, kind: str, tmp_path: Path) -> None:
    def publish(rows: Sequence[Row]) -> None:
        with path.open("a", encoding="utf-8", newline="") as file:
            if kind == "csv":
                writer = csv.DictWriter(file, list(rows[0]))
                if not file.tell():
                    writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(f"{json.dumps(row)}\n" for row in rows)

    path = tmp_path / "data"
    spoilt = {"a": "two", "b": 1, "y": "a", "id": "spoilt"}
    law(
        Stand(
            open=partial(text_file, path, kind=kind, label="y", id="id", max_classes=5),
            publish=publish,
            spoil=lambda: publish([spoilt]),
            follows=False,
        )
    )

"""When a record came to be: read from a column, or told by the broker; never a reason to lose the record."""

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_commands import streamkd

from runners.feeds.decode import YEAR_2000, moment
from runners.feeds.delayed import Delayed
from runners.feeds.files import text_file
from runners.feeds.joined import Joined
from runners.feeds.rows import table_file
from runners.feeds.tail import tail
from streamkd import Batch
from streamkd.errors import ConfigError

MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2999, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001 - the zone is given
ZONES = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
COMMON: dict[str, Any] = {"label": "y", "time": "at", "max_classes": 5, "refuse": pytest.fail}


def polled(feed: Any) -> Batch:
    batch = feed.poll(16)
    feed.close()
    assert isinstance(batch, Batch)
    return batch


@given(MOMENTS, ZONES)
def test_a_moment_is_the_same_as_a_number_as_text_and_in_any_zone(at: datetime, zone: timezone) -> None:
    seconds = at.timestamp()
    assert moment(seconds) == moment(str(seconds)) == seconds
    for read in (
        at,
        at.isoformat(),
        f"{at.isoformat()} ",
        at.astimezone(zone).isoformat(),
        str(at.replace(tzinfo=None)),
    ):
        assert moment(read) == pytest.approx(seconds, abs=1e-6)


@given(st.one_of(st.none(), st.text(), st.floats(), st.integers(), st.lists(st.integers()), st.booleans()))
def test_whatever_a_cell_holds_is_a_moment_of_our_age_or_none_at_all(cell: object) -> None:
    seconds = moment(cell)
    assert math.isnan(seconds) or seconds >= YEAR_2000


@pytest.mark.parametrize("cell", ["", "soon", "17", 0, 1_767_225_600_000, "1_767_225_600", "2026-13-01", 10**400])
def test_counters_milliseconds_and_words_are_no_moments(cell: object) -> None:
    assert math.isnan(moment(cell))


def test_the_column_is_no_feature_and_a_record_without_a_time_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("a,at,y\n1,2026-01-01T00:00:00Z,x\n2,soon,x\n3,,x\n", encoding="utf-8")
    batch = polled(text_file(path, kind="csv", **COMMON))
    assert batch.x.tolist() == [[1], [2], [3]]
    assert batch.times[0] == datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    assert [math.isnan(at) for at in batch.times] == [False, True, True]


def test_a_feed_without_times_gives_none(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("a,y\n1,x\n", encoding="utf-8")
    assert polled(text_file(path, kind="csv", **{**COMMON, "time": ""})).times == ()


def test_a_table_may_hold_dates_of_its_own_type(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    at = datetime(2026, 1, 1, 12, tzinfo=UTC)
    table = pytest.importorskip("pyarrow").Table.from_pylist([{"a": 1.0, "at": at, "y": "x"}])
    parquet.write_table(table, tmp_path / "d.parquet")
    assert polled(table_file(tmp_path / "d.parquet", kind="parquet", **COMMON)).times == (at.timestamp(),)


def test_lines_that_come_one_by_one_have_times_too(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(json.dumps({"a": 1, "at": 1_767_225_600, "y": "x"}) + "\n", encoding="utf-8")
    assert polled(tail(tmp_path / "log", **COMMON)).times == (1_767_225_600.0,)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"time": "att"}, r"feed\.time = 'att': no such column .* did you mean 'at'\?"),
        ({"time": "y"}, r"feed\.time = 'y': feed\.label has it, too"),
        ({"ignore": ("at",)}, r"feed\.ignore = 'at': feed\.time has it, too"),
    ],
)
def test_a_time_that_is_not_there_or_has_two_uses_is_refused(tmp_path: Path, options: Any, told: str) -> None:
    path = tmp_path / "d.csv"
    path.write_text("a,at,y\n1,1,x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=told):
        text_file(path, kind="csv", **{**COMMON, **options})


def test_check_shows_times_as_they_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Milliseconds, or a column that is no time, are found out before the first run."""
    path = tmp_path / "d.csv"
    path.write_text("a,at,y\n1,1767225600,x\n2,1767225600000,z\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    settings = [f"--set=feed.{setting}" for setting in (f"path={path}", "label=y", "time=at")]
    assert streamkd(monkeypatch, "check", "default", *settings) == 0
    shown = capsys.readouterr().out
    assert "2026-01-01 00:00:00Z" in shown
    assert "(unreadable)" in shown


def test_a_record_keeps_its_time_when_its_label_comes_by_another_way(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("a,at,id\n1,2026-01-01,r1\n", encoding="utf-8")
    (tmp_path / "y.csv").write_text("id,y\nr1,x\n", encoding="utf-8")
    records = text_file(tmp_path / "d.csv", kind="csv", **{**COMMON, "label": "", "id": "id"})
    labels = text_file(tmp_path / "y.csv", kind="csv", **{**COMMON, "time": "", "id": "id", "labels_only": True})
    joined = Joined(records, labels, capacity=10, seconds=0, clock=lambda: 0.0, refuse=pytest.fail)
    assert polled(joined).times == (1_767_225_600.0,)
    timed = text_file(tmp_path / "d.csv", kind="csv", **{**COMMON, "label": "id"})
    assert polled(Delayed(timed, 1)).times == (1_767_225_600.0,)

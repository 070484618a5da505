"""What dashboard-linter asks of dashboards, and more; and that the files are what the code makes."""

import json
import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from test_commands import streamkd

from monitoring.dashboards.__main__ import written
from monitoring.dashboards.ask import panels, questions

MONITORING = Path(__file__).parents[1] / "monitoring"
GOLDEN = Path(__file__).parent / "golden" / "metrics.txt"
BOARDS: dict[str, dict[str, Any]] = {
    file.stem: json.loads(file.read_text(encoding="utf-8")) for file in MONITORING.glob("grafana/dashboards/*.json")
}
SELECTED = 'job=~"$job", instance=~"$instance"'
SELECTOR = re.compile(r"\b(?P<name>(?:streamkd|process|python)_\w+|ALERTS)(?:\{(?P<labels>[^}]*)\})?")
NOT_RATED = {"streamkd_checkpoint_restores_total": "a restore comes before the first scrape, so no rise is ever seen"}
ON_NO_PANEL = {"streamkd_steps_total": "the time of a batch and the records in one say more"}


@pytest.fixture(params=sorted(BOARDS))
def board(request: pytest.FixtureRequest) -> dict[str, Any]:
    return BOARDS[request.param]


def selectors(board: Mapping[str, Any]) -> list[re.Match[str]]:
    return [found for question in questions(board) for found in SELECTOR.finditer(question.expression)]


def family(series: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", series)


def test_the_files_are_byte_for_byte_what_the_code_makes() -> None:
    for name, text in written().items():
        file = MONITORING / "grafana" / "dashboards" / name
        assert file.read_text(encoding="utf-8") == text, f"{name}: make it again with python -m monitoring.dashboards"
    assert set(written()) == {f"{name}.json" for name in BOARDS}


def test_grafanas_own_model_knows_every_key(board: dict[str, Any]) -> None:
    """The model drops keys that it does not know, so a misspelt one would not come back."""
    assert json.loads(JSONEncoder().encode(Dashboard.from_json(board))) == board


def test_the_data_source_is_chosen_by_whoever_looks(board: dict[str, Any]) -> None:
    first = board["templating"]["list"][0]
    assert (first["type"], first["name"], first["query"]) == ("datasource", "datasource", "prometheus")
    asked = [*panels(board), *(target for panel in panels(board) for target in panel["targets"])]
    asked += [*board["templating"]["list"][1:], *board["annotations"]["list"]]
    assert all(each["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for each in asked)


def test_job_and_instance_are_chosen_too_several_or_all(board: dict[str, Any]) -> None:
    variables = board["templating"]["list"][1:]
    assert [variable["name"] for variable in variables] == ["job", "instance"]
    for variable in variables:
        assert variable["query"].startswith("label_values(streamkd_build_info")
        assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".+")
        assert variable["refresh"] == 2, "asked again when the time shown changes"


def test_every_series_is_that_of_the_job_and_the_instance_chosen(board: dict[str, Any]) -> None:
    asked = [each for each in selectors(board) if each["name"] != "streamkd_build_info"]
    assert asked
    for each in asked:
        assert SELECTED in (each["labels"] or ""), each.string


def test_every_panel_says_what_it_is_and_what_to_do_when_it_looks_bad(board: dict[str, Any]) -> None:
    for panel in panels(board):
        assert panel["title"]
        assert len(panel["description"].split(". ")) >= 2, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
    titles = [panel["title"] for panel in panels(board)]
    assert len(set(titles)) == len(titles)


def test_alerts_named_in_descriptions_have_a_page(board: dict[str, Any]) -> None:
    for panel in panels(board):
        for name in re.findall(r"Streamkd\w+", panel["description"]):
            assert (MONITORING / "runbooks" / f"{name}.md").is_file(), name


def test_counters_are_rated_over_an_interval_that_grafana_chooses(board: dict[str, Any]) -> None:
    for question in questions(board):
        for found in SELECTOR.finditer(question.expression):
            if re.search(r"_(total|sum|count|bucket)$", found["name"]) and found["name"] not in NOT_RATED:
                before, after = question.expression[: found.start()], question.expression[found.end() :]
                assert re.search(r"\b(rate|increase)\($", before), question
                assert after.startswith("[$__rate_interval]"), question
        ranges = set(re.findall(r"\[([^\]]+)\]", question.expression))
        assert ranges <= {"$__rate_interval", "1h:15s"}, question


def test_dashboards_ask_for_what_the_golden_list_promises_and_show_all_of_it() -> None:
    golden = {line.split()[0] for line in GOLDEN.read_text(encoding="utf-8").splitlines()}
    ours = {found["name"] for board in BOARDS.values() for found in selectors(board) if "streamkd_" in found["name"]}
    shown = {name if name in golden else family(name) for name in ours}
    assert shown - golden == set()
    assert golden - shown == set(ON_NO_PANEL)


def test_drifts_swaps_and_restarts_are_marked_on_every_panel(board: dict[str, Any]) -> None:
    marks = {mark["name"]: mark["expr"] for mark in board["annotations"]["list"] if mark["enable"]}
    assert set(marks) == {"Drift", "Swap", "Restart"}


def test_nobody_changes_a_dashboard_by_accident_and_no_panel_covers_another(board: dict[str, Any]) -> None:
    assert board["editable"] is False
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for one, other in combinations([panel["gridPos"] for panel in board["panels"]], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in board["panels"])


def test_overview_fits_one_screen_and_distillation_has_a_row_of_its_own() -> None:
    board = BOARDS["overview"]
    assert max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"]) <= 24
    assert "Distillation health" in [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    rows = [panel["title"] for panel in BOARDS["detail"]["panels"] if panel["type"] == "row"]
    assert len(rows) == 10


def test_a_daemon_that_does_not_answer_is_shown_in_red() -> None:
    """Grafana gives the lowest colour to what is said where there is no value."""
    state, learned, *_ = panels(BOARDS["overview"])
    for panel in (state, learned):
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0] == {"color": "red", "value": None}


def test_the_folder_is_written_whole_and_never_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert streamkd(monkeypatch, "dashboards", str(tmp_path / "watch")) == 0
    written_files = {file.relative_to(tmp_path / "watch") for file in (tmp_path / "watch").rglob("*") if file.is_file()}
    expected = {"prometheus", "alertmanager", "grafana", "runbooks", "compose.yml", "README.md"}
    assert {file.parts[0] for file in written_files} == expected
    assert {Path("grafana/dashboards/overview.json"), Path("runbooks/StreamkdDown.md")} <= written_files
    capsys.readouterr()
    assert streamkd(monkeypatch, "dashboards", str(tmp_path / "watch")) == 2
    assert "name another folder" in " ".join(capsys.readouterr().err.split())
    assert streamkd(monkeypatch, "dashboards", "/dev/null/watch") == 2

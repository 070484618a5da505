"""Rules that Prometheus takes, alerts that fire and stay quiet, and a page for each."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from stack import needs

from runners.settings import Configuration
from streamkd.settings import keys

MONITORING = Path(__file__).parents[1] / "monitoring"
RULES = MONITORING / "prometheus" / "rules"
GOLDEN = Path(__file__).parent / "golden" / "metrics.txt"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in read(RULES / name)["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}


@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "--lint=all", "--lint-fatal", *(f"rules/{file.name}" for file in RULES.glob("*.yml"))),
        pytest.param(
            ("test", "rules", *(f"tests/{file.name}" for file in (MONITORING / "prometheus" / "tests").glob("*.yml"))),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["configuration", "rules", "tests of rules"],
)
def test_promtool_is_content_with(check: tuple[str, ...]) -> None:
    needs("promtool", "prometheus")
    done = subprocess.run(
        ["promtool", *check], cwd=MONITORING / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_amtool_is_content_with_the_example_for_alertmanager() -> None:
    needs("amtool", "prometheus-alertmanager")
    done = subprocess.run(
        ["amtool", "check-config", MONITORING / "alertmanager" / "alertmanager.yml"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_what_is_the_case_and_where_to_read_on(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert "{{" not in rule["annotations"]["summary"]
    assert "{{" in rule["annotations"]["description"]
    assert rule["annotations"]["runbook_url"] == f"runbooks/{name}.md"
    page = (MONITORING / rule["annotations"]["runbook_url"]).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    assert headings == [name, "Meaning", "Impact", "Diagnosis", "Mitigation"]


def test_there_is_no_page_without_an_alert_and_none_that_leads_nowhere() -> None:
    pages = list((MONITORING / "runbooks").iterdir())
    assert {page.stem for page in pages} == set(ALERTS)
    for page in pages:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"


def test_settings_that_pages_and_panels_advise_to_change_exist() -> None:
    known = {*keys(Configuration), "drift.detector.delta", "feed.on_position_lost"}
    known |= {f"feed.{name}" for name in ("time", "categorical", "ignore", "missing", "classes", "start")}
    tables = "|".join({name.split(".")[0] for name in known if "." in name})
    for file in [*(MONITORING / "runbooks").glob("*.md"), *(MONITORING / "grafana" / "dashboards").glob("*.json")]:
        named = set(re.findall(rf"(?<![\w/.-])(?:{tables})\.[a-z_.]*[a-z_]", file.read_text(encoding="utf-8")))
        assert named <= known, file.name


def test_every_alert_is_tried_to_fire_and_to_stay_quiet() -> None:
    fires: set[str] = set()
    quiet: set[str] = set()
    for file in (MONITORING / "prometheus" / "tests").glob("*.yml"):
        for test in read(file)["tests"]:
            for expected in test["alert_rule_test"]:
                (fires if expected["exp_alerts"] else quiet).add(expected["alertname"])
    assert fires == quiet == set(ALERTS)


def test_every_number_of_an_alert_is_among_the_thresholds_and_each_of_these_is_used() -> None:
    expressions = [rule["expr"] for rule in ALERTS.values()]
    given = {rule["record"] for rule in rules("thresholds.yml")}
    assert {name for text in expressions for name in re.findall(r"scalar\(([\w:]+)\)", text)} == given
    compared = {number for text in expressions for number in re.findall(r"(?:[<>]|==)\s*([\d.]+)", text)}
    assert compared <= {"0", "1"}


def test_rules_ask_only_for_what_is_measured_or_recorded() -> None:
    golden = {line.split()[0] for line in GOLDEN.read_text(encoding="utf-8").splitlines()}
    recorded = {rule["record"] for name in ("recording.yml", "thresholds.yml") for rule in rules(name)}
    for rule in [*ALERTS.values(), *rules("recording.yml")]:
        asked = set(re.findall(r"(?<![\w:])[\w:]*streamkd[\w:]+(?=[\s{)\[]|$)", rule["expr"]))
        families = {re.sub(r"_(bucket|count)$", "", name) for name in asked}
        assert families <= golden | recorded, rule


def test_what_is_mounted_is_where_the_programs_look_for_it() -> None:
    services = read(MONITORING / "compose.yml")["services"]
    assert set(services) == {"streamkd", "prometheus", "alertmanager", "grafana"}
    mounted = [volume.split(":") for service in services.values() for volume in service["volumes"]]
    assert all((MONITORING / source).is_dir() for source, *_ in mounted if source.startswith("./"))
    (provider,) = read(MONITORING / "grafana/provisioning/dashboards/streamkd.yml")["providers"]
    assert provider["options"]["path"] in {target for _, target, *_ in mounted}
    scraped = read(MONITORING / "prometheus" / "prometheus.yml")
    assert scraped["scrape_configs"][0]["static_configs"] == [{"targets": ["streamkd:9464"]}]
    (source,) = read(MONITORING / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    assert source["url"] == "http://prometheus:9090"
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])

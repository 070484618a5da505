import time
from pathlib import Path
from urllib.parse import urlencode

import pytest
from stack import got, needs, prometheus
from test_commands import started, table, told


def asked(address: str, query: str) -> dict[str, float]:
    """Ask Prometheus; return the value of each series, by its peer or state."""
    answer = got(f"{address}/api/v1/query?{urlencode({'query': query})}")
    found = answer["data"]["result"] if answer else []
    return {
        series["metric"].get("peer", series["metric"].get("state", "")): float(series["value"][1]) for series in found
    }


@pytest.mark.slow
def test_a_real_prometheus_sees_the_cohort_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("prometheus", "prometheus")
    monkeypatch.chdir(tmp_path)
    table(Path("d.csv"), 60_000)
    settings = [f"--set={pair}" for pair in ("feed.path=d.csv", "feed.label=y", "http.port=0")]
    with started("run", "default", *settings) as daemon:
        target = told(daemon, "listening")["port"]
        Path("prometheus.yml").write_text(
            "global: {scrape_interval: 1s}\n"
            f"scrape_configs: [{{job_name: streamkd, static_configs: [{{targets: ['127.0.0.1:{target}']}}]}}]\n",
            encoding="utf-8",
        )
        with prometheus(Path("prometheus.yml"), tmp_path / "tsdb") as address:
            accuracy = "rate(streamkd_prequential_correct_total[10s]) / rate(streamkd_prequential_evaluated_total[10s])"
            seen: dict[str, float] = {}
            deadline = time.monotonic() + 30
            while len(seen) < 4 and time.monotonic() < deadline:
                time.sleep(0.5)
                seen = asked(address, accuracy)
            assert set(seen) == {"served", "quick", "middle", "steady"}
            assert all(0.5 < value <= 1 for value in seen.values())
            assert sum(asked(address, "streamkd_teacher").values()) == 1
            assert asked(address, "streamkd_state == 1") == {"running": 1}
            assert asked(address, "rate(streamkd_feed_records_total[10s]) > 0")

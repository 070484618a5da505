from pathlib import Path
from urllib.parse import urlencode

import pytest
from stack import got, needs, prometheus, waited
from test_commands import started, told


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
    endless = ("feed.kind=drifting", "feed.records=1_000_000_000", "http.port=0")
    with started("run", "default", *(f"--set={setting}" for setting in endless)) as daemon:
        target = told(daemon, "listening")["port"]
        Path("prometheus.yml").write_text(
            "global: {scrape_interval: 2s}\n"
            f"scrape_configs: [{{job_name: streamkd, static_configs: [{{targets: ['127.0.0.1:{target}']}}]}}]\n",
            encoding="utf-8",
        )
        with prometheus(Path("prometheus.yml"), tmp_path / "tsdb") as address:
            accuracy = "rate(streamkd_prequential_correct_total[20s]) / rate(streamkd_prequential_evaluated_total[20s])"
            seen: dict[str, float] = {}

            def learned() -> bool:
                """Say whether all have: at first there are no values, then some that are none, then low ones."""
                seen.clear()
                seen.update(asked(address, accuracy))
                return len(seen) == 4 and all(0.5 < value <= 1 for value in seen.values())

            assert waited(learned), seen
            assert set(seen) == {"served", "quick", "middle", "steady"}
            assert waited(lambda: sum(asked(address, "streamkd_teacher").values()) == 1)
            assert waited(lambda: asked(address, "streamkd_state == 1") == {"running": 1})
            assert waited(lambda: asked(address, "rate(streamkd_feed_records_total[20s]) > 0"))

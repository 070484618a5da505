"""Write both dashboards where Grafana is told to look for them."""

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from monitoring.dashboards.detail import detail
from monitoring.dashboards.kit import MONITORING
from monitoring.dashboards.overview import overview


def written() -> dict[str, str]:
    """Return the files: name -> text."""
    encoder = JSONEncoder(indent=1, sort_keys=True)
    return {f"{name}.json": encoder.encode(make()) + "\n" for name, make in MAKERS.items()}


MAKERS = {"overview": overview, "detail": detail}
if __name__ == "__main__":
    for name, text in written().items():
        (MONITORING / "grafana" / "dashboards" / name).write_text(text, encoding="utf-8")

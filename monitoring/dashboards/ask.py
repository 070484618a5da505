"""The questions a dashboard asks of Prometheus, asked as Grafana would: to prove that each has an answer."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

LABEL_VALUES = re.compile(r"label_values\((?P<of>.+), (?P<label>\w+)\)")
Series = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """One expression of a dashboard.

    Attributes:
        where: title of the panel, or name of the variable or of the annotation.
        expression: as written, variables and all.
        legend: likewise.
        instant: asked for now, rather than for the time shown.
    """

    where: str
    expression: str
    legend: str = ""
    instant: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """The time shown.

    Attributes:
        start, end: seconds since the epoch.
        step: seconds between two points.
        scrape: seconds between two scrapes, as Grafana's data source is told.
    """

    start: float
    end: float
    step: float
    scrape: float

    def fill(self, expression: str) -> str:
        """Return an expression with Grafana's variables filled in, everything selected."""
        rates = f"{max(self.step + self.scrape, 4 * self.scrape):g}s"
        for name, value in (("__rate_interval", rates), ("job", ".+"), ("instance", ".+")):
            expression = re.sub(rf"\$(\{{{name}\}}|{name}\b)", value, expression)
        return expression


def panels(board: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Return the panels of a dashboard, those inside folded rows included, rows left out."""
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels") or []
        else:
            yield panel


def questions(board: Mapping[str, Any]) -> Iterator[Question]:
    """Return all that a dashboard asks: panels, then variables, then annotations."""
    for panel in panels(board):
        for target in panel["targets"]:
            yield Question(panel["title"], target["expr"], target["legendFormat"], target["instant"])
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield Question(f"${variable['name']}", variable["query"])
    for annotation in board["annotations"]["list"]:
        yield Question(annotation["name"], annotation["expr"])


def ask(address: str, question: Question, window: Window) -> list[Any]:
    """Return the answer: series that have a value, or the values of a variable.

    Args:
        address: of Prometheus, without a path.
        question: of a dashboard.
        window: the time shown.

    Raises:
        OSError: Prometheus refused the question, or cannot be reached.
    """
    variable = LABEL_VALUES.fullmatch(question.expression)
    if variable is not None:
        about = {"match[]": window.fill(variable["of"]), "start": window.start, "end": window.end}
        values: list[Any] = _get(f"{address}/api/v1/label/{variable['label']}/values?{urlencode(about)}")
        return values
    expression = window.fill(question.expression)
    if question.instant:
        found = _get(f"{address}/api/v1/query?{urlencode({'query': expression, 'time': window.end})}")
    else:
        about = {"query": expression, "start": window.start, "end": window.end, "step": window.step}
        found = _get(f"{address}/api/v1/query_range?{urlencode(about)}")
    return [series for series in found["result"] if _drawn(series)]


def _drawn(series: Series) -> bool:
    """Return whether there is anything to see of a series; a share of nothing is NaN throughout."""
    points = series.get("values") or [series["value"]]
    return not all(math.isnan(float(value)) for _, value in points)


def _get(url: str) -> Any:
    with urlopen(url, timeout=10) as answer:  # noqa: S310 - the address of a Prometheus, given by whoever runs this
        return json.load(answer)["data"]

"""Panels, rows, variables and annotations: the few kinds that both dashboards are made of."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.models import dashboard as made
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    DataSourceRef,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    LineInterpolation,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)

MONITORING = Path(__file__).parents[1]
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
SELECTED = 'job=~"$job", instance=~"$instance"'
GREEN, ORANGE, RED = "green", "orange", "red"
Panel = timeseries.Panel | stat.Panel | statetimeline.Panel
AnyPanel = TypeVar("AnyPanel", timeseries.Panel, stat.Panel, statetimeline.Panel)
Query = tuple[str, str]
"""An expression, in which `$selected` stands for the job and the instance, and the legend of its series."""


def threshold(name: str) -> float:
    """Return the number that an alert hangs on: the lines drawn are those that alerts are raised at."""
    (group,) = yaml.safe_load((MONITORING / "prometheus/rules/thresholds.yml").read_text(encoding="utf-8"))["groups"]
    expressions = {rule["record"]: rule["expr"] for rule in group["rules"]}
    return float(expressions[f"streamkd:threshold:{name}"].removeprefix("vector(").removesuffix(")"))


def graph(
    title: str,
    unit: str,
    description: str,
    *queries: Query,
    size: tuple[int, int] = (8, 7),
    stacked: bool = False,
    blocks: bool = False,
    steps: bool = False,
    bounds: tuple[float | None, float | None] = (0, None),
    alert_above: float | None = None,
    alert_below: float | None = None,
) -> timeseries.Panel:
    """Make a panel of curves over time.

    Args:
        title: of the panel.
        unit: as Grafana calls it.
        description: what is shown, and what to do when it looks bad.
        queries: what is drawn.
        size: width of 24, and height.
        stacked: on top of one another.
        blocks: for events; each is as wide as the interval that Grafana rates over.
        steps: for values that hold until the next.
        bounds: of the axis, softly; None leaves it to the data.
        alert_above: draw a line there; an alert is raised above it.
        alert_below: likewise below it.
    """
    panel = _filled(timeseries.Panel(), title, unit, description, *queries, size=size)
    low, high = bounds
    panel.color_scheme(dashboard.FieldColor().mode(made.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
    panel.legend(
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(show_legend=True)
        .calcs([])
    )
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    panel.show_points(VisibilityMode.NEVER).line_width(1).fill_opacity(0)
    if low is not None:
        panel.axis_soft_min(low)
    if high is not None:
        panel.axis_soft_max(high)
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(40)
    if blocks:
        panel.fill_opacity(60)
    if steps or blocks:
        panel.line_interpolation(LineInterpolation.STEP_AFTER)
    lower = [("transparent", None)] if alert_below is None else [(RED, None), ("transparent", alert_below)]
    upper = [] if alert_above is None else [(RED, alert_above)]
    if (alert_above, alert_below) != (None, None):
        panel.thresholds(_steps(*lower, *upper))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    return panel


def figure(
    title: str,
    unit: str,
    description: str,
    *queries: Query,
    size: tuple[int, int] = (4, 4),
    colours: Sequence[tuple[str, float | None]] = ((GREEN, None),),
    named: bool = False,
    empty: str = "none",
    decimals: int | None = None,
    words: tuple[str, str] | None = None,
    curve: bool = True,
) -> stat.Panel:
    """Make a panel of one large figure, or of a name.

    Args:
        title: of the panel.
        unit: as Grafana calls it.
        description: what is shown, and what to do when it looks bad.
        queries: what is shown.
        size: width of 24, and height.
        colours: and from which value on; None for the lowest.
        named: show the name of the series there is now, rather than its value.
        empty: shown where there is no value.
        decimals: of the figure; None leaves it to Grafana.
        words: for 0, which is bad, and for 1, which is well.
        curve: draw its course behind it.
    """
    panel = _filled(stat.Panel(), title, unit, description, *queries, size=size, now=named)
    panel.color_scheme(dashboard.FieldColor().mode(made.FieldColorModeId.THRESHOLDS)).thresholds(_steps(*colours))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(values=False).fields(""))
    panel.graph_mode(BigValueGraphMode.AREA if curve and not named else BigValueGraphMode.NONE)
    panel.color_mode(BigValueColorMode.VALUE)
    panel.text_mode(BigValueTextMode.NAME if named else BigValueTextMode.AUTO).no_value(empty)
    if decimals is not None:
        panel.decimals(decimals)
    if words is not None:
        panel.mappings([_meaning(words, (RED, GREEN))])
    return panel


def timeline(
    title: str,
    unit: str,
    description: str,
    *queries: Query,
    words: tuple[str, str],
    size: tuple[int, int] = (8, 7),
    colours: tuple[str, str] = ("transparent", GREEN),
) -> statetimeline.Panel:
    """Make a panel of what was the case when: a bar for each series, by whether it is 0 or 1.

    Args:
        title: of the panel.
        unit: as Grafana calls it.
        description: what is shown, and what to do when it looks bad.
        queries: what is shown.
        words: for 0 and for 1.
        size: width of 24, and height.
        colours: for 0 and for 1.
    """
    panel = _filled(statetimeline.Panel(), title, unit, description, *queries, size=size)
    panel.mappings([_meaning(words, colours)])
    panel.color_scheme(dashboard.FieldColor().mode(made.FieldColorModeId.THRESHOLDS))
    panel.thresholds(_steps((colours[0], None), (colours[1], 1)))
    panel.show_value(VisibilityMode.NEVER).merge_values(merge_values=True).row_height(0.8)
    panel.legend(
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(show_legend=False)
        .calcs([])
    )
    return panel


def assemble(
    uid: str, title: str, description: str, rows: Sequence[tuple[str, Sequence[Panel]]], *, other: tuple[str, str]
) -> made.Dashboard:
    """Put panels, row by row, into a dashboard with its variables, annotations and a link.

    Args:
        uid: in its address.
        title: of the dashboard.
        description: of the dashboard.
        rows: heading, or empty for none, and panels from left to right.
        other: uid and title of the dashboard to link to.
    """
    board = dashboard.Dashboard(title).uid(uid).description(description).tags(["streamkd"]).readonly()
    board.time("now-1h", "now").refresh("10s").tooltip(made.DashboardCursorSync.CROSSHAIR).timezone("browser")
    for variable in _variables():
        board.with_variable(variable)
    for annotation in _annotations():
        board.annotation(annotation)
    link = dashboard.DashboardLink(other[1]).type(made.DashboardLinkType.LINK).url(f"/d/{other[0]}")
    board.link(link.include_vars(include_vars=True).keep_time(keep_time=True))
    for heading, panels in rows:
        if heading:
            board.with_row(dashboard.Row(heading))
        for panel in panels:
            board.with_panel(panel)
    built = board.build()
    for number, each in enumerate(built.panels or [], 1):
        each.id_val = number
    return built


def _filled(
    panel: AnyPanel, title: str, unit: str, description: str, *queries: Query, size: tuple[int, int], now: bool = False
) -> AnyPanel:
    panel.title(title).unit(unit).description(description).datasource(SOURCE)
    panel.span(size[0]).height(size[1])
    for letter, (expression, legend) in zip("ABCDEFGH", queries, strict=False):
        asked = prometheus.Dataquery().expr(expression.replace("$selected", SELECTED)).legend_format(legend)
        panel.with_target((asked.instant() if now else asked.range()).ref_id(letter).datasource(SOURCE))
    return panel


def _meaning(words: tuple[str, str], colours: tuple[str, str]) -> made.ValueMap:
    return made.ValueMap(
        options={
            str(value): made.ValueMappingResult(text=words[value], color=colours[value], index=value)
            for value in (0, 1)
        }
    )


def _steps(*steps: tuple[str, float | None]) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(made.ThresholdsMode.ABSOLUTE)
        .steps([made.Threshold(value=value, color=colour) for colour, value in steps])
    )


def rate(counter: str, *by: str, where: str = "") -> str:
    """Return what a counter rises by, each second, `where` its labels are so."""
    return f"sum by ({', '.join(by)}) (rate(streamkd_{counter}{{{_labels(where)}}}[$__rate_interval]))"


def events(counter: str, *by: str) -> str:
    """Return how often something happened of late; Prometheus extrapolates, and what happens is whole."""
    return f"round(sum by ({', '.join(by)}) (increase(streamkd_{counter}{{$selected}}[$__rate_interval])))"


def share(part: str, whole: str, *by: str, where: str = "") -> str:
    """Return what share one counter's rise is of another's."""
    return f"{rate(part, *by, where=where)} / {rate(whole, *by, where=where)}"


def mean(observed: str, *by: str, where: str = "") -> str:
    """Return the mean of what a summary or a histogram has observed of late."""
    return share(f"{observed}_sum", f"{observed}_count", *by, where=where)


def quantile(which: float, observed: str, where: str = "") -> str:
    """Return a quantile of what a histogram has observed of late."""
    return f"histogram_quantile({which}, {rate(f'{observed}_bucket', 'le', where=where)})"


def level(gauge: str, *by: str) -> str:
    """Return a gauge, the highest where there are several."""
    return f"max by ({', '.join(by)}) (streamkd_{gauge}{{$selected}})"


def lowest(gauge: str, *by: str) -> str:
    """Return a gauge, the lowest where there are several: one instance that is unwell is not hidden by the others."""
    return f"min by ({', '.join(by)}) (streamkd_{gauge}{{$selected}})"


def age(moment: str, *by: str) -> str:
    """Return how long ago a moment was, the longest where there are several; nothing where it never was."""
    return f"time() - min by ({', '.join(by)}) (streamkd_{moment}_timestamp_seconds{{$selected}} > 0)"


def _labels(where: str) -> str:
    return f"$selected, {where}" if where else "$selected"


def _variables() -> list[dashboard.DatasourceVariable | dashboard.QueryVariable]:
    def asked(name: str, label: str, query: str) -> dashboard.QueryVariable:
        variable = dashboard.QueryVariable(name).label(label).datasource(SOURCE).query(query).definition(query)
        variable.refresh(made.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(made.VariableSort.ALPHABETICAL_ASC)
        return variable.multi(multi=True).include_all(include_all=True).all_value(".+")

    return [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        asked("job", "Job", "label_values(streamkd_build_info, job)"),
        asked("instance", "Instance", 'label_values(streamkd_build_info{job=~"$job"}, instance)'),
    ]


def _annotations() -> list[dashboard.AnnotationQuery]:
    """Return the marks on every panel. Values that are moments, in milliseconds, place the mark exactly."""

    def mark(name: str, colour: str, expression: str, text: str, *, exact: bool) -> dashboard.AnnotationQuery:
        return (
            dashboard.AnnotationQuery()
            .name(name)
            .datasource(SOURCE)
            .enable(enable=True)
            .icon_color(colour)
            .expr(expression.replace("$selected", SELECTED))
            .title_format(name)
            .text_format(text)
            .use_value_for_time(use_value_for_time=exact)
        )

    return [
        mark(
            "Drift",
            "red",
            "streamkd_drift_last_detection_timestamp_seconds{$selected} * 1000 > 0",
            "{{detector}} on {{signal}}, {{instance}}",
            exact=True,
        ),
        mark(
            "Swap",
            "blue",
            f"{events('role_swaps_total', 'instance', 'reason')} > 0",
            "{{reason}}, {{instance}}",
            exact=False,
        ),
        mark(
            "Restart",
            "purple",
            "process_start_time_seconds{$selected} * 1000",
            "{{instance}}",
            exact=True,
        ),
    ]

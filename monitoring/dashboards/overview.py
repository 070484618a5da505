"""Overview: alive, keeping up, accurate, still teaching one another, recovered from the last drift? On one screen."""

from grafana_foundation_sdk.models import dashboard

from monitoring.dashboards import shared
from monitoring.dashboards.kit import GREEN, ORANGE, RED, Panel, age, assemble, figure, graph, rate, threshold

STATE = (
    'max by (state) (2 * (streamkd_state{$selected, state="running"} == 1)'
    ' or 0 * (streamkd_state{$selected, state=~"failed|stopped"} == 1) or (streamkd_state{$selected} == 1))'
)
"""2 for well, 1 for not yet or not any more, 0 for bad; the name of what is so is in the label."""


def overview() -> dashboard.Dashboard:
    """Make it: 24 rows of the grid high, which is what a screen of 1080 lines shows."""
    right_answers = rate("prequential_correct_total", "peer", where='peer!="served"')
    now: list[Panel] = [
        figure(
            "State",
            "none",
            "What the process is doing; running is well. Down or failed: see StreamkdDown. Restoring for minutes: a "
            "large checkpoint, or a feed that is slow to find its place.",
            (STATE, "{{state}}"),
            named=True,
            empty="down",
            colours=((RED, None), (ORANGE, 1), (GREEN, 2)),
        ),
        figure(
            "Learned",
            "recps",
            "Labelled records learned each second. At zero while records come in, their labels do not: see Detail, "
            "Labels.",
            (rate("trained_records_total", "job"), ""),
            colours=((RED, None), (GREEN, 0.001)),
        ),
        figure(
            "Waiting in the feed",
            "short",
            "Records that the feed has and has not given, where it can tell. Rising for long: see StreamkdLagGrowing.",
            ("sum(streamkd_feed_lag_records{$selected})", ""),
            empty="not known",
            colours=((GREEN, None),),
        ),
        figure(
            "Served accuracy",
            "percentunit",
            "Share of right answers of the answer served, before learning. Lower than usual: look below for a drift, "
            "and whether it recovers.",
            (shared.SERVED_ACCURACY, ""),
        ),
        figure(
            "Best peer",
            "none",
            "The most accurate peer of the moment. The served answer leans on it. If it is always the same one, the "
            "others may not be worth their time.",
            (f"topk(1, {right_answers})", "{{peer}}"),
            named=True,
        ),
        figure(
            "Last checkpoint",
            "s",
            "How long ago the newest whole checkpoint was made: what a crash would repeat. Old, with records learned "
            "since: see StreamkdCheckpointStale.",
            (age("checkpoint_last_success", "job"), ""),
            empty="none since the start",
            colours=((GREEN, None), (ORANGE, threshold("checkpoint_age_seconds"))),
            decimals=0,
            curve=False,
        ),
    ]
    course: list[Panel] = [shared.accuracy((12, 7)), shared.records((6, 7)), shared.busy((6, 7))]
    teaching: list[Panel] = [
        shared.agreement((6, 6)),
        shared.divergence((6, 6)),
        shared.transfer((6, 6)),
        shared.office((6, 6)),
    ]
    world: list[Panel] = [
        shared.drifts((6, 5)),
        shared.shortfall((6, 5)),
        shared.swaps((6, 5)),
        graph(
            "Alerts that fire",
            "short",
            "Alerts of streamkd that are firing, by name. Each has a page of its name in the runbooks. Needs the rules "
            "of this folder in Prometheus.",
            (
                'count by (alertname) (ALERTS{$selected, alertname=~"Streamkd.*", alertstate="firing"})',
                "{{alertname}}",
            ),
            size=(6, 5),
            stacked=True,
            steps=True,
        ),
    ]
    return assemble(
        "streamkd-overview",
        "streamkd: overview",
        "Is it alive, is it keeping up, is it accurate and who is best, are the peers still teaching one another, did "
        "the world drift and did the cohort recover?",
        [("", now), ("", course), ("Distillation health", teaching), ("Drift and recovery", world)],
        other=("streamkd-detail", "Detail"),
    )

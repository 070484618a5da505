"""Panels that both dashboards show."""

from grafana_foundation_sdk.builders import statetimeline, timeseries

from monitoring.dashboards.kit import events, graph, level, mean, rate, share, threshold, timeline

Size = tuple[int, int]
SERVED_ACCURACY = share("prequential_correct_total", "prequential_evaluated_total", "job", where='peer="served"')
SHORTFALL = f"clamp_min(max_over_time(({SERVED_ACCURACY})[1h:15s]) - ({SERVED_ACCURACY}), 0)"


def accuracy(size: Size) -> timeseries.Panel:
    """Return the honest score of everyone."""
    return graph(
        "Accuracy, before learning",
        "percentunit",
        "Share of right answers, each given before its label was known, by peer and for the answer served. "
        "The served line should be at or near the top. All fall at a drift mark: wait for the cohort to recover; they "
        "stay down: see the runbook of StreamkdAccuracyDropped. One falls alone: see StreamkdPeerLagging.",
        (share("prequential_correct_total", "prequential_evaluated_total", "peer"), "{{peer}}"),
        size=size,
        bounds=(None, 1),
    )


def records(size: Size) -> timeseries.Panel:
    """Return what came in, was learned and was refused."""
    return graph(
        "Records: received, learned, refused",
        "recps",
        "Learned follows received unless labels are missing or late (Detail, Labels). Nothing received: "
        "see StreamkdFeedStalled. Refused above zero: read the reasons in Detail, Errors and dead letters.",
        (rate("feed_records_total", "feed"), "received from {{feed}}"),
        (rate("trained_records_total", "job"), "learned"),
        (rate("dead_letter_records_total", "feed"), "refused from {{feed}}"),
        size=size,
    )


def busy(size: Size) -> timeseries.Panel:
    """Return how much of the time goes into what."""
    return graph(
        "Busy, by stage",
        "percentunit",
        "Share of the time spent in each stage of a batch; the rest is waiting for the feed. Near 100 % with records "
        "waiting, the machine is the limit: raise batch, lower replay.updates, or see StreamkdLagGrowing.",
        (rate("step_duration_seconds_sum", "phase"), "{{phase}}"),
        size=size,
        stacked=True,
        bounds=(0, 1),
    )


def agreement(size: Size) -> timeseries.Panel:
    """Return how often the peers say the same."""
    return graph(
        "Agreement",
        "percentunit",
        "Share of comparisons in which two peers gave the same answer. Between the lines is well. Above the upper "
        "they teach one another nothing (StreamkdPeersCollapsed): make them differ; below the lower they do not learn "
        "the same thing (StreamkdPeersDiverged).",
        (share("peer_agreed_total", "peer_compared_total", "job"), "agreement"),
        size=size,
        bounds=(None, 1),
        alert_above=threshold("agreement_high"),
        alert_below=threshold("agreement_low"),
    )


def divergence(size: Size) -> timeseries.Panel:
    """Return how far students are from their teachers."""
    return graph(
        "Divergence from the teachers",
        "none",
        "How far each student's answers are from its teachers', in nats. It jumps at a drift and falls as lessons are "
        "taken. At zero there is nothing left to teach; rising without a drift, a student does not follow: look at "
        "its alpha and its gradient norm.",
        (mean("distill_divergence", "student"), "{{student}}"),
        size=size,
    )


def transfer(size: Size) -> timeseries.Panel:
    """Return how much of what the teacher says is found in the students."""
    return graph(
        "Transfer efficiency",
        "percentunit",
        "Mutual information of teacher's and student's answers over the teacher's entropy: 1, the student knows all "
        "that the teacher says; 0, nothing. The teacher's own line is at 1. Low while agreement is high: one class "
        "rules. Low for one student: it does not listen (alpha) or cannot (capacity ratio).",
        (level("transfer_efficiency", "student"), "{{student}}"),
        size=size,
        bounds=(0, 1),
    )


def office(size: Size) -> statetimeline.Panel:
    """Return who taught when."""
    return timeline(
        "Teacher in office",
        "none",
        "Who teaches the others, over time. A change after a drift is as it should be. Changes all the time: "
        "see StreamkdRoleFlapping. A teacher that is not among the most accurate: look at roles.rule.",
        (level("teacher", "peer"), "{{peer}}"),
        words=("student", "teacher"),
        size=size,
    )


def swaps(size: Size) -> timeseries.Panel:
    """Return how often the teacher changed, and why."""
    return graph(
        "Swaps of the teacher, by reason",
        "short",
        "Changes of the teacher in office: after a drift, or in the course of things. Again and again, with "
        "few batches between them: see StreamkdRoleFlapping.",
        (events("role_swaps_total", "reason"), "{{reason}}"),
        size=size,
        blocks=True,
        stacked=True,
    )


def shortfall(size: Size) -> timeseries.Panel:
    """Return how far the served answer is below its best."""
    return graph(
        "Recovery: below the best of the last hour",
        "percentunit",
        "How far the served accuracy is below its best of the last hour. It jumps at a drift, and comes back as the "
        "cohort recovers. Above the line for an hour without coming back: see StreamkdAccuracyDropped.",
        (SHORTFALL, "served"),
        size=size,
        alert_above=threshold("accuracy_drop"),
    )


def drifts(size: Size) -> timeseries.Panel:
    """Return the alarms."""
    return graph(
        "Drifts found",
        "short",
        "Alarms of the drift detector. Each should go with a fall of accuracy that passes. Alarms without falls: "
        "a smaller drift.detector.delta; falls without alarms: a larger one (StreamkdDriftDetected says how).",
        (
            events("drift_detections_total", "detector", "signal"),
            "{{detector}} on {{signal}}",
        ),
        size=size,
        blocks=True,
    )

"""Detail: everything that is measured, in rows, for whoever wants to know why."""

from collections.abc import Sequence

from grafana_foundation_sdk.models import dashboard

from monitoring.dashboards import shared
from monitoring.dashboards.kit import (
    GREEN,
    RED,
    Panel,
    age,
    assemble,
    events,
    figure,
    graph,
    level,
    lowest,
    mean,
    quantile,
    rate,
    threshold,
    timeline,
)

THIRD, QUARTER, FIFTH = (8, 7), (6, 7), (5, 7)
REFUSED = rate("dead_letter_records_total", "feed")


def detail() -> dashboard.Dashboard:
    """Make it."""
    return assemble(
        "streamkd-detail",
        "streamkd: detail",
        "Everything that is measured, in rows: from the feed to the memory of the process.",
        [
            ("Feeds", _feeds()),
            ("Learning", _learning()),
            ("Mutual distillation", _distillation()),
            ("Drift and roles", _drift()),
            ("Labels", _labels()),
            ("Replay", _replay()),
            ("Compute", _compute()),
            ("Checkpoints", _checkpoints()),
            ("Errors and dead letters", _errors()),
            ("Runtime", _runtime()),
        ],
        other=("streamkd-overview", "Overview"),
    )


def _feeds() -> Sequence[Panel]:
    return [
        shared.records(FIFTH),
        graph(
            "Waiting in the feed",
            "short",
            "Records that the feed has and has not given, by partition, where it can tell. Above the line and rising: "
            "see StreamkdLagGrowing. One partition alone: its producer writes more than the others.",
            (level("feed_lag_records", "feed", "partition"), "{{feed}} {{partition}}"),
            size=FIFTH,
            alert_above=threshold("lag_records"),
        ),
        graph(
            "Silence",
            "s",
            "Time since the last record, of the instance that has waited longest. A saw of small teeth is well. A "
            "slope: nothing comes; above the line see StreamkdFeedStalled.",
            (age("feed_last_record_received", "feed"), "{{feed}}"),
            size=FIFTH,
            alert_above=threshold("feed_silence_seconds"),
        ),
        graph(
            "Age when learned",
            "s",
            "From the event to the end of its batch, where records tell (feed.time) or the broker does; all at once "
            "after a stand-still, then falling, is catching up. Above the line for half of them: see "
            "StreamkdRecordAgeHigh. Empty: nobody tells.",
            (quantile(0.5, "record_age_seconds"), "median"),
            (quantile(0.95, "record_age_seconds"), "95 %"),
            size=FIFTH,
            alert_above=threshold("record_age_seconds"),
        ),
        timeline(
            "Connected",
            "none",
            "Whether the feed can be read. Red at times: the connection breaks and is made again; the log says when. "
            "Red for ten minutes: see StreamkdFeedStalled.",
            (lowest("feed_connected", "feed"), "{{feed}}"),
            words=("not connected", "connected"),
            colours=(RED, GREEN),
            size=(4, 7),
        ),
    ]


def _learning() -> Sequence[Panel]:
    return [
        shared.accuracy((12, 8)),
        graph(
            "Weight in the served answer",
            "percentunit",
            "How much each peer counts in the answer served, by how right it was of late. A peer at zero for good "
            "helps nobody: see StreamkdPeerLagging.",
            (level("served_weight", "peer"), "{{peer}}"),
            size=(12, 8),
            stacked=True,
            bounds=(0, 1),
        ),
        graph(
            "Loss of the labels",
            "none",
            "What updates minimise of the error on labels, mean in nats. It jumps at a drift and falls again. Rising "
            "without a drift: a learning rate that is too large, or labels that turn into noise.",
            (mean("loss", "peer", where='component="hard"'), "{{peer}}"),
            size=QUARTER,
        ),
        graph(
            "Loss of the lessons",
            "none",
            "What updates minimise of the distance to the teachers. Above the loss of the labels for long, the lessons "
            "outweigh the labels: distillation.cap, or a lower alpha.",
            (mean("loss", "peer", where='component="soft"'), "{{peer}}"),
            size=QUARTER,
        ),
        graph(
            "Gradient norm",
            "none",
            "Size of the gradient before clipping. Near zero: the peer has stopped learning; growing without end: a "
            "learning rate that is too large. Then StreamkdLossNonFinite is not far.",
            (mean("gradient_norm", "peer"), "{{peer}}"),
            size=QUARTER,
        ),
        graph(
            "Answers scored",
            "recps",
            "Answers compared with their labels each second. Below the records received: labels are missing or late.",
            (rate("prequential_evaluated_total", "peer"), "{{peer}}"),
            size=QUARTER,
        ),
    ]


def _distillation() -> Sequence[Panel]:
    return [
        shared.agreement(QUARTER),
        shared.divergence(QUARTER),
        shared.transfer(QUARTER),
        shared.office(QUARTER),
        graph(
            "Temperature",
            "none",
            "How soft the lessons of each student are. High after a drift, lower as losses fall. Stuck at a bound: the "
            "bounds of distillation.temperature do not fit the losses of this stream.",
            (level("temperature", "peer"), "{{peer}}"),
            size=QUARTER,
            bounds=(None, None),
        ),
        graph(
            "Alpha, by pair",
            "none",
            "How much each student listens to each teacher. Zero for a pair whose teacher is not in office. Zero for "
            "all: nobody teaches, because nobody is better than another, or because the world has just drifted.",
            (level("alpha", "teacher", "student"), "{{teacher}} to {{student}}"),
            size=QUARTER,
        ),
        graph(
            "Capacity ratio",
            "none",
            "Parameters of each student over those of the teacher in office. It moves with swaps only. Far below 1, a "
            "student cannot hold all that it is taught: expect its transfer efficiency to stay low.",
            (level("capacity_ratio", "student"), "{{student}}"),
            size=QUARTER,
            steps=True,
        ),
        shared.swaps(QUARTER),
    ]


def _drift() -> Sequence[Panel]:
    return [
        shared.drifts(THIRD),
        shared.shortfall(THIRD),
        figure(
            "Since the last drift",
            "s",
            "Time since the last alarm. Short while accuracy is as ever: the detector is too eager. Never, while "
            "accuracy fell: it is too dull.",
            (f"time() - ({level('drift_last_detection_timestamp_seconds', 'detector', 'signal')} > 0)", "{{detector}}"),
            size=THIRD,
            empty="no drift yet",
            decimals=0,
            curve=False,
        ),
    ]


def _labels() -> Sequence[Panel]:
    return [
        graph(
            "Predictions that wait",
            "short",
            "Predictions whose label has not come. Rising to the line: labels are late or lost; beyond "
            "labels.pending_capacity the oldest are given up (StreamkdLabelBacklog).",
            (level("labels_pending", "job"), "waiting"),
            size=QUARTER,
            alert_above=threshold("labels_pending"),
        ),
        graph(
            "Labels that came late, or not",
            "recps",
            "Labels joined to their prediction, and predictions given up. Any given up: see StreamkdLabelBacklog.",
            (rate("labels_joined_total", "job"), "joined"),
            (rate("labels_expired_total", "job"), "given up"),
            size=QUARTER,
        ),
        graph(
            "Delay of labels",
            "s",
            "Time from a prediction to its label. Rising: the source of the labels falls behind; the cohort learns of "
            "a drift that much later.",
            (quantile(0.5, "label_delay_seconds"), "median"),
            (quantile(0.95, "label_delay_seconds"), "95 %"),
            size=QUARTER,
        ),
        graph(
            "Learned without a label",
            "recps",
            "Records that never have a label, learned from the answer served. Zero where all have labels, or may still "
            "get them. Far more than have labels, while accuracy falls: the cohort believes itself too much; raise "
            "distillation.confidence, or lower distillation.unlabelled.",
            (rate("taught_records_total", "job"), "learned"),
            size=QUARTER,
        ),
    ]


def _replay() -> Sequence[Panel]:
    return [
        graph(
            "Memory, filled",
            "percentunit",
            "Records remembered over those that can be. It fills once and stays full. It does not fill: no labelled "
            "records come.",
            (f"{level('replay_records', 'job')} / {level('replay_capacity_records', 'job')}", "filled"),
            size=THIRD,
            bounds=(0, 1),
        ),
        graph(
            "Priority of what is recalled",
            "none",
            "How hard the recalled records were when last learned. All high for long: the memory holds records that "
            "nobody can learn, of a world that is gone or with wrong labels.",
            (quantile(0.5, "replay_priority"), "median"),
            (quantile(0.95, "replay_priority"), "95 %"),
            size=THIRD,
        ),
        graph(
            "Age of what is recalled",
            "short",
            "How many records ago the recalled ones came. It falls at a drift, when the window shrinks to the present "
            "world. It does not: the detector has not seen the drift.",
            (quantile(0.5, "replay_age_records"), "median"),
            (quantile(0.95, "replay_age_records"), "95 %"),
            size=THIRD,
        ),
    ]


def _compute() -> Sequence[Panel]:
    return [
        shared.busy(QUARTER),
        graph(
            "Time of a batch, by stage",
            "s",
            "Mean time of each stage. It should stay flat however long the stream. Growing: a model or a tree that "
            "grows, or a machine that is shared with others.",
            (mean("step_duration_seconds", "phase"), "{{phase}}"),
            size=QUARTER,
            stacked=True,
        ),
        graph(
            "Slow steps",
            "s",
            "Time that learning takes in half of the batches, and at most in 95 and 99 of a hundred. The last far "
            "above the first: something else wants the machine, or checkpoints hold learning up.",
            *(
                (quantile(which, "step_duration_seconds", 'phase="learn"'), f"{100 * which:g} %")
                for which in (0.5, 0.95, 0.99)
            ),
            size=QUARTER,
        ),
        graph(
            "Records in a batch",
            "short",
            "Mean size of a batch. Below the setting of batch: the feed gives fewer at a time, so there is time to "
            "spare. At it, with records waiting: raise it.",
            (mean("batch_records", "job"), "mean"),
            size=QUARTER,
        ),
    ]


def _checkpoints() -> Sequence[Panel]:
    return [
        graph(
            "Not yet covered",
            "short",
            "Records learned since the last checkpoint: what a crash would repeat. A saw is well. A slope that does "
            "not come down: saves fail, see StreamkdCheckpointFailing.",
            (level("checkpoint_uncovered_records", "job"), "records"),
            size=QUARTER,
        ),
        graph(
            "Saves",
            "short",
            "Checkpoints made, and attempts that failed. Any failure: the log says why, and the next save tries again.",
            (events("checkpoint_saves_total", "result"), "{{result}}"),
            size=QUARTER,
            blocks=True,
            stacked=True,
        ),
        graph(
            "Time to save",
            "s",
            "Mean time on the disk, beside the learning. Rising: the disk is busy or nearly full. It may not come near "
            "the time between two checkpoints.",
            (mean("checkpoint_duration_seconds", "job"), "written"),
            size=QUARTER,
        ),
        figure(
            "Size",
            "bytes",
            "Of the last checkpoint; checkpoint.keep of them, and the best, are on the disk. Growing: a peer whose "
            "model grows, or more predictions that wait for labels.",
            (level("checkpoint_size_bytes", "job"), ""),
            size=(3, 7),
            curve=False,
        ),
        figure(
            "Restores",
            "short",
            "Whether this process went on from the newest checkpoint (success) or from an older one, because the "
            "newest was damaged (fallback). Any fallback: look at the disk.",
            (level("checkpoint_restores_total", "result"), "{{result}}"),
            size=(3, 7),
            decimals=0,
            curve=False,
        ),
    ]


def _errors() -> Sequence[Panel]:
    return [
        graph(
            "Refused, by reason",
            "recps",
            "Records that could not be used; each is in the dead letters as it came. Read them, and mend the producer "
            "or the configuration: see StreamkdDeadLetterRateHigh.",
            (rate("dead_letter_records_total", "reason"), "{{reason}}"),
            size=THIRD,
            stacked=True,
        ),
        graph(
            "Share refused",
            "percentunit",
            "Refused records over all. Above the line for long an alert is raised; at dead_letters.max_share it "
            "stops, because then the mistake is ours or the configuration's.",
            (
                f"{REFUSED} / ({REFUSED} + {rate('feed_records_total', 'feed')})",
                "{{feed}}",
            ),
            size=(4, 7),
            alert_above=threshold("dead_letter_ratio"),
        ),
        graph(
            "Errors around the feed",
            "short",
            "Errors by stage and kind. dead_letter: refused records cannot be written, and no checkpoint passes them "
            "(StreamkdDeadLetterWriteFailing). predictions: nor can these, and no checkpoint passes them either.",
            (
                events("feed_errors_total", "feed", "stage", "error_type"),
                "{{feed}} {{stage}} {{error_type}}",
            ),
            size=(4, 7),
            blocks=True,
            stacked=True,
        ),
        graph(
            "Positions lost",
            "short",
            "Positions that the source no longer had, and where reading went on instead. Any at all: records were "
            "never seen, see StreamkdPositionReset.",
            (events("feed_position_resets_total", "feed", "reason"), "{{feed}} {{reason}}"),
            size=(4, 7),
            blocks=True,
            stacked=True,
        ),
        graph(
            "Updates not finite",
            "short",
            "Updates that were not taken, and what was done with a peer that stayed so. One or two: a bad record, left "
            "out and dead-lettered. More: see StreamkdLossNonFinite.",
            (
                events("nonfinite_steps_total", "peer", "action"),
                "{{peer}} {{action}}",
            ),
            size=(4, 7),
            blocks=True,
            stacked=True,
        ),
    ]


def _runtime() -> Sequence[Panel]:
    return [
        graph(
            "Resident memory",
            "bytes",
            "Of the process. Flat, once everything in it is full. A slope over hours: see StreamkdMemoryGrowing.",
            ("max by (instance) (process_resident_memory_bytes{$selected})", "{{instance}}"),
            size=(5, 7),
        ),
        graph(
            "Processor",
            "none",
            "Cores in use. At the number of threads with records waiting, the machine is the limit; far above it, "
            "torch was given more threads than small models can use.",
            ("sum by (instance) (rate(process_cpu_seconds_total{$selected}[$__rate_interval]))", "{{instance}}"),
            size=(5, 7),
        ),
        graph(
            "Open files",
            "short",
            "File descriptors. A slope: a feed or a part of your own does not close what it opens.",
            ("max by (instance) (process_open_fds{$selected})", "{{instance}}"),
            size=(4, 7),
        ),
        graph(
            "Garbage collections",
            "cps",
            "Runs of Python's collector, by generation. Many of generation 2: a part of your own makes cycles.",
            ("sum by (generation) (rate(python_gc_collections_total{$selected}[$__rate_interval]))", "{{generation}}"),
            size=(4, 7),
        ),
        figure(
            "Up since",
            "s",
            "How long the process has been up. Short again and again: see StreamkdCrashLooping.",
            ("time() - max by (instance) (process_start_time_seconds{$selected})", ""),
            size=(2, 7),
            decimals=0,
            curve=False,
        ),
        figure(
            "Version",
            "none",
            "Versions in use. Two at once while instances are replaced; otherwise one was forgotten.",
            ("max by (version) (streamkd_build_info{$selected})", "{{version}}"),
            size=(2, 7),
            named=True,
        ),
        figure(
            "Settings",
            "none",
            "Whether the configuration on disk is the one in force. Refused: see StreamkdConfigReloadFailed.",
            ("min by (instance) (streamkd_config_last_reload_successful{$selected})", ""),
            size=(2, 7),
            words=("refused", "in force"),
            curve=False,
        ),
    ]

"""The rows of the ablation: which settings switch each mechanism off, and what stands in its place.

Every row is a list of overrides of a shipped configuration, as `streamkd eval default FILE --set KEY=VALUE` takes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import tomli_w

from runners.settings import Configuration, load
from streamkd.report import SERVED
from streamkd.settings import PeerSettings

DEFAULT = "the default"
FROZEN = 0.2
"""The share of the stream after which the teacher of static distillation stops learning."""


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration to measure.

    Attributes:
        name: in tables.
        overrides: `key.path=value` each, on the shipped configuration `source`.
        why: what the row says.
        group: rows of one group stand together in tables.
        source: name of a shipped configuration.
        answer: whose accuracy is told: what is served, or a peer.
    """

    name: str
    overrides: tuple[str, ...]
    why: str
    group: str
    source: str = "default"
    answer: str = SERVED


@dataclass(frozen=True, slots=True)
class Mechanism:
    """A part of the default that can be switched off.

    Attributes:
        name: of the part.
        off: settings that take it away and leave the rest.
        why: what is there instead.
        added: what it is called when those that come after it are still off; its name, unless given.
    """

    name: str
    off: tuple[str, ...]
    why: str
    added: str = ""


MECHANISMS = (
    Mechanism(
        "distillation",
        ("distillation.scheme=none",),
        "peers learn from labels and memories alone",
        "mutual KL, T = 1, weight 1",
    ),
    Mechanism(
        "temperature schedule",
        ("distillation.temperature={kind='constant', value=1.0}",),
        "every lesson at T = 1",
    ),
    Mechanism("alpha schedule", ("distillation.alpha={kind='constant', value=1.0}",), "every lesson at weight 1"),
    Mechanism(
        "gate and cap",
        ("distillation.gate=open", "distillation.cap=false"),
        "lessons on which the teacher is wrong are taken too, and may outweigh the label",
    ),
    Mechanism("one teacher", ("distillation.scheme=mutual",), "every peer learns from every other"),
    Mechanism("memory", ("replay.capacity=0",), "as many steps a batch, on the batch alone", "memory, uniform"),
    Mechanism("priorities", ("replay.alpha=0.0",), "memories are drawn uniformly from the same window"),
    Mechanism("averages", ("served.averages=false",), "the averaged weights do not answer beside the peers"),
    Mechanism("role swap", ("roles.rule=never",), "the first peer teaches for ever"),
    Mechanism(
        "drift reaction",
        ("drift.detector.kind=never",),
        "no alarm: the window of memories only grows, nothing is damped, shortened or re-elected at once",
    ),
    Mechanism("effort", ("drift.effort_boost=1.0",), "no more steps a batch after an alarm than before"),
    Mechanism("weighted answer", ("served.floor=1.0",), "the mixture of the members is their plain mean"),
    Mechanism("learned pool", ("served.pool=false",), "the served answer is the members' weighted mixture alone"),
)
"""In the order in which they are added from the bottom up. Where two set the same key, the earlier one has its way."""

OTHERS = (
    Row("one step a batch", ("replay.updates=1",), "half the work of the default", "instead"),
    Row("reservoir memory", ("replay.evict=reservoir", "replay.window=0"), "memories of all times", "instead"),
    Row(
        "deep mutual learning, T = 1",
        (
            "distillation.scheme=mutual",
            "distillation.gate=open",
            "distillation.cap=false",
            "distillation.temperature={kind='constant', value=1.0}",
            "distillation.alpha={kind='constant', value=1.0}",
        ),
        "as published (Zhang et al. 2018), weight 1; all else as in the default",
        "instead",
    ),
    Row(
        "deep mutual learning, T = 4",
        (
            "distillation.scheme=mutual",
            "distillation.gate=open",
            "distillation.cap=false",
            "distillation.temperature={kind='constant', value=4.0}",
            "distillation.alpha={kind='constant', value=1.0}",
        ),
        "likewise at the temperature that most follow",
        "instead",
    ),
    Row("the mission preset", (), "the rules as they were published", "instead", source="mission"),
)


def rows(records: int, batch: int) -> list[Row]:
    """Return all rows, the default first.

    Args:
        records: of the stream, for the moment at which the teacher of static distillation is frozen.
        batch: records a step.
    """
    default = load("default")
    return [
        Row(DEFAULT, (), "as it is shipped", DEFAULT),
        *one_off(),
        *from_the_bottom(),
        *_alone(default),
        _equal(default),
        _unnormed(default),
        _static(default, records, batch),
        *OTHERS,
        *_small_student(),
    ]


def one_off() -> list[Row]:
    """Return the default without each mechanism."""
    return [Row(f"- {part.name}", part.off, part.why, "without") for part in MECHANISMS]


def from_the_bottom() -> list[Row]:
    """Return the peers without any mechanism, then with one more each time; with all of them they are the default."""
    made = [Row("peers alone", _off(0), "no mechanism at all, as many steps a batch", "from the bottom up")]
    for count, part in enumerate(MECHANISMS[:-1], start=1):
        name = part.added or part.name
        made.append(Row(f"+ {name}", _off(count), f"the row above, and {name}", "from the bottom up"))
    last = MECHANISMS[-1].name
    return [*made, Row(f"+ {last} = {DEFAULT}", (), "with all of them", "from the bottom up")]


def _off(first: int) -> tuple[str, ...]:
    """Return the settings that switch off all mechanisms from the one of that index on."""
    settings: dict[str, str] = {}
    for part in reversed(MECHANISMS[first:]):
        settings |= {setting.partition("=")[0]: setting for setting in part.off}
    return tuple(settings.values())


def _alone(default: Configuration) -> list[Row]:
    """Each peer without any other: its answer is the served one."""
    return [
        Row(
            f"{peer.name} alone",
            (_peers([peer]), "served.averages=false", "served.pool=false"),
            "one peer with the same memory and drift reaction, and nobody to teach it",
            "one peer",
        )
        for peer in default.peers
    ]


def _equal(default: Configuration) -> Row:
    peer = default.peers[len(default.peers) // 2]
    peers = [peer.model_copy(update={"name": other.name}) for other in default.peers]
    return Row("equal peers", (_peers(peers),), f"all like {peer.name}, from other initial weights", "instead")


def _unnormed(default: Configuration) -> Row:
    peers = [
        peer.model_copy(update={"model": peer.model.model_copy(update={"layer_norm": False})}) for peer in default.peers
    ]
    return Row("no layer norm", (_peers(peers),), "models of linear layers alone", "instead")


def _static(default: Configuration, records: int, batch: int) -> Row:
    updates = ceil(FROZEN * records / batch) * default.replay.updates
    return Row(
        "static distillation",
        ("distillation.scheme=static", f"distillation.freeze_after={updates}"),
        f"the first peer teaches, and learns nothing more after {FROZEN:.0%} of the stream",
        "instead",
    )


def _small_student() -> list[Row]:
    """Return a network of eight hidden units by itself, and taught by others."""
    student = "{name='student', model={kind='mlp', widths=[8]}, optimizer={kind='sgd', lr=0.1}}"
    forest = "{name='forest', model={kind='river:forest.ARFClassifier', n_models=10}}"
    named = {"group": "a small student's own answer", "answer": "student"}
    alone = ("served.averages=false", "served.pool=false")
    return [
        Row("student alone", (f"peers=[{student}]", *alone), "eight hidden units, with the same memory", **named),
        Row(
            "a forest teaches it",
            (f"peers=[{forest}, {student}]", "roles.rule=never"),
            "river's adaptive random forest of ten trees is the teacher",
            **named,
        ),
        Row("large peers beside it", ("distillation.scheme=none",), "and nobody teaches", **named, source="compact"),
        Row("large peers teach it", (), "the shipped configuration `compact`", **named, source="compact"),
    ]


def _peers(peers: Sequence[PeerSettings]) -> str:
    """Return the override that makes these the cohort: one line of TOML."""
    return "peers=[" + ", ".join(_inline(peer.model_dump(exclude_defaults=True)) for peer in peers) + "]"


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_inline(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return tomli_w.dumps({"v": value}).partition("=")[2].strip()

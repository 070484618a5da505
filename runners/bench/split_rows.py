"""The rows of `streamkd bench split`: what has been published for classes that come one after the other, and ours.

All of them have the networks, the optimizer, the memory and the draws of the shipped `images`; the rows before ours
take away what is ours, and put in what they are called after. A row that makes as many forward and backward passes as
another is a fair rival to it, whatever the number of its updates.
"""

from collections.abc import Mapping

from runners.bench.learners import OURS
from runners.bench.rows import Row

REPLAY = {
    "distillation.scheme": "none",
    "distillation.alpha": "{kind='constant', value=1.0}",
    "distillation.temperature": "{kind='constant', value=4.0}",
    "distillation.gate": "open",
    "distillation.cap": "false",
    "distillation.stream_classes": "seen",
    "distillation.views": "[]",
    "served.averages": "false",
    "replay.updates": "1",
}
"""Experience replay (Chaudhry et al. 2019), by two networks: their mean answers, and nobody teaches."""

_CHAIN = (
    "[{kind='RandomResizedCrop', scale=[0.6, 1.0]}, {kind='RandAugment', num_ops=1, magnitude=11}, "
    "{kind='RandAugment', num_ops=1, magnitude=11}]"
)
"""As published, with the milder of two strengths, and without mirroring, which of a digit makes another sign."""
_PRESENT = {"distillation.stream_classes": "present"}
_AVERAGES = {"distillation.scheme": "self"}
_MUTUAL = {"distillation.scheme": "mutual"}
_VIEWS = {"distillation.views": _CHAIN}


def _weight(alpha: float) -> dict[str, str]:
    return {"distillation.alpha": f"{{kind='constant', value={alpha}}}"}


def rows() -> list[Row]:
    """Return all rows, ours last."""
    once, often = "one pass over what is learned", "four passes"
    cool = {"distillation.temperature": "{kind='constant', value=1.0}"}
    return [
        _row("replay", once, "experience replay (Chaudhry et al. 2019)"),
        _row("+ mutual, T = 1", once, "deep mutual learning (Zhang et al. 2018)", _MUTUAL, cool),
        _row("+ mutual, T = 4", once, "likewise, softer", _MUTUAL),
        _row("+ averages, T = 4", once, "each learns from its own averaged weights", _AVERAGES),
        _row(
            "+ averages, T = 4, answering too",
            once,
            "weight 5.5, and the averages are served beside the networks (MKD, Michel et al. 2024)",
            _AVERAGES,
            _weight(5.5),
            {"served.averages": "true"},
        ),
        _row("ER-ACE", once, "asymmetric cross entropy (Caccia et al. 2022)", _PRESENT),
        _row("ER-ACE + averages, T = 4", once, "both", _PRESENT, _AVERAGES),
        _row("replay, four updates", often, "repeated rehearsal (Zhang et al. 2022)", {"replay.updates": "4"}),
        _row("replay, four views", often, "the views of CCL-DC are learned, and nobody teaches", _VIEWS),
        _row("CCL-DC", often, "the chain of Wang et al. 2024, T = 4, lambda = 2", _MUTUAL, _weight(4.0), _VIEWS),
        _row("ER-ACE + CCL-DC", often, "likewise, lambda = 1", _PRESENT, _MUTUAL, _weight(2.0), _VIEWS),
        Row("streamkd, one update", ("replay.updates=1",), "ours at the same work as replay", OURS, source="images"),
        Row(
            "streamkd, nobody teaches",
            ("distillation.scheme=none",),
            "ours with averages that answer and do not teach",
            OURS,
            source="images",
        ),
        Row(OURS, (), "the shipped `images`", OURS, source="images"),
    ]


def _row(name: str, group: str, why: str, *changes: Mapping[str, str]) -> Row:
    settings = dict(REPLAY)
    for change in changes:
        settings |= change
    return Row(name, tuple(f"{key}={value}" for key, value in settings.items()), why, group, source="images")

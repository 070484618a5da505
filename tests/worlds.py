"""Small worlds and engines that several tests share."""

from functools import partial
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn

from streamkd import (
    UNLABELLED,
    Batch,
    Distillation,
    DriftWatch,
    Election,
    Engine,
    LabelRates,
    Peer,
    Pool,
    Recall,
    ReplayBuffer,
)
from streamkd.capacity import rank
from streamkd.drift import adwin
from streamkd.features import similarity_preserving
from streamkd.models import mlp
from streamkd.roles import mission
from streamkd.schedules import curriculum
from streamkd.taps import Tapped

CLASSES = 4


def world(records: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clusters whose labels change places halfway."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (records,), generator=generator)
    x = torch.randn(records, 5, generator=generator) * 0.3 + torch.eye(5)[y] * 2
    half = records // 2
    return x, torch.cat([y[:half], (y[half:] + 1) % 3])


def batches(records: int = 1600, size: int = 16, *, late: bool = False) -> list[Batch]:
    """The world in batches; with `late`, every fifth label comes three batches after its record."""
    x, y = world(records)
    made = []
    for start in range(0, records, size):
        rows = range(start, min(start + size, records))
        known = y[rows.start : rows.stop].clone()
        answers: dict[str, int] = {}
        if late:
            known[::5] = UNLABELLED
            past = range(max(0, start - 3 * size), max(0, start - 2 * size), 5)
            answers = {str(row): int(y[row]) for row in past}
        ids = tuple(str(row) for row in rows)
        made.append(Batch(x[rows.start : rows.stop], known, ids=ids, late=answers, position={"row": rows.stop}))
    return made


class Droopy(nn.Module):
    """Has all that a checkpoint must not forget: dropout, batch norm's buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Answer."""
        logits: Tensor = self.layers(x)
        return logits


def engine(*, tapped: bool = False, **options: Any) -> Engine:
    wrap = (lambda build: lambda: Tapped(build())) if tapped else lambda build: build
    first, second = (wrap(partial(mlp, (5,), CLASSES, widths=(width,))) for width in (16, 8))
    peers = [
        Peer("a", first, partial(torch.optim.SGD, lr=0.3, momentum=0.5), seed=1),
        Peer("b", second, partial(torch.optim.Adam, lr=0.01), seed=2),
        Peer("c", wrap(Droopy), partial(torch.optim.SGD, lr=0.03), seed=3),
    ]
    return Engine(peers, CLASSES, **options)


def lively() -> Engine:
    """An engine in which every part is at work: swaps come easily, and alarms."""
    measure = rank(horizon=100.0)
    measure.start([None] * 3, torch.zeros(1, 5))
    return engine(
        tapped=True,
        capacity=measure,
        election=Election(3, rule=mission(), every=4, tenure=8, tenure_drift=2),
        drift=DriftWatch(adwin(delta=0.05)),
        replay=ReplayBuffer(200, seed=5),
        distillation=Distillation(
            scheme="mutual",
            temperature=curriculum(growth=20),
            features=similarity_preserving,
            gate="soft",
            effort_boost=1.0,
            rate_boost=2.0,
            temperature_boost=1.5,
        ),
        pool=Pool(6, LabelRates(CLASSES), rate=0.01),
        recall=Recall(stride=16),
    )


def stored(state: dict[str, Any]) -> Any:
    """Return what a checkpoint would give back."""
    file = BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)

"""Contract checks, for authors of parts of their own: what the built-in ones pass, a plug-in should pass.

Each raises AssertionError with a sentence that says what does not hold.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from streamkd.batch import UNLABELLED, Batch, Output
from streamkd.capacity import Capacity
from streamkd.drift import DriftDetector
from streamkd.features import FeatureLoss
from streamkd.losses import Loss
from streamkd.replay import ReplayBuffer
from streamkd.schedules import Schedule, Signals


def check_loss(loss: Loss, classes: int = 4) -> None:
    """Check a loss: one value an example, finite, differentiable, pairs of peers independent of one another."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5, classes, generator=generator).requires_grad_()
    teacher = torch.randn(3, 5, classes, generator=generator)
    y = torch.tensor([0, 1, UNLABELLED, 2 % classes, 3 % classes])
    temperature = torch.tensor([[1.0], [2.0], [4.0]])
    together = loss(Output(student), Output(teacher), y, temperature)
    _hold(together.shape == (3, 5), f"one value an example: {list(together.shape)} came of [3, 5, {classes}] logits")
    _hold(bool(together.isfinite().all()), "every value is finite")
    (gradient,) = torch.autograd.grad(together.sum(), student)
    _hold(bool(gradient.isfinite().all()), "every gradient is finite")
    alone = torch.stack([loss(Output(student[i]), Output(teacher[i]), y, temperature[i]) for i in range(len(student))])
    _hold(torch.allclose(together, alone, atol=1e-5), "pairs in one call are what they are in calls of their own")


def check_feature_loss(loss: FeatureLoss, shape: Sequence[int] = (6, 8)) -> None:
    """Check a loss on features: one value an example, finite, differentiable, the teacher left alone."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, *shape, generator=generator).requires_grad_()
    teacher = torch.randn(5, *shape, generator=generator)
    said = loss(student, teacher)
    _hold(said.shape == (5,), f"one value an example: {list(said.shape)} came of features {[5, *shape]}")
    _hold(bool(said.isfinite().all()), "every value is finite")
    (gradient,) = torch.autograd.grad(said.sum(), student)
    _hold(bool(gradient.isfinite().all()), "every gradient is finite")
    _hold(bool(gradient.any()), "there is something to learn from another's features")


def check_adapter(
    make: Callable[..., nn.Module], student: Sequence[int] = (6, 4), teacher: Sequence[int] = (6, 8)
) -> None:
    """Check an adapter: to the teacher's shape, and trained by what the student learns."""
    adapter = make(student, teacher)
    own, other = torch.randn(5, *student).requires_grad_(), torch.randn(5, *teacher)
    adapted = adapter(own, other)
    _hold(adapted.shape == other.shape, f"it gives {list(adapted.shape)} where the teacher has {list(other.shape)}")
    adapted.square().sum().backward()
    _hold(own.grad is not None and bool(own.grad.isfinite().all()), "its gradient reaches the student")
    _hold(all(weight.grad is not None for weight in adapter.parameters()), "every weight of it is trained")


def check_capacity(make: Callable[[], Capacity], updates: int = 40) -> None:
    """Check a measure of capacity: a value a peer, never negative, and the same after a restore as without one."""
    generator = torch.Generator().manual_seed(0)
    models = [nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))]
    measure, restored = make(), make()
    for one in (measure, restored):
        one.start(models, torch.zeros(1, 4))

    def hear(*measures: Capacity) -> None:
        p, y = torch.rand(2, 5, 3, generator=generator).softmax(-1), torch.randint(0, 3, (5,), generator=generator)
        features = [torch.randn(5, width, generator=generator) for width in (4, 8)]
        for one in measures:
            one.update(p, y, features)

    for _ in range(updates):
        hear(measure)
    _hold(len(measure.values) == len(models), f"one value a peer; there are {len(measure.values)}")
    _hold(all(0 < value < float("inf") for value in measure.values), f"all are positive: {measure.values}")
    restored.load_state_dict(measure.state_dict())
    for _ in range(updates):
        hear(measure, restored)
    _hold(measure.values == restored.values, "a restored measure goes on as it would have gone on")


def check_schedule(schedule: Schedule) -> None:
    """Check a schedule: finite and not negative, and a function of its signals alone."""
    value: float | None = None
    for update, loss in enumerate([3.0, 0.7, 0.2, 0.01, 0.4, 5.0]):
        signals = Signals(update=update, classes=6, loss=loss, teacher_loss=0.3, previous=value)
        value = schedule(signals)
        _hold(value == schedule(signals), "the same signals give the same value: schedules hold no state")
        _hold(0 <= value < float("inf"), f"the value is finite and not negative; it is {value}")


def check_detector(make: Callable[[], DriftDetector]) -> None:
    """Check a detector: quiet on a steady stream of few errors, and the same after a restore as without one."""
    detector = make()
    steady = [float(i % 10 == 0) for i in range(600)]
    _hold(sum(detector.update(value) for value in steady) <= 1, "a steady stream raises no row of alarms")
    restored = make()
    restored.load_state_dict(detector.state_dict())
    future = [float(i % 3 > 0) for i in range(600)]
    _hold(
        [detector.update(value) for value in future] == [restored.update(value) for value in future],
        "a restored detector raises the alarms that it would have raised",
    )
    _hold(detector.width == restored.width, "and it has the same width")


def check_replay(make: Callable[[], ReplayBuffer]) -> None:
    """Check a memory: never more than its capacity, draws what it was given, and the same after a restore."""
    buffer, restored = make(), make()
    given = torch.arange(40.0)[:, None]
    for x in given.chunk(6):
        buffer.add(x, x[:, 0].long())
        _hold(len(buffer) <= buffer.capacity, "it holds no more than its capacity")
    drawn = buffer.sample(32)
    _hold(bool((drawn.x[:, 0].long() == drawn.y).all()), "a record comes back with its own label")
    _hold(float(drawn.weights.min()) > 0 and float(drawn.weights.max()) <= 1, "weights are between 0 and 1")
    buffer.update(drawn.slots, drawn.y.float())
    restored.load_state_dict(buffer.state_dict())
    for memory in (buffer, restored):
        memory.add(given[:3], given[:3, 0].long())
    same = torch.equal(buffer.sample(64).slots, restored.sample(64).slots)
    _hold(same, "a restored memory draws what it would have drawn")


class AnyFeed(Protocol):
    """What a feed has to have for `check_feed`."""

    shape: tuple[int, ...]

    def poll(self, records: int) -> Batch | None:
        """Return up to `records` records; None at the end."""

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on after the batch that carried `position`."""

    def close(self) -> None:
        """Let go of the source."""


def check_feed(make: Callable[[], AnyFeed], records: int = 7) -> None:
    """Check a feed that ends: records in order, and from every position exactly the records that come after it."""
    feed = make()
    shape, batches = feed.shape, _drain(feed, records)
    _hold(bool(batches), "the feed has records")
    whole = torch.cat([batch.x for batch in batches])
    _hold(tuple(whole.shape[1:]) == tuple(shape), "records have the shape that the feed tells")
    given = 0
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        given += len(batch)
        feed = make()
        feed.seek(batch.position)
        rest = _drain(feed, records)
        _hold(
            _same(torch.cat([b.x for b in rest]) if rest else whole[:0], whole[given:]), "after a seek, the rest comes"
        )
        if following is not None:
            _hold(torch.equal(rest[0].y, following.y), "with the same labels")


def _drain(feed: AnyFeed, records: int) -> list[Batch]:
    batches = []
    while (batch := feed.poll(records)) is not None:
        if len(batch):
            batches.append(batch)
    feed.close()
    return batches


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, equal_nan=True)


def _hold(holds: bool, law: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise AssertionError(f"does not hold: {law}")

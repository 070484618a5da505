"""What an engine does on a GPU, tried where there is none; see `elsewhere`."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from elsewhere import GPU, Elsewhere, Remote
from torch import Tensor
from torch.utils._pytree import tree_leaves
from worlds import CLASSES, batches, stored

from runners.settings import load
from streamkd import UNLABELLED, Batch, Engine, config
from streamkd.config import build_engine

FEATURES = (5,)
IMAGE = (1, 12, 12)
SETTINGS: dict[str, Sequence[str]] = {
    "default": [],
    "mutual": ["distillation.scheme=mutual"],
    "ensemble": ["distillation.scheme=ensemble"],
    "average": ["distillation.scheme=average"],
    "static": ["distillation.scheme=static", "distillation.freeze_after=8"],
    "dist": ["distillation.loss=dist"],
    "sum of losses": ["distillation.loss=[{kind='kd'}, {kind='mse_logits', weight=0.5}]"],
    "per record": ["distillation.per_record=certainty"],
    "curriculum": ["distillation.temperature=curriculum"],
    "views": ["distillation.views=['missing', 'swapped']"],
    "present classes": ["distillation.stream_classes=present"],
    "features": ["distillation.features={kind='hint', adapter='linear'}"],
    "fisher": ["distillation.capacity=fisher"],
    "adam": [f"peers.{index}.optimizer={{kind='adam', lr=0.01}}" for index in range(3)],
    "adagrad": [f"peers.{index}.optimizer={{kind='adagrad', lr=0.05}}" for index in range(3)],
    "momentum": ["peers.1.optimizer={kind='sgd', lr=0.1, momentum=0.9, fused=false}"],
    "of two shapes": ["peers.1.model={kind='mlp', widths=[9]}"],
    "river": ["peers.0.model={kind='river:tree.HoeffdingTreeClassifier'}"],
    "reservoir": ["replay.evict=reservoir"],
    "no memory": ["replay.capacity=0"],
    "bandit": ["roles.rule=bandit"],
    "as they are": ["inputs.standardise=false"],
}


def records() -> list[Batch]:
    """The world, some of whose labels come late, with classes among the others that were never seen."""
    stream = batches(112, late=True)
    labels = [torch.where(batch.y == 1, CLASSES, batch.y) for batch in stream]
    late = [{name: CLASSES if y == 1 else y for name, y in batch.late.items()} for batch in stream]
    return [replace(batch, y=y, late=told) for batch, y, told in zip(stream, labels, late, strict=True)]


def pictures(*, unlabelled: bool) -> list[Batch]:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(5, 16, *IMAGE, generator=chance)
    y = (x.flatten(2) @ torch.randn(x[0, 0].numel(), CLASSES, generator=chance)).argmax(-1)
    if unlabelled:
        y[:, ::3] = UNLABELLED
    return [Batch(records, labels) for records, labels in zip(x, y, strict=True)]


def engine(settings: Sequence[str], shape: Sequence[int], device: torch.device, patch: pytest.MonkeyPatch) -> Engine:
    patch.setattr(config, "resolve_device", lambda *_, **__: device)
    torch.manual_seed(0)
    return build_engine(load("default", [f"max_classes={CLASSES + 1}", *settings]), shape)


def told(made: Engine, stream: Sequence[Batch]) -> list[tuple[Tensor, Any]]:
    """Run through a stream; return what was answered, and whatever there is to tell of it."""
    reports = [made.step(batch) for batch in stream]
    return [(report.served, report.summary()) for report in reports]


def assert_alike(here: Sequence[tuple[Tensor, Any]], there: Sequence[tuple[Tensor, Any]]) -> None:
    for (one, first), (other, second) in zip(here, there, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
        assert list(numbers(first)) == pytest.approx(list(numbers(second)), rel=1e-2, abs=1e-3)


def numbers(value: Any) -> chain[float]:
    """Return all numbers in nested values, in order."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return chain.from_iterable(numbers(one) for one in inside)
    return chain([float(value)] if isinstance(value, int | float) else [])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_on_a_gpu_it_says_what_it_says_on_the_cpu(settings: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = records()
    here = told(engine(settings, FEATURES, torch.device("cpu"), monkeypatch), stream)
    with Elsewhere():
        there = told(engine(settings, FEATURES, GPU, monkeypatch), stream)
    assert_alike(here, there)


@pytest.mark.parametrize("unlabelled", [False, True])
@pytest.mark.parametrize("augment", [None, "flip", "erase"])
def test_and_of_images(augment: str | None, monkeypatch: pytest.MonkeyPatch, *, unlabelled: bool) -> None:
    stream = pictures(unlabelled=unlabelled)
    kinds = [f"peers.{index}.model={{kind='cnn'}}" for index in range(3)]
    settings = kinds if augment is None else [*kinds, f"inputs.augment={augment}"]
    here = told(engine(settings, IMAGE, torch.device("cpu"), monkeypatch), stream)
    with Elsewhere():
        there = told(engine(settings, IMAGE, GPU, monkeypatch), stream)
    assert_alike(here, there)


@pytest.mark.parametrize("settings", [SETTINGS[name] for name in ("default", "adam", "features", "bandit")])
def test_what_was_saved_on_a_gpu_goes_on_on_the_cpu(settings: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = records()
    with Elsewhere():
        unbroken = engine(settings, FEATURES, GPU, monkeypatch)
        told(unbroken, stream[:8])
        saved = stored(unbroken.state_dict())
        there = told(unbroken, stream[8:])
    resumed = engine(settings, FEATURES, torch.device("cpu"), monkeypatch)
    resumed.load_state_dict(saved)
    assert_alike(told(resumed, stream[8:]), there)


@pytest.mark.parametrize("name", ["default", "mutual", "ensemble", "views", "adam", "of two shapes"])
def test_a_gpu_is_waited_for_once_to_answer_once_an_update_and_once_for_the_losses(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Elsewhere() as gpu:
        made = engine(SETTINGS[name], FEATURES, GPU, monkeypatch)
        for batch in records():
            before = gpu.reads, made.guidance.updates
            report = made.step(batch)
            recalled = len(report.replay.ages) > 0
            assert gpu.reads - before[0] == 1 + (made.guidance.updates - before[1]) + recalled


def test_what_waits_and_what_is_remembered_takes_no_room_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with Elsewhere():
        made = engine([], FEATURES, GPU, monkeypatch)
        told(made, records())
        waiting = made.pending.state_dict()
        kept = tree_leaves((made.replay.state_dict(), waiting))
        assert not any(isinstance(leaf, Remote) for leaf in kept)
        assert sum(isinstance(leaf, Tensor) for leaf in kept) > len(waiting["answers"]) > 0
        models = [tree_leaves(peer["module"]) for peer in made.cohort.state_dict()["peers"].values()]
        assert all(isinstance(leaf, Remote) for leaf in chain.from_iterable(models))

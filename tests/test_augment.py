"""Images are changed while they are learned, each by itself, and never while they are predicted."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from worlds import stored

from runners.settings import load
from streamkd import Batch, Engine, Peer, ReplayBuffer, augment, checkpoint
from streamkd.config import build_engine
from streamkd.errors import ConfigError
from streamkd.models import cnn
from streamkd.parts import public_functions

NAMES = sorted(public_functions(augment))


def pixels(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_stay_images_and_each_is_changed_by_itself(name: str, channels: int) -> None:
    torch.manual_seed(0)
    image = pixels(1, channels, 12, 10)
    changed = public_functions(augment)[name]()(image.expand(64, -1, -1, -1))
    assert (changed.shape, changed.dtype) == ((64, channels, 12, 10), torch.uint8)
    assert len({bytes(each.flatten().tolist()) for each in changed}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_no_image_is_no_image(name: str) -> None:
    assert len(public_functions(augment)[name]()(pixels(0, 3, 8, 8))) == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**20))
def test_a_crop_is_a_window_of_the_image_in_black(padding: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = pixels(3, 2, 5, 6, seed=seed)
    for image, changed in zip(x, augment.crop(padding=padding)(x), strict=True):
        around = nn.functional.pad(image, [padding] * 4)
        windows = around.unfold(1, 5, 1).unfold(2, 6, 1).movedim(0, 2).reshape(-1, 2, 5, 6)
        assert any(torch.equal(window, changed) for window in windows)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_flip_mirrors_left_for_right(share: float) -> None:
    x = pixels(4, 3, 5, 6)
    assert torch.equal(augment.flip(share=share)(x), x.flip(-1) if share else x)


class Watched(nn.Module):
    """Notes what it is shown."""

    def __init__(self, seen: list[tuple[bool, Tensor]]) -> None:
        super().__init__()
        self.seen = seen
        self.layers = cnn((1, 6, 6), 3, channels=(4,), width=4)

    def forward(self, x: Tensor) -> Tensor:
        """Answer."""
        self.seen.append((self.training, x.clone()))
        logits: Tensor = self.layers(x)
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watched":
        """Let copies note in the same list."""
        copy = Watched(self.seen)
        copy.load_state_dict(self.state_dict())
        return copy


def black(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def batches(n: int = 12) -> list[Batch]:
    return [Batch(pixels(8, 1, 6, 6, seed=k), torch.arange(8) % 3) for k in range(n)]


def test_what_is_learned_and_recalled_is_augmented_and_what_is_predicted_is_not() -> None:
    seen: list[tuple[bool, Tensor]] = []
    peers = [Peer(name, partial(Watched, seen), seed=k) for k, name in enumerate("ab")]
    engine = Engine(peers, 3, augment=black)
    for batch in batches():
        engine.step(batch)
    engine.predict(pixels(4, 1, 6, 6))
    learned = [x for training, x in seen if training]
    assert len(learned) == 2 * engine.guidance.updates
    assert len(learned[-1]) > 8  # memories among them
    assert all(x.unique().numel() == 1 for x in learned)
    assert all(x.unique().numel() > 1 for training, x in seen if not training)


def test_every_update_sees_another_view() -> None:
    views: list[Tensor] = []

    def noted(x: Tensor) -> Tensor:
        views.append(augment.crop()(x))
        return views[-1]

    peers = [Peer(name, partial(cnn, (1, 6, 6), 3, channels=(4,), width=4), seed=k) for k, name in enumerate("ab")]
    engine = Engine(peers, 3, replay=ReplayBuffer(0), augment=noted)
    engine.step(batches()[0])
    assert len(views) == engine.recall.updates == 2
    assert not torch.equal(*views)


SETTINGS = [
    "max_classes=3",
    "inputs.augment=['crop', 'flip', {kind='RandomErasing', p=1.0}]",
    "drift.detector={kind='adwin', delta=0.2, clock=4, grace_period=4}",
]


def build() -> Engine:
    return build_engine(load("images", SETTINGS), (1, 6, 6))


def test_a_restored_engine_draws_the_views_that_it_would_have_drawn() -> None:
    torch.manual_seed(0)
    unbroken = build()
    for batch in batches()[:5]:
        unbroken.step(batch)
    state = stored(unbroken.state_dict())
    for batch in batches()[5:]:
        unbroken.step(batch)
    torch.manual_seed(99)
    restored = build()
    restored.load_state_dict(state)
    for batch in batches()[5:]:
        restored.step(batch)
    assert checkpoint.digest(restored.state_dict()) == checkpoint.digest(unbroken.state_dict())
    assert restored.replay.sample(2).x.dtype == torch.uint8


def test_what_is_remembered_is_the_image_as_it_came() -> None:
    engine = build()
    given_batches = batches()
    for batch in given_batches:
        engine.step(batch)
    came = {bytes(image.flatten().tolist()) for batch in given_batches for image in batch.x}
    kept = engine.replay.state_dict()["x"]
    assert {bytes(image.flatten().tolist()) for image in kept} <= came


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("['corp']", r"inputs\.augment\.0\.kind = 'corp': no such part; did you mean crop\?"),
        ("[{kind='crop', pading=2}]", r"inputs\.augment\.0\.pading: no such option of crop; did you mean .*padding\?"),
        ("[{kind='flip', share=2}]", r"inputs\.augment\.0\.share = 2"),
        ("['RandomCrop', 'RandomCorp']", r"inputs\.augment\.1\.kind = 'RandomCorp'.*did you mean RandomCrop\?"),
        ("[{kind='RandomCrop', pading=2}]", r"inputs\.augment\.0\.pading.*did you mean .*padding\?"),
        ("[{kind='RandomCrop', size=3}]", r"inputs\.augment\.0 = .*makes \[2, 3, 3, 3\].*they must stay such"),
        ("[{kind='Resize', size='a'}]", r"inputs\.augment\.0 = "),
        ("[3]", r"inputs\.augment\.0"),
        ("['os:getcwd']", r"inputs\.augment\.0 = .*os:getcwd"),
        ("['test_augment:READY']", r"inputs\.augment\.0 = .*READY"),
    ],
)
def test_an_augmentation_that_does_not_fit_is_refused_at_start(value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        build_engine(load("images", [f"inputs.augment={value}"]), (3, 8, 8))
    assert str(refusal.value).count("\n") < 12


def test_records_that_are_no_images_are_not_augmented() -> None:
    with pytest.raises(ConfigError, match=r"inputs\.augment: records have shape \[5\]; only images"):
        build_engine(load("default", ["inputs.augment='flip'"]), (5,))


@pytest.mark.parametrize("value", ["'flip'", "['RandomCrop']", "[{kind='test_augment:inverted', by=255}]", "[]"])
def test_one_or_several_by_name_or_of_ones_own(value: str) -> None:
    engine = build_engine(load("images", [f"inputs.augment={value}"]), (3, 8, 8))
    assert (engine.augment is None) == (value == "[]")


READY = torch.nn.Flatten()
"""Made already: no factory of an augmentation."""


def inverted(*, by: int) -> Callable[[Tensor], Tensor]:
    return lambda x: by - x

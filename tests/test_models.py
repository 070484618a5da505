"""Models for images: of torchvision, fitted to small ones of any number of channels."""

import sys
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from runners.settings import load
from streamkd.config import build_engine
from streamkd.errors import ConfigError
from streamkd.models import torchvision_model

SMALL = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "shufflenet_v2_x0_5"]

SHRINK_NEXT = {"mobilenet_v3_small", "shufflenet_v2_x0_5"}
"""Whose first block has a convolution of its own that passes over pixels."""


def sizes(model: nn.Module, shape: Sequence[int]) -> list[int]:
    """Return the height of what each convolution gives."""
    found: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda _layer, _x, y: found.append(y.shape[-1]))
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", SMALL)
def test_the_stem_of_a_small_backbone_passes_over_no_pixel(name: str) -> None:
    shape = (2, 32, 32)
    model = torchvision_model(name, shape, 7, small=True, norm="group")
    first, second, *_ = sizes(model, shape)
    assert first == 32
    assert second == (16 if name in SHRINK_NEXT else 32)
    assert model(torch.zeros(1, *shape)).shape == (1, 7)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def test_without_being_small_a_backbone_takes_any_number_of_channels_and_is_left_as_it_is() -> None:
    gray, colour = (torchvision_model("resnet18", (channels, 64, 64), 7) for channels in (1, 3))
    assert gray(torch.zeros(2, 1, 64, 64)).shape == (2, 7)
    assert sizes(gray, (1, 64, 64)) == sizes(colour, (3, 64, 64))
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in gray.modules())


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("{kind='vit_b_16', small=true}", r"peers\.0\.model = .*patches; vit takes small ones"),
        ("{kind='vgg11', norm='group'}", r"peers\.0\.model = .*it has no batch norm to replace"),
        ("{kind='resnet18', norm='layer'}", r"peers\.0\.model = .*norm = 'layer': batch or group"),
        ("{kind='resnet18', small=true, weights='DEFAULT'}", r"peers\.0\.model = .*weights"),
        ("{kind='resnet1'}", r"peers\.0\.model\.kind = 'resnet1': no such model; did you mean"),
        ("{kind='resnet18', smal=true}", r"peers\.0\.model = .*smal"),
    ],
)
def test_a_backbone_that_cannot_be_fitted_is_refused(model: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        build_engine(load("images", [f"peers.0.model={model}"]), (3, 32, 32))
    assert str(refusal.value).count("\n") < 12


@pytest.mark.parametrize("setting", ["peers.0.model={kind='resnet18'}", "inputs.augment=['RandomCrop']"])
def test_where_torchvision_is_missing_that_is_said(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.models", "torchvision.transforms", "torchvision.transforms.v2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="needs torchvision; pip install torchvision"):
        build_engine(load("images", [setting]), (3, 32, 32))

"""Models for peers: factories called with the shape of one record and the number of classes.

A factory of one's own is named `module:Name` in the configuration. It is given `shape` and `classes` if it takes
arguments of those names, and returns a `torch.nn.Module` whose output is `[n, classes]` logits or an `Output`.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import gcd, prod
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from streamkd.errors import ConfigError

_IMAGE = ("channels", "height", "width")
Positive = Annotated[int, Field(ge=1)]
Stages = Annotated[Sequence[Annotated[int, Field(ge=4, multiple_of=4)]], Field(min_length=1)]


def mlp(
    shape: Sequence[int], classes: int, *, widths: Sequence[Positive] = (128, 64), layer_norm: bool = False
) -> nn.Module:
    """Build a multi-layer perceptron: linear layers of the given widths with ReLU between them.

    Args:
        shape: of one record; anything but a vector is flattened.
        classes: width of the logits.
        widths: of the hidden layers; none makes it logistic regression.
        layer_norm: normalise before each activation (Ba et al. 2016); helps deep stacks stay plastic.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    sizes = [prod(shape), *widths]
    for before, after in pairwise(sizes):
        layers.append(nn.Linear(before, after))
        layers.extend([nn.LayerNorm(after)] if layer_norm else [])
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def cnn(
    shape: Sequence[int], classes: int, *, channels: Stages = (32, 64), width: Positive = 128, pooled: bool = True
) -> nn.Module:
    """Build a small convolutional network for images `[channels, height, width]`.

    Each stage is a 3x3 convolution, group norm (Wu and He 2018: batches of a stream are too small and too alike
    for batch norm), ReLU and a 2x2 maximum; then one hidden layer of `width`.

    Args:
        shape: of one record.
        classes: width of the logits.
        channels: of each stage, multiples of 4.
        width: of the hidden layer.
        pooled: False leaves the maximum out, and the convolution takes steps of two instead: at a quarter of the cost.
    """
    if len(shape) != len(_IMAGE):
        raise ValueError(f"a cnn takes records of shape [channels, height, width], not {list(shape)}")
    layers: list[nn.Module] = []
    for before, after in pairwise([shape[0], *channels]):
        layers += [
            nn.Conv2d(before, after, 3, stride=1 if pooled else 2, padding=1),
            nn.GroupNorm(4, after),
            nn.ReLU(),
            *([nn.MaxPool2d(2, ceil_mode=True)] if pooled else []),
        ]
    halvings = 2 ** len(channels)
    flat = channels[-1] * prod(-(-side // halvings) for side in shape[1:])
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, width), nn.ReLU(), nn.Linear(width, classes))


class _Transformer(nn.Module):
    """Patches of an image to tokens, through the layers, to their mean."""

    def __init__(self, shape: Sequence[int], classes: int, *, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        channels, *sides = shape
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn(prod(side // patch for side in sides), width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder(self.patches(x).flatten(2).transpose(1, 2) + self.places)
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def vit(
    shape: Sequence[int],
    classes: int,
    *,
    patch: Positive = 4,
    width: Positive = 64,
    depth: Positive = 2,
    heads: Positive = 4,
) -> nn.Module:
    """Build a small vision transformer (Dosovitskiy et al. 2021) for images `[channels, height, width]`.

    Its tokens, `[patches, width]`, are what its layer `encoder` puts out; their mean goes to the logits.

    Args:
        shape: of one record.
        classes: width of the logits.
        patch: side of a patch, in pixels; what is left over at the edges is not seen.
        width: of a token.
        depth: layers.
        heads: of the attention; they divide `width`.
    """
    if len(shape) != len(_IMAGE) or min(shape[1:]) < patch:
        raise ValueError(
            f"a vit takes records of shape [channels, height, width], at least {patch} high and wide, not {list(shape)}"
        )
    return _Transformer(shape, classes, patch=patch, width=width, depth=depth, heads=heads)


def torchvision_model(
    name: str, shape: Sequence[int], classes: int, *, small: bool = False, norm: str = "batch", **options: Any
) -> nn.Module:
    """Build any model of `torchvision.models` by its name, for images of any number of channels.

    Args:
        name: e.g. `resnet18`.
        shape: of one record: channels, height, width.
        classes: width of the logits.
        small: for images of 32 x 32 or so: the first convolution is 3 x 3 and passes over no pixel, and no maximum
            follows it (He et al. 2016, on CIFAR).
        norm: `batch`, or `group` for group norm in its place, 16 channels a group (Wu and He 2018): the batches of a
            stream are too small and too alike for batch norm.
        **options: the model's own; it is untrained unless `weights` says otherwise.

    Raises:
        ConfigError: torchvision is not installed.
        ValueError: the model cannot be changed as asked for.
    """
    try:
        from torchvision.models import get_model  # noqa: PLC0415 - slow to import, and absent on some machines
    except ImportError:
        raise ConfigError(f"model.kind = {name!r}: needs torchvision; pip install torchvision") from None
    if norm not in {"batch", "group"}:
        raise ValueError(f"norm = {norm!r}: batch or group")
    model = cast("nn.Module", get_model(name, num_classes=classes, **options))
    stem = next((name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)), "")
    if len(shape) == len(_IMAGE) and (small or getattr(model.get_submodule(stem), "in_channels", 0) != shape[0]):
        if options.get("weights") is not None:
            raise ValueError(f"weights are of a model for 3 channels and large images, not for {list(shape)}, or small")
        _fit_stem(model, stem, shape[0], small=small)
    if norm == "group":
        _group(model)
    return model


def _fit_stem(model: nn.Module, name: str, channels: int, *, small: bool) -> None:
    """Replace the first convolution by one that takes so many channels; a `small` one passes over no pixel."""
    stem = cast("nn.Conv2d", model.get_submodule(name))
    shrinks = small and max(stem.stride) > 1
    if shrinks and stem.stride == stem.kernel_size:
        raise ValueError("small: its first convolution cuts the image into patches; vit takes small ones (patch = 4)")
    how: dict[str, Any] = {"kernel_size": stem.kernel_size, "stride": stem.stride, "padding": stem.padding}
    if shrinks:
        how = {"kernel_size": 3, "padding": 1}
        # Of a maximum that comes right after it, before the next convolution.
        order = [at for at, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.MaxPool2d)]
        if isinstance(model.get_submodule(order[1]), nn.MaxPool2d):
            model.set_submodule(order[1], nn.Identity())
    model.set_submodule(name, nn.Conv2d(channels, stem.out_channels, bias=stem.bias is not None, **how))


def _group(model: nn.Module) -> None:
    """Replace batch norm by group norm."""
    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    if not norms:
        raise ValueError("norm = 'group': it has no batch norm to replace; leave it out")
    for name, layer in norms.items():
        channels = layer.num_features
        model.set_submodule(name, nn.GroupNorm(channels // gcd(channels, 16), channels))

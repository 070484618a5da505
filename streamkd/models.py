"""Models for peers: factories called with the shape of one record and the number of classes.

A factory of one's own is named `module:Name` in the configuration. It is given `shape` and `classes` if it takes
arguments of those names, and returns a `torch.nn.Module` whose output is `[n, classes]` logits or an `Output`.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any, cast

from torch import nn


def mlp(
    shape: Sequence[int], classes: int, *, widths: Sequence[int] = (128, 64), layer_norm: bool = False
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


def cnn(shape: Sequence[int], classes: int, *, channels: Sequence[int] = (32, 64), width: int = 128) -> nn.Module:
    """Build a small convolutional network for images `[channels, height, width]`.

    Each stage is a 3x3 convolution, group norm (Wu and He 2018: batches of a stream are too small and too alike
    for batch norm), ReLU and a 2x2 maximum; then one hidden layer of `width`.
    """
    if len(shape) != len(("channels", "height", "width")):
        raise ValueError(f"a cnn takes records of shape [channels, height, width], not {list(shape)}")
    layers: list[nn.Module] = []
    for before, after in pairwise([shape[0], *channels]):
        layers += [
            nn.Conv2d(before, after, 3, padding=1),
            nn.GroupNorm(4, after),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
        ]
    halvings = 2 ** len(channels)
    flat = channels[-1] * prod(-(-side // halvings) for side in shape[1:])
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, width), nn.ReLU(), nn.Linear(width, classes))


def torchvision_model(name: str, classes: int, **options: Any) -> nn.Module:
    """Build any model of `torchvision.models` by its name, untrained unless `weights` says otherwise."""
    from torchvision.models import get_model  # noqa: PLC0415 - slow to import, and absent on some machines

    return cast("nn.Module", get_model(name, num_classes=classes, **options))

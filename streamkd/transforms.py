"""Transforms of torchvision, for one image after the other; and what `inputs.augment` names, made into one function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from streamkd.errors import ConfigError
from streamkd.parts import find, make, parameters, shown, tried
from streamkd.settings import Part

Augment = Callable[[Tensor], Tensor]
"""Takes images `[n, channels, height, width]` and returns as many, each changed by itself."""


def each(name: str, **options: Any) -> Augment:
    """Apply a transform of `torchvision.transforms.v2` to every image by itself.

    To a batch it would do one and the same thing to all images, for it takes a batch for one sample.
    """
    transform = known()[name](**options)

    def applied(x: Tensor) -> Tensor:
        return torch.stack([transform(image) for image in x]) if len(x) else x

    return applied


def known() -> dict[str, Any]:
    """Return all transforms of torchvision by their names.

    Raises:
        ConfigError: torchvision is not installed.
    """
    try:
        from torchvision.transforms import v2  # noqa: PLC0415 - slow to import, and absent on some machines
    except ImportError:
        raise ConfigError("inputs.augment: needs torchvision; pip install torchvision") from None
    return {
        name: value for name, value in vars(v2).items() if isinstance(value, type) and issubclass(value, v2.Transform)
    }


def chained(parts: Sequence[Part], family: Any, shape: Sequence[int]) -> Augment | None:
    """Return all augmentations as one, in their order; None where there are none.

    Args:
        parts: one of the family, a transform of torchvision by its name, or the user's own: a factory of an `Augment`.
        family: the module of the built-in ones.
        shape: of one record.

    Raises:
        ConfigError: records are no images, or an augmentation does not exist or does not keep them what they are.
    """
    if parts and len(shape) != len(("channels", "height", "width")):
        raise ConfigError(
            f"inputs.augment: records have shape {list(shape)}; only images [channels, height, width] are augmented"
        )
    steps = [_made(part, family, shape, f"inputs.augment.{index}") for index, part in enumerate(parts)]

    def augment(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return augment if steps else None


def _made(part: Part, family: Any, shape: Sequence[int], key: str) -> Augment:
    if ":" not in part.kind and part.kind[:1].isupper():
        transform = find(part, {name: f"torchvision.transforms.v2:{name}" for name in known()}, key)
        sized = {"size": tuple(shape[1:])} if "size" in parameters(transform) else {}
        step: Augment = tried(lambda: each(part.kind, **{**sized, **part.options}), part, key)
    else:
        step = make(part, family, key)
    x = torch.zeros(2, *shape, dtype=torch.uint8)
    with torch.random.fork_rng():
        said = tried(lambda: step(x), part, key)
    if not isinstance(said, Tensor) or (said.shape, said.dtype) != (x.shape, x.dtype):
        found = f"{list(said.shape)} of {said.dtype}" if isinstance(said, Tensor) else type(said).__name__
        raise ConfigError(f"{key} = {shown(part)}: makes {found} of {list(x.shape)} bytes; they must stay such")
    return step

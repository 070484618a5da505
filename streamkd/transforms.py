"""Transforms of torchvision, for one image after the other; and what `inputs.augment` names, made into one function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from streamkd.errors import ConfigError
from streamkd.parts import find, make, parameters, shown, tried
from streamkd.settings import Part

_KINDS = {torch.uint8: "bytes", torch.float32: "numbers"}
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
        raise ConfigError("a transform of images needs torchvision; pip install torchvision") from None
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
    if parts and not is_image(shape):
        raise ConfigError(
            f"inputs.augment: records have shape {list(shape)}; only images [channels, height, width] are augmented"
        )
    steps = made(parts, family, shape, "inputs.augment")

    def augment(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return augment if steps else None


def is_image(shape: Sequence[int]) -> bool:
    """Whether records of that shape are images."""
    return len(shape) == len(("channels", "height", "width"))


def made(parts: Sequence[Part], family: Any, shape: Sequence[int], key: str) -> list[Augment]:
    """Return what parts name, each tried on two records; images are bytes.

    Args:
        parts: as for `chained`; only of images can they be of torchvision.
        family: likewise.
        shape: likewise.
        key: of the setting.

    Raises:
        ConfigError: one does not exist, or does not keep records what they are.
    """
    return [_made(part, family, shape, f"{key}.{index}") for index, part in enumerate(parts)]


def _made(part: Part, family: Any, shape: Sequence[int], key: str) -> Augment:
    if ":" not in part.kind and part.kind[:1].isupper() and is_image(shape):
        transform = find(part, {name: f"torchvision.transforms.v2:{name}" for name in known()}, key)
        sized = {"size": tuple(shape[1:])} if "size" in parameters(transform) else {}
        step: Augment = tried(lambda: each(part.kind, **{**sized, **part.options}), part, key)
    else:
        step = make(part, family, key)
    x = torch.zeros(2, *shape, dtype=torch.uint8 if is_image(shape) else torch.float32)
    with torch.random.fork_rng():
        said = tried(lambda: step(x), part, key)
    if not isinstance(said, Tensor) or (said.shape, said.dtype) != (x.shape, x.dtype):
        found = f"{list(said.shape)} of {said.dtype}" if isinstance(said, Tensor) else type(said).__name__
        kept = f"{list(x.shape)} {_KINDS[x.dtype]}"
        raise ConfigError(f"{key} = {shown(part)}: makes {found} of {kept}; they must stay such")
    return step

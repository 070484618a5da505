"""Harder views of raw inputs, for a chain of distillation.

Each factory returns a function from records `[n, ...]` to as many harder ones. What it does is drawn for every record
by itself, from torch's own generator, of which the engine keeps the state.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from streamkd.settings import did_you_mean

View = Callable[[Tensor], Tensor]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, le=1)]


def missing(*, share: Share = 0.2) -> View:
    """Values of a table are lost, and taken for their mean (denoising, Vincent et al. 2008).

    Args:
        share: of the values.
    """
    return lambda x: x.masked_fill(torch.rand(x.shape).to(x.device) < share, torch.nan)


def swapped(*, share: Share = 0.2) -> View:
    """Values of a table come from other records of the batch: SCARF's corruption (Bahri et al. 2022).

    Args:
        share: of the values.
    """

    def view(x: Tensor) -> Tensor:
        others = torch.rand(x.shape).argsort(0).to(x.device)  # of each feature, an order of its own
        return torch.where(torch.rand(x.shape).to(x.device) < share, x.gather(0, others), x)

    return view


def crop(*, least: Part = 0.6) -> View:
    """Parts of images, brought to the size of the whole (Szegedy et al. 2015).

    Args:
        least: share of the area that is left of an image; it is drawn between this and 1.
    """

    def view(x: Tensor) -> Tensor:
        return transform("RandomResizedCrop", size=x.shape[-2:], scale=(least, 1.0))(x)

    return view


def transform(name: str, **arguments: Any) -> View:
    """Any of `torchvision.transforms.v2`, image by image (TorchVision maintainers 2016).

    Args:
        name: of its class.
        **arguments: its own.

    Raises:
        ValueError: there is no such class.
    """
    from torchvision.transforms import v2  # noqa: PLC0415 - slow to import, and only asked for with images

    if not hasattr(v2, name):
        raise ValueError(
            f"name = {name!r}: no such transform of torchvision.transforms.v2{did_you_mean(name, vars(v2))}"
        )
    made = getattr(v2, name)(**arguments)
    return lambda x: torch.stack([made(image) for image in x]) if len(x) else x

"""Images changed a little, anew for every update, so that what is learned is not learned by heart.

An augmentation takes `[n, channels, height, width]` as the feed gave them, before they are scaled, and returns as many,
each changed by itself. All draw from torch's shared generator, whose state is part of a checkpoint.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from streamkd.transforms import Augment, each

Share = Annotated[float, Field(ge=0, le=1)]


def crop(*, padding: Annotated[int, Field(ge=1)] = 4) -> Augment:
    """Shift each image by up to `padding` pixels, up or down and left or right; black comes in (He et al. 2016).

    Args:
        padding: the furthest shift, in pixels.
    """

    def shifted(x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        padded = functional.pad(x, [padding] * 4)
        top, left = torch.randint(0, 2 * padding + 1, (2, n, 1)).to(x.device)
        rows = (top + torch.arange(height, device=x.device))[:, :, None]
        columns = (left + torch.arange(width, device=x.device))[:, None, :]
        images = torch.arange(n, device=x.device)[:, None, None]
        return padded[images, :, rows, columns].movedim(-1, 1)

    return shifted


def flip(*, share: Share = 0.5) -> Augment:
    """Mirror some of the images, left for right (Krizhevsky et al. 2012).

    Args:
        share: of the images.
    """
    return lambda x: torch.where((torch.rand(len(x), 1, 1, 1) < share).to(x.device), x.flip(-1), x)


def erase(*, share: Share = 0.5) -> Augment:
    """Black out a rectangle in some of the images (random erasing, Zhong et al. 2020).

    Args:
        share: of the images.
    """
    return each("RandomErasing", p=share)


def jitter(*, strength: Share = 0.2) -> Augment:
    """Change brightness, contrast and saturation (Howard 2013).

    Args:
        strength: by how much at most, as a share of each.
    """
    return each("ColorJitter", brightness=strength, contrast=strength, saturation=strength)


def rotate(*, degrees: Annotated[float, Field(gt=0, le=180)] = 15.0) -> Augment:
    """Turn each image (Simard et al. 2003).

    Args:
        degrees: by how much at most, to either side.
    """
    return each("RandomRotation", degrees=degrees)


def trivial() -> Augment:
    """Change each image in one way of fourteen, as strongly as chance will (TrivialAugment, Müller and Hutter 2021)."""
    return each("TrivialAugmentWide")

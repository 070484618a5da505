"""Harder views of tables, for a chain of distillation; those of images are what `augment` does to them.

Each factory returns a function from records `[n, ...]` to as many harder ones. What it does is drawn for every record
by itself, from torch's own generator, of which the engine keeps the state.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

View = Callable[[Tensor], Tensor]
Share = Annotated[float, Field(ge=0, le=1)]


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

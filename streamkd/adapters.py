"""From a student's features to the shape of its teacher's, where their architectures are unlike.

Each function takes the shapes of one record's features, the student's and the teacher's (`[width]`,
`[positions, width]` or `[channels, height, width]`), and makes a module that takes (student's features, teacher's
features), `[n, ...]` each, to `[n, *teacher's shape]`. It is trained with the student. What is adapted is the
student's side alone: were the teacher's adapted too, both could agree on saying nothing.
"""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamkd.taps import MAP, positions


class _Linear(nn.Module):
    def __init__(self, student: int, teacher: Sequence[int]) -> None:
        super().__init__()
        self.teacher = tuple(teacher)
        self.layer = nn.Linear(student, _width(teacher))

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        adapted: Tensor = self.layer(positions(own))
        return _shaped(adapted, other)


class _Convolution(nn.Module):
    def __init__(self, student: int, teacher: Sequence[int], groups: int) -> None:
        super().__init__()
        self.size = teacher[1], teacher[2]
        self.layers = nn.Sequential(
            nn.Conv2d(student, teacher[0], 1), nn.GroupNorm(gcd(groups, teacher[0]), teacher[0]), nn.GELU()
        )

    def forward(self, own: Tensor, other: Tensor) -> Tensor:  # noqa: ARG002 - as every adapter's
        adapted: Tensor = self.layers(functional.adaptive_avg_pool2d(own, self.size))
        return adapted


class _CrossAttention(nn.Module):
    def __init__(self, student: int, teacher: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            teacher, gcd(heads, teacher), kdim=student, vdim=student, batch_first=True
        )

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        values = positions(own)
        adapted, _ = self.attention(positions(other), values, values, need_weights=False)
        return _shaped(adapted, other)


def linear(student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
    """One matrix, at every position alike (Romero et al. 2015).

    Raises:
        ValueError: the two do not have the same number of positions.
    """
    here, there = _count(student), _count(teacher)
    if here != there:
        raise ValueError(
            f"features of shape {list(student)} have {here} positions and the teacher's of shape {list(teacher)} "
            f"{there}; convolution adapts maps to maps, and cross_attention anything"
        )
    return _Linear(_width(student), teacher)


def convolution(student: Sequence[int], teacher: Sequence[int], *, groups: int = 4) -> nn.Module:
    """1x1 convolution, group norm, GELU, between maps (the articles that streamkd follows; Romero et al. 2015).

    The student's map is first averaged down, or repeated, to the teacher's height and width. It ends in a GELU, as
    features do that follow an activation.

    Args:
        student: shape of its features, `[channels, height, width]`.
        teacher: likewise.
        groups: of the norm; fewer where the channels cannot be divided by them.

    Raises:
        ValueError: one of the two is no map.
    """
    for shape in (student, teacher):
        if len(shape) != MAP:
            raise ValueError(
                f"a convolution adapts maps [channels, height, width], and these features have shape {list(shape)}; "
                "linear adapts vectors, and cross_attention anything"
            )
    return _Convolution(student[0], teacher, groups)


def cross_attention(student: Sequence[int], teacher: Sequence[int], *, heads: int = 4) -> nn.Module:
    """Each position of the teacher gathers what it needs from the student's (Vaswani et al. 2017).

    softmax(Q K^T / sqrt(d)) V with queries from the teacher's features, keys and values from the student's: the only
    adapter between a map and the tokens of a transformer. As in the articles that streamkd follows.

    Args:
        student: shape of its features.
        teacher: likewise.
        heads: of the attention; fewer where the teacher's width cannot be divided by them.
    """
    return _CrossAttention(_width(student), _width(teacher), heads)


def _width(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) == MAP else shape[-1]


def _count(shape: Sequence[int]) -> int:
    return positions(torch.empty(1, *shape, device="meta")).shape[1]


def _shaped(adapted: Tensor, like: Tensor) -> Tensor:
    """Give `[n, positions, width]` the shape of `like`."""
    return (adapted.transpose(1, 2) if like.dim() == 1 + MAP else adapted).reshape(like.shape)

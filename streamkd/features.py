"""What a student learns from its teacher's features, per example.

A feature loss is a function `(student, teacher) -> [n]` of the features of both, `[n, width]`, `[n, positions, width]`
or `[n, channels, height, width]`; the student's have been through the adapter, where there is one. The teacher's come
detached.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from streamkd.taps import MAP, positions

FeatureLoss = Callable[[Tensor, Tensor], Tensor]
Power = Annotated[float, Field(gt=0, allow_inf_nan=False)]

TINY = 1e-6
"""Added under roots and norms, so that features of nothing but zeros have a gradient."""


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared difference, 1 / 2d * ||phi(h_S) - h_T||^2, phi the adapter: FitNets (Romero et al. 2015).

    Over the d numbers of a record, so that wide features weigh no more than narrow ones.

    Raises:
        ValueError: the shapes differ.
    """
    _same(student.shape[1:], teacher.shape[1:])
    return (student - teacher).flatten(1).square().mean(1) / 2


def attention_transfer(student: Tensor, teacher: Tensor, *, power: Power = 2.0) -> Tensor:
    """||Q_S / ||Q_S|| - Q_T / ||Q_T||||^2, Q = sum over channels of |A|^p at each position (Zagoruyko, Komodakis 2017).

    Where a network looks, and not what it sees there: widths may differ, and no adapter is needed. Of two maps the
    larger one is averaged down to the other's height and width. The published weight of 1,000 and more is for the mean
    over positions; this is their sum.

    Args:
        student: features with positions.
        teacher: likewise.
        power: p.

    Raises:
        ValueError: features without positions, or with unlike ones that are no maps.
    """
    own, other = (_attention(features, power) for features in (student, teacher))
    if own.dim() == other.dim() == MAP:
        size = min(own.shape[1], other.shape[1]), min(own.shape[2], other.shape[2])
        own, other = (functional.adaptive_avg_pool2d(side, size) for side in (own, other))
    own, other = own.flatten(1), other.flatten(1)
    _same(own.shape[1:], other.shape[1:])
    return (functional.normalize(own, eps=TINY) - functional.normalize(other, eps=TINY)).square().sum(1)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """1 / n * ||row of G_S - row of G_T||^2, G the similarities of the records at hand (Tung and Mori 2019).

    G = Q Q^T of the flattened features, every row of length 1: records that are alike to the teacher become alike to
    the student. Widths may differ, and no adapter is needed. The mean over records is the published
    1 / n^2 * ||G_S - G_T||_F^2; a single record has nothing to be alike to. It is small: weighed 3,000 as published.
    """
    own, other = (
        functional.normalize(flat @ flat.T, dim=1, eps=TINY) for flat in (student.flatten(1), teacher.flatten(1))
    )
    return (own - other).square().sum(1) / len(own)


def wasserstein(student: Tensor, teacher: Tensor) -> Tensor:
    """1 / d * (||mu_S - mu_T||^2 + ||sigma_S - sigma_T||^2): squared 2-Wasserstein (Lv et al. 2024).

    Between normal distributions with independent components, as which the features of a record are taken over its
    positions; mu and sigma `[d]` are their means and deviations. The order of the positions does not matter, nor need
    there be as many of them; vectors have one position, and this is twice their `hint`.

    Raises:
        ValueError: the widths differ.
    """
    own, other = positions(student), positions(teacher)
    _same(own.shape[2:], other.shape[2:])
    means = own.mean(1) - other.mean(1)
    spreads = _deviation(own) - _deviation(other)
    return (means.square() + spreads.square()).mean(1)


def _deviation(features: Tensor) -> Tensor:
    return (features.var(1, correction=0) + TINY).sqrt()


def _attention(features: Tensor, power: float) -> Tensor:
    if features.dim() < MAP:
        raise ValueError(
            f"features of shape {list(features.shape[1:])} have no positions to attend to; "
            "take them from a layer before the last pooling, or use hint"
        )
    return (features.abs() + TINY).pow(power).sum(1 if features.dim() == 1 + MAP else 2)


def _same(own: torch.Size, other: torch.Size) -> None:
    if own != other:
        raise ValueError(
            f"features of {list(own)} cannot be held against a teacher's of {list(other)}; "
            "an adapter takes the ones to the shape of the others"
        )

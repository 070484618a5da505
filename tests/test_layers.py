from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from streamkd import layers

lawful = settings(max_examples=25, deadline=None)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6), st.integers(1, 4))


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(layer: layers.Layer, plainly: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Hold a layer's answer and way back to autograd's; return autograd's gradients at the weights."""
    leaf = x.clone().requires_grad_()
    expected = plainly(leaf)
    gradient = numbers(*expected.shape, seed=99)
    back, *others = torch.autograd.grad(expected, [leaf, *weights], gradient)
    assert torch.allclose(layer(x), expected, atol=1e-9)
    assert torch.allclose(layer.back(gradient), back, atol=1e-9)
    return list(others)


@lawful
@given(sizes, st.booleans())
def test_a_linear_layer_is_a_product_a_peer(size: tuple[int, int, int, int], bias: bool) -> None:  # noqa: FBT001
    peers, n, wide, out = size
    x, weight, shift = numbers(peers, n, wide, seed=0), numbers(peers, out, wide, seed=1), numbers(peers, out, seed=2)
    leaves = [weight.clone().requires_grad_(), shift.clone().requires_grad_()][: 1 + bias]
    slots = [torch.full_like(leaf, 7.0) for leaf in leaves]  # what is there is written over
    layer = layers.Linear(weight, shift if bias else None, slots)

    def plainly(x: Tensor) -> Tensor:
        return torch.stack(
            [functional.linear(x[i], leaves[0][i], leaves[1][i] if bias else None) for i in range(peers)]
        )

    for slot, found in zip(slots, agree(layer, plainly, x, leaves), strict=True):
        assert torch.allclose(slot, found, atol=1e-9)
    together = layer(x[0])  # records that all peers are given alike
    assert torch.allclose(together, plainly(x[:1].expand(peers, -1, -1)), atol=1e-9)


@lawful
@given(sizes, st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_narrow_layer_is_the_first_columns_and_the_others_learn_nothing(
    size: tuple[int, int, int, int], widths: list[int]
) -> None:
    peers, n, wide, out = size
    x, weight, shift = numbers(peers, n, wide, seed=0), numbers(peers, out, wide, seed=1), numbers(peers, out, seed=2)
    slots, others = ([torch.full_like(weight, 7.0), torch.full_like(shift, 7.0)] for _ in range(2))
    whole, layer = layers.Linear(weight, shift, others), layers.Linear(weight, shift, slots)
    for width in widths:
        layer.narrow(width)
        width = min(width, out)  # noqa: PLW2901 - there are no more
        gradient = numbers(peers, n, width, seed=width)
        assert torch.allclose(layer(x), whole(x)[..., :width])
        back = whole.back(functional.pad(gradient, (0, out - width)))
        assert torch.allclose(layer.back(gradient), back)
        assert all(torch.allclose(slot, other) for slot, other in zip(slots, others, strict=True))


@lawful
@given(sizes, st.integers(0, 2))
def test_layer_norm_is_torchs(size: tuple[int, int, int, int], affine: int) -> None:
    peers, n, wide, _ = size
    x, scale, shift = numbers(peers, n, wide, seed=0), numbers(peers, wide, seed=1), numbers(peers, wide, seed=2)
    leaves = [scale.clone().requires_grad_(), shift.clone().requires_grad_()][:affine]
    slots = [torch.full_like(leaf, 7.0) for leaf in leaves]
    layer = layers.Norm(scale if affine else None, shift if affine == 2 else None, slots, 1e-5)

    def plainly(x: Tensor) -> Tensor:
        own = [[leaf[i] for leaf in leaves] for i in range(peers)]
        return torch.stack([functional.layer_norm(x[i], (wide,), *own[i], eps=1e-5) for i in range(peers)])

    for slot, found in zip(slots, agree(layer, plainly, x, leaves), strict=True):
        assert torch.allclose(slot, found, atol=1e-9)


@pytest.mark.parametrize("function", [nn.GELU(), nn.Tanh(), nn.SiLU(), nn.ELU(), nn.LeakyReLU(0.2)])
def test_functions_of_one_number_go_back_by_their_own_derivative(function: nn.Module) -> None:
    agree(layers.Elementwise(function), function, numbers(2, 3, 4, seed=0), [])


def test_the_positive_part_lets_through_what_was_positive() -> None:
    agree(layers.Rectifier(), functional.relu, numbers(2, 3, 4, seed=0), [])

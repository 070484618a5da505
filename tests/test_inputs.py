from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import stored

from streamkd.inputs import Raw, Standardiser

lawful = settings(max_examples=25, deadline=None)
splits = st.lists(st.integers(1, 40), min_size=1, max_size=8)
nan, infinity = float("nan"), float("inf")


def drawn(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def taught(x: Tensor, sizes: list[int] | None = None, **options: Any) -> Standardiser:
    inputs = Standardiser(**options)
    for part in x.split(sizes or [len(x)]):
        inputs.update(part)
    return inputs


@lawful
@given(splits, st.floats(-1e6, 1e6), st.floats(1e-2, 1e3), st.integers(0, 2**20))
def test_mean_and_variance_are_those_of_all_data_whatever_the_batches(
    sizes: list[int], offset: float, scale: float, seed: int
) -> None:
    # In double precision: in single, a large offset leaves one value and a few far from it, which are moved in.
    known = drawn(sum(sizes), 3, seed=seed).double() * scale + offset
    inputs = taught(known, sizes)
    assert torch.allclose(inputs.mean, known.mean(0), rtol=1e-12)
    assert torch.allclose(inputs.square / inputs.count, known.var(0, correction=0), rtol=1e-6)


@lawful
@given(splits, st.integers(0, 2**20))
def test_a_missing_value_teaches_nothing_and_becomes_the_mean(sizes: list[int], seed: int) -> None:
    x = drawn(sum(sizes), 2, seed=seed)
    missing = drawn(sum(sizes), 2, seed=seed + 1) > 0.5
    inputs = taught(torch.where(missing, nan, x), sizes)
    for feature in range(2):
        known = x[~missing[:, feature], feature].double()
        assert float(inputs.count[feature]) == len(known)
        if len(known):
            assert float(inputs.mean[feature]) == pytest.approx(float(known.mean()), abs=1e-9)
    standard = inputs(torch.where(missing, nan, x))
    assert bool(standard.isfinite().all())
    assert int(standard[missing].count_nonzero()) == 0


def test_a_feature_that_is_always_missing_is_zero() -> None:
    x = torch.stack([drawn(20, seed=1), torch.full((20,), nan)], 1)
    standard = taught(x, [10, 10])(x)
    assert int(standard[:, 1].count_nonzero()) == 0
    assert float(standard[:, 0].std(correction=0)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("endless", [infinity, -infinity])
def test_an_infinity_is_clipped_and_leaves_no_trace(endless: float) -> None:
    x = drawn(40, 2)
    poisoned = x.clone()
    poisoned[7, 0] = endless
    inputs, clean = taught(poisoned), taught(x[[*range(7), *range(8, 40)]])
    assert float(inputs.mean[0]) == pytest.approx(float(clean.mean[0]))
    assert float(inputs.square[0]) == pytest.approx(float(clean.square[0]))
    assert float(inputs(poisoned)[7, 0]) == (8 if endless > 0 else -8)


@lawful
@given(st.floats(-1e8, 1e8, width=32), splits)
def test_a_feature_that_never_varies_is_exactly_zero(value: float, sizes: list[int]) -> None:
    x = torch.full((sum(sizes), 1), value)
    assert int(taught(x, sizes)(x).count_nonzero()) == 0


def test_a_feature_that_never_varied_is_not_blown_up_when_it_first_does() -> None:
    inputs = taught(torch.full((1_000, 1), 5.0))
    assert float(inputs(torch.tensor([[5.5]]))) == pytest.approx(0.5)


@pytest.mark.parametrize("clip", [2.0, 8.0])
def test_what_lies_far_out_is_clipped(clip: float) -> None:
    inputs = taught(drawn(500, 1), clip=clip)
    standard = inputs(torch.tensor([[1e9], [-1e9], [0.1]]))
    assert standard[:2, 0].tolist() == [clip, -clip]
    assert 0 < abs(float(standard[2])) < 1


def test_a_large_offset_costs_no_precision() -> None:
    # In single precision the sum of squares of a million and a half would swallow a variance of one.
    steps = torch.tensor([-1.5, -0.5, 0.5, 1.5]).repeat(2_500)[:, None]
    x = steps + 1.5e6  # each of them a single-precision number
    standard = taught(x, [16] * 625)(x)
    assert torch.allclose(standard, steps / steps.std(correction=0), atol=1e-4)


def test_the_horizon_forgets_the_past_exponentially() -> None:
    inputs = taught(drawn(500, 1), [20] * 25, horizon=100)
    before = float(inputs.mean)
    assert float(inputs.count) == 100
    for _ in range(10):  # each batch of 20 beside a past that counts 100
        inputs.update(torch.full((20, 1), 5.0))
    assert float(inputs.mean) == pytest.approx(5 + (before - 5) * (100 / 120) ** 10)
    assert float(inputs.count) == 100
    for _ in range(90):
        inputs.update(torch.full((20, 1), 5.0))
    assert float(inputs.square / inputs.count) == pytest.approx(0, abs=1e-3)


def test_within_the_horizon_nothing_is_forgotten() -> None:
    x = drawn(200, 2) + torch.arange(200)[:, None] / 20
    assert torch.allclose(taught(x, [10] * 20, horizon=200).mean, x.double().mean(0))


def test_images_have_one_scale_a_channel() -> None:
    x = (
        drawn(30, 3, 4, 5) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
        + torch.tensor([0.0, 5.0, -50.0])[:, None, None]
    )
    standard = taught(x, [10, 10, 10])(x)
    assert standard.shape == x.shape
    assert torch.allclose(standard.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(standard.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    # One affine map a channel: places in the image keep their differences.
    spread = standard[:, 1].flatten() - standard[0, 1, 0, 0]
    raw = x[:, 1].flatten() - x[0, 1, 0, 0]
    assert torch.allclose(spread * x[:, 1].std(correction=0), raw, atol=1e-3)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_images_are_forgotten_by_the_record_whatever_their_size(size: int) -> None:
    inputs = taught(drawn(500, 1, size, size), [20] * 25, horizon=100)
    before = float(inputs.mean)
    assert float(inputs.count) == pytest.approx(100)
    inputs.update(torch.full((20, 1, size, size), 3.0))
    assert float(inputs.mean) == pytest.approx(3 + (before - 3) * 100 / 120)


def test_before_the_first_record_inputs_pass_as_they_are() -> None:
    inputs = Standardiser()
    inputs.update(torch.zeros(0, 3))
    assert inputs(torch.tensor([[1.5, nan, 99.0]])).tolist() == [[1.5, 0.0, 8.0]]


def test_a_restored_standardiser_goes_on_as_it_would_have() -> None:
    x = drawn(300, 3) * 4 + 2
    inputs, restored = taught(x[:150], [50] * 3, horizon=120), Standardiser(horizon=120)
    restored.load_state_dict(stored(inputs.state_dict()))
    for part in x[150:].split(50):
        assert torch.equal(inputs(part), restored(part))
        inputs.update(part)
        restored.update(part)
    assert torch.equal(inputs(x), restored(x))


def test_raw_inputs_are_left_alone_but_for_what_is_missing() -> None:
    raw = Raw()
    raw.update(torch.full((5, 2), 100.0))
    raw.load_state_dict(stored(raw.state_dict()))
    assert raw(torch.tensor([[1e6, nan]])).tolist() == [[1e6, 0.0]]


@pytest.mark.parametrize("records", [40, 1_000, 20_000])
@pytest.mark.parametrize("far", [1e4, -1e12, 3e38])
def test_one_value_far_out_does_not_spoil_the_scale(records: int, far: float) -> None:
    x = drawn(records, 2) * 5 + 3
    inputs, undisturbed = taught(x), taught(x)
    inputs.update(torch.tensor([[far, 3.0]]))
    x = drawn(100, 2, seed=1) * 5 + 3
    assert torch.allclose(inputs(x), undisturbed(x), rtol=0.35, atol=0.35 + 8 / records**0.5)
    assert float(inputs(x)[:, 0].std()) > 0.6


@lawful
@given(st.floats(0, 8), st.integers(0, 2**20))
def test_a_scale_that_really_changes_is_followed(exponent: float, seed: int) -> None:
    inputs = taught(drawn(100_000, 1, seed=seed), horizon=10_000)
    x = drawn(20_000, 1, seed=seed + 1) * 10**exponent
    for part in x.split(16):
        inputs.update(part)
    assert 0.2 < float(inputs(x).std()) < 3


def test_a_scale_that_changes_is_followed_by_a_tenth_a_record() -> None:
    inputs = taught(drawn(100_000, 1))
    before = float(inputs.square)
    for _ in range(20):
        inputs.update(torch.tensor([[1e9]]))
    assert float(inputs.square) == pytest.approx(before * 1.1**20, rel=0.05)


@lawful
@given(splits, st.integers(1, 3), st.integers(0, 2**20))
def test_bytes_are_scaled_as_the_same_numbers_are(sizes: list[int], channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (sum(sizes), channels, 3, 2), dtype=torch.uint8, generator=generator)
    bytewise, numbers = taught(pixels, sizes), taught(pixels.double(), sizes)
    assert torch.allclose(bytewise.mean, numbers.mean, rtol=1e-12)
    assert torch.allclose(bytewise.square, numbers.square, rtol=1e-9)
    assert torch.equal(bytewise.count, numbers.count)
    assert torch.allclose(bytewise(pixels), numbers(pixels.float()), atol=1e-5)
    assert bytewise(pixels).dtype == Standardiser()(pixels).dtype == torch.float32


def test_bytes_that_are_not_scaled_go_from_0_to_1() -> None:
    pixels = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    assert torch.allclose(Raw()(pixels), torch.tensor([[[[0, 0.2, 1]]]]))

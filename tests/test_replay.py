from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import stored

from streamkd import ReplayBuffer
from streamkd.replay import Evict, Memories, lowest, reservoir, ring

EVICTIONS = [ring, lowest, reservoir]

lawful = settings(max_examples=25, deadline=None)


def records(start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Each record carries its number in the order of arrival, and so does its label."""
    numbers = torch.arange(start, stop)
    return numbers[:, None].float(), numbers


def filled(n: int, *, capacity: int | None = None, batch: int = 7, **options: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(n if capacity is None else capacity, **options)
    for start in range(0, n, batch):
        buffer.add(*records(start, min(start + batch, n)))
    return buffer


def kept(buffer: ReplayBuffer) -> list[int]:
    return sorted(buffer.state_dict()["y"].tolist())


def prioritise(buffer: ReplayBuffer, losses: Tensor) -> None:
    """Give the slots 0, 1, ... these losses, once the ceiling is above them all."""
    for _ in range(100):
        buffer.update(torch.arange(len(losses)), torch.full((len(losses),), 2 * float(losses.max())))
    buffer.update(torch.arange(len(losses)), losses)
    assert torch.allclose(buffer.priorities[: len(losses)], losses + 1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_a_record_is_drawn_in_proportion_to_its_priority_to_the_alpha(alpha: float) -> None:
    buffer = filled(20, alpha=alpha, seed=1)
    prioritise(buffer, torch.linspace(0.1, 4, 20))
    shares = buffer.priorities**alpha / (buffer.priorities**alpha).sum()
    drawn = buffer.sample(20_000)
    expected = shares * 20_000
    chi_square = float(((drawn.slots.bincount(minlength=20) - expected) ** 2 / expected).sum())
    assert chi_square < 44  # 19 degrees of freedom pass 43.8 once in a thousand


def test_full_importance_weights_undo_the_bias_of_the_draw() -> None:
    buffer = filled(50, alpha=1.0, beta=1.0, seed=2)
    values = torch.linspace(0.1, 5, 50)
    prioritise(buffer, values)  # what is larger is drawn more
    drawn = buffer.sample(50_000)
    said = values[drawn.slots]
    assert float(said.mean()) > 1.25 * float(values.mean())
    assert float((said * drawn.weights).sum() / drawn.weights.sum()) == pytest.approx(float(values.mean()), rel=0.02)


def test_importance_weights_are_the_published_ones_over_their_largest() -> None:
    buffer = filled(10, alpha=0.6, beta=0.4, beta_records=10**9, seed=3)
    prioritise(buffer, torch.linspace(0.2, 3, 10))
    p = buffer.priorities**0.6 / (buffer.priorities**0.6).sum()
    drawn = buffer.sample(30)
    expected = (10 * p[drawn.slots]) ** -0.4
    assert torch.allclose(drawn.weights, expected / expected.max(), atol=1e-5)


def test_new_records_come_in_at_the_highest_priority_in_the_buffer() -> None:
    buffer = filled(6, capacity=12)
    prioritise(buffer, torch.tensor([0.1, 0.4, 0.2, 0.3, 0.1, 0.2]))
    buffer.add(*records(6, 9))
    assert torch.allclose(buffer.priorities[6:9], torch.tensor(0.4 + 1e-3))
    prioritise(buffer, torch.full((9,), 0.05))  # the highest falls with the losses: it is no high-water mark
    buffer.add(*records(9, 10))
    assert float(buffer.priorities[9]) == pytest.approx(0.05 + 1e-3)


@lawful
@given(st.integers(1, 9), st.lists(st.integers(0, 25), max_size=12), st.sampled_from(EVICTIONS))
def test_a_memory_never_holds_more_than_its_capacity_or_less_than_it_could(
    capacity: int, additions: list[int], evict: Evict
) -> None:
    buffer, added = ReplayBuffer(capacity, evict=evict), 0
    for n in additions:
        buffer.add(*records(added, added + n))
        added += n
        assert len(buffer) == min(added, capacity)
        numbers = kept(buffer)
        assert len(set(numbers)) == len(numbers) == len(buffer)  # nothing twice
        assert torch.equal(buffer.state_dict()["x"][:, 0].long(), buffer.state_dict()["y"]) if added else True


@lawful
@given(st.integers(1, 9), st.lists(st.integers(0, 25), max_size=12))
def test_a_ring_keeps_exactly_the_newest(capacity: int, additions: list[int]) -> None:
    buffer, added = ReplayBuffer(capacity), 0
    for n in additions:
        buffer.add(*records(added, added + n))
        added += n
    assert kept(buffer) == list(range(max(0, added - capacity), added))


def test_lowest_makes_room_where_the_priority_is_lowest() -> None:
    buffer = filled(6, evict=lowest)
    prioritise(buffer, torch.tensor([0.5, 0.1, 0.9, 0.2, 0.8, 0.3]))
    buffer.add(*records(6, 8))
    assert kept(buffer) == [0, 2, 4, 5, 6, 7]


def test_a_reservoir_is_uniform_over_history() -> None:
    for capacity, history, batch, runs in [(10, 50, 7, 400), (2, 7, 3, 1_000)]:
        counts = torch.zeros(history)
        for seed in range(runs):
            buffer = filled(history, capacity=capacity, batch=batch, seed=seed, evict=reservoir)
            counts[torch.tensor(kept(buffer))] += 1
        share = capacity / history
        scores = (counts - runs * share) / (runs * share * (1 - share)) ** 0.5
        assert float(scores.abs().max()) < 4
        assert float(scores[: history // 2].mean().abs()) < 0.8  # no half is favoured as a whole


@pytest.mark.parametrize("evict", EVICTIONS)
@pytest.mark.parametrize("window", [10, 25])
def test_nothing_older_than_the_window_is_drawn(evict: Evict, window: int) -> None:
    buffer = filled(200, capacity=60, batch=5, evict=evict, seed=4)
    drawn = buffer.sample(500, window)
    inside = [number for number in kept(buffer) if number >= 200 - window]
    assert sorted(set(drawn.y.tolist())) == inside
    assert torch.equal(drawn.ages, 200 - drawn.y)


def test_a_window_that_holds_nothing_recalls_no_error() -> None:
    # A reservoir's latest records are rare once history is long: none of its 40 may be among the latest 16.
    buffer = filled(6_000, capacity=40, batch=100, evict=reservoir, seed=0)
    assert max(kept(buffer)) < 6_000 - 16
    drawn = buffer.sample(8, window=16)
    assert bool(drawn.weights.isfinite().all())


def test_a_window_wider_than_the_memory_is_all_of_it() -> None:
    one, other = filled(30, seed=5), filled(30, seed=5)
    assert torch.equal(one.sample(100).slots, other.sample(100, 31).slots)


def test_importance_weighting_grows_to_full_and_begins_again_after_a_drift() -> None:
    buffer = ReplayBuffer(5, beta_records=100)
    betas = [buffer.beta]
    for start in range(0, 150, 10):
        buffer.add(*records(start, start + 10))
        betas.append(buffer.beta)
    assert betas[0] == pytest.approx(0.4)
    assert betas[5] == pytest.approx(0.7)
    assert betas[10:] == pytest.approx([1.0] * 6)
    buffer.forget_schedule()
    assert buffer.beta == pytest.approx(0.4)


def test_a_memory_without_capacity_remembers_nothing() -> None:
    buffer = filled(20, capacity=0)
    drawn = buffer.sample(8, 256)
    assert len(buffer) == len(drawn) == 0
    buffer.update(drawn.slots, torch.zeros(0))
    again = ReplayBuffer(0)
    again.load_state_dict(stored(buffer.state_dict()))
    assert len(again.sample(8)) == 0


def test_priorities_are_capped_where_one_loss_in_twenty_is_larger() -> None:
    buffer = filled(64)
    generator = torch.Generator().manual_seed(6)
    above = []
    for step in range(2_000):
        losses = -torch.rand(32, generator=generator).log()
        if step >= 200:
            above.append(float((losses > buffer.ceiling).float().mean()))
        buffer.update(torch.arange(32), losses)
        assert float(buffer.priorities[:32].max()) <= buffer.ceiling + 1e-6
    assert sum(above) / len(above) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_every_record_drawable(bad: float) -> None:
    buffer = filled(4, seed=7)
    buffer.update(torch.arange(4), torch.tensor([0.5, bad, 0.0, 1.0]))
    assert bool(buffer.priorities.isfinite().all())
    assert sorted(buffer.sample(2_000).slots.unique().tolist()) == [0, 1, 2, 3]


@lawful
@given(
    st.sampled_from(EVICTIONS),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.lists(st.integers(1, 9), max_size=4),
)
def test_a_restored_memory_draws_what_it_would_have_drawn(evict: Evict, before: list[int], after: list[int]) -> None:
    def go_on(buffer: ReplayBuffer, additions: list[int]) -> list[Memories]:
        drawn = []
        for n in additions:
            drawn.append(buffer.sample(6, 12))
            buffer.update(drawn[-1].slots, drawn[-1].y.float())
            buffer.add(*records(buffer.added, buffer.added + n))
        return [*drawn, buffer.sample(6)]

    buffer, restored = ReplayBuffer(15, evict=evict, seed=8), ReplayBuffer(15, evict=evict, seed=9)
    restored.add(*records(100, 118))  # it has a past of its own, of which nothing is left
    buffer.add(*records(0, 20))
    buffer.forget_schedule()
    go_on(buffer, before)
    restored.load_state_dict(stored(buffer.state_dict()))
    for one, other in zip(go_on(buffer, after), go_on(restored, after), strict=True):
        for name in ("slots", "x", "y", "weights", "ages"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert buffer.beta == restored.beta


def test_a_copy_of_a_memory_is_its_own_and_does_the_same() -> None:
    buffer = filled(30, seed=12)
    copied = deepcopy(buffer)
    for each in (buffer, copied):
        drawn = each.sample(12)
        each.update(drawn.slots, drawn.y.float())
    one, other = buffer.state_dict(), copied.state_dict()
    assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)
    assert torch.equal(buffer.priorities, copied.priorities)
    buffer.bar(torch.tensor([0]))
    assert float(copied.priorities[0]) > 0


def test_images_come_back_as_they_were_stored() -> None:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(8, 3, 4, 4, generator=generator)
    x[0, 0, 0, 0] = float("nan")  # raw: what is missing stays missing
    buffer = ReplayBuffer(8)
    buffer.add(x, torch.arange(8))
    drawn = buffer.sample(40)
    assert torch.equal(drawn.x.nan_to_num(-9), x[drawn.y].nan_to_num(-9))


def test_a_record_that_is_barred_is_never_drawn_and_its_slot_is_used_again() -> None:
    buffer = filled(4, seed=7)
    buffer.bar(torch.tensor([1, 2]))
    assert sorted(buffer.sample(2_000).slots.unique().tolist()) == [0, 3]
    buffer.bar(torch.arange(4))
    assert len(buffer.sample(8)) == 0
    buffer.add(*records(4, 8))
    assert sorted(buffer.sample(2_000).slots.unique().tolist()) == [0, 1, 2, 3]
    again = filled(4, seed=7)
    again.bar(torch.tensor([0]))
    again.add(*records(4, 5))
    assert 0 in again.sample(2_000).slots

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import stored

from streamkd import Served

lawful = settings(max_examples=25, deadline=None)
nan, infinity = float("nan"), float("inf")


def answers(members: int, n: int, classes: int = 3, seed: int = 0) -> Tensor:
    """Log-probabilities `[members, n, classes]`, none of them so bold that the floor would touch it."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(members, n, classes, generator=generator, dtype=torch.float64)
    return logits.clamp(-5, 5).log_softmax(-1)


@lawful
@given(st.integers(1, 6).flatmap(lambda m: st.lists(st.lists(st.floats(1e-5, 1), min_size=m, max_size=m), min_size=1)))
def test_without_forgetting_the_total_loss_is_the_best_members_plus_ln_members(sequence: list[list[float]]) -> None:
    members = len(sequence[0])
    served, total, losses = Served(members, gamma=1, floor=0), 0.0, torch.zeros(members, dtype=torch.float64)
    for row in sequence:
        log_p = torch.tensor(row, dtype=torch.float64).clamp(max=1 - 1e-5).log()
        both = torch.stack([log_p, (-log_p.expm1()).log()], -1)[:, None]  # the truth is the first of two classes
        total -= float(served.answer(both)[0, 0].log())
        losses -= log_p
        served.update(log_p[:, None])
    assert total <= float(losses.min()) + math.log(members) + 1e-6


@lawful
@given(
    st.integers(1, 5).flatmap(
        lambda m: st.lists(
            st.lists(st.sampled_from([0.0, -0.1, -3.0, -50.0, -infinity, nan]), min_size=m, max_size=m), max_size=30
        )
    ),
    st.sampled_from([0.0, 0.01, 0.5]),
)
def test_weights_add_up_to_one_and_none_falls_below_its_share_of_the_floor(
    sequence: list[list[float]], floor: float
) -> None:
    members = len(sequence[0]) if sequence else 3
    served = Served(members, floor=floor)
    for row in sequence:
        served.update(torch.tensor(row)[:, None])
        assert float(served.weights.sum()) == pytest.approx(1)
        assert float(served.weights.min()) >= floor / members


@pytest.mark.parametrize("bad", [nan, infinity])
def test_a_member_that_is_not_finite_weighs_nothing(bad: float) -> None:
    served, said = Served(3), answers(3, 4)
    served.update(answers(3, 8, seed=1)[..., 0])
    broken = said.clone()
    broken[1, 2, 0] = bad
    others = torch.tensor([0, 2])
    weights = served.weights[others] / served.weights[others].sum()
    expected = torch.einsum("m,mnc->nc", weights, said[others].exp())
    assert torch.allclose(served.answer(broken), expected)


def test_where_nobody_is_finite_every_class_is_as_likely() -> None:
    assert Served(2).answer(torch.full((2, 3, 4), nan)).tolist() == [[0.25] * 4] * 3


@lawful
@given(st.lists(st.booleans(), min_size=4, max_size=4), st.sampled_from([0.0, 0.01]), st.integers(0, 2**20))
def test_the_answer_is_a_distribution_whoever_broke_down(sound: list[bool], floor: float, seed: int) -> None:
    served = Served(4, gamma=1, floor=floor)
    # One member was right for long, so that the others' weights are next to nothing without a floor.
    gains = torch.tensor([-0.01, -2.0, -3.0, -4.0])
    served.update(gains[:, None].expand(-1, 200))
    said = answers(4, 3, seed=seed).float()
    said[~torch.tensor(sound)] = nan
    mixed = served.answer(said)
    assert float(mixed.min()) >= 0
    assert torch.allclose(mixed.sum(1), torch.ones(3), atol=1e-5)


def test_scores_are_the_discounted_sums_of_log_probabilities() -> None:
    served = Served(2, gamma=0.99, floor=0.01)
    first = torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.5, 0.5]], dtype=torch.float64)
    second = torch.tensor([[0.2, 0.3], [0.6, 0.6]], dtype=torch.float64)
    served.update(first.log())
    served.update(second.log())
    scores = [
        0.99**2 * math.log(0.9 * 0.8 * 0.7) + math.log(0.2 * 0.3),
        0.99**2 * math.log(0.5**3) + math.log(0.6**2),
    ]
    best = math.exp(scores[0]) / (math.exp(scores[0]) + math.exp(scores[1]))
    assert served.weights.tolist() == pytest.approx([0.99 * best + 0.005, 0.99 * (1 - best) + 0.005])


@pytest.mark.parametrize("bad", [nan, -infinity, -1e9])
def test_no_single_answer_is_charged_with_more_than_the_floor(bad: float) -> None:
    served, charged = Served(2), Served(2)
    served.update(torch.tensor([[bad], [-0.5]]))
    charged.update(torch.tensor([[math.log(1e-6)], [-0.5]]))
    assert torch.allclose(served.weights, charged.weights)


def test_memory_is_shorter_for_as_many_batches_as_an_alarm_lasts() -> None:
    served, by_hand = Served(2, gamma=0.99, gamma_drift=0.9, drift_batches=3, floor=0), torch.zeros(2).double()
    served.shorten()
    for batch, gamma in enumerate([0.9, 0.9, 0.9, 0.99, 0.99]):
        log_p = answers(2, 4, seed=batch)[..., 0]
        served.update(log_p)
        by_hand = gamma**4 * by_hand + log_p.sum(1)
        assert torch.allclose(served.weights, by_hand.softmax(0))


def test_the_answer_follows_whoever_was_right_of_late() -> None:
    served = Served(2)
    right_then_wrong = torch.tensor([0.9] * 300 + [0.1] * 100).log()
    served.update(torch.stack([right_then_wrong, torch.full((400,), 0.5).log()])[:, :300])
    assert served.weights[0] > 0.98
    for start in range(300, 400, 10):
        served.update(torch.stack([right_then_wrong, torch.full((400,), 0.5).log()])[:, start : start + 10])
    assert served.weights[1] > 0.98


@lawful
@given(st.integers(1, 4), st.sampled_from([0.0, 0.01, 1.0]), st.integers(0, 2**20))
def test_without_averages_the_answer_is_that_of_the_peers_alone(peers: int, floor: float, seed: int) -> None:
    without, alone = Served(2 * peers, floor=floor, averages=False), Served(peers, floor=floor)
    past, said = answers(2 * peers, 8, seed=seed)[..., 0], answers(2 * peers, 3, seed=seed + 1)
    without.update(past)
    alone.update(past[:peers])
    assert torch.allclose(without.answer(said), alone.answer(said[:peers]))
    assert without.weights[peers:].tolist() == [0.0] * peers


def test_a_floor_of_one_makes_the_answer_a_plain_mean() -> None:
    served, said = Served(4, floor=1.0), answers(4, 3)
    served.update(answers(4, 8, seed=1)[..., 0])
    assert torch.allclose(served.answer(said), said.exp().mean(0))


def test_restored_weights_go_on_as_they_would_have() -> None:
    served, restored = Served(3, drift_batches=4), Served(3, drift_batches=4)
    served.update(answers(3, 8, seed=1)[..., 0])
    served.shorten()
    served.update(answers(3, 8, seed=2)[..., 0])
    restored.load_state_dict(stored(served.state_dict()))
    for batch in range(5):  # past the end of the alarm
        for one in (served, restored):
            one.update(answers(3, 8, seed=3 + batch)[..., 0])
        assert torch.equal(served.weights, restored.weights)

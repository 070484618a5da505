from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from worlds import batches, engine, stored

from runners.settings import load
from streamkd import Election, Engine
from streamkd.bandit import Bandit
from streamkd.config import build_engine
from streamkd.errors import ConfigError
from streamkd.roles import bandit

lawful = settings(max_examples=25, deadline=None)
EVERYBODY = np.array([True, True, True])


def made(**options: object) -> Bandit:
    rule = bandit(**options)  # type: ignore[arg-type]
    assert isinstance(rule, Bandit)
    return rule


def answers(peers: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.randn(peers, n, 4, generator=generator).log_softmax(-1)
    return log_p, torch.rand(peers, n, generator=generator) < 0.5


def term(rule: Bandit, roles: Election, seed: int, candidates: NDArray[np.bool_] = EVERYBODY) -> int | None:
    """Let a term pass, and be judged."""
    rule.hear(*answers(3, 20, seed))
    chosen = rule(roles, candidates, drifting=False)
    if chosen is not None:
        roles.teacher = chosen
    return chosen


def test_a_term_is_worth_what_the_students_gained_and_learned_less_what_the_teacher_cost() -> None:
    rule, roles = made(gain=2.0, divergence=0.5, energy=0.3, costs=(0.2, 1.0, 0.5)), Election(3)
    term(rule, roles, 0)
    roles.teacher = 1
    (first, second) = (answers(3, 20, seed) for seed in (0, 1))
    rule.hear(*second)
    gained = (second[1].double().mean(1) - first[1].double().mean(1))[[0, 2]].mean()
    p = second[0].exp()
    apart = [float((p[1] * (second[0][1] - second[0][student])).sum(-1).mean()) for student in (0, 2)]
    expected = 2.0 * float(gained) + 0.5 * sum(apart) / 2 - 0.3 * 1.0
    assert rule.reward(1) == pytest.approx(expected, rel=1e-5)


@lawful
@given(st.integers(0, 2**20), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_term_is_the_same_whatever_the_batches_it_came_in(seed: int, sizes: list[int]) -> None:
    log_p, correct = answers(3, sum(sizes), seed)
    whole, parts = made(), made()
    whole.hear(log_p, correct)
    for one, other in zip(log_p.split(sizes, 1), correct.split(sizes, 1), strict=True):
        parts.hear(one, other)
    assert [whole.reward(peer) for peer in range(3)] == pytest.approx([parts.reward(peer) for peer in range(3)])


@lawful
@given(st.integers(0, 2**20), st.integers(1, 30))
def test_with_nothing_forgotten_it_is_the_ridge_regression_of_the_rewards(seed: int, terms: int) -> None:
    rule = made(gamma=1.0, exploration=0.0)
    rule.hear(*answers(3, 1, seed))
    chance = np.random.default_rng(seed)
    x, r = chance.normal(size=(terms, 6)), chance.normal(size=terms)
    for context, reward in zip(x, r, strict=True):
        rule.learn(context, float(reward))
    theta = np.linalg.solve(x.T @ x + np.eye(6), x.T @ r)
    assert rule.worth(np.eye(6)) == pytest.approx(theta)
    # The bound is that of the forecaster that forgets nothing: x V^-1 x.
    rule.exploration = 1.0
    assert rule.worth(np.eye(6)) - theta == pytest.approx(np.sqrt(np.diag(np.linalg.inv(x.T @ x + np.eye(6)))))


def pulled(rule: Bandit, worth: list[tuple[float, ...]]) -> list[int]:
    """Choose and learn, term by term, where each peer is worth what it is said to be; nothing else is known of it."""
    rule.hear(*answers(3, 1, 0))
    arms, chance, chosen = np.eye(3, 6), np.random.default_rng(0), []
    for rewards in worth:
        arm = int(rule.worth(arms).argmax())
        rule.learn(arms[arm], rewards[arm] + 0.02 * chance.normal())
        chosen.append(arm)
    return chosen


def test_the_peer_that_is_worth_most_is_found_and_found_anew_when_the_world_changes() -> None:
    before, after = (0.0, 0.3, 0.1), (0.2, -0.3, 0.1)
    chosen = pulled(made(), [before] * 150 + [after] * 150)
    assert {arm: chosen[:150].count(arm) for arm in range(3)}[1] > 90
    assert chosen[200:].count(0) > 60
    assert set(chosen) == {0, 1, 2}  # nobody is written off unheard
    # What forgets nothing finds it later, by many terms.
    stubborn = pulled(made(gamma=1.0), [before] * 150 + [after] * 150)
    assert stubborn[150:].count(0) < chosen[150:].count(0)


def test_of_two_who_are_worth_the_same_the_cheaper_one_is_kept() -> None:
    rule = made(gain=0.0, divergence=0.0, energy=1.0, exploration=0.1, costs=(1.0, 0.1, 1.0))
    roles = Election(3)
    teachers = []
    for seed in range(60):
        term(rule, roles, seed)
        teachers.append(roles.teacher)
    assert teachers[20:].count(1) > 30


def test_nobody_but_a_candidate_takes_over() -> None:
    rule, roles = made(exploration=10.0), Election(3)
    only = np.array([False, False, True])
    assert {term(rule, roles, seed, only) for seed in range(20)} <= {2, None}


def test_nothing_is_decided_without_a_record() -> None:
    assert made()(Election(3), EVERYBODY, drifting=True) is None


def test_a_peer_that_broke_down_leaves_no_trace_in_what_is_known() -> None:
    rule, roles = made(), Election(3)
    log_p, correct = answers(3, 20, 0)
    log_p[2] = torch.nan
    for _ in range(3):
        rule.hear(log_p, correct)
        rule(roles, EVERYBODY, drifting=False)
    assert np.isfinite(rule.worth(np.eye(6))).all()


def test_a_restored_bandit_chooses_whom_it_would_have_chosen() -> None:
    (rule, roles), (restored, others) = ((rule, Election(3, rule=rule)) for rule in (made(), made()))
    for seed in range(10):
        term(rule, roles, seed)
    rule.hear(*answers(3, 5, 99))
    others.load_state_dict(stored(roles.state_dict()))
    future = [[term(one, by, seed) for seed in range(10, 40)] for one, by in ((rule, roles), (restored, others))]
    assert future[0] == future[1]
    assert len(set(future[0])) > 2


def test_an_engine_elects_by_it_and_keeps_the_least_time_in_office() -> None:
    made_engine = engine(election=Election(3, rule=made(), every=4, tenure=16))
    swaps = [(r.updates, r.swap.after) for b in batches(late=True) for r in [made_engine.step(b)] if r.swap]
    assert len({name for _, name in swaps}) > 1
    assert all(after - before >= 8 for (before, _), (after, _) in pairwise(swaps))


def test_costs_are_measured_and_not_for_the_user_to_set() -> None:
    small = "peers.2.model.widths=[4]"
    built: Engine = build_engine(load("default", ["roles.rule=bandit", small]), (5,))
    rule = built.roles.rule
    assert isinstance(rule, Bandit)
    assert rule.costs[:2] == pytest.approx([1.0, 1.0])
    assert rule.costs[2] == pytest.approx((5 * 4 + 4 * 100) / (5 * 128 + 128 * 64 + 64 * 100))
    with pytest.raises(ConfigError, match=r"roles\.rule\.costs: no such option"):
        build_engine(load("default", ["roles.rule={kind='bandit', costs=[1]}"]), (5,))

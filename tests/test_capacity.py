from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from worlds import stored

from runners.settings import load
from streamkd import UNLABELLED, Batch, Engine, Peer
from streamkd.capacity import REFRESH, Capacity, dimension, fisher, flops, parameters, rank, three_c
from streamkd.config import build_engine
from streamkd.errors import ConfigError
from streamkd.models import mlp
from streamkd.taps import Tapped

lawful = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**20)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def told(measure: Capacity, *features: Tensor, p: Tensor | None = None, y: Tensor | None = None) -> list[float]:
    """Let a measure hear the features of each peer once, on records that were all answered alike."""
    n = len(features[0])
    measure.start([None] * len(features), torch.zeros(1, 1))
    measure.update(
        torch.full((len(features), n, 2), 0.5, dtype=torch.float64) if p is None else p,
        torch.zeros(n, dtype=torch.int64) if y is None else y,
        features,
    )
    return measure.values


def test_parameters_and_operations_are_those_of_the_matrices() -> None:
    model = mlp((6,), 3, widths=(5,))
    for module in (model, Tapped(model, adapters={"t": nn.Linear(5, 100)})):
        for measure, expected in ((parameters(), 6 * 5 + 5 + 5 * 3 + 3), (flops(), 2 * (6 * 5 + 5 * 3))):
            measure.start([module, None], torch.zeros(1, 6))
            assert measure.values == [expected, 0]


@lawful
@given(seeds, st.integers(1, 6), st.integers(1, 5), st.integers(2, 4))
def test_the_fisher_trace_is_that_of_the_last_layers_gradients_record_by_record(
    seed: int, n: int, width: int, classes: int
) -> None:
    h = drawn(n, width, seed=seed)
    y = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))
    layer = nn.Linear(width, classes, dtype=torch.float64)
    squares = []
    for record, label in zip(h, y, strict=True):
        loss = nn.functional.cross_entropy(layer(record), label)
        squares.append(sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(layer.parameters()))))
    p = layer(h).softmax(-1).detach()[None]
    assert told(fisher(), h, p=p, y=y) == pytest.approx([sum(squares) / n])


@lawful
@given(seeds, st.integers(1, 8), st.floats(0.1, 10))
def test_features_of_k_even_directions_have_that_many_dimensions_along_whatever_axes(
    seed: int, k: int, scale: float
) -> None:
    turned, _ = torch.linalg.qr(drawn(12, 12, seed=seed))
    corners = scale * torch.cat([torch.eye(12, dtype=torch.float64)[:k], -torch.eye(12, dtype=torch.float64)[:k]])
    features = corners @ turned + 3.0  # a mean is no dimension
    assert told(rank(), features) == pytest.approx([k])
    assert told(dimension(share=0.999), features) == [k]
    assert told(dimension(share=0.5), features) == [-(-k // 2)]


@lawful
@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_the_running_covariance_of_a_long_horizon_is_that_of_all_records(seed: int, sizes: list[int]) -> None:
    features = drawn(sum(sizes), 4, seed=seed)
    whole, parts = rank(horizon=1e9), rank(horizon=1e9)
    whole.start([None], features)
    parts.start([None], features)
    for part in features.split(sizes):
        parts.update(torch.full((1, len(part), 2), 0.5), torch.zeros(len(part), dtype=torch.int64), [part])
    whole.update(torch.full((1, len(features), 2), 0.5), torch.zeros(len(features), dtype=torch.int64), [features])
    for one, other in zip(whole.state_dict()["tallies"][0][3:], parts.state_dict()["tallies"][0][3:], strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_score_of_an_average_peer_is_the_sum_of_the_weights() -> None:
    features = [scale * drawn(50, width, seed=width) for width, scale in ((3, 1.0), (6, 20.0), (9, 0.1))]
    scores = told(three_c(), *features)
    assert sum(scores) / 3 == pytest.approx(1.0)
    by_fisher, by_dimension = (told(three_c(f, d), *features) for f, d in ((1.0, 0.0), (0.0, 1.0)))
    assert scores == pytest.approx([0.6 * f + 0.4 * d for f, d in zip(by_fisher, by_dimension, strict=True)])
    widths = told(dimension(), *features)
    assert by_dimension == pytest.approx([width / (sum(widths) / 3) for width in widths])


@pytest.mark.parametrize("make", [fisher, dimension, rank, three_c])
def test_what_is_not_known_or_not_finite_is_passed_over(make: partial[Capacity]) -> None:
    measure, features = make(), drawn(20, 4, seed=1)
    expected = told(make(), features, features)
    broken, far = features.clone(), features.clone()
    broken[3] = torch.nan
    far[3] = 1e200  # finite, but not its square
    assert told(measure, features, features) == expected
    half = torch.full((2, 20, 2), 0.5, dtype=torch.float64)
    for _ in range(2 * REFRESH):
        measure.update(half, torch.full((20,), UNLABELLED), [features, features])
        measure.update(half, torch.zeros(20, dtype=torch.int64), [broken, None])
        measure.update(half, torch.zeros(20, dtype=torch.int64), [None, far])
    assert measure.values == expected


@pytest.mark.parametrize("make", [fisher, dimension, rank, three_c])
def test_a_restored_measure_goes_on(make: partial[Capacity]) -> None:
    measure, restored = make(), make()
    told(measure, drawn(20, 4, seed=1))
    restored.load_state_dict(stored(measure.state_dict()))
    for seed in range(2 * REFRESH):
        for one in (measure, restored):
            one.update(torch.full((1, 20, 2), 0.5), torch.zeros(20, dtype=torch.int64), [drawn(20, 4, seed=seed)])
    assert measure.values == restored.values


def engine(kind: str, *overrides: str) -> Engine:
    made = build_engine(load("default", [f"distillation.capacity={kind}", *overrides]), (5,))
    x = torch.randn(320, 5, generator=torch.Generator().manual_seed(0))
    for start in range(0, 320, 16):
        made.step(Batch(x[start : start + 16], (x[start : start + 16, 0] > 0).long()))
    return made


@pytest.mark.parametrize("kind", ["parameters", "flops", "fisher", "dimension", "rank", "three_c"])
def test_schedules_and_reports_are_given_the_capacities_that_are_measured(kind: str) -> None:
    made = engine(kind, "peers.2.model.widths=[16]", "distillation.alpha=capacity_ratio")
    known = made.guidance.capacities
    assert all(value > 0 for value in known)
    report = made.step(Batch(torch.randn(16, 5), torch.zeros(16, dtype=torch.int64)))
    ratios = [peer.capacity_ratio for peer in report.peers.values()]
    now, teacher = made.guidance.capacities, made.roles.teacher
    assert ratios == pytest.approx([value / now[teacher] for value in now])
    for (source, student), alpha in made.guidance.alphas.items():
        ratio = known[student] / known[source]
        assert alpha == pytest.approx(float(torch.sigmoid(torch.tensor(ratio))), abs=0.02)


def test_the_parameters_of_a_peer_are_the_capacity_unless_another_is_asked_for() -> None:
    made = engine("parameters")
    assert made.guidance.capacities == [peer.capacity for peer in made.cohort.peers]
    assert all(isinstance(peer, Peer) and not isinstance(peer.module, Tapped) for peer in made.cohort.peers)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distillation.capacity=flop", ["distillation.capacity.kind = 'flop'", "did you mean flops?"]),
        ("distillation.capacity={kind='dimension', share=2}", ["distillation.capacity.share = 2"]),
        ("distillation.capacity={kind='rank', width=2}", ["distillation.capacity.width", "no such option"]),
    ],
)
def test_a_capacity_that_does_not_exist_is_refused(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        build_engine(load("default", [override]), (5,))
    for word in words:
        assert word in str(refused.value)

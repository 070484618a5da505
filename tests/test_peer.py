from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from worlds import stored

from runners.settings import load
from streamkd import Batch, Output, Peer
from streamkd.config import build_engine
from streamkd.models import mlp
from streamkd.peer import MakeOptimizer

sgd: MakeOptimizer = partial(torch.optim.SGD, lr=0.1)
momentum: MakeOptimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
adam: MakeOptimizer = partial(torch.optim.Adam, lr=0.01)

OPTIMIZERS = [sgd, momentum, adam]


def small() -> nn.Module:
    return mlp((3,), 2, widths=(4,))


def with_buffers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def peer(
    optimizer: MakeOptimizer = sgd, build: Callable[[], nn.Module] = small, *, seed: int = 0, **options: Any
) -> Peer:
    return Peer("a", build, optimizer, seed=seed, **options)


def records(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, generator=generator), torch.randint(0, 2, (8,), generator=generator)


def learn(one: Peer, seed: int, rate: float = 1.0) -> float:
    x, y = records(seed)
    nn.functional.cross_entropy(one.learn(x).logits, y).backward()  # type: ignore[no-untyped-call]
    norm = float(one.clip_gradient())
    one.step(norm, rate)
    return norm


def flat(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def give_gradients(one: Peer, value: float) -> None:
    for parameter in one.module.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_the_average_is_plain_at_first_and_exponential_from_its_horizon_on() -> None:
    horizon, one, weights = 4, peer(horizon=4), []
    for update in range(1, 13):
        learn(one, update)
        weights.append(flat(one.module))
        warm = weights[:horizon]
        expected = (1 - 1 / horizon) ** max(0, update - horizon) * torch.stack(warm).mean(0)
        for age, later in enumerate(reversed(weights[horizon:])):
            expected = expected + (1 - 1 / horizon) ** age / horizon * later
        assert torch.allclose(flat(one.average), expected, atol=1e-6)


def test_before_the_first_step_the_average_answers_as_the_peer_does() -> None:
    one = peer()
    x, _ = records(0)
    assert torch.equal(one.predict_average(x).logits, one.predict(x).logits)


def test_buffers_are_copied_into_the_average_and_not_averaged() -> None:
    one = peer(build=with_buffers)
    for update in range(5):
        learn(one, update)
    theirs, ours = dict(one.average.named_buffers()), dict(one.module.named_buffers())
    assert int(ours["1.num_batches_tracked"]) == 5
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert not torch.allclose(flat(one.average), flat(one.module))


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    one = peer(seed=5)
    torch.manual_seed(2)
    torch.rand(3)
    assert torch.equal(flat(one.module), flat(peer(seed=5).module))
    assert not torch.equal(flat(one.module), flat(peer(seed=6).module))


def test_the_making_of_a_peer_leaves_no_trace_in_torchs_own_chance() -> None:
    before = torch.get_rng_state()
    one = peer()
    one.restart(peer(seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_is_never_stepped_on(bad: float, optimizer: MakeOptimizer) -> None:
    one, undisturbed = peer(optimizer), peer(optimizer)
    for both in (one, undisturbed):
        learn(both, 0)
    give_gradients(one, 0.1)
    next(one.module.parameters()).grad[0, 0] = bad  # type: ignore[index]
    one.step(float(one.clip_gradient()))
    assert torch.equal(flat(one.module), flat(undisturbed.module))
    assert torch.equal(flat(one.average), flat(undisturbed.average))
    assert (one.skipped, one.stuck) == (1, 1)
    # It was thrown away whole: what comes next is as if it had never been.
    for both in (one, undisturbed):
        learn(both, 1)
    assert torch.equal(flat(one.module), flat(undisturbed.module))
    assert (one.skipped, one.stuck) == (1, 0)


@pytest.mark.parametrize(("value", "length"), [(5.0, 2.0), (0.01, None)])
def test_a_gradient_longer_than_the_clip_is_shortened_to_it_and_keeps_its_direction(
    value: float, length: float | None
) -> None:
    one = peer(clip=2.0)
    before = flat(one.module)
    give_gradients(one, value)
    norm = float(one.clip_gradient())
    one.step(norm)
    assert norm == pytest.approx(value * len(before) ** 0.5)
    moved = (before - flat(one.module)) / 0.1
    assert float(moved.norm()) == pytest.approx(length or norm, rel=1e-3)
    assert torch.allclose(moved / moved.norm(), torch.full_like(moved, len(moved) ** -0.5), atol=1e-3)


def test_a_raised_rate_is_for_one_step() -> None:
    one = peer()
    places = [flat(one.module)]
    for rate in (1.0, 3.0, 1.0):
        give_gradients(one, 0.01)
        one.step(float(one.clip_gradient()), rate)
        places.append(flat(one.module))
    first, second, third = (float((b - a).norm()) for a, b in pairwise(places))
    assert second == pytest.approx(3 * first, rel=1e-3)
    assert third == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("build", [small, with_buffers])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_peer_learns_what_it_would_have_learned(
    optimizer: MakeOptimizer, build: Callable[[], nn.Module]
) -> None:
    one, restored = peer(optimizer, build, seed=1), peer(optimizer, build, seed=2)
    for update in range(4):
        learn(one, update, rate=2.0)
    give_gradients(one, float("nan"))
    one.step(float(one.clip_gradient()))
    restored.load_state_dict(stored(one.state_dict()))
    assert (restored.skipped, restored.stuck, restored.restarts) == (1, 1, 0)
    for both in (one, restored):
        torch.manual_seed(3)  # of dropout
        for update in range(4, 8):
            learn(both, update)
    assert torch.equal(flat(one.module), flat(restored.module))
    x, _ = records(9)
    assert torch.equal(one.predict(x).logits, restored.predict(x).logits)
    assert torch.equal(one.predict_average(x).logits, restored.predict_average(x).logits)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restart_from_a_sound_peer_of_the_same_shape_takes_its_weights_and_nothing_else(
    optimizer: MakeOptimizer,
) -> None:
    one, source = peer(optimizer, seed=1), peer(optimizer, seed=2)
    for update in range(3):
        learn(one, update)
        learn(source, update + 10)
    one.restart(source)
    assert one.restarts == 1
    assert torch.equal(flat(one.module), flat(source.module))
    # Optimizer and average begin anew: it moves as a new peer with those weights would.
    new = peer(optimizer, seed=3)
    new.module.load_state_dict(source.module.state_dict())
    for both in (one, new):
        learn(both, 20)
    assert torch.equal(flat(one.module), flat(new.module))
    assert torch.equal(flat(one.average), flat(one.module))
    assert not torch.equal(flat(one.module), flat(source.module))


def test_a_restart_from_a_peer_that_is_no_help_is_a_fresh_start() -> None:
    broken, other_shape = peer(seed=2), peer(build=partial(mlp, (3,), 2, widths=(5,)))
    next(broken.module.parameters()).data[0, 0] = float("nan")
    for source in (broken, other_shape):
        one = peer(seed=1)
        first = flat(one.module)
        one.restart(source)
        assert bool(flat(one.module).isfinite().all())
        assert flat(one.module).shape == first.shape
        assert not torch.equal(flat(one.module), first)  # what failed once is not tried again


def test_a_peer_predicts_without_chance_and_learns_with_it() -> None:
    one = peer(build=with_buffers)
    x, _ = records(0)
    before = torch.get_rng_state()
    assert torch.equal(one.predict(x).logits, one.predict(x).logits)
    assert torch.equal(torch.get_rng_state(), before)
    statistics = one.module.get_buffer("1.running_mean").clone()
    one.predict(x)
    assert torch.equal(one.module.get_buffer("1.running_mean"), statistics)
    assert not torch.equal(one.learn(x).logits, one.learn(x).logits)
    assert not torch.equal(one.module.get_buffer("1.running_mean"), statistics)


def test_to_predict_asks_for_no_gradient_and_to_learn_does() -> None:
    one = peer()
    x, _ = records(0)
    assert one.learn(x).logits.requires_grad
    assert not one.predict_average(x).logits.requires_grad
    assert not one.predict(x).logits.requires_grad


def test_capacity_counts_what_is_frozen_as_well() -> None:
    def half_frozen() -> nn.Module:
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        module[0].requires_grad_(requires_grad=False)
        return module

    assert peer().capacity == 3 * 4 + 4 + 4 * 2 + 2
    assert peer(build=half_frozen).capacity == 3 * 4 + 4 + 4 * 2 + 2


def test_a_model_may_return_plain_logits_or_an_output_with_features() -> None:
    class Told(nn.Module):
        """Tells its features."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Output:
            """Answer."""
            return Output(self.linear(x), features=x)

    x, _ = records(0)
    plain, told = peer(build=partial(nn.Linear, 3, 2), seed=4), peer(build=Told, seed=4)
    assert torch.equal(told.predict(x).logits, plain.predict(x).logits)
    assert plain.predict(x).features is None
    assert told.learn(x).features is x


def precise(precision: torch.dtype) -> Peer:
    return Peer("a", partial(mlp, (6,), 3, widths=(16,)), partial(torch.optim.SGD, lr=0.1), precision=precision)


def test_a_peer_of_another_precision_keeps_its_weights_and_says_nearly_the_same() -> None:
    x, y = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    rough, exact = precise(torch.bfloat16), precise(torch.float32)
    for peer in (rough, exact):
        for _ in range(20):
            said = peer.learn(x).logits
            assert said.dtype == torch.float32
            functional.cross_entropy(said, y).backward()
            peer.step(float(peer.clip_gradient()))
    for asked in ("predict", "predict_average"):
        one, other = (getattr(peer, asked)(x).logits for peer in (rough, exact))
        assert one.dtype == torch.float32
        assert not torch.equal(one, other)
        assert torch.allclose(one, other, atol=0.05)
    assert {parameter.dtype for parameter in rough.module.parameters()} == {torch.float32}


def test_peers_of_another_precision_are_asked_one_by_one_and_learn() -> None:
    settings = load("default", ["precision=bfloat16", "max_classes=3"])
    made = build_engine(settings, (6,))
    assert len(made.cohort.groups) == len(made.cohort.peers)
    chance = torch.Generator().manual_seed(1)
    right = 0
    for number in range(60):
        x = torch.randn(16, 6, generator=chance)
        report = made.step(Batch(x, x[:, :3].argmax(1)))
        right += report.scored.correct["served"] if number >= 40 else 0
    assert right > 0.7 * 20 * 16

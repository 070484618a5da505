from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from worlds import batches, engine, stored

from streamkd import Cohort, Distillation, Peer, checkpoint
from streamkd.cohort import STUCK
from streamkd.lesson import Lesson
from streamkd.models import mlp
from streamkd.peer import MakeOptimizer
from streamkd.river_peer import RiverPeer
from streamkd.schedules import constant
from streamkd.stack import Single, Stack, grouped

FEATURES, CLASSES = 4, 3
Build = Callable[[], nn.Module]


def gelu() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(FEATURES, 6), nn.GELU(), nn.Sequential(nn.Tanh(), nn.Linear(6, CLASSES))
    )


def bare() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 6, bias=False),
        nn.LayerNorm(6, elementwise_affine=False),
        nn.ReLU(),
        nn.Linear(6, 5),
        nn.LayerNorm(5, bias=False),
        nn.Linear(5, CLASSES),
    )


BUILDS: dict[str, Build] = {
    "normed": partial(mlp, (FEATURES,), CLASSES, widths=(8, 6), layer_norm=True),
    "plain": partial(mlp, (FEATURES,), CLASSES, widths=(8,)),
    "linear": partial(mlp, (FEATURES,), CLASSES, widths=()),
    "gelu": gelu,
    "bare": bare,
}
OPTIMIZERS: dict[str, Callable[[float], MakeOptimizer]] = {
    "sgd": lambda lr: partial(torch.optim.SGD, lr=lr),
    "momentum": lambda lr: partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=1e-3),
    "adam": lambda lr: partial(torch.optim.Adam, lr=lr / 10),
    "fused": lambda lr: partial(torch.optim.AdamW, lr=lr / 10, fused=True),
}


def peers(build: Build, optimizer: str = "sgd", size: int = 3) -> list[Peer]:
    rates = (0.3, 0.1, 0.03, 0.2)[:size]
    return [
        Peer(str(i), build, OPTIMIZERS[optimizer](rate), horizon=5 * (i + 1), clip=0.5 + i, seed=i)
        for i, rate in enumerate(rates)
    ]


def cohort(members: Sequence[Peer | RiverPeer], scheme: str = "leader") -> Cohort:
    return Cohort(members, Distillation(scheme=scheme, burn_in=2, alpha=constant(0.7), temperature=constant(2.0)))


def one_by_one(made: Cohort) -> Cohort:
    """Let each peer go through its own model, as those do that cannot be stacked."""
    made.groups = [Single(index, peer) for index, peer in enumerate(made.peers)]
    made.places = None
    return made


def lesson(seed: int, n: int = 12) -> Lesson:
    chance = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=chance)
    return Lesson(3 * torch.randn(n, FEATURES, generator=chance), y, torch.full((n,), 1 / n))


def learn(made: Cohort, updates: range, teacher: int = 1) -> None:
    for update in updates:
        made.guidance.schedule(teacher, CLASSES)
        weights = torch.full((2 * len(made),), 1 / (2 * len(made)))
        made.learn([lesson(update)], teacher=teacher, seen=torch.ones(CLASSES, dtype=torch.bool), weights=weights)


def weights(made: Cohort) -> Tensor:
    models = [peer.module for peer in made.peers if isinstance(peer, Peer)]
    models += [peer.average for peer in made.peers if isinstance(peer, Peer)]
    return torch.cat([nn.utils.parameters_to_vector(model.parameters()).detach().clone() for model in models])


def same(one: Cohort, other: Cohort) -> bool:
    x = lesson(999).x
    return torch.allclose(weights(one), weights(other), rtol=1e-3, atol=1e-4) and torch.allclose(
        one.predict(x), other.predict(x), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("scheme", ["leader", "mutual", "ensemble", "static"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_together_each_comes_to_what_it_comes_to_alone(build: Build, optimizer: str, scheme: str) -> None:
    stacked, alone = (cohort(peers(build, optimizer), scheme) for _ in range(2))
    assert [type(group) for group in stacked.groups] == [Stack]
    one_by_one(alone)
    assert same(stacked, alone)
    learn(stacked, range(25))
    learn(alone, range(25))
    assert same(stacked, alone)
    assert [peer.taken for peer in stacked.peers if isinstance(peer, Peer)] == [25] * 3


def test_each_is_told_its_own_norm_wherever_those_of_its_architecture_stand() -> None:
    def mixed() -> Cohort:
        kinds = [BUILDS["normed"], BUILDS["plain"], BUILDS["normed"], BUILDS["linear"]]
        return cohort([Peer(str(i), build, clip=100.0, seed=i) for i, build in enumerate(kinds)], "none")

    told = []
    for made in (mixed(), one_by_one(mixed())):
        made.guidance.schedule(1, CLASSES)
        seen, even = torch.ones(CLASSES, dtype=torch.bool), torch.full((8,), 1 / 8)
        told.append(made.learn([lesson(0)], teacher=1, seen=seen, weights=even)[0].norms)
    assert told[0] == pytest.approx(told[1], rel=1e-4)
    assert len({round(norm, 4) for norm in told[0]}) == 4


def test_a_member_that_breaks_down_stops_alone() -> None:
    stacked, alone = cohort(peers(BUILDS["normed"]), "none"), one_by_one(cohort(peers(BUILDS["normed"]), "none"))
    for made in (stacked, alone):
        learn(made, range(3))
        with torch.no_grad():
            next(made.peers[1].module.parameters())[0, 0] = float("nan")  # type: ignore[union-attr]
        learn(made, range(3, 6))
    assert [peer.skipped for peer in stacked.peers] == [peer.skipped for peer in alone.peers] == [0, 3, 0]
    sound = weights(stacked).isfinite()
    assert torch.equal(sound, weights(alone).isfinite())
    assert torch.allclose(weights(stacked)[sound], weights(alone)[sound], atol=1e-5)


def test_a_member_that_is_restarted_goes_on_in_the_stack() -> None:
    stacked, alone = cohort(peers(BUILDS["plain"])), one_by_one(cohort(peers(BUILDS["plain"])))
    for made in (stacked, alone):
        learn(made, range(3))
        with torch.no_grad():
            next(made.peers[2].module.parameters())[0, 0] = float("nan")  # type: ignore[union-attr]
        learn(made, range(3, 3 + STUCK))
        assert made.peers[2].restarts == 1
        learn(made, range(20, 30))
    assert same(stacked, alone)


def test_only_peers_of_one_architecture_are_put_together() -> None:
    normed, plain = BUILDS["normed"], BUILDS["plain"]

    def kinds(builds: Sequence[Build]) -> list[tuple[str, list[int]]]:
        made = [Peer(str(index), build, seed=index) for index, build in enumerate(builds)]
        return [(type(group).__name__, list(group.members)) for group in grouped(made)]

    assert kinds([normed, normed]) == [("Stack", [0, 1])]
    assert kinds([normed, plain, normed, plain]) == [("Stack", [0, 2]), ("Stack", [1, 3])]
    assert kinds([normed, plain]) == [("Single", [0]), ("Single", [1])]


def hooked() -> nn.Module:
    module = mlp((FEATURES,), CLASSES)
    module.register_forward_hook(lambda *_: None)
    return module


def tied() -> nn.Module:
    first = nn.Linear(FEATURES, FEATURES)
    return nn.Sequential(first, nn.ReLU(), first, nn.ReLU(), nn.Linear(FEATURES, CLASSES))


def half_frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(FEATURES, 5), nn.ReLU(), nn.Linear(5, CLASSES))
    module[0].requires_grad_(requires_grad=False)
    return module


class Own(nn.Sequential):
    """May do anything."""


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(FEATURES, 5), nn.Dropout(), nn.Linear(5, CLASSES)),
        lambda: nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)),
        lambda: nn.Sequential(nn.Linear(FEATURES, 5), nn.Flatten(), nn.Linear(5, CLASSES)),
        lambda: Own(nn.Linear(FEATURES, CLASSES)),
        lambda: nn.Sequential(nn.Linear(FEATURES, CLASSES)).double(),
        hooked,
        tied,
        half_frozen,
    ],
)
def test_what_a_stack_could_not_do_alike_is_left_to_the_models(build: Build) -> None:
    made = [Peer(str(index), build, seed=index) for index in range(2)]
    assert [type(group) for group in grouped(made)] == [Single, Single]


def test_answers_come_in_the_order_of_the_peers_whatever_the_groups() -> None:
    normed, plain = BUILDS["normed"], BUILDS["plain"]
    members = [Peer(str(index), build, seed=index) for index, build in enumerate([normed, plain, normed, plain])]
    made = cohort(members, "mutual")
    learn(made, range(5))
    x = lesson(7).x
    said = made.predict(x)
    for index, peer in enumerate(members):
        assert torch.allclose(said[index], peer.predict(x).logits, atol=1e-5)
        assert torch.allclose(said[4 + index], peer.predict_average(x).logits, atol=1e-5)


def test_a_restored_stack_learns_what_it_would_have_learned() -> None:
    made, restored = cohort(peers(BUILDS["normed"], "momentum")), cohort(peers(BUILDS["normed"], "momentum"))
    learn(made, range(6))
    restored.load_state_dict(stored(made.state_dict()))
    for one in (made, restored):
        learn(one, range(6, 12))
    assert checkpoint.digest(made.state_dict()) == checkpoint.digest(restored.state_dict())


def test_classes_that_were_not_met_are_not_answered_and_move_no_weight() -> None:
    made = engine()
    before = [peer.module.state_dict() for peer in made.cohort.peers if isinstance(peer, Peer)]
    last = [{name: weight.clone() for name, weight in weights.items()} for weights in before]
    reports = [made.step(batch) for batch in batches(320)]
    assert all(report.served.shape[-1] == 4 and float(report.served[:, 3].max()) == 0 for report in reports[1:])
    for peer, weights in zip(made.cohort.peers, last, strict=True):
        assert isinstance(peer, Peer)
        *_, name = [name for name in weights if name.endswith("bias")]
        now = peer.module.state_dict()[name]
        assert float(now[3]) == float(weights[name][3])
        assert not torch.equal(now[:3], weights[name][:3])

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from worlds import stored

from runners.settings import load
from streamkd import UNLABELLED, Batch, Cohort, Distillation, Engine, Peer, adapters, chance, checkpoint, features
from streamkd.config import build_engine
from streamkd.errors import ConfigError
from streamkd.features import FeatureLoss, attention_transfer, hint, similarity_preserving, wasserstein
from streamkd.lesson import Lesson, means
from streamkd.models import cnn, mlp, vit
from streamkd.parts import public_functions
from streamkd.schedules import complement, constant
from streamkd.taps import Tapped

LOSSES = list(public_functions(features).values())
WITH_POSITIONS = [(6, 8), (8, 3, 4)]
SHAPES = [(8,), *WITH_POSITIONS]

lawful = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**20)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shapes_of(loss: FeatureLoss) -> list[tuple[int, ...]]:
    return WITH_POSITIONS if loss is attention_transfer else SHAPES


CASES = [(loss, shape) for loss in LOSSES for shape in shapes_of(loss)]


@pytest.mark.parametrize(("loss", "shape"), CASES)
@lawful
@given(seeds, st.integers(1, 6))
def test_from_ones_own_features_there_is_nothing_to_learn(
    loss: FeatureLoss, shape: tuple[int, ...], seed: int, n: int
) -> None:
    student, teacher = drawn(n, *shape, seed=seed).requires_grad_(), drawn(n, *shape, seed=seed + 1)
    same = loss(student, student.detach())
    assert same.shape == (n,)
    assert float(same.detach().abs().max()) < 1e-12
    assert float(torch.autograd.grad(same.sum(), student)[0].abs().max()) < 1e-9
    other = loss(student, teacher).detach()
    assert float(other.min()) >= 0
    assert float(other.max()) > 0 or n == 1


@pytest.mark.parametrize(("loss", "shape"), CASES)
def test_the_gradient_is_that_of_finite_differences(loss: FeatureLoss, shape: tuple[int, ...]) -> None:
    student, teacher = drawn(3, *shape, seed=1).requires_grad_(), drawn(3, *shape, seed=2)
    assert torch.autograd.gradcheck(lambda leaf: loss(leaf, teacher), (student,))


@pytest.mark.parametrize(("loss", "shape"), CASES)
def test_features_of_nothing_but_zeros_have_a_finite_gradient(loss: FeatureLoss, shape: tuple[int, ...]) -> None:
    student = torch.zeros(3, *shape).requires_grad_()
    said = loss(student, torch.ones(3, *shape))
    assert bool(said.isfinite().all())
    assert bool(torch.autograd.grad(said.sum(), student)[0].isfinite().all())


@lawful
@given(seeds, st.floats(0.1, 10))
def test_attention_is_where_a_network_looks_and_not_how_hard_or_at_what(seed: int, scale: float) -> None:
    student, teacher = drawn(3, 8, 5, 4, seed=seed), drawn(3, 8, 5, 4, seed=seed + 1)
    expected = attention_transfer(student, teacher)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(attention_transfer(scale * student[:, order], -teacher), expected, atol=1e-4)
    assert float(expected.max()) <= 2  # maps of length 1 without a negative number
    # Channels that are repeated, and maps of another size, need no adapter.
    assert torch.allclose(attention_transfer(student.repeat(1, 2, 1, 1), teacher), expected, atol=1e-4)
    assert attention_transfer(student, drawn(3, 2, 2, 7, seed=seed)).shape == (3,)


@lawful
@given(seeds, st.integers(2, 6), st.floats(0.1, 10))
def test_similarities_do_not_depend_on_the_axes_nor_on_the_scale(seed: int, n: int, scale: float) -> None:
    student, teacher = drawn(n, 8, seed=seed), drawn(n, 5, seed=seed + 1)
    turned, _ = torch.linalg.qr(drawn(8, 8, seed=seed + 2))
    expected = similarity_preserving(student, teacher)
    assert torch.allclose(similarity_preserving(scale * student @ turned, teacher), expected, atol=1e-6)
    published = [nn.functional.normalize(flat @ flat.T, dim=1) for flat in (student, teacher)]
    assert torch.allclose(expected.mean(), (published[0] - published[1]).square().sum() / n**2, atol=1e-6)


@lawful
@given(seeds, st.floats(-5, 5))
def test_the_wasserstein_distance_is_one_of_distributions(seed: int, shift: float) -> None:
    student, teacher = drawn(3, 6, 8, seed=seed), drawn(3, 6, 8, seed=seed + 1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    expected = wasserstein(student, teacher)
    assert torch.allclose(wasserstein(student[:, order], teacher), expected)
    assert torch.allclose(wasserstein(student.repeat(1, 2, 1), teacher), expected)  # twice as many positions
    assert torch.allclose(wasserstein(student, student + shift), torch.tensor(shift**2, dtype=torch.float64))
    vector, other = student[:, 0], teacher[:, 0]
    assert torch.allclose(wasserstein(vector, other), 2 * hint(vector, other))


def test_features_that_cannot_be_compared_are_refused_with_both_shapes() -> None:
    for loss in (hint, wasserstein):
        with pytest.raises(ValueError, match=r"\[8\].*\[5\].*adapter"):
            loss(torch.zeros(2, 8), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="no positions"):
        attention_transfer(torch.zeros(2, 8), torch.zeros(2, 8))


PAIRS = [(student, teacher) for student in [(6,), (4, 6), (6, 4, 2)] for teacher in [(10,), (7, 10), (10, 3, 5)]]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@pytest.mark.parametrize("name", sorted(public_functions(adapters)))
def test_an_adapter_takes_features_to_the_shape_of_the_teachers_or_says_which_one_would(
    name: str, student: Sequence[int], teacher: Sequence[int]
) -> None:
    try:
        adapter = public_functions(adapters)[name](student, teacher)
    except ValueError as refused:
        assert name != "cross_attention"
        assert "cross_attention" in str(refused)  # noqa: PT017 - only some pairs are refused
        return
    own, other = torch.randn(3, *student).requires_grad_(), torch.randn(3, *teacher)
    adapted = adapter(own, other)
    assert adapted.shape == other.shape
    adapted.square().sum().backward()
    assert own.grad is not None
    assert bool(own.grad.abs().sum(tuple(range(1, own.dim()))).gt(0).all())
    assert all(weight.grad is not None for weight in adapter.parameters())


@pytest.mark.parametrize("layer", ["", "1", "2"])
def test_a_tap_changes_neither_answers_nor_weights_nor_capacity(layer: str) -> None:
    def tapped() -> nn.Module:
        model = mlp((4,), 3, widths=(6,))
        return Tapped(model, layer, {"t": adapters.linear((6,), (5,))})

    plain, heard = Peer("a", partial(mlp, (4,), 3, widths=(6,)), seed=1), Peer("a", tapped, seed=1)
    x = torch.randn(5, 4)
    assert plain.capacity == heard.capacity
    assert torch.equal(plain.learn(x).logits, heard.learn(x).logits)
    hidden = plain.module[1](x) if layer == "1" else plain.module[1](x).relu()
    for answer in (heard.learn, heard.predict, heard.predict_average):
        told = answer(x).features
        assert told is not None
        assert torch.equal(told, hidden)


def student_and_teacher(rule: Distillation) -> Cohort:
    """The student's features are adapted; rate 1, so that steps are gradients."""

    def build(width: int, other: int, name: str) -> nn.Module:
        return Tapped(mlp((4,), 3, widths=(width,)), "", {name: adapters.linear((width,), (other,))})

    make = partial(torch.optim.SGD, lr=1.0)
    return Cohort(
        [
            Peer("t", partial(build, 8, 5, "s"), make, clip=1e9, seed=1),
            Peer("s", partial(build, 5, 8, "t"), make, clip=1e9, seed=2),
        ],
        rule,
    )


def lesson(seed: int = 0, n: int = 6) -> Lesson:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    return Lesson(torch.randn(n, 4, generator=generator), y, torch.rand(n, generator=generator))


def taught(**options: Any) -> Distillation:
    given: dict[str, Any] = {"gate": "open", "burn_in": 0, "alpha": constant(0.0), "temperature": constant(1.0)}
    return Distillation(**given | options)


def stepped(cohort: Cohort, what: Lesson) -> list[list[Tensor]]:
    """Learn once; return by what each weight of each peer changed."""
    before = [[weight.detach().clone() for weight in peer.module.parameters()] for peer in cohort.peers]
    cohort.guidance.schedule(0, 3)
    cohort.learn([what], teacher=0, seen=torch.ones(3, dtype=torch.bool), weights=torch.full((4,), 0.25))
    return [
        [old - new.detach() for old, new in zip(olds, peer.module.parameters(), strict=True)]
        for olds, peer in zip(before, cohort.peers, strict=True)
    ]


@pytest.mark.parametrize("optimizer", ["kind='sgd', lr=0.05, momentum=0.9", "kind='adam'"])
def test_adapters_that_have_no_gradient_at_first_are_stepped_once_they_have(optimizer: str) -> None:
    peers = [f"peers.{index}.optimizer={{{optimizer}}}" for index in range(3)]
    features = "distillation.features={kind='hint', adapter='linear'}"
    made = build_engine(
        load("default", [*peers, features, "distillation.burn_in=4", "peers.0.model.widths=[16]"]), (5,)
    )
    before = stored(made.cohort.state_dict()["peers"])
    x = torch.randn(160, 5, generator=torch.Generator().manual_seed(0))
    for rows in torch.split(x, 16):
        made.step(Batch(rows, (rows[:, 0] > 0).long()))
    after = made.cohort.state_dict()["peers"]
    adapted = [(name, key) for name, peer in before.items() for key in peer["module"] if "adapters" in key]
    assert any(not torch.equal(before[name]["module"][key], after[name]["module"][key]) for name, key in adapted)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_a_student_steps_along_its_labels_and_along_its_teachers_features(weight: float) -> None:
    what = lesson()
    cohort = student_and_teacher(taught(features=hint, feature_weight=constant(weight)))
    modules = teacher, student = [peer.module for peer in cohort.peers]
    totals = [
        (what.weights * nn.functional.cross_entropy(module(what.x).logits, what.y, reduction="none")).sum()
        for module in modules
    ]
    target = teacher(what.x).features.detach()
    totals[1] += weight * (what.weights * hint(student.adapt("t", student(what.x).features, target), target)).sum()
    wanted = [
        torch.autograd.grad(total, list(module.parameters()), allow_unused=True, materialize_grads=True)
        for total, module in zip(totals, modules, strict=True)
    ]
    for moved, expected in zip(stepped(cohort, what), wanted, strict=True):
        assert all(torch.allclose(got, want, atol=1e-5) for got, want in zip(moved, expected, strict=True))


def test_features_weigh_what_the_logits_leave_them_and_are_reported() -> None:
    what = lesson()
    cohort = student_and_teacher(taught(alpha=constant(0.25), features=hint, feature_weight=complement()))
    cohort.guidance.schedule(0, 3)
    assert cohort.guidance.feature_weights == {(0, 1): 0.75}
    without = student_and_teacher(taught(alpha=constant(0.25)))
    teacher, student = (peer.module for peer in cohort.peers)
    target = teacher(what.x).features.detach()
    expected = 0.75 * hint(student.adapt("t", student(what.x).features, target), target).mean().detach()
    seen, weights = torch.ones(3, dtype=torch.bool), torch.full((4,), 0.25)
    without.guidance.schedule(0, 3)
    told, plain = (one.learn([what], teacher=0, seen=seen, weights=weights)[0] for one in (cohort, without))
    assert float(means([told])[0][1][1] - means([plain])[0][1][1]) == pytest.approx(float(expected), rel=1e-4)
    assert float(means([told])[0][1][0]) == 0


def test_features_are_not_learned_from_before_the_burn_in_is_over_nor_without_a_label() -> None:
    what = lesson()
    unlabelled = Lesson(what.x, torch.full_like(what.y, UNLABELLED), what.weights)
    for rule, learned in ((taught(features=hint, burn_in=1), what), (taught(features=hint), unlabelled)):
        moved = stepped(student_and_teacher(rule), learned)[1]
        assert all(not bool(change.any()) for change in moved[-2:])  # the adapter


def images(records: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A bright quarter of the image tells the class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (records,), generator=generator)
    x = 0.3 * torch.randn(records, 1, 8, 8, generator=generator)
    for row, label in enumerate(y.tolist()):
        x[row, :, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 1.0
    return x, y


UNLIKE = [
    "max_classes=4",
    "distillation.burn_in=2",
    "distillation.gate=open",
    "roles.rule=never",
    "peers=[{name='conv', features='7'}, {name='former', features='encoder'}]",
    "peers.0.model={kind='cnn', channels=[8, 16], width=32}",
    "peers.1.model={kind='vit', width=16, depth=1}",
    "peers.1.optimizer={kind='adamw', lr=0.003}",
]


def unlike(*overrides: str) -> Engine:
    """A convolutional teacher and a transformer: a map of [16, 2, 2] against four tokens of 16."""
    return build_engine(load("default", [*UNLIKE, *overrides]), (1, 8, 8))


def distance(engine: Engine, x: Tensor, loss: FeatureLoss) -> float:
    teacher, student = (peer.module.eval() for peer in engine.cohort.peers)
    assert isinstance(student, Tapped)
    with torch.no_grad():
        target, own = teacher(x).features, student(x).features
        return float(loss(student.adapt("conv", own, target), target).mean())


@pytest.mark.parametrize(
    ("loss", "adapter", "strength"),
    [(hint, "cross_attention", 1.0), (wasserstein, "linear", 1.0), (similarity_preserving, "none", 1_000.0)],
)
def test_a_transformer_learns_the_features_of_a_convolutional_teacher(
    loss: FeatureLoss, adapter: str, strength: float
) -> None:
    x, y = images(960)
    rule = f"distillation.features={{kind='{loss.__name__}', adapter='{adapter}'}}"
    apart = {}
    for weight in (0.0, strength):
        engine = unlike(rule, f"distillation.feature_weight.value={weight}")
        for start in range(0, len(x), 16):
            engine.step(Batch(x[start : start + 16], y[start : start + 16]))
        apart[weight] = distance(engine, engine.inputs(x[:200]), loss)
    assert apart[strength] < 0.7 * apart[0.0]


def test_adapters_are_in_the_checkpoint_and_a_restored_run_ends_where_an_unbroken_one_ends() -> None:
    x, y = images(320, seed=1)
    batches = [Batch(x[start : start + 16], y[start : start + 16]) for start in range(0, len(x), 16)]
    rule = "distillation.features={kind='hint', adapter='cross_attention'}"
    whole, restored = unlike(rule, "deterministic=true"), unlike(rule, "deterministic=true")
    for batch in batches[:10]:
        whole.step(batch)
    restored.load_state_dict(stored(whole.state_dict()))
    assert any("adapters" in name for name in whole.cohort.peers[1].shapes())
    before = chance.state()
    for engine in (whole, restored):
        chance.restore(before)
        for batch in batches[10:]:
            engine.step(batch)
    assert checkpoint.digest(whole.state_dict()) == checkpoint.digest(restored.state_dict())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distillation.features=hnt", ["distillation.features.kind = 'hnt'", "did you mean hint?"]),
        ("distillation.features={kind='hint', adapter='liner'}", ["adapter.kind = 'liner'", "did you mean linear?"]),
        ("distillation.features={kind='hint'}", ["distillation.features", "[16, 2, 2]", "[4, 16]", "adapter"]),
        ("distillation.features={kind='hint', adapter='convolution'}", ["cross_attention"]),
        ("distillation.features={kind='hint', adapter={kind='cross_attention', heads='x'}}", ["adapter.heads = 'x'"]),
        ("distillation.features={kind='attention_transfer', power=0}", ["distillation.features.power = 0"]),
    ],
)
def test_features_that_do_not_fit_are_refused_at_start(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        unlike(override)
    for word in words:
        assert word in str(refused.value)


def test_a_layer_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"peers\.1\.features.*encodr.*encoder"):
        unlike("distillation.features=hint", "peers.1.features=encodr")


def test_features_need_a_teacher_that_is_a_peer() -> None:
    with pytest.raises(ConfigError, match=r"distillation\.features.*ensemble.*leader"):
        unlike("distillation.features=similarity_preserving", "distillation.scheme=ensemble")


def test_a_transformer_and_a_convolution_answer_images() -> None:
    for model in (cnn((1, 8, 8), 4), vit((1, 8, 8), 4)):
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    with pytest.raises(ValueError, match="vit"):
        vit((5,), 4)

import os
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stack import BUILDS, CLASSES, FEATURES, Build, lesson, peers, same
from torch import Tensor, nn
from worlds import stored

from streamkd import UNLABELLED, Batch, Cohort, Distillation, Engine, stream_classes, views
from streamkd.cohort import UNFIT
from streamkd.compiling import Compiled, Function
from streamkd.fused import ROWS
from streamkd.lesson import Lesson
from streamkd.losses import dist
from streamkd.models import mlp
from streamkd.schedules import constant

RULE = {"burn_in": 2, "alpha": constant(0.7), "temperature": constant(2.0), "beta": constant(0.8)}


def as_it_is(function: Function, _: Sequence[Tensor]) -> Function:
    """Stand in for a compiler."""
    return function


def cohorts(build: Build, optimizer: str = "sgd", *, compiler: Any = as_it_is, **rule: Any) -> tuple[Cohort, Cohort]:
    """One cohort as it is, and one by the function of whole updates, which is not compiled here."""
    plain, fused = (Cohort(peers(build, optimizer), Distillation(**RULE | rule), compiled=it) for it in (False, True))
    assert fused.fused is not None
    fused.fused.take = Compiled(fused.fused.take.function, compiler)
    return plain, fused


def some(seed: int, n: int) -> Lesson:
    """Records of which some have no label, and of which the last class was never met."""
    made = lesson(seed, n)
    y = torch.where(torch.arange(n) % 5 == 3, UNLABELLED, made.y.clamp(max=1))
    return Lesson(made.x, y, made.weights * (1 + torch.arange(n) % 3))


def learn(made: Cohort, numbers: range, n: int = 12, **options: Any) -> list[Any]:
    weights = torch.full((2 * len(made),), 1 / (2 * len(made)))
    seen = torch.tensor([True, True])
    told = []
    for number in numbers:
        made.guidance.schedule(1, CLASSES)
        told += made.learn([some(number, n)], teacher=1, seen=seen, weights=weights, **options)
    return told


@pytest.mark.parametrize("n", [1, 12, 16, 20])
@pytest.mark.parametrize("cap", [True, False])
@pytest.mark.parametrize("gate", ["better", "soft", "open"])
@pytest.mark.parametrize("scheme", ["leader", "mutual", "static"])
def test_a_whole_update_comes_to_what_its_operations_come_to(scheme: str, gate: str, cap: bool, n: int) -> None:  # noqa: FBT001
    plain, fused = cohorts(BUILDS["normed"], scheme=scheme, gate=gate, cap=cap, freeze_after=6)
    for one, other in zip(learn(plain, range(9), n), learn(fused, range(9), n), strict=True):
        for name in ("losses", "parts", "betas"):
            assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-3, atol=1e-5), name
        assert torch.equal(one.answers, other.answers)
        assert one.norms == pytest.approx(other.norms, rel=1e-3, abs=1e-6)
    assert fused.uncompiled == ""
    assert same(plain, fused)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "rule", [{}, {"scheme": "static", "freeze_after": 3}, {"rate_boost": 4.0, "boost_half_life": 2}]
)
def test_updates_taken_together_come_to_what_they_come_to_one_by_one(
    rule: dict[str, Any], optimizer: str, count: int
) -> None:
    plain, fused = cohorts(BUILDS["normed"], optimizer, **rule)
    options: Any = {"teacher": 1, "seen": torch.tensor([True, True]), "weights": torch.full((6,), 1 / 6)}
    for first in range(0, 3 * count, count):
        for made in (plain, fused):
            made.guidance.alarm()
            made.guidance.schedule(1, CLASSES)
        lessons = [some(number, 12) for number in range(first, first + count)]
        one = [plain.learn([lesson], **options)[0] for lesson in lessons]
        other = fused.learn(lessons, **options)
        assert [told.norms for told in one] == [pytest.approx(told.norms, rel=1e-3, abs=1e-6) for told in other]
        assert all(torch.equal(told.y, lesson.y) for told, lesson in zip(other, lessons, strict=True))
    assert (fused.guidance.updates, [peer.taken for peer in fused.peers]) == (
        plain.guidance.updates,
        [peer.taken for peer in plain.peers],
    )
    assert same(plain, fused)


@pytest.mark.parametrize(("optimizer", "calls"), [("sgd", [2, 2, 1]), ("adam", [1] * 5)])
def test_two_updates_go_into_one_call_unless_optimizers_have_to_step_between_them(
    optimizer: str, calls: list[int]
) -> None:
    asked: list[int] = []

    def counted(function: Function, _: Sequence[Tensor]) -> Function:
        def call(*operands: Tensor) -> Sequence[Tensor]:
            told = function(*operands)
            asked.append(len(told[-1]))
            return told

        return call

    _, fused = cohorts(BUILDS["normed"], optimizer, compiler=counted)
    learn(fused, range(2))
    assert not asked  # in the burn-in nobody teaches
    fused.guidance.schedule(1, CLASSES)
    options: Any = {"teacher": 1, "seen": torch.tensor([True, True]), "weights": torch.full((6,), 1 / 6)}
    fused.learn([some(number, 12) for number in range(5)], **options)
    assert asked == calls
    fused.fitting.at_once = 11  # what does not fit the device at once is learned in parts, by operations of their own
    assert len(fused.learn([some(0, 12)], **options)) == 1
    assert asked == calls


def test_a_size_that_cannot_be_compiled_leaves_the_others_as_they_are() -> None:
    asked: list[int] = []

    def narrow(function: Function, operands: Sequence[Tensor]) -> Function:
        asked.append(len(operands[-1]))
        if len(operands[-1]) > ROWS:
            raise RuntimeError("too large for it")
        return function

    plain, fused = cohorts(BUILDS["normed"], compiler=narrow)
    for n in (12, 12, 12, 20, 12, 20):
        for made in (plain, fused):
            learn(made, range(1), n)
    assert asked == [16, 32]
    assert "too large for it" in fused.uncompiled
    assert same(plain, fused)


def test_of_updates_taken_together_those_after_one_with_a_record_at_fault_are_not_taken() -> None:
    plain, fused = cohorts(BUILDS["normed"])
    options: Any = {"teacher": 1, "seen": torch.tensor([True, True]), "weights": torch.full((6,), 1 / 6)}
    lessons = [some(number, 12) for number in range(6)]
    lessons[3].x[4] = torch.inf
    for made in (plain, fused):
        made.guidance.updates = 2  # past the burn-in
        made.guidance.schedule(1, CLASSES)
        told = made.learn(lessons, **options)
        assert [one.faulty for one in told] == [(), (), (), (4,)]
        assert (made.guidance.updates, [peer.skipped for peer in made.peers]) == (6, [1, 1, 1])
    assert same(plain, fused)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_every_architecture_that_is_put_together_can_be_fused(build: Build, optimizer: str) -> None:
    plain, fused = cohorts(build, optimizer)
    learn(plain, range(12))
    learn(fused, range(12))
    assert same(plain, fused)


WIDE: dict[str, Build] = {
    "normed": partial(mlp, (FEATURES,), 20, widths=(8, 6), layer_norm=True),
    "no bias": lambda: nn.Sequential(nn.Linear(FEATURES, 6), nn.ReLU(), nn.Linear(6, 20, bias=False)),
    "a norm at the end": lambda: nn.Sequential(nn.Linear(FEATURES, 20), nn.LayerNorm(20, elementwise_affine=False)),
    "a function at the end": lambda: nn.Sequential(nn.Linear(FEATURES, 20), nn.Tanh()),
}


@pytest.mark.parametrize("build", WIDE.values(), ids=WIDE)
def test_outputs_for_classes_that_were_never_met_change_nothing(build: Build) -> None:
    plain, fused = cohorts(build)
    learn(plain, range(12))
    learn(fused, range(12))
    assert fused.uncompiled == ""
    assert same(plain, fused)


def test_a_record_at_fault_is_left_out_and_a_broken_teacher_teaches_nothing() -> None:
    plain, fused = cohorts(BUILDS["normed"])
    for made in (plain, fused):
        learn(made, range(3))
        broken = some(3, 12)
        broken.x[4] = torch.inf
        made.guidance.schedule(1, CLASSES)
        (told,) = made.learn([broken], teacher=1, seen=torch.tensor([True, True]), weights=torch.full((6,), 1 / 6))
        assert told.faulty == (4,)
        with torch.no_grad():
            next(made.peers[1].module.parameters())[0, 0] = torch.nan  # type: ignore[union-attr]
        told, *_ = learn(made, range(4, 5))
        assert told.parts[1, 0].isfinite().all()
        assert [peer.skipped for peer in made.peers] == [1, 2, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "ensemble"},
        {"loss": dist},
        {"per_record": lambda *_: torch.ones(1)},
        {"stream_classes": stream_classes.present},
        {"views": [views.missing()]},
    ],
    ids=["ensemble", "loss", "per record", "present classes", "views"],
)
def test_what_has_to_be_looked_at_on_the_way_is_not_compiled_and_says_so(options: dict[str, Any]) -> None:
    made = Cohort(peers(BUILDS["normed"]), Distillation(**options), compiled=True)
    assert made.fused is None
    assert made.uncompiled == UNFIT
    assert Cohort(peers(BUILDS["normed"]), Distillation(**options)).uncompiled == ""


@pytest.mark.slow
def test_without_a_compiler_updates_are_made_as_ever(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        env={**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert "ompiler" in made.stdout


WITHOUT = """
from test_fused import *
plain, fused = (Cohort(peers(BUILDS["normed"]), Distillation(**RULE), compiled=it) for it in (False, True))
learn(plain, range(5))
learn(fused, range(5))
assert same(plain, fused)
print(fused.uncompiled)
"""


def engine(*, compiled: bool = True) -> Engine:
    return Engine(peers(BUILDS["normed"]), CLASSES, distillation=Distillation(**RULE), compiled=compiled)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a C++ compiler of another kind")
def test_a_compiled_run_goes_on_from_its_checkpoint_and_one_that_is_not_reads_it() -> None:
    chance = torch.Generator().manual_seed(0)
    stream = []
    for _ in range(60):
        x = torch.randn(16, FEATURES, generator=chance)
        stream.append(Batch(x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()))
    unbroken = engine()
    for batch in stream:
        unbroken.step(batch)
    assert unbroken.uncompiled == ""
    killed, resumed, plain = engine(), engine(), engine(compiled=False)
    for batch in stream[:30]:
        killed.step(batch)
    state = stored(killed.state_dict())
    for made in (resumed, plain):
        made.load_state_dict(deepcopy(state))
        for batch in stream[30:]:
            made.step(batch)
    x = torch.randn(50, FEATURES, generator=chance)
    assert torch.equal(unbroken.predict(x), resumed.predict(x))
    assert torch.allclose(unbroken.predict(x), plain.predict(x), atol=0.05)

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_fused import RULE, WIDE, as_it_is
from test_stack import BUILDS, FEATURES, Build, peers
from torch import Tensor

from streamkd import Cohort, Distillation, LabelRates, Pool, Served
from streamkd.compiling import Compiled, Function
from streamkd.inputs import Raw, Standardiser
from streamkd.panel import MOST, Panel

CLASSES = 3


def records(n: int, seed: int = 0, *, gaps: bool = True) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    x = 5 + 3 * torch.randn(n, FEATURES, generator=chance)
    return torch.where(torch.rand(x.shape, generator=chance) < 0.1, torch.nan, x) if gaps else x


def panels(
    build: Build, *, pooled: bool = True, averages: bool = True, raw: bool = False, compiler: Any = as_it_is
) -> tuple[Panel, Panel]:
    """One panel that asks operation by operation, and one by its function, which is not compiled here."""
    made = []
    for compiled in (False, True):
        cohort = Cohort(peers(build), Distillation(**RULE), compiled=compiled)
        cohort.guidance.updates = 1
        members = 2 * len(cohort)
        served = Served(members, averages=averages)
        served.update(torch.randn(members, 8, generator=torch.Generator().manual_seed(1)).clamp(max=0))
        inputs = Raw() if raw else Standardiser()
        inputs.update(records(64))
        pool = Pool(members, LabelRates(CLASSES), voices=None if averages else len(cohort)) if pooled else None
        panel = Panel(cohort, inputs, served, pool)
        if compiled:
            assert panel.say is not None
            panel.say = Compiled(panel.say.function, compiler)
        if pool:
            with torch.inference_mode():
                for seed in range(20):
                    y = torch.arange(16) % 2
                    pool.update(panel(records(16, seed, gaps=False), torch.tensor([True, True, False]))[0], y)
        made.append(panel)
    return made[0], made[1]


@pytest.mark.parametrize("n", [1, 16, 20, MOST, MOST + 1])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_answers_by_one_function_are_those_of_its_operations(build: Build, n: int) -> None:
    for seen in ([True, True, True], [True, False, True], [False, True]):
        for one, other in zip(
            *(panel(records(n), torch.tensor(seen), again=True) for panel in panels(build)), strict=True
        ):
            assert one.shape == other.shape
            assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("options", [{"pooled": False}, {"averages": False}, {"raw": True}], ids=str)
def test_it_answers_alike_without_a_pool_without_averages_and_without_a_scale(options: dict[str, Any]) -> None:
    plain, quick = panels(BUILDS["normed"], **options)
    seen = torch.tensor([True, True, True])
    for one, other in zip(plain(records(16), seen), quick(records(16), seen, again=True), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_member_that_broke_down_weighs_nothing() -> None:
    for panel in panels(BUILDS["normed"]):
        with torch.no_grad():
            next(iter(panel.cohort.peers[1].module.parameters()))[0, 0] = torch.nan  # type: ignore[union-attr]
        log_p, served = panel(records(16), torch.tensor([True, True, True]), again=True)
        assert log_p[1].isnan().any()
        assert torch.allclose(served.sum(-1), torch.ones(16))


def test_the_function_is_for_batches_alone_that_come_again_and_again() -> None:
    asked: list[Sequence[int]] = []

    def noted(function: Function, operands: Sequence[Tensor]) -> Function:
        asked.append((*operands[1].shape, len(operands[2])))
        return function

    _, panel = panels(BUILDS["normed"], compiler=noted)
    seen = torch.tensor([True, True, True])
    for n in (16, 7, 16, 0, 20, MOST + 1):
        panel(records(n), seen, again=True)
    assert asked == [(16, FEATURES, CLASSES), (32, FEATURES, CLASSES)]
    panel(records(33), seen)
    panel.cohort.fitting.at_once = 20
    panel(records(34), seen, again=True)
    panel.cohort.fitting.at_once = MOST
    panel.cohort.guidance.updates = 0
    panel(records(35), seen, again=True)
    assert len(asked) == 2


def test_a_class_more_is_seldom_compiled_for() -> None:
    asked: list[int] = []

    def noted(function: Function, operands: Sequence[Tensor]) -> Function:
        asked.append(len(operands[2]))
        return function

    cohort = Cohort(peers(WIDE["normed"]), Distillation(**RULE), compiled=True)
    cohort.guidance.updates = 1
    panel = Panel(cohort, Raw(), Served(2 * len(cohort)), None)
    assert panel.say is not None
    panel.say = Compiled(panel.say.function, noted)
    for met in (1, 3, 8, 9, 16, 20):
        log_p, served = panel(records(16), torch.ones(met, dtype=torch.bool), again=True)
        assert (log_p.shape[-1], served.shape[-1]) == (met, met)
    assert asked == [8, 16, 20]


def test_answers_of_what_was_taken_at_once_are_counted_once() -> None:
    """Else a device whose memory ran out would be tried again too soon."""
    for panel in panels(BUILDS["normed"]):
        panel.cohort.fitting.at_once, before = 64, panel.cohort.fitting._fitted  # noqa: SLF001 - what is counted
        for again in (False, True):
            panel(records(16), torch.tensor([True, True, True]), again=again)
        assert panel.cohort.fitting._fitted - before == 2  # noqa: SLF001 - likewise


def test_what_cannot_be_compiled_is_answered_as_ever() -> None:
    def broken(*_: Any) -> Function:
        raise RuntimeError("no compiler")

    plain, panel = panels(BUILDS["normed"], compiler=broken)
    seen = torch.tensor([True, True, True])
    assert panel.say is not None
    assert all(map(torch.equal, plain(records(16), seen), panel(records(16), seen, again=True)))
    assert "no compiler" in panel.uncompiled


def test_a_panel_whose_cohort_is_not_compiled_has_no_function() -> None:
    cohort = Cohort(peers(BUILDS["normed"]), Distillation(scheme="ensemble"), compiled=True)
    assert Panel(cohort, Raw(), Served(2 * len(cohort)), None).say is None

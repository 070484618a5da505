from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_fused import as_it_is, engine
from torch import Tensor

from streamkd import Batch
from streamkd.compiling import SIZES, Compiled, Function


class Noted:
    """Stands in for a compiler: what it makes asks for tensors of one shape, one type, in one piece."""

    def __init__(self) -> None:
        self.asked: list[tuple[Sequence[int], torch.dtype]] = []

    def __call__(self, function: Function, tensors: Sequence[Tensor]) -> Function:
        """Make it, and note what for."""
        (like,) = tensors
        self.asked.append((like.shape, like.dtype))

        def made(x: Tensor) -> Sequence[Tensor]:
            assert (x.shape, x.dtype, x.is_contiguous()) == (like.shape, like.dtype, True)
            return function(x)

        return made


def twice(x: Tensor) -> list[Tensor]:
    return [2 * x]


def test_it_is_compiled_once_for_every_shape_and_type_in_whatever_order_the_numbers_lie() -> None:
    compiler = Noted()
    made = Compiled(twice, compiler)
    for x in (torch.ones(2, 3), torch.ones(3, 2).T, torch.ones(2, 3).double(), torch.ones(3, 2), torch.zeros(2, 3)):
        told = made(x)
        assert told is not None
        assert torch.equal(told[0], 2 * x)
    assert compiler.asked == [((2, 3), torch.float32), ((2, 3), torch.float64), ((3, 2), torch.float32)]
    assert made.trouble == ""


def test_there_is_an_end_to_shapes_and_it_is_told() -> None:
    made = Compiled(twice, as_it_is)
    for n in range(SIZES):
        assert made(torch.ones(n)) is not None
    assert made.trouble == ""
    assert made(torch.ones(SIZES)) is None
    assert str(SIZES) in made.trouble
    assert made(torch.ones(0)) is not None


def test_memory_that_runs_out_is_another_s_to_deal_with() -> None:
    def full(x: Tensor) -> list[Tensor]:
        raise torch.OutOfMemoryError(f"no room for {x.shape}")

    made = Compiled(full, as_it_is)
    with pytest.raises(torch.OutOfMemoryError):
        made(torch.ones(2))
    assert made.trouble == ""


@pytest.mark.parametrize("stage", ["answers", "lessons", "updates"])
def test_an_engine_tells_which_stage_is_not_compiled_and_learns_all_the_same(stage: str) -> None:
    def broken(*_: Any) -> Function:
        raise RuntimeError(f"cannot compile {stage}")

    made = engine()
    stages = {
        "answers": [made.panel.say],
        "lessons": list(made._lessons._quick.values()),  # noqa: SLF001 - to break it
        "updates": [made.cohort.fused and made.cohort.fused.take],
    }
    for name, functions in stages.items():
        for one in functions:
            assert one is not None
            one._compiler = broken if name == stage else as_it_is  # noqa: SLF001 - likewise
    for seed in range(6):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        made.step(Batch(x, (x[:, 0] > 0).long()))
    assert made.uncompiled == f"RuntimeError: cannot compile {stage}"
    assert made.cohort.guidance.updates == 12

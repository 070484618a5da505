"""Functions of tensors, compiled for every shape in which these come.

`torch.compile` asks at every call whether what it compiled still holds (its guards), and that costs more than a small
network's answer. Here a function is traced as it stands: whatever is no tensor is constant, and the shapes and types of
the tensors are all that is asked about.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from streamkd.errors import reason

SIZES = 64
"""Shapes that one function is compiled for at the most: each takes seconds, and memory."""

_KIND = attrgetter("shape", "dtype")
Function = Callable[..., Sequence[Tensor]]


def compiled(function: Function, tensors: Sequence[Tensor]) -> Function:
    """Compile a function for tensors of these shapes, by what `torch.compile` leaves the work to."""
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415 - it takes a while to import

    with torch.inference_mode(mode=False), torch.enable_grad():  # in which a function may ask for gradients of its own
        examples = [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in tensors]
        graph = make_fx(function, tracing_mode="fake")(*examples)
    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta.clear()  # torch 2.8 would take what it was traced with for what it is compiled for
    made: Function = torch._inductor.standalone_compile(  # noqa: SLF001 - known by this name
        graph,
        [*examples],
        dynamic_shapes="from_example_inputs",
        # One thread compiles: processes that wait to compile more would stay for good. On the CPU C++ calls the kernels
        # as well: called from Python they took 8 % of a step more.
        options={"config_patches": {"compile_threads": 1, "cpp_wrapper": all(one.is_cpu for one in tensors)}},
    )
    return made


class Compiled:
    """A compiled function; compiled at the first call with tensors of these shapes, which takes some seconds.

    Args:
        function: from tensors to a sequence of tensors. Nothing else that it reads may change, and no branch that it
            takes may hang on what is in the tensors, which are on one device. Those that it writes to are contiguous.
        compiler: makes a function for tensors like those given.

    Attributes:
        trouble: why it was not compiled, for tensors of some shape; empty if it was.
    """

    def __init__(
        self, function: Function, compiler: Callable[[Function, Sequence[Tensor]], Function] = compiled
    ) -> None:
        self.function = function
        self.trouble = ""
        self._compiler = compiler
        self._made: dict[tuple[Any, ...], Callable[..., Sequence[Tensor] | None]] = {}

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor] | None:
        """Return what the function returns; None where it cannot be compiled, or was for `SIZES` other shapes.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        given = [tensor.contiguous() for tensor in tensors]
        like = tuple(map(_KIND, given))
        try:
            made = self._made.get(like)
            if made is None:
                made = self._made[like] = self._make(given)
            return made(*given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a compiler that is not there, or is another, comes to
            self.trouble = reason(error)
            self._made[like] = _nothing
            return None

    def _make(self, tensors: Sequence[Tensor]) -> Function:
        if len(self._made) >= SIZES:
            raise RuntimeError(f"there were tensors of more than {SIZES} shapes")
        return self._compiler(self.function, tensors)


def _nothing(*_: Tensor) -> None:
    """Stand in for what could not be compiled."""

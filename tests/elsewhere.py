"""A GPU that is not there, to find out what an engine does on one: its tensors say that they are on `cuda:0`.

What they hold lies on the CPU, and so does the arithmetic. But they are not to be mixed with tensors of the CPU, numpy
cannot have them, and whoever asks what is in them is counted: on a GPU, that is to wait for all that was begun.
Speed, memory and the kernels of a GPU are not tried here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
BY_INDEX = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
"""What takes indices of the CPU, too."""


class Remote(Tensor):
    """A tensor on the GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type[Self], inner: Tensor) -> Self:
        """To torch itself it is a tensor without contents: of the CUDA that is not there, nothing can be asked."""
        with torch.inference_mode(mode=False):
            made: Self = Tensor._make_wrapper_subclass(  # noqa: SLF001 - there is no public way
                cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="meta"
            )
        return made

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl  # noqa: SLF001 - likewise

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run where no `Elsewhere` is in force."""
        raise AssertionError(f"{func} on the GPU, outside of it: {types}, {args}, {kwargs}")

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # an attribute there
        """The GPU."""
        return GPU

    @property
    def data(self) -> Tensor:  # type: ignore[override]  # likewise
        """As torch's."""
        return self.detach()

    @data.setter
    def data(self, other: "Remote") -> None:
        self.inner = other.inner

    def __getitem__(self, key: Any) -> Tensor:
        """Torch would make an index of a list where the tensor seems to be."""
        return super().__getitem__(_index(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        """Likewise."""
        super().__setitem__(_index(key), value)

    def new_tensor(self, values: Any) -> Tensor:  # type: ignore[override]  # all that is needed of it
        """As torch's."""
        return torch.tensor(values, dtype=self.dtype, device=GPU)

    def tolist(self) -> Any:
        """As torch's: all at once."""
        return self.cpu().tolist()

    def numpy(self) -> Any:  # type: ignore[override]  # likewise
        """As torch's."""
        raise TypeError("can't convert a tensor on cuda:0 to numpy")


class Elsewhere(TorchDispatchMode):
    """While it is in force, there is a GPU.

    Attributes:
        reads: how often something was read from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self._before: list[bool] = []  # it is in force within itself, too
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # noqa: SLF001 - so torch does not look for a driver

    def __enter__(self) -> Any:
        """Let tensors be made on the CPU, and be moved then."""
        torch._C._ensureCUDADeviceGuardSet()  # noqa: SLF001 - what torch's own fake tensors do
        self._before.append(torch._C._only_lift_cpu_tensors())  # noqa: SLF001 - likewise
        torch._C._set_only_lift_cpu_tensors(True)  # noqa: SLF001, FBT003 - likewise
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Have no GPU again."""
        torch._C._set_only_lift_cpu_tensors(self._before.pop())  # noqa: SLF001 - likewise
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one of torch's operations."""
        options = dict(kwargs or {})
        if func._can_decompose():  # noqa: SLF001 - there is no public way
            with self:
                made = func.decompose(*args, **options)
            if made is not NotImplemented:
                return made
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        remote = [tensor for tensor in tensors if isinstance(tensor, Remote)]
        there = bool(remote) if options.get("device") is None else _there(options["device"])
        if func is aten._to_copy.default or func is aten.copy_.default:  # noqa: SLF001 - as torch names it
            there = there if func is aten._to_copy.default else isinstance(args[0], Remote)  # noqa: SLF001 - likewise
            self.reads += bool(remote) and not there
        elif not remote and not there:
            return func(*args, **options)
        elif remote and func not in BY_INDEX:
            strangers = [tuple(one.shape) for one in tensors if not isinstance(one, Remote) and one.dim()]
            if strangers:
                raise RuntimeError(f"{func}: tensors on the GPU and, of shapes {strangers}, on the CPU")
        self.reads += func is aten._local_scalar_dense.default  # noqa: SLF001 - likewise
        options.pop("pin_memory", None)
        if options.get("device") is not None:
            options["device"] = torch.device("cpu")
        held = tree_map_only(Remote, lambda tensor: tensor.inner, (list(args), options))
        made = func(*held[0], **held[1])
        if not there:
            return made
        wrapped = tree_map_only(Tensor, Remote, made)
        return return_and_correct_aliasing(func, tuple(args), dict(kwargs or {}), wrapped)


def _there(device: Any) -> bool:
    """Whether that is the GPU, or where torch itself takes its tensors to be."""
    return torch.device(device).type in ("cuda", "meta")


def _index(key: Any) -> Any:
    return torch.tensor(key) if isinstance(key, list) else key

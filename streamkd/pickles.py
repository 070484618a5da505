"""river's objects as bytes, and back: they have no state of plain values, and a pickle may name any callable."""

import copyreg
import io
import pickle
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

FAMILIES = frozenset(
    {
        "_river_rust",
        "base",
        "drift",
        "dummy",
        "ensemble",
        "forest",
        "linear_model",
        "metrics",
        "multiclass",
        "naive_bayes",
        "neighbors",
        "optim",
        "preprocessing",
        "compose",
        "proba",
        "stats",
        "tree",
        "utils",
    }
)
"""Packages of river whose classes and functions may be loaded: data and rules for them, nothing that acts elsewhere."""
PLAIN = frozenset(
    {
        ("builtins", "dict"),
        ("builtins", "float"),
        ("builtins", "int"),
        ("builtins", "set"),
        ("collections", "Counter"),
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("collections", "deque"),
        ("copy", "deepcopy"),
        ("functools", "partial"),
        ("random", "Random"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
    }
)
"""What else river's objects are made of."""


def dump(thing: Any) -> dict[str, Any]:
    """Return one of river's objects as plain values: `body` `[n]` uint8, a pickle, and `strings`, those in it."""
    file = io.BytesIO()
    pickler = ByValue(file, protocol=4)
    pickler.dump(thing)
    return {"strings": list(pickler.strings), "body": torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)}


def load(state: Mapping[str, Any]) -> Any:
    """Return the object that `dump` was given.

    Raises:
        pickle.UnpicklingError: the pickle names anything that is not a part of river's objects; it is not called.
    """
    return AllowListUnpickler(io.BytesIO(state["body"].numpy().tobytes()), state["strings"]).load()


class ByValue(pickle.Pickler):
    """Puts strings into a table by their value.

    A pickle tells strings that are one object from those that are merely equal, and what was loaded shares other ones
    than what was never saved: so the same state would have two pickles, and two digests.
    """

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.strings: dict[str, int] = {}

    def persistent_id(self, thing: Any) -> int | None:
        """Return the place of a string in the table; None for anything else."""
        return self.strings.setdefault(thing, len(self.strings)) if type(thing) is str else None

    def reducer_override(self, thing: Any) -> Any:
        """Leave out the generators that river's distributions seed from nowhere and, but to be sampled, never use."""
        if not isinstance(thing, _rivers("proba.base").Distribution) or thing.seed is not None:
            return NotImplemented
        known = {name: value for name, value in vars(thing).items() if name != "_rng"}
        return copyreg.__newobj__, (type(thing),), known  # type: ignore[attr-defined]  # typeshed does not know it


class AllowListUnpickler(pickle.Unpickler):
    """Loads classes of river's families and plain containers, and refuses to look at anything else."""

    def __init__(self, file: io.BytesIO, strings: Sequence[str]) -> None:
        super().__init__(file)
        self._strings = [sys.intern(text) for text in strings]

    def persistent_load(self, place: Any) -> str:
        """Return a string of the table."""
        return self._strings[int(place)]

    def find_class(self, module: str, name: str) -> Any:
        """Return the class, if it may be loaded."""
        if (module, name) == ("builtins", "getattr"):
            return _method
        if not _ours(module) and (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"{module}.{name} is not a part of river's objects")
        found = super().find_class(module, name)
        kind = type | FunctionType | BuiltinFunctionType
        if _ours(module) and not (isinstance(found, kind) and _ours(found.__module__ or "")):
            raise pickle.UnpicklingError(f"{module}.{name} is not a class or function of river's")
        return found


def _rivers(module: str) -> Any:
    """Import a part of river, once something of it is at hand: it is slow to import."""
    return import_module(f"river.{module}")


def _ours(module: str) -> bool:
    """Whether a module is of the families."""
    package, _, inner = module.partition(".")
    return package == "river" and inner.partition(".")[0] in FAMILIES


def _method(owner: object, name: str) -> Any:
    """Stand in for `getattr`, by which bound methods are pickled: of river's objects, and of its classes, alone."""
    known = owner if isinstance(owner, type) else type(owner)
    if not _ours(known.__module__) or name.startswith("__") or not callable(getattr(known, name, None)):
        raise pickle.UnpicklingError(f"{name} of {known.__name__} is not a part of river's objects")
    return getattr(owner, name)

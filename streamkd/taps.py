"""Models that also tell what one of their layers says, for lessons on features and measures of capacity."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from streamkd.batch import Output

MAP = len(("channels", "height", "width"))
"""Dimensions of a record's features that are a map; one less: positions of a width each; two less: a vector."""


class Tapped(nn.Module):
    """A model with a tap on one of its layers, and the adapters that it learns its teachers' features through.

    The adapters are parts of the student: its optimizer trains them, its gradient is clipped with theirs, and its
    checkpoint has them. They play no part in its answers.

    Args:
        model: gives logits, or an `Output`.
        layer: the layer whose output is told, by its name in the model; "" for what the model tells itself, or else
            for what goes into its last linear layer.
        adapters: teacher's name -> what takes (own features, teacher's features) to the teacher's shape.

    Raises:
        ValueError: there is no such layer.
    """

    def __init__(self, model: nn.Module, layer: str = "", adapters: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.model = model
        self.layer = layer or _last_linear(model)
        self.into = not layer
        if self.layer not in dict(model.named_modules()):
            known = ", ".join(name for name, _ in model.named_modules() if name)
            raise ValueError(f"the model has no layer {self.layer!r}; name one of {known}")
        self.names = list(adapters or {})  # of teachers; a module's own name may not be any text
        self.adapters = nn.ModuleList((adapters or {}).values())

    def forward(self, x: Tensor) -> Output:
        """Answer `x`, with features."""
        heard: list[Tensor] = []

        def hear(_: nn.Module, given: tuple[Any, ...], said: Any) -> None:
            heard.append(given[0] if self.into else said)

        tap = self.model.get_submodule(self.layer).register_forward_hook(hear)
        try:
            said = self.model(x)
        finally:
            tap.remove()
        output = as_output(said)
        told = heard[-1] if heard else None  # the last linear layer of a model that only torch knows may be passed by
        return Output(output.logits, output.features if self.into and output.features is not None else told)

    def adapt(self, teacher: str, own: Tensor, other: Tensor) -> Tensor:
        """Take own features to the shape of the teacher's, by the adapter for that teacher, where there is one."""
        if teacher not in self.names:
            return own
        adapted: Tensor = self.adapters[self.names.index(teacher)](own, other)
        return adapted


def plain(module: nn.Module) -> nn.Module:
    """Return the model without its tap."""
    return module.model if isinstance(module, Tapped) else module


def as_output(said: Any) -> Output:
    """Accept a model that returns plain logits, or logits among other things (torchvision's auxiliary outputs)."""
    if isinstance(said, Output):
        return said
    if isinstance(said, tuple):
        return Output(cast("Tensor", getattr(said, "logits", said[0])))
    return Output(said)


def positions(features: Tensor) -> Tensor:
    """Return features `[n, width]`, `[n, positions, width]` or `[n, channels, h, w]` as `[n, positions, width]`."""
    if features.dim() == 1 + MAP:
        return features.flatten(2).transpose(1, 2)
    return features if features.dim() == MAP else features[:, None]


def _last_linear(model: nn.Module) -> str:
    found: list[str] = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise ValueError("the model has no linear layer to take features from; name a layer of it")
    return found[-1]

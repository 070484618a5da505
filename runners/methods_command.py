"""`streamkd methods`: every part that a configuration can name, and what each says of itself."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from textwrap import indent
from types import ModuleType
from typing import Any

from docstring_parser import parse

from runners.feeds import KINDS, orders
from runners.predictions import KINDS as SINKS
from streamkd import (
    adapters,
    augment,
    capacity,
    drift,
    features,
    losses,
    per_record,
    replay,
    roles,
    schedules,
    schemes,
    stream_classes,
    views,
)
from streamkd.errors import ConfigError
from streamkd.parts import imported, public_functions, shown
from streamkd.settings import Part, did_you_mean

OURS = "streamkd"
"""The source of what was made up here."""

_SETTINGS = re.compile(r"those of `([\w.]+)\.(\w+)`")
_SOURCE = re.compile(r"\(([^()]*\b(?:(?:19|20)\d\d|articles)\b[^()]*)\)")


@dataclass(frozen=True, slots=True)
class Family:
    """Parts that take one another's place.

    Attributes:
        name: for people.
        keys: the settings in which its members are named.
        module: whose public functions they are; or name -> `module:Name`.
        given: arguments that are not for the user to set.
    """

    name: str
    keys: str
    module: ModuleType | Mapping[str, str]
    given: tuple[str, ...] = ()

    @property
    def methods(self) -> list["Method"]:
        """All members, in the order of their file."""
        if isinstance(self.module, ModuleType):
            return [Method(name, function, self) for name, function in public_functions(self.module).items()]
        return [Method(name, imported(target, name), self) for name, target in self.module.items()]


TAUGHT = ("student", "teacher", "y", "temperature")
FAMILIES = (
    Family("schemes", "distillation.scheme", schemes, ("peers", "teacher")),
    Family("losses", "distillation.loss", losses, TAUGHT),
    Family("feature losses", "distillation.features", features, ("student", "teacher")),
    Family("adapters", "distillation.features.adapter", adapters, ("student", "teacher")),
    Family("schedules", "distillation.temperature, .alpha, .beta, .feature_weight", schedules),
    Family("capacities", "distillation.capacity", capacity),
    Family("softness", "distillation.per_record", per_record, TAUGHT),
    Family("selectors", "roles.rule", roles, ("costs",)),
    Family("stream classes", "distillation.stream_classes", stream_classes, ("y", "classes")),
    Family("views", "distillation.views, of tables", views),
    Family("detectors", "drift.detector", drift),
    Family("replay", "replay.evict", replay, ("buffer", "n")),
    Family("augmentations", "inputs.augment; distillation.views, of images", augment),
    Family("orders", "feed.order, of images", orders),
    Family("feeds", "feed, labels.feed", KINDS, ("kind", "max_classes", "refuse", "labels_only")),
    Family("sinks", "predictions", SINKS),
)


@dataclass(frozen=True, slots=True)
class Method:
    """A member of a family."""

    name: str
    function: Callable[..., Any]
    family: Family

    @property
    def summary(self) -> str:
        """What it is, in a line, with its source."""
        said = parse(inspect.getdoc(self.function) or "").short_description or ""
        if self.source in said or not isinstance(self.family.module, ModuleType):
            return said
        return f"{said.removesuffix('.')} ({self.source})."

    @property
    def source(self) -> str:
        """Where it was published."""
        found = _SOURCE.search(" ".join((inspect.getdoc(self.function) or "").split()))
        return found[1] if found else OURS

    @property
    def text(self) -> str:
        """What more there is to say of it: the formula, where it fails."""
        return parse(inspect.getdoc(self.function) or "").long_description or ""

    @property
    def options(self) -> Iterator[tuple[str, str, str]]:
        """Name, default and description of each."""
        said = {each.arg_name: each.description for each in parse(inspect.getdoc(self.function) or "").params}
        own = inspect.signature(self.function).parameters
        for option in own.values():
            if option.kind is option.VAR_KEYWORD and (settings := _SETTINGS.search(said.get(option.name) or "")):
                yield from _fields(imported(f"{settings[1]}:{settings[2]}", self.name), {*own, *self.family.given})
            elif option.kind is option.VAR_KEYWORD:
                yield f"**{option.name}", "", said.get(f"**{option.name}") or ""
            elif option.name not in self.family.given:
                default = "to be set" if option.default is option.empty else repr(option.default)
                yield option.name, default, " ".join((said.get(option.name) or "").split())


def _fields(settings: Any, but: set[str]) -> Iterator[tuple[str, str, str]]:
    """Name, default and description of each of the settings that several parts have in common."""
    said = {
        name: " ".join((each.description or "").split())
        for each in parse(inspect.getdoc(settings) or "").params
        for name in each.arg_name.split(", ")
    }
    for name, field in settings.model_fields.items():
        if name not in but:
            default = shown(field.default) if isinstance(field.default, Part) else repr(field.default)
            yield name, "to be set" if field.is_required() else default, said[name]


def main(name: str | None) -> None:
    """List all methods, or tell all of those of one name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name is None:
        sys.stdout.write("\n".join(_listed()) + "\n")
        return
    everything = [method for family in FAMILIES for method in family.methods]
    found = [method for method in everything if method.name == name]
    if not found:
        hint = did_you_mean(name, [method.name for method in everything])
        raise ConfigError(f"{name}: no such method{hint or '; `streamkd methods` lists them all'}")
    sys.stdout.write("\n".join("\n".join(_told(method)) for method in found))


def _listed() -> Iterator[str]:
    for family in FAMILIES:
        yield f"{family.name}: {family.keys}"
        width = max(len(method.name) for method in family.methods)
        yield from (f"  {method.name:{width}}  {method.summary}" for method in family.methods)


def _told(method: Method) -> Iterator[str]:
    yield f"{method.name}, of {method.family.name}: {method.family.keys}"
    yield ""
    yield indent("\n\n".join(filter(None, [method.summary, method.text])), "  ")
    yield ""
    for name, default, description in method.options:
        yield f"  {name}{f' = {default}' if default else ''}"
        if description:
            yield f"      {description}"
    yield ""

"""Taps on the models that settings name, and adapters between them; widths are found by a dry run."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import nn

from streamkd import adapters, features
from streamkd.errors import ConfigError
from streamkd.features import FeatureLoss
from streamkd.parts import checked_options, find, tried
from streamkd.settings import EngineSettings, Part, PeerSettings
from streamkd.taps import MAP, Tapped

Build = Callable[[], nn.Module]


def tapped_models(builds: Mapping[str, Build], settings: EngineSettings, shape: Sequence[int]) -> dict[str, Build]:
    """Put a tap on each model, and an adapter between every two: who will teach whom is not known before."""
    rule = settings.distillation
    if rule.features.kind != "none" and rule.scheme in {"ensemble", "average", "self"}:
        raise ConfigError(
            f"distillation.features.kind = {rule.features.kind!r}: needs a teacher that is a peer, and under "
            f"distillation.scheme = {rule.scheme!r} there is none; leader, mutual and static have one"
        )
    keys = {peer.name: (f"peers.{index}.features", peer) for index, peer in enumerate(settings.peers)}
    heard = {name: _features(build, *keys[name], shape) for name, build in builds.items()}
    compared = feature_loss(rule.features)

    def build(name: str, own: torch.Tensor) -> nn.Module:
        made = builds[name]()  # before the adapters, so that its weights are what they would be without them
        adapters = {
            other: adapter
            for other, theirs in heard.items()
            if other != name and (adapter := _adapter(rule.features.adapter, own, theirs)) is not None
        }
        return Tapped(made, keys[name][1].features, adapters)

    def compare(name: str, own: torch.Tensor) -> None:
        model = build(name, own)
        for other, theirs in heard.items():
            if other != name and compared is not None and isinstance(model, Tapped):
                said = compared(model.adapt(other, own, theirs), theirs)
                if said.shape != own.shape[:1]:
                    raise ValueError(f"gives {list(said.shape)} for two records; [2] is needed, a value each")

    with torch.random.fork_rng():
        for name, own in heard.items():
            tried(partial(compare, name, own), rule.features, f"distillation.features, for {name}")
    return {name: partial(build, name, own) for name, own in heard.items()}


def _features(build: Build, key: str, peer: PeerSettings, shape: Sequence[int]) -> torch.Tensor:
    """Return the features of two records of zeros."""
    part = Part(kind=peer.features or "last linear")

    def told() -> torch.Tensor:
        heard = Tapped(build(), peer.features).eval()(torch.zeros(2, *shape)).features
        if not isinstance(heard, torch.Tensor) or not 1 < heard.dim() <= 1 + MAP:
            found = list(heard.shape) if isinstance(heard, torch.Tensor) else type(heard).__name__
            raise ValueError(f"its output is {found}; a vector, positions or a map a record is needed")
        return heard

    with torch.random.fork_rng(), torch.no_grad():
        return cast("torch.Tensor", tried(told, part, key))


def feature_loss(part: Part) -> FeatureLoss | None:
    """Return what `distillation.features` names; None for nothing."""
    if part.kind == "none":
        return None
    key = "distillation.features"
    named = find(part, features, key, given=("student", "teacher"))
    options = checked_options(named, part, key)
    return partial(named, **options) if options else cast("FeatureLoss", named)


def _adapter(part: Part, own: torch.Tensor, other: torch.Tensor) -> nn.Module | None:
    if part.kind == "none":
        return None
    key, given = "distillation.features.adapter", {"student": list(own.shape[1:]), "teacher": list(other.shape[1:])}
    named = find(part, adapters, key, given=tuple(given))
    return cast("nn.Module", named(**given, **checked_options(named, part, key)))

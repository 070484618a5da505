"""Settings in, an Engine out: the one module that turns names into objects.

A part is a table with a `kind`: a name of its family, or `module:Name`. What is named is a function, and the other
keys of the table are its keyword arguments, checked against its signature.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError, validate_call
from torch import nn

from streamkd import drift, losses, models, replay, schedules
from streamkd.cohort import Distillation
from streamkd.engine import Engine
from streamkd.errors import ConfigError
from streamkd.inputs import Raw, Standardiser
from streamkd.labels import Pending
from streamkd.peer import MakeOptimizer, Peer, as_output
from streamkd.roles import Election
from streamkd.served import Served
from streamkd.settings import EngineSettings, Part, complaints, did_you_mean


def build_engine(settings: EngineSettings, shape: Sequence[int], *, clock: Callable[[], float] = lambda: 0.0) -> Engine:
    """Make the engine that the settings describe.

    Args:
        settings: checked already.
        shape: of one record.
        clock: for the durations in reports.

    Raises:
        ConfigError: a part is misnamed, an option does not exist, or a model's output does not fit.
    """
    device = resolve_device(settings.device)
    rule = settings.distillation
    boosts = settings.drift.model_dump(include={"temperature_boost", "rate_boost", "boost_half_life"})
    memory = settings.replay.model_dump(include={"capacity", "alpha", "beta", "beta_records", "cap"})
    watch, rehearsal = settings.drift, settings.replay
    scaling = settings.inputs
    return Engine(
        list(_peers(settings, shape)),
        settings.max_classes,
        distillation=Distillation(
            scheme=rule.scheme,
            loss=partial(find(rule.loss, losses, "distillation.loss"), **rule.loss.options),
            temperature=make(rule.temperature, schedules, "distillation.temperature"),
            alpha=make(rule.alpha, schedules, "distillation.alpha"),
            beta=make(rule.beta, schedules, "distillation.beta"),
            gate=rule.gate,
            burn_in=rule.burn_in,
            freeze_after=rule.freeze_after,
            **boosts,
        ),
        replay=replay.ReplayBuffer(**memory, evict=getattr(replay, rehearsal.evict), seed=settings.seed + 1_000_003),
        recall=replay.Recall(updates=rehearsal.updates, records=rehearsal.records, window=rehearsal.window),
        drift=drift.DriftWatch(
            make(watch.detector, drift, "drift.detector"),
            watch.detector.kind.rpartition(":")[2],
            watch.signal,
        ),
        election=Election(len(settings.peers), **(settings.roles.model_dump() | _static_office(rule.scheme))),
        served=Served(2 * len(settings.peers), **settings.served.model_dump()),
        pending=Pending(settings.labels.pending_capacity),
        inputs=Standardiser(scaling.clip, scaling.horizon) if scaling.standardise else Raw(),
        device=device,
        clock=clock,
    )


def resolve_device(name: str) -> torch.device:
    """Return the device; `auto` is a GPU where torch finds one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}: torch finds no GPU here; set device = 'auto' or 'cpu'")
    return torch.device(name)


def _static_office(scheme: str) -> dict[str, str]:
    return {"rule": "never"} if scheme == "static" else {}


def _peers(settings: EngineSettings, shape: Sequence[int]) -> Iterator[Peer]:
    names = [peer.name for peer in settings.peers]
    for index, peer in enumerate(settings.peers):
        key = f"peers.{index}"
        if names.count(peer.name) > 1 or peer.name == "served":
            raise ConfigError(f"{key}.name = {peer.name!r}: taken; give each peer a name of its own, not 'served'")
        made = Peer(
            peer.name,
            _model(peer.model, shape, settings.max_classes, f"{key}.model"),
            _optimizer(peer.optimizer, f"{key}.optimizer"),
            horizon=peer.ema_horizon,
            clip=peer.clip,
            seed=settings.seed * 1_000 + index,
        )
        _check_output(made, shape, settings.max_classes, f"{key}.model")
        yield made


def _model(part: Part, shape: Sequence[int], classes: int, key: str) -> Callable[[], nn.Module]:
    """Return what builds a peer's model: one of ours, the user's own, or torchvision's by name."""
    options = part.options
    if ":" in part.kind or part.kind in public_functions(models):
        factory = find(part, models, key, given=("shape", "classes"))
        given = {"shape": tuple(shape), "classes": classes}
        options |= {name: value for name, value in given.items() if name in _parameters(factory)}
    else:
        factory, options = models.torchvision_model, {"name": part.kind, "classes": classes, **options}

    def build() -> nn.Module:
        try:
            module = factory(**options)
        except ImportError as error:
            raise ConfigError(f"{key}.kind = {part.kind!r}: needs torchvision ({error}); pip install it") from None
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{key} = {_shown(part)}: {error}") from None
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{key}.kind = {part.kind!r}: made a {type(module).__name__}, not a torch.nn.Module")
        return module

    return build


def _check_output(peer: Peer, shape: Sequence[int], classes: int, key: str) -> None:
    """Try the model on two records of zeros."""
    try:
        with torch.no_grad(), torch.random.fork_rng():
            logits = as_output(peer.predict(torch.zeros(2, *shape))).logits
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key}: cannot read records of shape {list(shape)}: {reason}") from None
    if tuple(logits.shape) != (2, classes):
        raise ConfigError(
            f"{key}: for 2 records its output has shape {list(logits.shape)}, and [2, {classes}] is needed; "
            f"make its output {classes} wide, or set max_classes to the width that it has"
        )


def _optimizer(part: Part, key: str) -> MakeOptimizer:
    """Return an optimizer of `torch.optim`, by its name in any case, or the user's own."""
    named = {name.lower(): value for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    options = part.options
    if ":" in part.kind:
        factory = imported(part.kind, f"{key}.kind")
    elif part.kind.lower() not in named:
        raise ConfigError(f"{key}.kind = {part.kind!r}: no such optimizer{did_you_mean(part.kind, named)}")
    else:
        factory = named[part.kind.lower()]
    for name in options:
        if name not in _parameters(factory):
            raise ConfigError(f"{key}.{name}: no such option of {part.kind}{did_you_mean(name, _parameters(factory))}")

    def build(parameters: Any) -> torch.optim.Optimizer:
        try:
            return factory(parameters, **options)  # type: ignore[no-any-return]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key} = {_shown(part)}: {error}") from None

    return build


def make(part: Part, family: ModuleType | Mapping[str, str], key: str, **given: Any) -> Any:
    """Call what `part` names with its options, types and bounds checked, and return what it makes.

    Args:
        part: the table.
        family: as for `find`.
        key: of the table, for the message.
        given: arguments that are not for the user to set; handed over where the function takes them.
    """
    factory = find(part, family, key, given=tuple(given))
    passed = {name: value for name, value in given.items() if name in _parameters(factory)}
    checked = factory if inspect.isclass(factory) else validate_call(factory)
    try:
        return checked(**passed, **part.options)
    except ValidationError as error:
        raise ConfigError("\n".join(complaints(error, key))) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} = {_shown(part)}: {error}") from None


def find(
    part: Part, family: ModuleType | Mapping[str, str], key: str, *, given: Sequence[str] = ()
) -> Callable[..., Any]:
    """Return the function that `part` names, once its options are known to exist.

    Args:
        part: the table.
        family: a module whose public functions are the names, or a mapping name -> `module:Name`.
        key: of the table, for the message.
        given: arguments that are not for the user to set.
    """
    if ":" in part.kind:
        found = imported(part.kind, f"{key}.kind")
    else:
        names = family if isinstance(family, Mapping) else public_functions(family)
        if part.kind not in names:
            raise ConfigError(
                f"{key}.kind = {part.kind!r}: no such part{did_you_mean(part.kind, names)} "
                f"(there are {', '.join(sorted(names))}; one of your own is written module:Name)"
            )
        target = names[part.kind]
        found = imported(target, key) if isinstance(target, str) else target
    parameters = _parameters(found)
    options = [name for name in parameters if name not in given]
    for name in part.options:
        if parameters and name not in options and not _takes_any(found):
            raise ConfigError(f"{key}.{name}: no such option of {part.kind}{did_you_mean(name, options, key)}")
    return found


def imported(name: str, key: str) -> Callable[..., Any]:
    """Import `module:Name`."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(f"{key} = {name!r}: cannot be imported: {error}") from None
    except AttributeError:
        raise ConfigError(f"{key} = {name!r}: there is no {attribute} in {module}") from None
    if not callable(found):
        raise ConfigError(f"{key} = {name!r}: is not a function or class")
    return found  # type: ignore[no-any-return]


def public_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Return the functions that a family's module defines, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(factory).parameters)
    except ValueError:  # built-ins without a signature
        return {}


def _takes_any(factory: Callable[..., Any]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in _parameters(factory).values())


def _shown(part: Part) -> str:
    return "{" + ", ".join(f"{k} = {v!r}" for k, v in part.model_dump().items()) + "}"

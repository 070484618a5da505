"""Settings in, an Engine out: the one module that turns names into objects.

A part is a table with a `kind`: a name of its family, or `module:Name`. What is named is a function, and the other
keys of the table are its keyword arguments, checked against its signature.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, validate_call
from torch import nn

from streamkd import drift, losses, models, replay, schedules
from streamkd.cohort import Distillation
from streamkd.engine import DriftWatch, Engine, Recall
from streamkd.errors import ConfigError
from streamkd.inputs import Raw, Standardiser
from streamkd.labels import Pending
from streamkd.peer import MakeOptimizer, Peer, as_output
from streamkd.roles import Election
from streamkd.served import Served

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0)]


class Settings(BaseModel):
    """A table of settings: no key but these, no value out of range."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


AnySettings = TypeVar("AnySettings", bound=Settings)


class Part(BaseModel):
    """A table that names a part by its `kind`; its other keys are the part's options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        """All keys but `kind`."""
        return dict(self.model_extra or {})


class PeerSettings(Settings):
    """One peer: its model, its optimizer, its average."""

    name: str = Field(min_length=1)
    model: Part = Part(kind="mlp")
    optimizer: Part = Part(kind="sgd")
    ema_horizon: Annotated[float, Field(ge=1, description="updates that the averaged weights look back")] = 10.0
    clip: Annotated[float, Field(gt=0, description="largest norm of the gradient")] = 2.0


class DistillationSettings(Settings):
    """How peers teach one another."""

    scheme: Literal["leader", "mutual", "ensemble", "average", "static", "none"] = "leader"
    loss: Part = Part(kind="kd")
    temperature: Part = Part(kind="loss_driven")
    alpha: Part = Part(kind="competence")
    beta: Part = Part(kind="constant", value=1.0)
    gate: Literal["better", "soft", "open"] = "better"
    burn_in: Count = 10
    freeze_after: Count = 1_000


class RolesSettings(Settings):
    """Who becomes teacher, and when."""

    rule: Literal["tested", "mission", "never"] = "tested"
    every: Positive = 16
    bar: Share = 0.95
    margin: Annotated[float, Field(ge=0)] = 0.005
    tenure: Count = 64
    tenure_drift: Count = 8


class ServedSettings(Settings):
    """How members are weighted in the served answer."""

    gamma: Share = 0.99
    gamma_drift: Share = 0.98
    drift_batches: Count = 64
    floor: Share = 0.01


class ReplaySettings(Settings):
    """The memory, and how it is rehearsed."""

    capacity: Count = 2_000
    alpha: Share = 0.6
    beta: Share = 0.4
    beta_records: Positive = 20_000
    evict: Literal["ring", "lowest", "reservoir"] = "ring"
    cap: Annotated[float, Field(gt=0, le=1)] = 0.95
    updates: Annotated[int, Field(ge=1, le=64, description="optimizer steps a batch")] = 2
    records: Annotated[int, Field(ge=0, description="memories drawn for each update")] = 32
    window: Annotated[int, Field(ge=0, description="least records drawn from; 0: all of the buffer")] = 256


class DriftSettings(Settings):
    """What is watched for drift, and what is done about it."""

    detector: Part = Part(kind="adwin")
    signal: Literal["error", "loss"] = "error"
    temperature_boost: Annotated[float, Field(ge=1)] = 1.0
    rate_boost: Annotated[float, Field(ge=1)] = 1.0
    boost_half_life: Positive = 32


class InputSettings(Settings):
    """How raw inputs are scaled."""

    standardise: bool = True
    clip: Factor = 8.0
    horizon: Positive = 100_000


class LabelSettings(Settings):
    """Predictions that wait for their labels."""

    pending_capacity: Count = 10_000


class EngineSettings(Settings):
    """Everything that makes an Engine."""

    batch: Annotated[int, Field(ge=1, le=65_536, description="records a step")] = 16
    seed: Count = 0
    deterministic: bool = False
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    max_classes: Annotated[int, Field(ge=2, le=65_536, description="width of the models' output")] = 100
    peers: Annotated[tuple[PeerSettings, ...], Field(min_length=2)]
    distillation: DistillationSettings = DistillationSettings()
    roles: RolesSettings = RolesSettings()
    served: ServedSettings = ServedSettings()
    replay: ReplaySettings = ReplaySettings()
    drift: DriftSettings = DriftSettings()
    inputs: InputSettings = InputSettings()
    labels: LabelSettings = LabelSettings()


def build_engine(
    settings: EngineSettings, shape: Sequence[int], *, clock: Callable[[], float] = lambda: 0.0
) -> Engine:
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
        replay=replay.ReplayBuffer(
            **memory, evict=getattr(replay, rehearsal.evict), seed=settings.seed + 1_000_003
        ),
        recall=Recall(updates=rehearsal.updates, records=rehearsal.records, window=rehearsal.window),
        drift=DriftWatch(
            make(watch.detector, drift, "drift.detector"), watch.detector.kind.rpartition(":")[2], watch.signal
        ),
        election=Election(
            len(settings.peers), **(settings.roles.model_dump() | _static_office(rule.scheme))
        ),
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
        raise ConfigError(f"{key}.kind = {part.kind!r}: no such optimizer{_did_you_mean(part.kind, named)}")
    else:
        factory = named[part.kind.lower()]
    for name in options:
        if name not in _parameters(factory):
            raise ConfigError(f"{key}.{name}: no such option of {part.kind}{_did_you_mean(name, _parameters(factory))}")

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
        raise ConfigError("\n".join(_complaints(error, key, part.options))) from None
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
                f"{key}.kind = {part.kind!r}: no such part{_did_you_mean(part.kind, names)} "
                f"(there are {', '.join(sorted(names))}; one of your own is written module:Name)"
            )
        target = names[part.kind]
        found = imported(target, key) if isinstance(target, str) else target
    parameters = _parameters(found)
    options = [name for name in parameters if name not in given]
    for name in part.options:
        if parameters and name not in options and not _takes_any(found):
            raise ConfigError(f"{key}.{name}: no such option of {part.kind}{_did_you_mean(name, options, key)}")
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


def validate(model: type[AnySettings], data: Mapping[str, Any]) -> AnySettings:
    """Check a table of settings.

    Raises:
        ConfigError: one line for each mistake, with the key, the value and what would do.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaints(error, "", data, model))) from None


def _complaints(
    error: ValidationError, prefix: str, data: Mapping[str, Any], model: type[BaseModel] | None = None
) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in ([prefix] if prefix else []) + list(problem["loc"]))
        if problem["type"] == "extra_forbidden":
            known = list(keys(model)) if model else []
            yield f"{key}: no such setting{_did_you_mean(key, known)}"
        elif problem["type"] == "missing":
            yield f"{key}: missing; set it"
        else:
            message = problem["msg"][:1].lower() + problem["msg"][1:]
            yield f"{key} = {problem['input']!r}: {message}"


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Return every key of a model of settings, those of its tables included."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        for inner in [field.annotation, *get_args(field.annotation)]:
            if inspect.isclass(inner) and issubclass(inner, Settings):
                index = ".0" if field.annotation is not inner else ""
                yield from keys(inner, f"{key}{index}.")


def _did_you_mean(name: str, known: Any, prefix: str = "") -> str:
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    dot = f"{prefix}." if prefix else ""
    return f"; did you mean {dot}{close[0]}?" if close else ""


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(factory).parameters)
    except ValueError:  # built-ins without a signature
        return {}


def _takes_any(factory: Callable[..., Any]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in _parameters(factory).values())


def _shown(part: Part) -> str:
    return "{" + ", ".join(f"{k} = {v!r}" for k, v in part.model_dump().items()) + "}"

"""Settings in, an Engine out: the one module that turns names into objects.

A part is a table with a `kind`: a name of its family, or `module:Name`. What is named is a function, and the other
keys of the table are its keyword arguments, checked against its signature.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, cast, get_type_hints

import torch
from pydantic import BaseModel, ValidationError, create_model, validate_call
from torch import nn

from streamkd import adapters, capacity, drift, features, losses, models, per_record, replay, roles, schedules
from streamkd.batch import Output
from streamkd.cohort import Distillation
from streamkd.engine import Engine
from streamkd.errors import ConfigError, one_screen, reason
from streamkd.features import FeatureLoss
from streamkd.inputs import Raw, Standardiser
from streamkd.labels import Pending
from streamkd.peer import MakeOptimizer, Peer
from streamkd.pool import LabelRates, Pool
from streamkd.river_peer import RiverPeer
from streamkd.roles import Election
from streamkd.served import Served
from streamkd.settings import EngineSettings, LossSum, Part, PeerSettings, complaints, did_you_mean, validate
from streamkd.taps import MAP, Tapped

RIVER = "river:"
RESERVED = ("served", "no-change", "majority")
"""Names that tables and metrics use beside those of the peers."""


def build_engine(settings: EngineSettings, shape: Sequence[int], *, clock: Callable[[], float] = lambda: 0.0) -> Engine:
    """Make the engine that the settings describe.

    Args:
        settings: checked already.
        shape: of one record.
        clock: for the durations in reports.

    Raises:
        ConfigError: a part is misnamed, an option does not exist, or a model's output does not fit.
    """
    device = resolve_device(settings.device, deterministic=settings.deterministic)
    rule = settings.distillation
    boosts = settings.drift.model_dump(include={"temperature_boost", "rate_boost", "effort_boost", "boost_half_life"})
    memory = settings.replay.model_dump(include={"capacity", "alpha", "beta", "beta_records", "cap"})
    watch, rehearsal = settings.drift, settings.replay
    scaling = settings.inputs
    measure: capacity.Capacity = make(rule.capacity, capacity, "distillation.capacity")
    peers = list(_peers(settings, shape, tapped=measure.online or rule.features.kind != "none"))
    models = [peer.module if isinstance(peer, Peer) else None for peer in peers]
    _tried(lambda: measure.start(models, torch.zeros(1, *shape)), rule.capacity, "distillation.capacity")
    return Engine(
        peers,
        settings.max_classes,
        capacity=measure,
        distillation=Distillation(
            scheme=rule.scheme,
            cap=rule.cap,
            loss=_loss(rule.loss, settings.max_classes),
            temperature=_schedule(rule.temperature, "distillation.temperature", least=1e-3),
            per_record=_per_record(rule.per_record, settings.max_classes),
            widest_gap=rule.widest_gap,
            alpha=_schedule(rule.alpha, "distillation.alpha"),
            beta=_schedule(rule.beta, "distillation.beta"),
            features=_feature_loss(rule.features),
            feature_weight=_schedule(rule.feature_weight, "distillation.feature_weight"),
            gate=rule.gate,
            burn_in=rule.burn_in,
            freeze_after=rule.freeze_after,
            unlabelled=rule.unlabelled,
            confidence=rule.confidence,
            doubt=rule.doubt,
            interpolate=rule.interpolate,
            **boosts,
        ),
        replay=replay.ReplayBuffer(**memory, evict=getattr(replay, rehearsal.evict), seed=settings.seed + 1_000_003),
        recall=replay.Recall(**rehearsal.model_dump(include={"updates", "records", "window", "stride"})),
        drift=drift.DriftWatch(
            _detector(watch.detector),
            watch.detector.kind.rpartition(":")[2],
            watch.signal,
        ),
        election=_election(settings, models, shape),
        served=Served(2 * len(settings.peers), **settings.served.model_dump(include=_HEDGE)),
        pool=_pool(settings),
        pending=Pending(settings.labels.pending_capacity),
        inputs=Standardiser(scaling.clip, scaling.horizon) if scaling.standardise else Raw(),
        device=device,
        clock=clock,
    )


def resolve_device(name: str, *, deterministic: bool) -> torch.device:
    """Return the device; `auto` is a GPU where torch finds one and results need not repeat bit for bit.

    Raises:
        ConfigError: there is no such device, or it cannot keep the promise.
    """
    if deterministic:
        if name.startswith("cuda"):
            raise ConfigError(f"device = {name!r}: deterministic = true holds on the CPU only; set device = 'cpu'")
        return torch.device("cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}: torch finds no GPU here; set device = 'auto' or 'cpu'")
    return torch.device(name)


def _schedule(part: Part, key: str, least: float = 0.0) -> schedules.Schedule:
    schedule: schedules.Schedule = make(part, schedules, key)
    value = _tried(lambda: float(schedule(schedules.Signals())), part, key)
    if not least <= value < float("inf"):
        raise ConfigError(f"{key} = {_shown(part)}: gives {value}; {least} is the least that will do")
    return schedule


def _loss(part: Part, classes: int) -> losses.Loss:
    """Return what `distillation.loss` names: one of the family, one of the user's own, or a weighted sum of such."""
    if part.kind != "sum":
        return _per_example(part, losses, classes, "distillation.loss")
    parts = validate(LossSum, part.options, "distillation.loss").parts
    return losses.Sum(
        [
            (each.weight, _per_example(each, losses, classes, f"distillation.loss.parts.{index}"))
            for index, each in enumerate(parts)
        ]
    )


def _per_record(part: Part, classes: int) -> losses.Loss | None:
    if part.kind == "even" and not part.options:
        return None
    return _per_example(part, per_record, classes, "distillation.per_record")


def _per_example(part: Part, family: ModuleType, classes: int, key: str) -> losses.Loss:
    """Return a function of what two peers say that gives a value an example, tried on two records."""
    named = find(part, family, key, given=("student", "teacher", "y", "temperature"))
    options = checked_options(named, part, key)
    loss: losses.Loss = partial(named, **options) if options else named
    said = Output(torch.eye(2, classes).expand(1, 2, classes))
    value = _tried(lambda: loss(said, said, torch.zeros(2, dtype=torch.int64), torch.ones(1, 1)), part, key)
    found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    if found != [1, 2]:
        raise ConfigError(
            f"{key} = {_shown(part)}: gives {found} for a pair of peers and two records; [1, 2] is needed, a value each"
        )
    return loss


def checked_options(function: Callable[..., Any], part: Part, key: str) -> dict[str, Any]:
    """Return the options of `part`, held to the types and bounds that the function itself is annotated with."""
    hints = get_type_hints(function, include_extras=True) if inspect.isfunction(function) else {}
    known = {name: (hint, ...) for name, hint in hints.items() if name in part.options}
    model: type[BaseModel] = create_model(part.kind, **known)  # type: ignore[call-overload]
    try:
        return part.options | dict(model.model_validate(part.options))
    except ValidationError as error:
        raise ConfigError(one_screen(complaints(error, key))) from None


def _detector(part: Part) -> drift.DriftDetector:
    detector: drift.DriftDetector = make(part, drift, "drift.detector")
    missing = [name for name in ("update", "state_dict", "load_state_dict", "width") if not hasattr(detector, name)]
    if missing:
        raise ConfigError(f"drift.detector.kind = {part.kind!r}: not a detector; it has no {', '.join(missing)}")
    _tried(lambda: detector.update(0.0), part, "drift.detector")
    return cast("drift.DriftDetector", make(part, drift, "drift.detector"))


def _tried(call: Callable[[], Any], part: Part, key: str) -> Any:
    """Call what the user named; whatever it does wrong is a mistake in the configuration."""
    try:
        return call()
    except (ConfigError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of river's compiled detectors is no Exception
        raise ConfigError(f"{key} = {_shown(part)}: {reason(error)}") from error


_HEDGE = {"gamma", "gamma_drift", "drift_batches", "floor", "averages"}


def _pool(settings: EngineSettings) -> Pool | None:
    rule = settings.served
    rates = LabelRates(settings.max_classes, rule.label_memories, rule.answer_memories)
    size = len(settings.peers)
    voices = 2 * size if rule.averages else size
    return Pool(2 * size, rates, rate=rule.pool_rate, voices=voices) if rule.pool else None


def _election(settings: EngineSettings, models: Sequence[nn.Module | None], shape: Sequence[int]) -> Election:
    part = Part(kind="never") if settings.distillation.scheme == "static" else settings.roles.rule
    given = {}
    if "costs" in _parameters(find(part, roles, "roles.rule")):
        operations = capacity.flops()
        operations.start(models, torch.zeros(1, *shape))
        most = max(operations.values)
        given = {"costs": tuple(value / most if most else 0.0 for value in operations.values)}
    rule: roles.Rule = make(part, roles, "roles.rule", **given)
    return Election(len(settings.peers), rule=rule, **settings.roles.model_dump(exclude={"rule"}))


def _peers(settings: EngineSettings, shape: Sequence[int], *, tapped: bool) -> Iterator[Peer | RiverPeer]:
    names = [peer.name for peer in settings.peers]
    builds = {}
    for index, peer in enumerate(settings.peers):
        key = f"peers.{index}"
        if names.count(peer.name) > 1 or peer.name in RESERVED:
            raise ConfigError(
                f"{key}.name = {peer.name!r}: taken; give each peer a name of its own, none of {', '.join(RESERVED)}"
            )
        if not peer.model.kind.startswith(RIVER):
            builds[peer.name] = _model(peer.model, shape, settings.max_classes, f"{key}.model")
    if tapped:
        builds = _tapped(builds, settings, shape)
    for index, peer in enumerate(settings.peers):
        key = f"peers.{index}"
        if peer.name not in builds:
            yield _river_peer(peer.name, peer.model, settings, index)
            continue
        made = Peer(
            peer.name,
            builds[peer.name],
            _optimizer(peer.optimizer, f"{key}.optimizer"),
            horizon=peer.ema_horizon,
            clip=peer.clip,
            seed=settings.seed * 1_000 + index,
        )
        _check_output(made, shape, settings.max_classes, peer.model, f"{key}.model")
        yield made


Build = Callable[[], nn.Module]


def _tapped(builds: Mapping[str, Build], settings: EngineSettings, shape: Sequence[int]) -> dict[str, Build]:
    """Put a tap on each model, and an adapter between every two: who will teach whom is not known before."""
    rule = settings.distillation
    if rule.features.kind != "none" and rule.scheme in {"ensemble", "average"}:
        raise ConfigError(
            f"distillation.features.kind = {rule.features.kind!r}: needs a teacher that is a peer, and under "
            f"distillation.scheme = {rule.scheme!r} there is none; leader, mutual and static have one"
        )
    keys = {peer.name: (f"peers.{index}.features", peer) for index, peer in enumerate(settings.peers)}
    heard = {name: _features(build, *keys[name], shape) for name, build in builds.items()}
    compared = _feature_loss(rule.features)

    def build(name: str, own: torch.Tensor) -> nn.Module:
        made = builds[name]()  # before the adapters, so that its weights are what they would be without them
        adapters = {
            other: adapter
            for other, theirs in heard.items()
            if other != name and (adapter := _adapter(rule.features.adapter, own, theirs)) is not None
        }
        return Tapped(made, keys[name][1].features, adapters)

    def tried(name: str, own: torch.Tensor) -> None:
        model = build(name, own)
        for other, theirs in heard.items():
            if other != name and compared is not None and isinstance(model, Tapped):
                said = compared(model.adapt(other, own, theirs), theirs)
                if said.shape != own.shape[:1]:
                    raise ValueError(f"gives {list(said.shape)} for two records; [2] is needed, a value each")

    with torch.random.fork_rng():
        for name, own in heard.items():
            _tried(partial(tried, name, own), rule.features, f"distillation.features, for {name}")
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
        return cast("torch.Tensor", _tried(told, part, key))


def _feature_loss(part: Part) -> FeatureLoss | None:
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


def _river_peer(name: str, part: Part, settings: EngineSettings, index: int) -> RiverPeer:
    """Return a peer of any of river's classifiers, named as in `river:forest.ARFClassifier`."""
    key = f"peers.{index}.model"
    module, _, attribute = part.kind.removeprefix(RIVER).rpartition(".")
    factory = imported(f"river.{module}:{attribute}", f"{key}.kind")
    if not (inspect.isclass(factory) and issubclass(factory, import_module("river.base").Classifier)):
        raise ConfigError(f"{key}.kind = {part.kind!r}: is not one of river's classifiers")
    options = part.options
    if "seed" in _parameters(factory):
        options = {"seed": settings.seed * 1_000 + index, **options}
    for option in options:
        if option not in _parameters(factory):
            hint = did_you_mean(option, _parameters(factory), key)
            raise ConfigError(f"{key}.{option}: no such option of {part.kind}{hint}")
    return RiverPeer(name, lambda: _tried(lambda: factory(**options), part, key), settings.max_classes)


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
        module = _tried(lambda: factory(**options), part, key)
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{key}.kind = {part.kind!r}: made a {type(module).__name__}, not a torch.nn.Module")
        return module

    return build


def _check_output(peer: Peer, shape: Sequence[int], classes: int, part: Part, key: str) -> None:
    """Try the model on two records of zeros, as it answers and as it learns."""
    x = torch.zeros(2, *shape)
    with torch.random.fork_rng():
        for answer in (peer.learn, peer.predict):
            logits = _tried(partial(_logits, answer, x), part, f"{key}, for records of shape {list(shape)}")
            found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            if found != [2, classes]:
                raise ConfigError(
                    f"{key}: for 2 records its output has shape {found}, and [2, {classes}] is needed; "
                    f"make its output {classes} wide, or set max_classes to the width that it has"
                )


def _logits(answer: Callable[[torch.Tensor], Output], x: torch.Tensor) -> Any:
    return answer(x).logits


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
        optimizer = _tried(lambda: factory(parameters, **options), part, key)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(f"{key}.kind = {part.kind!r}: made a {type(optimizer).__name__}, not a torch Optimizer")
        for name, value in ((name, value) for group in optimizer.param_groups for name, value in group.items()):
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{key}.{name} = {value}: not a finite number")
        return optimizer

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
        raise ConfigError(one_screen(complaints(error, key))) from None
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
        if (parameters or inspect.isfunction(found)) and name not in options and not _takes_any(found):
            raise ConfigError(f"{key}.{name}: no such option of {part.kind}{did_you_mean(name, options, key)}")
    return found


def imported(name: str, key: str) -> Callable[..., Any]:
    """Import `module:Name`."""
    module, _, attribute = name.partition(":")
    try:
        inside = import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise ConfigError(f"{key} = {name!r}: cannot be imported: {reason(error)}") from error
    found = getattr(inside, attribute, None)
    if found is None:
        raise ConfigError(
            f"{key} = {name!r}: there is no {attribute} in {module}{did_you_mean(attribute, vars(inside))}"
        )
    if not callable(found):
        raise ConfigError(f"{key} = {name!r}: is not a function or class")
    return cast("Callable[..., Any]", found)


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

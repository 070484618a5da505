"""Settings in, an Engine out."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from streamkd import (
    augment,
    capacity,
    drift,
    losses,
    models,
    per_record,
    replay,
    roles,
    schedules,
    stream_classes,
    views,
)
from streamkd.batch import Output
from streamkd.distillation import Distillation
from streamkd.engine import Engine
from streamkd.errors import ConfigError, reason
from streamkd.inputs import Raw, Standardiser
from streamkd.labels import Pending
from streamkd.parts import checked_options, find, imported, make, parameters, public_functions, shown, tried
from streamkd.peer import MakeOptimizer, Peer
from streamkd.pool import LabelRates, Pool
from streamkd.river_peer import RiverPeer
from streamkd.roles import Election
from streamkd.served import Served
from streamkd.settings import EngineSettings, LossSum, Part, did_you_mean, validate
from streamkd.tapping import feature_loss, tapped_models
from streamkd.transforms import chained, is_image, made

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
    tried(lambda: measure.start(models, torch.zeros(1, *shape)), rule.capacity, "distillation.capacity")
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
            features=feature_loss(rule.features),
            feature_weight=_schedule(rule.feature_weight, "distillation.feature_weight"),
            gate=rule.gate,
            stream_classes=getattr(stream_classes, rule.stream_classes),
            views=made(rule.views, augment if is_image(shape) else views, shape, "distillation.views"),
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
        augment=chained(scaling.augment, augment, shape),
        device=device,
        compiled=settings.compile,
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
    value = tried(lambda: float(schedule(schedules.Signals())), part, key)
    if not least <= value < float("inf"):
        raise ConfigError(f"{key} = {shown(part)}: gives {value}; {least} is the least that will do")
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
    value = tried(lambda: loss(said, said, torch.zeros(2, dtype=torch.int64), torch.ones(1, 1)), part, key)
    found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    if found != [1, 2]:
        raise ConfigError(
            f"{key} = {shown(part)}: gives {found} for a pair of peers and two records; [1, 2] is needed, a value each"
        )
    return loss


def _detector(part: Part) -> drift.DriftDetector:
    detector: drift.DriftDetector = make(part, drift, "drift.detector")
    missing = [name for name in ("update", "state_dict", "load_state_dict", "width") if not hasattr(detector, name)]
    if missing:
        raise ConfigError(f"drift.detector.kind = {part.kind!r}: not a detector; it has no {', '.join(missing)}")
    tried(lambda: detector.update(0.0), part, "drift.detector")
    return cast("drift.DriftDetector", make(part, drift, "drift.detector"))


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
    if "costs" in parameters(find(part, roles, "roles.rule")):
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
        builds = tapped_models(builds, settings, shape)
    for index, peer in enumerate(settings.peers):
        key = f"peers.{index}"
        if peer.name not in builds:
            yield _river_peer(peer.name, peer.model, settings, index)
            continue
        optimizer = _optimizer(peer.optimizer, f"{key}.optimizer", fused=":" not in peer.model.kind and not tapped)
        if ":" not in peer.optimizer.kind:
            tried(partial(_step_once, optimizer), peer.optimizer, f"{key}.optimizer")
        made = Peer(
            peer.name,
            builds[peer.name],
            optimizer,
            horizon=peer.ema_horizon,
            clip=peer.clip,
            seed=settings.seed * 1_000 + index,
            precision=getattr(torch, settings.precision),
        )
        _check_output(made, shape, settings.max_classes, peer.model, f"{key}.model")
        yield made


def _river_peer(name: str, part: Part, settings: EngineSettings, index: int) -> RiverPeer:
    """Return a peer of any of river's classifiers, named as in `river:forest.ARFClassifier`."""
    key = f"peers.{index}.model"
    module, _, attribute = part.kind.removeprefix(RIVER).rpartition(".")
    factory = imported(f"river.{module}:{attribute}", f"{key}.kind")
    if not (inspect.isclass(factory) and issubclass(factory, import_module("river.base").Classifier)):
        raise ConfigError(f"{key}.kind = {part.kind!r}: is not one of river's classifiers")
    options = part.options
    if "seed" in parameters(factory):
        options = {"seed": settings.seed * 1_000 + index, **options}
    for option in options:
        if option not in parameters(factory):
            hint = did_you_mean(option, parameters(factory), key)
            raise ConfigError(f"{key}.{option}: no such option of {part.kind}{hint}")
    made = RiverPeer(name, lambda: tried(lambda: factory(**options), part, key), settings.max_classes)
    try:
        made.load_state_dict(made.state_dict())
    except Exception as error:
        raise ConfigError(
            f"{key}.kind = {part.kind!r}: cannot be read back from a checkpoint: {reason(error)}; choose another"
        ) from error
    return made


def _model(part: Part, shape: Sequence[int], classes: int, key: str) -> Callable[[], nn.Module]:
    """Return what builds a peer's model: one of ours, the user's own, or torchvision's by name."""
    options, given = part.options, {"shape": tuple(shape), "classes": classes}
    if ":" in part.kind:
        factory = find(part, models, key, given=tuple(given))
    elif part.kind in public_functions(models):
        factory = find(part, models, key, given=tuple(given))
        options = checked_options(factory, part, key)
    else:
        _check_torchvision(part, key)
        factory, options = models.torchvision_model, checked_options(models.torchvision_model, part, key)
        given |= {"name": part.kind}
    options = {name: value for name, value in given.items() if name in parameters(factory)} | options

    def build() -> nn.Module:
        module = tried(lambda: factory(**options), part, key)
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{key}.kind = {part.kind!r}: made a {type(module).__name__}, not a torch.nn.Module")
        return module

    return build


def _check_torchvision(part: Part, key: str) -> None:
    """Refuse what is the name of no model."""
    names = tried(_torchvision_names, part, key)
    if part.kind.lower() not in names:
        said = "no such model" if names else "needs torchvision; pip install torchvision"
        close = did_you_mean(part.kind, [*public_functions(models), *names])
        raise ConfigError(f"{key}.kind = {part.kind!r}: {said}{close}")


def _torchvision_names() -> Sequence[str]:
    try:
        from torchvision.models import list_models  # noqa: PLC0415 - slow to import, and absent on some machines
    except ImportError:
        return ()
    return cast("list[str]", list_models())


def _check_output(peer: Peer, shape: Sequence[int], classes: int, part: Part, key: str) -> None:
    """Try the model on two records of zeros, as it answers and as it learns."""
    x = torch.zeros(2, *shape)
    with torch.random.fork_rng():
        for answer in (peer.learn, peer.predict):
            logits = tried(partial(_logits, answer, x), part, f"{key}, for records of shape {list(shape)}")
            found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            if found != [2, classes]:
                raise ConfigError(
                    f"{key}: for 2 records its output has shape {found}, and [2, {classes}] is needed; "
                    f"make its output {classes} wide, or set max_classes to the width that it has"
                )


def _step_once(make_optimizer: MakeOptimizer) -> None:
    """Find out whether an optimizer steps along a dense gradient, and asks for nothing else."""
    weight = nn.Parameter(torch.zeros(1, 1))
    weight.grad = torch.zeros(1, 1)
    make_optimizer([weight]).step()


def _logits(answer: Callable[[torch.Tensor], Output], x: torch.Tensor) -> Any:
    return answer(x).logits


def _optimizer(part: Part, key: str, *, fused: bool) -> MakeOptimizer:
    """Return an optimizer of `torch.optim`, by its name in any case, or the user's own.

    Args:
        part: the table.
        key: of the table, for the message.
        fused: take one kernel for all weights, which torch has for some optimizers, unless something else is asked for.
            By itself torch would not, on the CPU. Such a kernel goes by the memory of dense weights, whatever a model
            of the user's own may have, and by all of them having a gradient from the first step on, which adapters of
            features do not.
    """
    named = {name.lower(): value for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    options = part.options
    if ":" in part.kind:
        factory = imported(part.kind, f"{key}.kind")
    elif part.kind.lower() not in named:
        raise ConfigError(f"{key}.kind = {part.kind!r}: no such optimizer{did_you_mean(part.kind, named)}")
    else:
        factory = named[part.kind.lower()]
    for name in options:
        if name not in parameters(factory):
            raise ConfigError(f"{key}.{name}: no such option of {part.kind}{did_you_mean(name, parameters(factory))}")

    if fused and ":" not in part.kind and "fused" in parameters(factory) and not _OTHERWISE & options.keys():
        options = {**options, "fused": True}

    def build(parameters: Any) -> torch.optim.Optimizer:
        optimizer = tried(lambda: factory(parameters, **options), part, key)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(f"{key}.kind = {part.kind!r}: made a {type(optimizer).__name__}, not a torch Optimizer")
        for name, value in ((name, value) for group in optimizer.param_groups for name, value in group.items()):
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{key}.{name} = {value}: not a finite number")
        return optimizer

    return build


_OTHERWISE = {"fused", "foreach", "differentiable"}
"""Options of torch's optimizers that say by which kernels they step."""

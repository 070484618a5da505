"""Every setting of an engine: its type, its bounds, its default; and what is said of one that does not fit."""

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from streamkd.errors import ConfigError, one_screen, short

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0)]


class Settings(BaseModel):
    """A table of settings: no key but these, no value out of range."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _kinds(cls, table: Any) -> Any:
        """Let a part without a `kind` be of the default kind."""
        if not isinstance(table, Mapping):
            return table
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {
            name: {"kind": default.kind, **value}
            if isinstance(value, Mapping) and isinstance(default := defaults.get(name), Part)
            else value
            for name, value in table.items()
        }


AnySettings = TypeVar("AnySettings", bound=Settings)


class Part(BaseModel):
    """A table that names a part by its `kind`; its other keys are the part's options. A name alone has none."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """All keys but `kind`."""
        return dict(self.model_extra or {})


class PeerSettings(Settings):
    """One peer: its model, its optimizer, its average."""

    name: str = Field(min_length=1)
    model: Part = Part(kind="mlp")
    optimizer: Part = Part.model_validate({"kind": "sgd", "lr": 0.1})
    features: Annotated[
        str, Field(description="layer of the model whose output is compared; the last linear's input")
    ] = ""
    ema_horizon: Annotated[float, Field(ge=1, description="updates that the averaged weights look back")] = 10.0
    clip: Annotated[float, Field(gt=0, description="largest norm of the gradient")] = 2.0


def _no_number(value: Any) -> Any:
    """Say how a number is written that does not change."""
    if type(value) in {int, float}:
        raise PydanticCustomError("number", "{said}", {"said": f'write {{ kind = "constant", value = {value} }}'})
    return value


SchedulePart = Annotated[Part, BeforeValidator(_no_number)]


def _one_or_more(value: Any) -> Any:
    """Let one part stand for a list of it."""
    return [value] if isinstance(value, (str, Mapping)) else value


class WeightedPart(Part):
    """One of several parts that are added up."""

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0


class LossSum(Settings):
    """The options of a loss that is a weighted sum."""

    parts: Annotated[tuple[WeightedPart, ...], Field(min_length=1)]


def _summed(value: Any) -> Any:
    """Let a list of losses stand for their sum."""
    return {"kind": "sum", "parts": value} if isinstance(value, (list, tuple)) else value


class FeaturePart(Part):
    """A loss on features, and the adapter to the teacher's."""

    adapter: Part = Part(kind="none")


class DistillationSettings(Settings):
    """How peers teach one another."""

    scheme: Literal["leader", "mutual", "ensemble", "average", "self", "static", "none"] = "leader"
    loss: Annotated[Part, BeforeValidator(_summed)] = Part(kind="kd")
    temperature: SchedulePart = Part(kind="loss_driven")
    per_record: Part = Part(kind="even")
    alpha: SchedulePart = Part(kind="competence")
    capacity: Part = Part(kind="parameters")
    widest_gap: Annotated[float, Field(gt=0, description="of capacities, past which alpha is weakened")] = math.inf
    beta: SchedulePart = Part.model_validate({"kind": "constant", "value": 1.0})
    features: FeaturePart = FeaturePart(kind="none")
    feature_weight: SchedulePart = Part.model_validate({"kind": "constant", "value": 1.0})
    gate: Literal["better", "soft", "open"] = "better"
    cap: bool = True
    stream_classes: Literal["seen", "present"] = "seen"
    views: Annotated[
        tuple[Part, ...],
        BeforeValidator(_one_or_more),
        Field(description="each harder than the one before; a student learns the answer to the next"),
    ] = ()
    burn_in: Count = 10
    freeze_after: Count = 1_000
    unlabelled: Annotated[float, Field(ge=0, description="weight of records that will never have a label")] = 1.0
    confidence: Annotated[float, Field(ge=0, le=1, description="of the served answer, for these to be learned")] = 0.0
    doubt: Annotated[float, Field(ge=0, le=1, description="share of that answer spread over all classes")] = 0.1
    interpolate: Annotated[float, Field(ge=0, le=1, description="share up to which two such records are mixed")] = 0.5


class RolesSettings(Settings):
    """Who becomes teacher, and when."""

    rule: Part = Part(kind="tested")
    gamma: Share = 0.998
    every: Positive = 16
    bar: Share = 0.95
    margin: Annotated[float, Field(ge=0)] = 0.005
    confidence: Annotated[float, Field(ge=0)] = 2.33
    confidence_drift: Annotated[float, Field(ge=0)] = 1.28
    tenure: Count = 64
    tenure_drift: Count = 8


class ServedSettings(Settings):
    """How members are weighted in the served answer."""

    gamma: Share = 0.99
    gamma_drift: Share = 0.98
    drift_batches: Count = 64
    floor: Share = 0.01
    pool: Annotated[bool, Field(description="also pool the members by learned coefficients")] = True
    pool_rate: Annotated[float, Field(ge=0, le=1, description="of learning them, a record")] = 0.002
    label_memories: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], ...],
        Field(description="of the label rates in the pool: what a record leaves standing"),
    ] = (0.9, 0.98, 0.998)
    answer_memories: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], ...],
        Field(description="likewise of the rates of answers to records that will never have a label"),
    ] = (0.9, 0.98, 0.998)
    averages: Annotated[bool, Field(description="whether the peers' averaged weights answer beside them")] = True


class ReplaySettings(Settings):
    """The memory, and how it is rehearsed."""

    capacity: Annotated[int, Field(ge=0, le=10_000_000)] = 2_000
    alpha: Share = 0.6
    beta: Share = 0.4
    beta_records: Positive = 20_000
    evict: Literal["ring", "lowest", "reservoir"] = "ring"
    cap: Annotated[float, Field(gt=0, le=1)] = 0.95
    updates: Annotated[int, Field(ge=1, le=64, description="optimizer steps a batch")] = 2
    records: Annotated[int, Field(ge=0, le=65_536, description="memories drawn for each update")] = 32
    window: Annotated[int, Field(ge=0, description="least records drawn from; 0: all of the buffer")] = 256
    stride: Annotated[int, Field(ge=1, description="records learned together; larger batches in parts")] = 32


class DriftSettings(Settings):
    """What is watched for drift, and what is done about it."""

    detector: Part = Part(kind="adwin")
    signal: Literal["error", "loss"] = "error"
    temperature_boost: Annotated[float, Field(ge=1)] = 1.0
    rate_boost: Annotated[float, Field(ge=1)] = 1.0
    effort_boost: Annotated[float, Field(ge=1, le=64, description="factor on updates a batch at an alarm")] = 3.0
    boost_half_life: Positive = 64


class InputSettings(Settings):
    """How raw inputs are scaled."""

    standardise: bool = True
    clip: Factor = 8.0
    horizon: Positive = 100_000
    augment: Annotated[
        tuple[Part, ...],
        BeforeValidator(_one_or_more),
        Field(description="of images while they are learned, one after the other; anew for every update"),
    ] = ()


class LabelSettings(Settings):
    """Predictions that wait for their labels."""

    delay: Annotated[int, Field(ge=0, description="records after which a label is revealed; 0: with its own")] = 0
    pending_capacity: Count = 10_000


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise PydanticCustomError("device", "no such device; name auto, cpu, cuda or cuda:0")
    return name


class EngineSettings(Settings):
    """Everything that makes an Engine."""

    batch: Annotated[int, Field(ge=1, le=65_536, description="records a step")] = 16
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    deterministic: bool = False
    device: Annotated[str, AfterValidator(_device)] = "auto"
    precision: Annotated[
        Literal["float32", "bfloat16"], Field(description="in which models answer; each is then asked by itself")
    ] = "float32"
    compile: Annotated[bool, Field(description="compile what a step does, where a C++ compiler is found")] = False
    max_classes: Annotated[int, Field(ge=2, le=10_000, description="width of the models' output")] = 100
    peers: Annotated[tuple[PeerSettings, ...], Field(min_length=1)]
    distillation: DistillationSettings = DistillationSettings()
    roles: RolesSettings = RolesSettings()
    served: ServedSettings = ServedSettings()
    replay: ReplaySettings = ReplaySettings()
    drift: DriftSettings = DriftSettings()
    inputs: InputSettings = InputSettings()
    labels: LabelSettings = LabelSettings()


def validate(model: type[AnySettings], data: Mapping[str, Any], prefix: str = "") -> AnySettings:
    """Check a table of settings, whose own key is `prefix`.

    Raises:
        ConfigError: one line for each mistake, with the key, the value and what would do.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(one_screen(complaints(error, prefix, model))) from None


def complaints(error: ValidationError, prefix: str, model: type[BaseModel] | None = None) -> Iterator[str]:
    """Yield a line for each mistake: the key, the value and what would do."""
    problems = error.errors(include_url=False)
    for problem in problems:
        if problem["type"] == "too_short" and any(
            other["loc"][:1] == problem["loc"] != other["loc"] for other in problems
        ):
            continue  # said of a list only because an entry of it is wrong
        key = ".".join(str(part) for part in ([prefix] if prefix else []) + list(problem["loc"]))
        if problem["type"] == "extra_forbidden":
            indices = re.findall(r"\.(\d+)\.", key)
            index = f".{indices[0]}." if indices else ".0."
            named = keys(model, f"{prefix}." if prefix else "") if model else ()
            known = [re.sub(r"\.0\.", index, name) for name in named]
            yield f"{key}: no such setting{did_you_mean(key, known)}"
        elif problem["type"].startswith("missing"):
            yield f"{key}: missing; set it"
        else:
            part = str(problem.get("ctx", {}).get("class_name")).endswith("Part")
            said = _NEEDED.get("part" if part else problem["type"], problem["msg"])
            message = said[:1].lower() + said[1:]
            yield f"{key} = {short(problem['input'])}: {message}"


_NEEDED = {
    "part": 'write the name of a part, or a table, { kind = "..." } with its options',
    "model_type": "write a table of settings",
    "dict_type": "write a table",
    "tuple_type": "write a list",
    "is_instance_of": "write a list",
    "sequence_str": "write a list",
    "path_type": "write a path, in quotes",
    "string_type": "write text, in quotes",
}
"""What is to be written, by pydantic's name for the mistake, where pydantic says it in words of Python."""


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Return every key of a model of settings, those of its tables included."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        for inner in [field.annotation, *get_args(field.annotation)]:
            if inspect.isclass(inner) and issubclass(inner, Settings):
                index = ".0" if field.annotation is not inner else ""
                yield from keys(inner, f"{key}{index}.")


def did_you_mean(name: str, known: Any, prefix: str = "") -> str:
    """Return the end of a message: the known name that is closest, if any is close."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    dot = f"{prefix}." if prefix else ""
    return f"; did you mean {dot}{close[0]}?" if close else ""

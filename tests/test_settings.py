import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from test_commands import streamkd
from torch import nn
from worlds import batches, stored

from runners.feeds import KINDS, orders
from runners.feeds.files import text_file
from runners.settings import Configuration, load
from runners.shipped import shipped
from streamkd import (
    Engine,
    Output,
    Peer,
    adapters,
    augment,
    capacity,
    checkpoint,
    drift,
    features,
    losses,
    models,
    per_record,
    replay,
    roles,
    schedules,
)
from streamkd.config import build_engine
from streamkd.errors import ConfigError
from streamkd.parts import make, public_functions
from streamkd.settings import EngineSettings, Part, keys

FIXED = (
    "feed.kind",
    "feed.path",
    "feed.label",
    "batch",
    "seed",
    "deterministic",
    "device",
    "peers",
    "replay.capacity",
    "checkpoint.directory",
    "checkpoint.every_records",
    "http.port",
)


class Net(nn.Module):
    """A user's own: takes what it asks for by name."""

    def __init__(self, shape: tuple[int, ...], width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(shape[0], width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Answer."""
        logits: torch.Tensor = self.layer(x)
        return logits


class Failing(nn.Module):
    """Fails in a way of its own."""

    def __init__(self) -> None:
        raise KeyError("out of order")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=99999999999", ["seed = 99999999999"]),
        ("threads=100000", ["threads = 100000"]),
        ("peers.1.nmae=x", ["did you mean peers.1.name?"]),
        ("batchh=3", ["batchh", "no such setting", "did you mean batch?"]),
        ("replay.capasity=3", ["replay.capasity", "did you mean replay.capacity?"]),
        ("replay.capacity=-1", ["replay.capacity", "-1", "greater than or equal to 0"]),
        ("batch=0", ["batch = 0", "greater than or equal to 1"]),
        ("batch=many", ["batch = 'many'", "integer"]),
        ("http.port=70000", ["http.port = 70000", "65535"]),
        ("device=gpu", ["device = 'gpu'", "auto, cpu, cuda or cuda:0"]),
        ("distillation.scheme=leadr", ["distillation.scheme", "'leadr'", "'leader'", "'mutual'"]),
        ("peers=[]", ["peers", "at least 1"]),
        ("peers.0.nmae=x", ["peers.0.nmae", "did you mean peers.0.name?"]),
        ("peers.7.name=x", ["peers.7", "there are 3"]),
        ("batch.size=3", ["batch is a value, not a table"]),
        ("no-equals-sign", ["key.path=value"]),
        ("distillation.alpha=0.7", ["distillation.alpha = 0.7: write", '{ kind = "constant", value = 0.7 }']),
        ("distillation.temperature=4", ['{ kind = "constant", value = 4 }']),
        ("drift.detector=3", ["drift.detector = 3: write the name of a part, or a table"]),
        ("replay=3", ["replay = 3: write a table of settings"]),
        ("inputs.augment=3", ["inputs.augment = 3: write a list"]),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key_its_value_and_the_remedy(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load("default", [override])
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("peers.0.model.kind=resnet9000", ["peers.0.model", "resnet9000"]),
        ("peers.0.model.width=[3]", ["peers.0.model.width", "did you mean peers.0.model.widths?"]),
        ("peers.0.model.kind=resnet81", ["peers.0.model.kind = 'resnet81': no such model; did you mean resnet18?"]),
        ("peers.0.model.widths=[0.5]", ["peers.0.model.widths.0 = 0.5", "integer"]),
        ("peers.0.model.widths=[0]", ["peers.0.model.widths.0 = 0", "greater than or equal to 1"]),
        ("peers.0.model.widths=64", ["peers.0.model.widths = 64: write a list"]),
        ("peers.0.model.layer_norm=maybe", ["peers.0.model.layer_norm = 'maybe'", "boolean"]),
        ("peers.0.model={kind='cnn', channels=[6]}", ["peers.0.model.channels.0 = 6", "multiple of 4"]),
        ("peers.0.model={kind='cnn', channels=[]}", ["peers.0.model.channels = []", "at least 1"]),
        ("peers.0.model={kind='vit', heads=0}", ["peers.0.model.heads = 0", "greater than or equal to 1"]),
        ("peers.0.model={kind='resnet18', small='maybe'}", ["peers.0.model.small = 'maybe'", "boolean"]),
        ("peers.1.optimizer.kind=sdg", ["peers.1.optimizer.kind = 'sdg'", "did you mean sgd?"]),
        ("peers.1.optimizer.rate=1", ["peers.1.optimizer.rate"]),
        ("peers.1.optimizer.lr=-1", ["peers.1.optimizer", "-1"]),
        ("peers.1.optimizer={kind='lbfgs'}", ["peers.1.optimizer", "lbfgs", "closure"]),
        ("peers.1.optimizer={kind='sparseadam'}", ["peers.1.optimizer", "sparseadam", "dense"]),
        ("peers.1.name=quick", ["peers.0.name = 'quick'", "taken"]),
        ("distillation.alpha.kind=competense", ["distillation.alpha.kind", "did you mean competence?"]),
        ("distillation.alpha.steep=3", ["distillation.alpha.steep", "steepness"]),
        ("distillation.alpha.maximum=high", ["distillation.alpha.maximum", "'high'"]),
        ("roles.rule={kind='bandit', gamma=2}", ["roles.rule.gamma = 2"]),
        ("roles.rule=testd", ["roles.rule.kind = 'testd'", "did you mean tested?"]),
        ("roles.rule={kind='tested', bar=1}", ["roles.rule.bar", "no such option"]),
        ("distillation.loss.kind=dk", ["distillation.loss.kind"]),
        ("distillation.loss={kind='dist', betwen=1}", ["distillation.loss.betwen", "did you mean"]),
        ("distillation.loss={kind='dist', between=-1}", ["distillation.loss.between = -1", "greater than or equal"]),
        ("distillation.loss=[{kind='kd'}, {kind='dits'}]", ["distillation.loss.parts.1.kind", "did you mean dist?"]),
        ("distillation.loss=[{kind='kd', weight=-1}]", ["distillation.loss.parts.0.weight = -1"]),
        ("distillation.loss=[{weight=1}]", ["distillation.loss.parts.0.kind: missing"]),
        ("distillation.per_record=certanty", ["distillation.per_record.kind", "did you mean certainty?"]),
        ("distillation.per_record={kind='difficulty', low=2}", ["distillation.per_record.low = 2"]),
        ("distillation.temperature={kind='curriculum', start=0}", ["distillation.temperature.start = 0"]),
        ("distillation.widest_gap=0", ["distillation.widest_gap = 0"]),
        ("distillation.loss=[3]", ["distillation.loss.parts.0 = 3: write the name of a part"]),
        ("distillation.loss=[]", ["distillation.loss.parts", "at least 1"]),
        ("drift.detector.kind=adwin2", ["drift.detector.kind", "did you mean adwin?"]),
        ("drift.detector.kind=nowhere:Thing", ["drift.detector.kind", "nowhere"]),
        ("drift.detector.kind=math:nothing", ["drift.detector.kind", "no nothing in math"]),
        ("peers.0.model={kind='test_settings:Net', widths=[1]}", ["peers.0.model.widths", "no such option"]),
        ("distillation.temperature.low=0.5", ["low = 0.5 must be under high = 0.5"]),
        ("distillation.temperature={kind='constant', value=0}", ["distillation.temperature", "the least"]),
        ("distillation.alpha.maximum=-1", ["distillation.alpha.maximum = -1"]),
        ("distillation.alpha.half_life=0", ["distillation.alpha.half_life = 0"]),
        ("drift.detector.delta=5", ["drift.detector.delta = 5"]),
        ("drift.detector.clock=0", ["drift.detector", "clock = 0"]),
        ("drift.detector={kind='river.drift:ADWIN'}", ["drift.detector.kind", "not a detector"]),
        ("peers.0.optimizer.lr=nan", ["peers.0.optimizer.lr", "nan"]),
        ("peers.2.name=majority", ["peers.2.name = 'majority'", "taken"]),
        ("peers.0.model={kind=':x'}", ["peers.0.model.kind"]),
        ("peers.0.model={kind='test_settings:Failing'}", ["KeyError", "out of order"]),
    ],
)
def test_a_wrong_part_is_refused_with_its_key_its_value_and_the_remedy(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        build_engine(load("default", [override]), (5,))
    for word in words:
        assert word in str(refused.value)


def test_what_is_false_in_quotes_is_false_to_a_model() -> None:
    engine = build_engine(load("default", ['peers.0.model.layer_norm="false"']), (5,))
    assert not any(isinstance(layer, nn.LayerNorm) for layer in engine.cohort.peers[0].module)


def test_a_model_of_the_users_own_is_given_what_it_asks_for() -> None:
    overrides = ["peers.0.model={kind='test_settings:Net'}", "max_classes=3"]
    engine = build_engine(load("default", overrides), (5,))
    assert engine.cohort.peers[0].module.layer.weight.shape == (3, 5)


def test_a_model_whose_output_does_not_fit_is_refused_with_both_widths() -> None:
    with pytest.raises(ConfigError, match=r"peers\.0\.model.*\[2, 7\].*\[2, 100\].*max_classes"):
        build_engine(load("default", ["peers.0.model={kind='test_settings:Net', width=7}"]), (5,))


def test_the_compact_student_is_at_least_ten_times_smaller_than_its_teachers() -> None:
    *teachers, student = build_engine(load("compact"), (33,)).cohort.peers
    assert student.name == "student"
    assert all(teacher.capacity >= 10 * student.capacity for teacher in teachers)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_configuration_builds(name: str) -> None:
    configuration = load(name)
    shape = (3, 32, 32) if name in {"images", "npz", "torchvision"} else (6,)
    assert len(build_engine(configuration, shape).cohort) >= 2
    options = {} if configuration.feed is None else configuration.feed.options
    assert not {"name", "model", "optimizer"} & options.keys()  # which are of peers


def test_every_kind_of_feed_has_a_shipped_configuration_to_start_from() -> None:
    begun = {tomllib.loads(text)["feed"]["kind"] for text in shipped().values()}
    families = {KINDS[kind] for kind in begun}
    assert families == set(KINDS.values())


@pytest.mark.parametrize(
    "name", ["demo", "http", "iterable", "kafka", "mqtt", "nats", "parquet", "redis", "stdin", "tail"]
)
def test_tables_are_learned_alike_whatever_they_come_from(name: str) -> None:
    learning = set(EngineSettings.model_fields) - {"max_classes"}
    shipped_one, default = (load(each, ["drift.detector.delta=0.002"]) for each in (name, "default"))
    assert shipped_one.model_dump(include=learning) == default.model_dump(include=learning)


def test_the_shipped_configuration_of_an_iterable_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for command, told in (("check", "First 3 records"), ("run", "")):
        assert streamkd(monkeypatch, command, "iterable", "--set=http.port=0") == 0
        assert told in capsys.readouterr().out
    assert checkpoint.about(checkpoint.found(Path("checkpoints"))[0])["records"] == 1_250


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 32)])
def test_convolutional_peers_answer_images(shape: tuple[int, ...]) -> None:
    models = ["peers.0.model={kind='cnn'}", "peers.1.model={kind='cnn', channels=[8]}", "max_classes=10"]
    engine = build_engine(load("default", models), shape)
    assert engine.predict(torch.zeros(2, *shape)).shape == (2, 10)


def test_torchvision_models_are_peers_by_name() -> None:
    engine = build_engine(load("default", ["peers.0.model={kind='squeezenet1_1'}", "max_classes=10"]), (3, 32, 32))
    assert engine.predict(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_keys_that_scripts_hang_on_are_there() -> None:
    options = inspect.signature(text_file).parameters
    known = {*keys(Configuration), "feed.kind", *(f"feed.{name}" for name in options)}
    assert set(FIXED) <= known


def test_overrides_are_toml_or_text_and_come_last(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('batch = 8\npeers = [{ name = "a" }, { name = "b" }]\n', encoding="utf-8")
    assert load(str(file)).batch == 8
    changed = load(
        str(file),
        [
            "batch=32",
            "feed.kind=csv",
            "feed.path=some file.csv",
            "peers.1.optimizer.kind=sgd",
            "peers.1.optimizer.lr=0.5",
        ],
    )
    assert changed.batch == 32
    assert changed.feed is not None
    assert changed.feed.options == {"path": "some file.csv"}
    assert changed.peers[1].optimizer.options == {"lr": 0.5}


def test_an_override_is_text_where_text_is_wanted() -> None:
    given = ["checkpoint.directory=2024", "peers.0.features=3", "peers.1.name=1.50", "feed.label=2024-01-01"]
    changed = load("default", [*given, "feed.time=12:30:00", "dead_letters.path='7'"])
    assert changed.checkpoint.directory == Path("2024")
    assert changed.peers[0].features == "3"
    assert changed.peers[1].name == "1.50"
    assert changed.feed is not None
    assert changed.feed.options == {"label": "2024-01-01", "time": "12:30:00"}
    assert changed.dead_letters.path == Path("7")


@pytest.mark.parametrize("text", ["batch = ", "\x00", "batch = 1\nbatch = 2"])
def test_what_is_not_toml_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load(str(file))


FAMILIES: list[tuple[Any, set[str]]] = [
    (
        losses,
        {
            "kd",
            "dml",
            "separate_temperatures",
            "sharpness",
            "standardised",
            "decoupled_kd",
            "dist",
            "mse_logits",
            "jensen_shannon",
            "hard_pseudo_label",
            "soft_label",
        },
    ),
    (
        schedules,
        {
            "constant",
            "mission_temperature",
            "loss_driven",
            "annealing",
            "curriculum",
            "mission_alpha",
            "capacity_ratio",
            "capacity_prior",
            "competence",
            "complement",
        },
    ),
    (features, {"hint", "attention_transfer", "similarity_preserving", "wasserstein"}),
    (adapters, {"linear", "convolution", "cross_attention"}),
    (models, {"mlp", "cnn", "vit", "torchvision_model"}),
    (capacity, {"parameters", "flops", "fisher", "dimension", "rank", "three_c"}),
    (per_record, {"even", "certainty", "difficulty"}),
    (drift, {"adwin", "kswin", "page_hinkley", "ddm", "eddm", "hddm_a", "hddm_w", "fhddm", "never"}),
    (replay, {"ring", "lowest", "reservoir"}),
    (roles, {"tested", "mission", "never", "bandit"}),
    (augment, {"crop", "flip", "erase", "jitter", "rotate", "trivial"}),
    (orders, {"file", "shuffled", "class_incremental", "domain_incremental"}),
]


@pytest.mark.parametrize(("family", "names"), FAMILIES)
def test_a_family_holds_the_parts_that_are_promised_and_no_helpers(family: Any, names: set[str]) -> None:
    assert set(public_functions(family)) == names


def test_a_part_without_a_kind_is_of_the_default_kind() -> None:
    settings = load("default", ["distillation.beta.value=0.5", "peers.0.optimizer={lr=0.5}"])
    assert settings.distillation.beta == Part.model_validate({"kind": "constant", "value": 0.5})
    assert settings.peers[0].optimizer == Part.model_validate({"kind": "sgd", "lr": 0.5})


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("drift.detector=never", "drift.detector"),
        ("peers.0.model=mlp", "peers.0.model"),
        ("peers.0.optimizer=adamw", "peers.0.optimizer"),
        ("distillation.loss=dist", "distillation.loss"),
        ("distillation.features=hint", "distillation.features"),
        ("distillation.alpha=capacity_prior", "distillation.alpha"),
        ("distillation.views=swapped", "distillation.views.0"),
        ("predictions=none", "predictions"),
        ("feed=jsonl", "feed"),
        ("labels.feed=csv", "labels.feed"),
    ],
)
def test_a_name_alone_is_a_part_without_any_options(override: str, key: str) -> None:
    place: Any = load("default", [override])
    for name in key.split("."):
        place = place[int(name)] if name.isdecimal() else getattr(place, name)
    assert (place.kind, place.options) == (override.partition("=")[2], {})


def test_a_name_in_a_list_of_losses_is_a_loss_without_options_and_weighs_one() -> None:
    named, written = (
        build_engine(load("default", [f"distillation.loss=[{first}, {{ kind = 'dist', weight = 0.5 }}]"]), (5,))
        for first in ("'kd'", "{ kind = 'kd', weight = 1.0 }")
    )
    for batch in batches(64):
        assert torch.equal(named.step(batch).served, written.step(batch).served)


def test_a_part_that_was_a_name_alone_can_be_given_an_option() -> None:
    rule = load("default", ["drift.detector=adwin", "drift.detector.delta=0.1"]).drift.detector
    assert (rule.kind, rule.options) == ("adwin", {"delta": 0.1})


def test_another_kind_does_not_keep_the_options_of_the_old_one() -> None:
    assert load("default", ["peers.0.model.kind=resnet18"]).peers[0].model.options == {}
    given = ["feed.path=d.jsonl", "feed.kind=jsonl"]
    feed = load("default", given).feed
    assert feed is not None
    assert feed.options == {"path": "d.jsonl"}


def test_deterministic_runs_are_on_the_cpu() -> None:
    assert build_engine(load("default", ["deterministic=true"]), (5,)).device.type == "cpu"
    with pytest.raises(ConfigError, match="deterministic"):
        build_engine(load("default", ["deterministic=true", "device=cuda"]), (5,))


def with_optimizers(optimizer: str) -> Engine:
    return build_engine(load("default", [f"peers.{index}.optimizer={{{optimizer}}}" for index in range(3)]), (5,))


def gathered(made: Engine) -> list[bool | None]:
    return [peer.optimizer.param_groups[0].get("fused") for peer in made.cohort.peers if isinstance(peer, Peer)]


@pytest.mark.parametrize(
    ("optimizer", "fused"),
    [
        ("kind='sgd', lr=0.1", True),
        ("kind='adam'", True),
        ("kind='adamw', fused=false", False),
        ("kind='adam', foreach=true", None),
        ("kind='rmsprop'", None),
    ],
)
def test_an_optimizer_steps_by_one_kernel_where_there_is_one_and_nothing_else_was_asked_for(
    optimizer: str, *, fused: bool | None
) -> None:
    assert gathered(with_optimizers(optimizer)) == [fused] * 3


def test_a_model_of_the_users_own_may_have_weights_that_no_such_kernel_takes() -> None:
    made = build_engine(load("default", ["peers.0.model.kind=test_settings:Net", "max_classes=3"]), (5,))
    assert gathered(made) == [None, True, True]


@pytest.mark.parametrize("optimizer", ["kind='adam'", "kind='adamw'", "kind='adagrad'", "kind='sgd', momentum=0.9"])
def test_one_kernel_comes_to_what_many_come_to_and_goes_on_with_what_they_have_gathered(optimizer: str) -> None:
    stream = batches(480)
    fused, plain = with_optimizers(optimizer), with_optimizers(f"{optimizer}, fused=false")
    for batch in stream[:15]:
        one, other = fused.step(batch), plain.step(batch)
        assert torch.allclose(one.served, other.served, atol=1e-4)
    fused.load_state_dict(stored(plain.state_dict()))
    assert gathered(fused) == [True] * 3
    for batch in stream[15:]:
        one, other = fused.step(batch), plain.step(batch)
        assert torch.allclose(one.served, other.served, atol=1e-4)


def test_options_are_checked_by_their_types() -> None:
    with pytest.raises(ConfigError, match=r"rate = 'quick'"):
        make(Part.model_validate({"kind": "loss_driven", "rate": "quick"}), schedules, "distillation.temperature")


def test_a_list_of_losses_is_their_weighted_sum() -> None:
    text = "distillation.loss=[{kind='kd', weight=0.5}, {kind='dist', within=2.0}]"
    rule = build_engine(load("default", [text]), (5,)).cohort.distillation
    assert isinstance(rule.loss, losses.Sum)
    said = [Output(torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2)]
    y, temperature = torch.zeros(4, dtype=torch.int64), torch.full((1, 1), 2.0)
    expected = 0.5 * losses.kd(*said, y, temperature) + losses.dist(*said, y, temperature, within=2.0)
    assert torch.allclose(rule.loss(*said, y, temperature), expected)

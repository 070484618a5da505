"""Classifiers of river's as peers: they learn, teach, are served and saved like any other."""

import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from river import forest, naive_bayes, tree
from test_commands import streamkd, table
from torch import Tensor
from worlds import CLASSES, batches, stored

from streamkd import Distillation, DriftWatch, Engine, Peer, RiverPeer, checkpoint, pickles
from streamkd.config import build_engine
from streamkd.drift import never
from streamkd.errors import ConfigError
from streamkd.inputs import Raw
from streamkd.models import mlp
from streamkd.schedules import constant
from streamkd.settings import EngineSettings, validate


def mixed(**options: Any) -> Engine:
    peers = [
        RiverPeer("forest", partial(forest.ARFClassifier, n_models=3, seed=1), CLASSES),
        Peer("a", partial(mlp, (5,), CLASSES, widths=(16,)), seed=1),
        Peer("b", partial(mlp, (5,), CLASSES, widths=(8,)), seed=2),
    ]
    return Engine(peers, CLASSES, **options)


def test_it_answers_with_the_classifiers_probabilities_smoothed_a_little() -> None:
    peer = RiverPeer("bayes", naive_bayes.GaussianNB, 3)
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    peer.absorb(x, y)
    alone = naive_bayes.GaussianNB()
    for row, label in zip(x.tolist(), y.tolist(), strict=True):
        alone.learn_one(dict(enumerate(row)), label)
    said = peer.predict(x).logits.exp()
    for row, p in zip(x.tolist(), said, strict=True):
        wanted = alone.predict_proba_one(dict(enumerate(row)))
        assert p.tolist() == pytest.approx([wanted.get(k, 0.0) for k in range(3)], abs=4e-3)
    assert torch.allclose(said.sum(1), torch.ones(40))


def test_before_it_has_learned_anything_every_class_is_as_likely() -> None:
    peer = RiverPeer("tree", tree.HoeffdingAdaptiveTreeClassifier, CLASSES)
    assert torch.allclose(peer.predict(torch.zeros(2, 5)).logits.exp(), torch.full((2, CLASSES), 1 / CLASSES))


def test_it_learns_every_labelled_record_once_and_no_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mixed()
    taken: list[int] = []
    absorb = RiverPeer.absorb
    monkeypatch.setattr(RiverPeer, "absorb", lambda self, x, y: (taken.extend(y.tolist()), absorb(self, x, y)))
    learned = [k for batch in batches(320, late=True) for k in made.step(batch).scored.y.tolist()]
    assert taken == learned


def test_the_world_is_learned_and_the_forest_takes_office_and_teaches() -> None:
    made = mixed(drift=DriftWatch(never()), distillation=Distillation(alpha=constant(1.0), gate="open"))
    reports = [made.step(batch) for batch in batches(800)]
    assert sum(report.scored.correct["forest"] for report in reports[20:]) / (30 * 16) > 0.8
    taught = [report.peers["a"].divergence for report in reports if ("forest", "a") in report.alphas]
    assert any(value > 0 for value in taught)
    assert all(("a", "forest") not in report.alphas or report.peers["forest"].soft >= 0 for report in reports)


@pytest.mark.parametrize("scheme", ["leader", "mutual", "ensemble", "average", "self", "static", "none"])
def test_a_resumed_run_equals_the_unbroken_one(scheme: str) -> None:
    unbroken, cut = (mixed(distillation=Distillation(scheme=scheme, freeze_after=30)) for _ in range(2))
    stream = batches(480, late=True)
    for batch in stream[:15]:
        unbroken.step(batch)
        cut.step(batch)
    again = mixed(distillation=Distillation(scheme=scheme, freeze_after=30))
    again.load_state_dict(stored(cut.state_dict()))
    for batch in stream[15:]:
        unbroken.step(batch)
        again.step(batch)
    assert checkpoint.digest(again.state_dict()) == checkpoint.digest(unbroken.state_dict())


def test_a_record_that_breaks_an_update_is_not_learned_by_those_that_learn_record_by_record_either() -> None:
    made, given = mixed(inputs=Raw()), list[Tensor]()
    forest = next(peer for peer in made.cohort.peers if isinstance(peer, RiverPeer))
    absorb = forest.absorb

    def recorded(x: Tensor, y: Tensor) -> None:
        given.append(x)
        absorb(x, y)

    forest.absorb = recorded  # type: ignore[method-assign]
    named = 0
    for number, batch in enumerate(batches(160)):
        x = batch.x.clone()
        x[number] = 3e38
        faults = [fault.row for fault in made.step(replace(batch, x=x)).faults]
        assert torch.equal(given[-1], x[[row for row in range(16) if row not in faults]])
        named += len(faults)
    assert named


def test_a_teacher_that_is_frozen_learns_nothing_more() -> None:
    made = mixed(distillation=Distillation(scheme="static", freeze_after=10))
    stream = batches(480)
    for batch in stream[:10]:
        made.step(batch)
    assert made.roles.teacher == 0
    before = made.cohort.peers[0].state_dict()["river"]["body"]
    for batch in stream[10:]:
        made.step(batch)
    if made.roles.teacher == 0:
        assert torch.equal(made.cohort.peers[0].state_dict()["river"]["body"], before)


@pytest.mark.parametrize(
    ("thing", "told"),
    [
        ("river.stream.iter_csv iter_csv", "is not a part of river's objects"),
        ("river.datasets.elec2 Elec2", "is not a part of river's objects"),
        ("river.utils.random math", "is not a class or function of river's"),
        ("river.stats.mode cast", "is not a class or function of river's"),
        ("builtins eval", "is not a part of river's objects"),
    ],
)
def test_what_acts_when_it_is_made_is_not_loaded(thing: str, told: str) -> None:
    module, name = thing.split()
    body = torch.frombuffer(bytearray(f"c{module}\n{name}\n.".encode()), dtype=torch.uint8)
    with pytest.raises(pickle.UnpicklingError, match=told):
        pickles.load({"strings": [], "body": body})


def test_the_same_state_has_one_pickle_whatever_its_past() -> None:
    model = forest.ARFClassifier(n_models=2, seed=3)
    again = pickles.load(stored(pickles.dump(model)))
    generator = torch.Generator().manual_seed(0)
    for row in torch.randn(300, 3, generator=generator).tolist():
        for one in (model, again):
            one.learn_one(dict(enumerate(row)), int(row[0] > 0))
    assert checkpoint.digest(pickles.dump(model)) == checkpoint.digest(pickles.dump(again))


@pytest.mark.parametrize(
    "kind",
    [
        "dummy.PriorClassifier",
        "forest.AMFClassifier",
        "linear_model.PAClassifier",
        "linear_model.SoftmaxRegression",
        "naive_bayes.GaussianNB",
        "neighbors.KNNClassifier",
        "tree.HoeffdingAdaptiveTreeClassifier",
        "tree.SGTClassifier",
    ],
)
def test_a_classifier_read_back_answers_and_learns_on_as_it_was(kind: str) -> None:
    (peer, *_) = build_engine(settings({"kind": f"river:{kind}"}), (3,)).cohort.peers
    assert isinstance(peer, RiverPeer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=generator)
    y = (x[:, 0] > 0).long()
    peer.absorb(x[:200], y[:200])
    again = RiverPeer("again", lambda: None, 3)
    again.load_state_dict({"river": stored(peer.state_dict()["river"])})
    for one in (peer, again):
        one.absorb(x[200:], y[200:])
    assert torch.equal(peer.predict(x).logits, again.predict(x).logits)


def test_a_classifier_that_cannot_be_saved_is_refused_before_it_learns() -> None:
    with pytest.raises(ConfigError, match=r"peers\.0\.model\.kind = 'river:facto\.FMClassifier': cannot be read back"):
        build_engine(settings({"kind": "river:facto.FMClassifier"}), (3,))


def settings(model: dict[str, Any]) -> EngineSettings:
    return validate(EngineSettings, {"max_classes": 3, "peers": [{"name": "r", "model": model}, {"name": "m"}]})


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"kind": "river:forest.ARF"}, "there is no ARF in river.forest"),
        ({"kind": "river:forrest.ARFClassifier"}, "cannot be imported"),
        ({"kind": "river:forest.ARFRegressor"}, "is not one of river's classifiers"),
        ({"kind": "river:forest.ARFClassifier", "n_model": 3}, "did you mean peers.0.model.n_models"),
        ({"kind": "river:forest.ARFClassifier", "n_models": "many"}, "peers.0.model = {kind = 'river:forest"),
    ],
)
def test_a_mistake_in_its_settings_is_told(model: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_engine(settings(model), (2,))


def test_runs_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = table(Path("d.csv"), 400).read_text(encoding="utf-8")
    Path("d.csv").write_text("\n".join(whole.split("\n")[:201]) + "\n", encoding="utf-8")
    forest_first = "peers.0.model={ kind = 'river:forest.ARFClassifier', n_models = 2 }"
    pairs = ["feed.path=d.csv", "feed.label=y", "http.port=0", forest_first]
    given = [part for pair in pairs for part in ("--set", pair)]
    assert streamkd(monkeypatch, "check", "default", *given) == 0
    assert streamkd(monkeypatch, "run", "default", *given) == 0
    Path("d.csv").write_text(whole, encoding="utf-8")
    assert streamkd(monkeypatch, "run", "default", *given) == 0
    assert checkpoint.about(checkpoint.found(Path("checkpoints"))[0])["records"] == 400

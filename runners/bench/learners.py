"""Online learners of other libraries, and our engine, behind one small protocol: predict a batch whole, then learn it.

Every learner is left with its library's defaults, but for the number of trees; none is tuned to a stream.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from river import ensemble, forest, linear_model, preprocessing, tree

from runners.bench.streams import Records
from runners.session import prepare_torch
from streamkd.batch import Batch
from streamkd.config import build_engine
from streamkd.models import mlp
from streamkd.settings import PeerSettings

TREES = 10
OURS = "streamkd"
COMPILED = "streamkd, compiled"
PACE = "ARF-10 (river)"
"""Whose speed the others' are told by."""


class Learner(Protocol):
    """Predicts batches of one stream, and learns them."""

    def prepare(self, batch: Batch, x: NDArray[np.float64]) -> Any:
        """Return a batch in the learner's own form; its time is not counted.

        Args:
            batch: as the feed gave it.
            x: `[n, features]`, its inputs, flat and without missing values.
        """

    def predict(self, prepared: Any) -> Sequence[int]:
        """Return a class index a record."""

    def learn(self, prepared: Any, y: Sequence[int]) -> None:
        """Learn the labels of a batch."""


@dataclass(frozen=True, slots=True)
class Rival:
    """Someone to race.

    Attributes:
        make: makes a learner for a stream, from a seed.
        missing: says what to install; empty where all is there.
        seeded: whether chance plays a part; if not, one pass is enough.
    """

    make: Callable[[Records, int], Learner]
    missing: Callable[[], str] = lambda: ""
    seeded: bool = True


class Ours:
    """The engine of the shipped default. Its step predicts a batch whole before it learns it, so there is one call."""

    def __init__(self, records: Records, seed: int, *overrides: str) -> None:
        configuration = records.stream.configuration(overrides=overrides, seed=seed)
        prepare_torch(configuration)
        self.engine = build_engine(configuration, records.shape)

    def prepare(self, batch: Batch, x: NDArray[np.float64]) -> Batch:  # noqa: ARG002 - it imputes by itself
        """Return the batch as it came."""
        return batch

    def predict(self, prepared: Batch) -> Sequence[int]:
        """Take a whole step, and return what was answered before the labels were looked at."""
        served: list[int] = self.engine.step(prepared).served.argmax(-1).tolist()
        return served

    def learn(self, prepared: Batch, y: Sequence[int]) -> None:
        """Do nothing: it was learned already."""


class Compiled(Ours):
    """The same with `compile = true`, as it goes once all that a stream asks for was compiled.

    Compiling takes longer than a short stream; so it goes through the stream beforehand, and then begins anew.

    Raises:
        RuntimeError: it cannot be compiled.
    """

    def __init__(self, records: Records, seed: int) -> None:
        super().__init__(records, seed, "compile=true")
        beginning = self.engine.state_dict()
        for batch in records.batches:
            self._check()
            self.engine.step(batch)
        self._check()
        self.engine.load_state_dict(beginning)

    def _check(self) -> None:
        if self.engine.uncompiled:
            raise RuntimeError(f"not compiled: {self.engine.uncompiled}")


class River:
    """A classifier of river's, record by record; before it knows any class it answers the first."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def prepare(self, batch: Batch, x: NDArray[np.float64]) -> list[dict[int, float]]:  # noqa: ARG002 - it needs one of the two
        """Return a mapping a record."""
        return [dict(enumerate(row)) for row in x.tolist()]

    def predict(self, prepared: list[dict[int, float]]) -> Sequence[int]:
        """Ask for every record."""
        return [int(self.model.predict_one(row) or 0) for row in prepared]

    def learn(self, prepared: list[dict[int, float]], y: Sequence[int]) -> None:
        """Learn every record."""
        for row, label in zip(prepared, y, strict=True):
            self.model.learn_one(row, label)


def logistic(records: Records, seed: int) -> Learner:  # noqa: ARG001 - it begins at zero
    """Online logistic regression on running standard scores; softmax regression for more than two classes."""
    binary = records.classes == len((False, True))
    model = linear_model.LogisticRegression() if binary else linear_model.SoftmaxRegression()
    return River(preprocessing.StandardScaler() | model)


class DeepRiver:
    """deep-river's classifier: a network as wide as the default's first, with its optimizer, on running scores."""

    def __init__(self, records: Records, seed: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        peers = records.stream.configuration().peers
        peer = next((peer for peer in peers if peer.model.kind == "mlp"), PeerSettings(name="mlp"))
        optimizers = {name.lower(): value for name, value in vars(torch.optim).items()}
        self.model = _deep_river().Classifier(
            module=mlp(records.shape, records.classes, **peer.model.options),
            loss_fn="cross_entropy",
            optimizer_fn=optimizers[peer.optimizer.kind.lower()],
            lr=peer.optimizer.options.get("lr", 1e-3),
            seed=seed,
        )
        self.scaler = preprocessing.StandardScaler()
        self.frame = import_module("pandas").DataFrame
        self.series = import_module("pandas").Series
        self.asked = False

    def prepare(self, batch: Batch, x: NDArray[np.float64]) -> Any:  # noqa: ARG002 - it needs one of the two
        """Return a table; its columns need names that sort as they stand."""
        return self.frame(x, columns=[f"x{column:06}" for column in range(x.shape[1])])

    def predict(self, prepared: Any) -> Sequence[int]:
        """Ask for the batch at once; the answer is the column of the highest probability."""
        if not self.asked:
            return [0] * len(prepared)
        said = self.model.predict_proba_many(self.scaler.transform_many(prepared))
        best: list[int] = said.to_numpy(dtype=float).argmax(1).tolist()
        return best

    def learn(self, prepared: Any, y: Sequence[int]) -> None:
        """Take one step of its optimizer."""
        self.asked = True
        self.scaler.learn_many(prepared)
        # Its variance of a column that hardly varies may fall below zero by rounding, and has a complex root then.
        self.scaler.vars.update({name: max(0.0, value) for name, value in self.scaler.vars.items()})
        self.model.learn_many(self.scaler.transform_many(prepared), self.series(list(y)))


def _deep_river() -> ModuleType:
    """Import its classifier alone: the package imports its anomaly detectors too, which need an older river."""
    if "deep_river" not in sys.modules:
        found = find_spec("deep_river")
        if found is None:
            raise ModuleNotFoundError("No module named 'deep_river'")
        package = ModuleType("deep_river")
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules["deep_river"] = package
    return import_module("deep_river.classification")


class Moa:
    """A classifier of MOA's through capymoa."""

    def __init__(self, records: Records, seed: int | None, name: str, **options: Any) -> None:
        _capymoa()
        features = [f"x{column}" for column in range(int(np.prod(records.shape)))]
        classes = [str(label) for label in range(records.classes)]
        stream = import_module("capymoa.stream")
        self.schema = stream.Schema.from_custom([*features, "y"], target="y", categories={"y": classes})
        self.instance = import_module("capymoa.core").LabeledInstance
        chance = {} if seed is None else {"random_seed": seed}
        self.model = getattr(import_module("capymoa.classifier"), name)(self.schema, **options, **chance)

    def prepare(self, batch: Batch, x: NDArray[np.float64]) -> list[Any]:
        """Return instances that are in Java's memory already."""
        labels = batch.y.clamp(min=0).tolist()
        made = [self.instance.from_array(self.schema, row, y) for row, y in zip(x, labels, strict=True)]
        for instance in made:
            _ = instance.java_instance  # made when it is first asked for
        return made

    def predict(self, prepared: list[Any]) -> Sequence[int]:
        """Ask for every record."""
        return [int(self.model.predict(instance) or 0) for instance in prepared]

    def learn(self, prepared: list[Any], y: Sequence[int]) -> None:  # noqa: ARG002 - the instances have the labels
        """Learn every record."""
        for instance in prepared:
            self.model.train(instance)


def _capymoa() -> ModuleType:
    """Import it, which starts Java; with the one collector of garbage that takes no thread of its own."""
    os.environ.setdefault("CAPYMOA_JVM_ARGS", "-Xmx8g -Xss10M -XX:+UseSerialGC")
    return import_module("capymoa.classifier")


def _without(load: Callable[[], object], install: str) -> Callable[[], str]:
    """Make a function that says what to install where `load` fails."""

    def missing() -> str:
        try:
            load()
        except Exception as error:  # noqa: BLE001 - a package of others, on a machine that may lack Java
            said = str(error).strip().partition("\n")[0]
            return f"{install} ({said or type(error).__name__})"
        return ""

    return missing


_NO_DEEP_RIVER = _without(
    _deep_river,
    "pip install 'streamkd[bench]', then pip install --no-deps deep-river, whose own pins exclude our torch and river",
)
_NO_MOA = _without(_capymoa, "pip install 'streamkd[bench]', and a Java runtime, 17 or newer")

RIVALS: Mapping[str, Rival] = {
    OURS: Rival(Ours),
    COMPILED: Rival(Compiled),
    "HAT (river)": Rival(lambda _, seed: River(tree.HoeffdingAdaptiveTreeClassifier(seed=seed))),
    PACE: Rival(lambda _, seed: River(forest.ARFClassifier(n_models=TREES, seed=seed))),
    "SRP-10 (river)": Rival(lambda _, seed: River(ensemble.SRPClassifier(n_models=TREES, seed=seed))),
    "logistic (river)": Rival(logistic, seeded=False),
    "network (deep-river)": Rival(DeepRiver, _NO_DEEP_RIVER),
    "ARF-10 (MOA)": Rival(
        lambda records, seed: Moa(records, seed, "AdaptiveRandomForestClassifier", ensemble_size=TREES), _NO_MOA
    ),
    "SRP-10 (MOA)": Rival(
        lambda records, seed: Moa(records, seed, "StreamingRandomPatches", ensemble_size=TREES), _NO_MOA
    ),
    "SAMkNN (MOA)": Rival(lambda records, _: Moa(records, None, "SAMkNN"), _NO_MOA, seeded=False),
}
"""Name -> rival; ours come first."""

"""A peer of another family: any of river's classifiers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from streamkd import pickles
from streamkd.batch import Output

LEAST = 1e-3
"""What a class is given at the least, before the probabilities are made to add up to 1 again: trees are often certain,
and a teacher's certainty has no finite logits."""


class RiverPeer:
    """Learns and predicts beside the torch peers, and teaches them through its probabilities.

    It has no gradient, so nobody teaches it: it learns every labelled record once, and no memories. It has no average
    either, and answers for its own.

    Args:
        name: appears in metrics and reports.
        build: makes the classifier.
        classes: width of its answers.
    """

    def __init__(self, name: str, build: Callable[[], Any], classes: int) -> None:
        self.name = name
        self.model = build()
        self.classes = classes
        self.capacity = 0  # nothing that could be held against a number of parameters
        self.skipped = self.stuck = self.rollbacks = self.restarts = 0
        self.good: Mapping[str, Tensor] = {}
        self._answered: tuple[Tensor, Tensor] | None = None

    @property
    def learns_by(self) -> str:
        """How it learns, for people."""
        return f"{type(self.model).__name__}, record by record"

    def to(self, device: torch.device) -> "RiverPeer":  # noqa: ARG002 - as a peer's
        """Stay where it is."""
        return self

    def predict(self, x: Tensor) -> Output:
        """Answer `x` `[n, ...]` with log-probabilities `[n, classes]`."""
        if self._answered is None or self._answered[0] is not x:
            self._answered = x, self._answer(x)
        return Output(self._answered[1])

    predict_average = learn = predict

    def absorb(self, x: Tensor, y: Tensor) -> None:
        """Learn the records `x` `[n, ...]` with their labels `y` `[n]`."""
        self._answered = None
        for features, label in zip(_features(x), y.tolist(), strict=True):
            self.model.learn_one(features, label)

    def clip_gradient(self) -> Tensor:
        """Return 0: there is no gradient."""
        return torch.zeros(())

    def step(self, norm: float, rate: float = 1.0) -> None:
        """Do nothing."""

    def discard(self) -> None:
        """Do nothing."""

    def shapes(self) -> dict[str, Any]:
        """Return what must be the same for a checkpoint to fit."""
        return {"river": type(self.model).__name__}

    def state_dict(self) -> dict[str, Any]:
        """Return the classifier as bytes."""
        return {"river": pickles.dump(self.model)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.model = pickles.load(state["river"])
        self._answered = None

    def _answer(self, x: Tensor) -> Tensor:
        p = torch.zeros(len(x), self.classes)
        for row, features in enumerate(_features(x)):
            for label, share in self.model.predict_proba_one(features).items():
                p[row, label] = share
        p = p.nan_to_num(0.0).clamp(min=LEAST)
        return (p / p.sum(-1, keepdim=True)).log().to(x.device)


def _features(x: Tensor) -> list[dict[int, float]]:
    return [dict(enumerate(row)) for row in x.flatten(1).tolist()]

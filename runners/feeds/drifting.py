"""A stream that drifts at known places, made by river's generators: for trying things out without any data."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Annotated, Any

import torch
from pydantic import Field
from river.datasets import synth

from runners.feeds import NONE, REPLAYABLE
from runners.feeds.classes import ClassMap
from streamkd.batch import Batch

FEATURES = 8
CLASSES = 5
CENTROIDS = 15
Record = tuple[Mapping[str, float], int]


class DriftingFeed:
    """Four concepts of clusters (random radial basis functions) in five stretches of equal length.

    A gives way to B, and B to C, at once; C fades into D over a fifth of a stretch; then A comes back at once.

    Attributes:
        drifts: after how many records the concept changes, or begins to.
    """

    def __init__(self, records: int, seed: int) -> None:
        self.name = "drifting"
        self.capabilities = REPLAYABLE
        self.connected = True
        self.resets = self.failures = NONE
        self.shape: tuple[int, ...] = (FEATURES,)
        self.records = records
        self.drifts = [records * k // 5 for k in range(1, 5)]
        self._seed = seed
        self._classes = ClassMap(CLASSES)
        self._given = 0
        self._stream = self._generate()

    def poll(self, records: int) -> Batch | None:
        """Return the next `records` records; fewer at the end, then None."""
        drawn = list(islice(self._stream, records))
        if not drawn:
            return None
        self._given += len(drawn)
        x = torch.tensor([list(features.values()) for features, _ in drawn])
        y = torch.tensor([self._classes.index(str(label)) for _, label in drawn])
        return Batch(x, y, position=self.position())

    def position(self) -> dict[str, Any]:
        """Return how many records were given, and the classes met in them."""
        return {"records": self._given, "classes": list(self._classes.labels)}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on after the records that were given before `position`."""
        self._given = position["records"]
        self._classes.restore(position["classes"])
        self._stream = islice(self._generate(), self._given, None)

    def adopt(self, classes: Sequence[str]) -> None:
        """Number these labels first."""
        self._classes.restore(classes)

    def progress(self) -> float:
        """Return how much of the stream was given, 0 to 1."""
        return self._given / self.records

    def lag(self) -> Mapping[str, int]:
        """Return how many records are still to come."""
        return {"0": self.records - self._given}

    def commit(self, position: Mapping[str, Any]) -> None:
        """Do nothing: a generator waits for nobody."""

    def describe(self) -> dict[str, Any]:
        """Return what the stream is made of."""
        return {
            "records": self.records,
            "drifts": self.drifts,
            "features": FEATURES,
            "classes": list(self._classes.labels),
            "seed": self._seed,
        }

    def close(self) -> None:
        """Do nothing."""

    def _generate(self) -> Iterator[Record]:
        before, fading = self.drifts[2] - self.drifts[1], self.records // 50
        # river's drift is a sigmoid about its position: one width before it, one record in fifty is of the new concept.
        c_into_d = synth.ConceptDriftStream(
            self._concept(2), self._concept(3), seed=self._seed, position=before + fading, width=fading
        )
        stretches = [
            islice(self._concept(0), self.drifts[0]),
            islice(self._concept(1), self.drifts[1] - self.drifts[0]),
            islice(c_into_d, self.drifts[3] - self.drifts[1]),
            islice(self._concept(0), self.records - self.drifts[3]),
        ]
        return iter(chain(*stretches))

    def _concept(self, number: int) -> "Turned":
        clusters = synth.RandomRBF(
            seed_model=self._seed,
            seed_sample=self._seed * 10 + number,
            n_classes=CLASSES,
            n_features=FEATURES,
            n_centroids=CENTROIDS,
        )
        return Turned(clusters, by=2 * number)


class Turned:
    """One of river's streams with its columns turned by some places: another concept, and exactly as hard."""

    def __init__(self, stream: Any, *, by: int) -> None:
        self.stream = stream
        self.by = by
        # What river looks at when it joins two streams.
        self.n_features, self.n_classes, self.n_outputs = stream.n_features, stream.n_classes, stream.n_outputs
        self.task, self.n_samples = stream.task, stream.n_samples

    def __iter__(self) -> Iterator[Record]:
        for features, label in self.stream:
            values = list(features.values())
            yield dict(zip(features, values[self.by :] + values[: self.by], strict=True)), label


def drifting(
    *,
    records: Annotated[int, Field(ge=100)] = 100_000,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> DriftingFeed:
    """Make up a stream with four known drifts.

    Args:
        records: of the stream, in five worlds of equal length.
        seed: of all chance in it.
    """
    return DriftingFeed(records, seed)

"""Questions wait for their answers: predictions are scored as they were made, whenever the label comes."""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamkd.batch import UNLABELLED, Batch, labelled
from streamkd.logits import UNSEEN


@dataclass(frozen=True, eq=False, slots=True)
class Answers:
    """What was said of some records, and what turned out to be true where that is known; all of it on the CPU.

    Attributes:
        x: `[n, ...]`, raw.
        y: `[n]`, class indices.
        log_p: `[sources, n, classes]`, as predicted before the label was known; of members first, then of the pool.
        served: `[n, classes]`, the served probabilities, likewise.
    """

    x: Tensor
    y: Tensor
    log_p: Tensor
    served: Tensor

    def __len__(self) -> int:
        return self.y.shape[0]

    def rows(self, rows: Tensor | slice) -> "Answers":
        """Return the chosen rows: `[m]` indices, `[n]` bool, or a slice."""
        return Answers(self.x[rows], self.y[rows], self.log_p[:, rows], self.served[rows])

    def among(self, classes: int) -> "Answers":
        """Return the same among the first classes: fewer of them, or more, which were ruled out."""
        more = classes - self.served.shape[1]
        if not more:
            return self
        log_p, served = functional.pad(self.log_p, (0, more), value=UNSEEN), functional.pad(self.served, (0, more))
        return Answers(self.x, self.y, log_p, served)

    def split(self, size: int) -> "list[Answers]":
        """Return the same in parts of at most `size` rows, in order; one at least."""
        if len(self) <= size:
            return [self]
        starts = range(0, len(self), size)
        return [self.rows(slice(start, start + size)) for start in starts]

    def without(self, rows: Collection[int]) -> "Answers":
        """Return the others."""
        return self.rows(torch.tensor([row not in rows for row in range(len(self))])) if rows else self


class Pending:
    """Predictions that wait for their labels, the oldest given up when there are too many.

    Args:
        capacity: in records; 0 waits for nothing.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        self.capacity = capacity
        self.joined = 0
        self.expired = 0
        self._waiting: OrderedDict[str, Answers] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, batch: Batch, said: Answers, classes: int | None = None) -> Answers:
        """Return what can be learned now: earlier records whose labels came, then the batch's own labelled ones.

        Records that carry an id and no label are kept until it comes. A label for a record that is not waiting
        (answered before, expired, or never seen) is passed over; a record whose label is told to be unknown for good is
        given up.

        Args:
            batch: the records, and labels of earlier ones.
            said: what was answered to the records.
            classes: how many of the first ones may come, as far as was known: of the others nothing is kept.
        """
        whole = UNLABELLED not in said.y.tolist()
        if whole and not batch.late:
            return said
        known = labelled(said.y)
        complete = said if whole else said.rows(known)
        told = [(name, y) for name, y in batch.late.items() if name in self._waiting]
        width = said.served.shape[1]
        answered = [self._answer(name, y).among(width) for name, y in told if y != UNLABELLED]
        self.joined += len(answered)
        for name in [name for name, y in told if y == UNLABELLED]:
            del self._waiting[name]
            self.expired += 1
        if batch.ids and len(complete) < len(said):
            self._wait(batch, said if classes is None else said.among(classes), known)
        # What is empty is left out, for it may be of another type than the records that wait.
        return _concatenate([*answered, complete] if len(complete) else answered) if answered else complete

    def _answer(self, name: str, y: int) -> Answers:
        question = self._waiting.pop(name)
        return Answers(question.x, torch.full_like(question.y, y), question.log_p, question.served)

    def _wait(self, batch: Batch, said: Answers, known: Tensor) -> None:
        for row in (~known).nonzero()[:, 0].tolist():
            if self._waiting.pop(batch.ids[row], None) is not None:  # of two records of one id the later waits
                self.expired += 1
            self._waiting[batch.ids[row]] = said.rows(torch.tensor([row]))
        while len(self._waiting) > self.capacity:
            self._waiting.popitem(last=False)
            self.expired += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the waiting predictions and the counters."""
        classes = [answers.served.shape[1] for answers in self._waiting.values()]
        widest = max(classes, default=0)
        waiting = [answers.among(widest) for answers in self._waiting.values()]
        together = _concatenate(waiting) if waiting else None
        return {
            "ids": list(self._waiting),
            "classes": classes,
            "joined": self.joined,
            "expired": self.expired,
            "answers": together
            and {"x": together.x, "y": together.y, "log_p": together.log_p, "served": together.served},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on waiting."""
        self.joined, self.expired = state["joined"], state["expired"]
        together = Answers(**state["answers"]) if state["answers"] else None
        self._waiting = OrderedDict(
            (name, together.rows(torch.tensor([row])).among(classes))
            for row, (name, classes) in enumerate(zip(state["ids"], state["classes"], strict=True))
            if together is not None
        )


def _concatenate(parts: list[Answers]) -> Answers:
    return Answers(
        torch.cat([part.x for part in parts]),
        torch.cat([part.y for part in parts]),
        torch.cat([part.log_p for part in parts], dim=1),
        torch.cat([part.served for part in parts]),
    )

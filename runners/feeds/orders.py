"""Orders in which a labelled set is told: as it lies, shuffled, or task after task.

What learns is never told where one task ends; `Order.tasks` is for whoever wants to measure what was forgotten. The
same rule on a test set of the same classes gives the same tasks, so that each has records of its own to be tested on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

Integers = NDArray[np.int64]
Image = NDArray[np.uint8]
View = Callable[[Image, int], Image]
"""Returns what is seen of an image `[channels, height, width]` in a task."""
Tasks = Annotated[int, Field(ge=1, le=10_000)]
Seed = Annotated[int, Field(ge=0)]
GROUPS, RECORDS, PIXELS = range(3)
"""What a seed is used for: each draws from a generator of its own, so that groups do not hang on the records."""


def _plain(image: Image, task: int) -> Image:  # noqa: ARG001 - a view
    """Return the image as it is."""
    return image


@dataclass(frozen=True, eq=False, slots=True)
class Order:
    """A set put in order.

    Attributes:
        indices: `[n]`, the record of the set that comes at each place: every one, once.
        tasks: `[n]`, the task, from 0, that is under way at each place.
        labels: `[n]`, the class index of each record of the set; negative where it is not known.
        classes: what the class indices stand for.
        view: what is seen of a record in a task.
    """

    indices: Integers
    tasks: Integers
    labels: Integers
    classes: tuple[str, ...]
    view: View = _plain

    def task_of(self, place: int) -> int:
        """Return the task that is under way when `place` records have come."""
        return int(self.tasks[place])


Rule = Callable[[Integers, Sequence[str]], Order]
"""Puts a set in order, given `[n]` class indices, negative where not known, and what these stand for."""


def file() -> Rule:
    """Records come as they lie in the file (streamkd)."""
    return lambda y, classes: Order(np.arange(len(y)), np.zeros_like(y), y, tuple(classes))


def shuffled(*, seed: Seed = 0) -> Rule:
    """Records come in random order: a world that stands still (streamkd).

    Args:
        seed: of the order.
    """
    return lambda y, classes: Order(_drawn(len(y), seed, RECORDS), np.zeros_like(y), y, tuple(classes))


def class_incremental(*, tasks: Tasks = 5, shuffle: bool = False, seed: Seed = 0) -> Rule:
    """Classes come in groups, one group after the other (van de Ven and Tolias 2019, class-incremental).

    A task is a group of classes, all groups as equal as can be; its records come in random order. Records without a
    label are dealt out over all tasks.

    Args:
        tasks: groups of classes.
        shuffle: deal the classes into groups at random; else they are grouped in the order of their indices.
        seed: of the groups and of the order within each.
    """

    def rule(y: Integers, classes: Sequence[str]) -> Order:
        group, _ = _groups(len(classes), tasks, seed if shuffle else None)
        task = _task_of_each(y, group, tasks, seed)
        indices = _in_turn(task, seed)
        return Order(indices, task[indices], y, tuple(classes))

    return rule


def domain_incremental(
    *,
    tasks: Tasks = 5,
    by: Literal["rotation", "permutation", "classes"] = "rotation",
    degrees: Annotated[float, Field(gt=0, le=360)] = 180.0,
    seed: Seed = 0,
) -> Rule:
    """The same labels come from one domain after the other (van de Ven and Tolias 2019, domain-incremental).

    By `rotation`, task t shows its share of the records turned by t / tasks of `degrees` (rotated MNIST, Lopez-Paz and
    Ranzato 2017). By `permutation`, each task but the first shows its share with the pixels in an order of its own
    (permuted MNIST, Goodfellow et al. 2013). By `classes`, a task is a group of classes as in `class_incremental`, and
    the label is only the place in the group: first or second class, for ten classes in five tasks.

    Args:
        tasks: domains.
        by: what tells one from another.
        degrees: by rotation, the angle that the tasks divide among them.
        seed: of the order, of the shares and of the permutations.
    """

    def rule(y: Integers, classes: Sequence[str]) -> Order:
        if by == "classes":
            group, place = _groups(len(classes), tasks, None)
            task = _task_of_each(y, group, tasks, seed)
            told = tuple("/".join(np.array(classes)[place == k]) for k in range(place.max() + 1))
            indices = _in_turn(task, seed)
            return Order(indices, task[indices], np.where(y >= 0, place[np.maximum(y, 0)], y), told)
        indices = _drawn(len(y), seed, RECORDS)
        shares = np.arange(len(y)) * tasks // max(1, len(y))
        view: View = _Turned(degrees / tasks) if by == "rotation" else _Permuted(seed)
        return Order(indices, shares, y, tuple(classes), view)

    return rule


def _drawn(n: int, seed: int, *use: int) -> Integers:
    return np.random.default_rng([seed, *use]).permutation(n)


def _groups(classes: int, tasks: int, seed: int | None) -> tuple[Integers, Integers]:
    """Return the group of each class, and its place in the group."""
    if tasks > classes:
        raise ValueError(f"tasks = {tasks}: there are {classes} classes; name as many tasks at most")
    row = np.arange(classes) if seed is None else _drawn(classes, seed, GROUPS)
    group, place = np.zeros((2, classes), dtype=np.int64)
    for number, members in enumerate(np.array_split(row, tasks)):
        group[members], place[members] = number, np.arange(len(members))
    return group, place


def _task_of_each(y: Integers, group: Integers, tasks: int, seed: int) -> Integers:
    return np.where(y >= 0, group[np.maximum(y, 0)], _drawn(len(y), seed, RECORDS) % tasks)


def _in_turn(task: Integers, seed: int) -> Integers:
    """Return the records task by task, in random order within each."""
    row = _drawn(len(task), seed, RECORDS)
    return row[np.argsort(task[row], kind="stable")]


class _Turned:
    def __init__(self, step: float) -> None:
        self._step = step

    def __call__(self, image: Image, task: int) -> Image:
        from PIL import Image as Pillow  # noqa: PLC0415 - for images only

        if not task:
            return image
        turned: Any = [Pillow.fromarray(plane).rotate(self._step * task, Pillow.Resampling.BILINEAR) for plane in image]
        return np.stack([np.asarray(plane) for plane in turned])


class _Permuted:
    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: dict[tuple[int, int], Integers] = {}  # a task's, so that it is drawn once

    def __call__(self, image: Image, task: int) -> Image:
        if not task:
            return image
        channels, height, width = image.shape
        key = task, height * width
        if key not in self._drawn:
            self._drawn = {key: _drawn(height * width, self._seed, PIXELS, task)}
        return image.reshape(channels, -1)[:, self._drawn[key]].reshape(image.shape)

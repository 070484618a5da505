"""From a batch, memories, and answers without a label to the lessons of all updates."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from streamkd.distillation import Distillation
from streamkd.inputs import Raw, Standardiser
from streamkd.labels import Answers
from streamkd.lesson import Lesson, joined
from streamkd.replay import Memories
from streamkd.untold import doubted, interpolated


class Lessons:
    """Makes lessons ready for the models, those of all updates of a batch together as far as they can be.

    Args:
        inputs: scaling of the raw inputs.
        augment: changes raw inputs a little, anew for every update; None: nothing does.
        rule: how peers teach one another.
        device: of the models.
    """

    def __init__(
        self,
        inputs: Standardiser | Raw,
        augment: Callable[[Tensor], Tensor] | None,
        rule: Distillation,
        device: torch.device,
    ) -> None:
        self._inputs = inputs
        self._augment = augment
        self._rule = rule
        self._device = device

    def __call__(
        self, answers: Answers, memories: Memories, untold: Answers | None, *, updates: int, seen: Tensor
    ) -> list[Lesson]:
        """Make one lesson for each of the updates.

        Args:
            answers: the records of the batch, with their labels; they come in every lesson.
            memories: dealt out to the lessons, in which they come first.
            untold: what was answered to records that will never have a label; they come last.
            updates: how many.
            seen: bool, which of the first classes were met so far.
        """
        past, raw = memories.x.to(self._device), answers.x.to(self._device, non_blocking=True)
        y, weights = answers.y.to(self._device), memories.weights / max(1, len(memories) // updates)
        past_x, x = self._shown(past, raw, updates)
        columns = (
            dealt(past_x, x.expand(updates, *x.shape[1:])),
            dealt(memories.y.to(self._device), y.expand(updates, -1)),
            dealt(weights.to(self._device), _even(raw).expand(updates, -1)),
        )
        lessons = [Lesson(*parts) for parts in zip(*(column.unbind() for column in columns), strict=True)]
        among = self._rule.stream_classes(y, len(seen))
        if among is not None:  # memories are told apart among all classes
            among = dealt(among.new_ones(len(past), len(seen)), among.expand(updates, *among.shape))
            lessons = [replace(lesson, among=one) for lesson, one in zip(lessons, among, strict=True)]
        if self._rule.views:
            harder = self._views(past) if len(past) else [past] * len(self._rule.views)
            present = [self._views(raw) for _ in lessons]
            views = [dealt(one, torch.stack(now)) for one, *now in zip(harder, *present, strict=True)]
            lessons = [replace(lesson, views=tuple(own)) for lesson, *own in zip(lessons, *views, strict=True)]
        return lessons if untold is None else self._with(lessons, untold, seen)

    def _shown(self, past: Tensor, raw: Tensor, updates: int) -> tuple[Tensor, Tensor]:
        """Make memories `[m, ...]` and the batch ready, for each update `[updates, n, ...]`, or for all `[1, n, ...]`.

        They are scaled together, for to scale a few records costs as much as to scale many.
        """
        if self._augment is None:
            own = raw[None]
        else:
            past = self._augment(past) if len(past) else past
            own = torch.stack([self._augment(raw) for _ in range(updates)])
        rows = own.flatten(0, 1)
        if not len(past) or past.dtype != rows.dtype:  # bytes go from 0 to 255, numbers of another type may not
            x, past_x = self._inputs(rows), self._inputs(past) if len(past) else past
        else:
            past_x, x = torch.split(self._inputs(torch.cat([past, rows])), [len(past), len(rows)])
        return past_x, x.view(*own.shape[:2], *x.shape[1:])

    def _views(self, raw: Tensor) -> list[Tensor]:
        """Make ever harder views of raw inputs, ready for the models."""
        made = []
        for view in self._rule.views:
            raw = view(raw)
            made.append(self._inputs(raw))
        return made

    def _with(self, lessons: list[Lesson], untold: Answers, seen: Tensor) -> list[Lesson]:
        """Add to every lesson what was answered to records that will never have a label."""
        rule, x, y = self._rule, self._inputs(untold.x.to(self._device)), untold.y.to(self._device)
        targets = doubted(untold.served[:, : len(seen)].to(self._device), seen, rule.doubt)
        mixed = [interpolated(x, targets, rule.interpolate) for _ in lessons]
        weights = _even(x) * rule.unlabelled
        return [joined([one, Lesson(x, y, weights, p)]) for one, (x, p) in zip(lessons, mixed, strict=True)]


def dealt(past: Tensor, present: Tensor) -> Tensor:
    """Deal `past` `[m, ...]` out to updates, before what each of them has anyway, `present` `[updates, n, ...]`."""
    if not len(past):
        return present
    return torch.cat([past.view(len(present), -1, *present.shape[2:]), present], 1)


def _even(x: Tensor) -> Tensor:
    """Weigh all records alike, together 1."""
    n = x.shape[0]
    return torch.full((n,), 1 / max(1, n), device=x.device)

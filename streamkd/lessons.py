"""From a batch, memories, and answers without a label to the lessons of all updates."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from streamkd.compiling import Compiled
from streamkd.distillation import Distillation
from streamkd.fused import AT_ONCE, ROWS
from streamkd.inputs import Raw, Standardiser
from streamkd.labels import Answers
from streamkd.lesson import Lesson, joined
from streamkd.replay import Memories
from streamkd.untold import doubted, interpolated

Scaled = Callable[..., Tensor]


class Lessons:
    """Makes lessons ready for the models, those of all updates of a batch together as far as they can be.

    Args:
        inputs: scaling of the raw inputs.
        augment: changes raw inputs a little, anew for every update; None: nothing does.
        rule: how peers teach one another.
        device: of the models.
        compiled: whether this is, for batches of whole rows, see `fused.ROWS`.
    """

    def __init__(
        self,
        inputs: Standardiser | Raw,
        augment: Callable[[Tensor], Tensor] | None,
        rule: Distillation,
        device: torch.device,
        *,
        compiled: bool = False,
    ) -> None:
        self._inputs = inputs
        self._augment = augment
        self._rule = rule
        self._device = device
        self._ready = partial(_ready, scaled=inputs.scaled)
        counts = range(1, AT_ONCE + 1) if compiled else ()
        self._quick = {updates: Compiled(partial(self._ready, updates=updates)) for updates in counts}

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
        y = answers.y.to(self._device)
        others = memories.y.to(self._device), y, memories.weights.to(self._device)
        made = self._made_ready(updates, past, raw, *others)
        lessons = list(map(Lesson, made[::3], made[1::3], made[2::3]))
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

    @property
    def uncompiled(self) -> str:
        """Why this was not compiled, though it was to be; empty where it was, or was not to be."""
        return next((one.trouble for one in self._quick.values() if one.trouble), "")

    def _made_ready(self, updates: int, past: Tensor, raw: Tensor, *others: Tensor) -> Sequence[Tensor]:
        """Make inputs ready, and deal all out, see below."""
        if self._augment is None and (not len(past) or past.dtype == raw.dtype):
            given = past, raw, *others, *self._inputs.scale(raw)
            quick = self._quick.get(updates) if len(past) and len(raw) and len(raw) % ROWS == 0 else None
            made = quick(*given) if quick else None
            return self._ready(*given, updates=updates) if made is None else made
        # Apart, for they may be of two types: bytes go from 0 to 255, and other numbers as they like.
        change, views = self._augment or (lambda x: x), updates if self._augment else 1
        past_x = self._inputs(change(past)) if len(past) else past
        own = torch.stack([change(raw) for _ in range(views)])
        x = self._inputs(own.flatten(0, 1)).view_as(own).expand(updates, *own.shape[1:])
        return _dealt_out(past_x, x, *others)

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


def _ready(
    past: Tensor, raw: Tensor, past_y: Tensor, y: Tensor, weights: Tensor, *scale: Tensor, scaled: Scaled, updates: int
) -> list[Tensor]:
    """Scale memories and a batch together, for to scale a few records costs as much as to scale many; deal them out."""
    rows = torch.cat([past, raw]) if len(past) else raw
    past_x, x = torch.split(scaled(rows, *scale), [len(past), len(raw)])
    return _dealt_out(past_x, x.expand(updates, *x.shape), past_y, y, weights)


def _dealt_out(past_x: Tensor, x: Tensor, past_y: Tensor, y: Tensor, weights: Tensor) -> list[Tensor]:
    """Return of one lesson after the other the inputs, the labels, and the weights."""
    updates = len(x)
    columns = (
        dealt(past_x, x),
        dealt(past_y, y.expand(updates, -1)),
        dealt(weights / max(1, len(past_x) // updates), _even(x[0]).expand(updates, -1)),
    )
    return list(chain.from_iterable(zip(*(column.unbind() for column in columns), strict=True)))


def dealt(past: Tensor, present: Tensor) -> Tensor:
    """Deal `past` `[m, ...]` out to updates, before what each of them has anyway, `present` `[updates, n, ...]`."""
    if not len(past):
        return present
    return torch.cat([past.view(len(present), -1, *present.shape[2:]), present], 1)


def _even(x: Tensor) -> Tensor:
    """Weigh all records alike, together 1."""
    n = x.shape[0]
    return torch.full((n,), 1 / max(1, n), device=x.device)

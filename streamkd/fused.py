"""Updates of peers that lie side by side, compiled into one function of tensors.

At the size of a stream's batches an operation costs more than its arithmetic. torch's compiler makes one function of
two updates in a row (answer, lesson, way back, step, averaging), which takes the place of some two hundred operations.

What it computes is laid out records last, `[peers, features, records]`: so every sum over features or classes, and the
few classes above all, are gone through in whole vectors of records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamkd.batch import UNLABELLED
from streamkd.compiling import Compiled
from streamkd.distillation import gated
from streamkd.gradients import TINY
from streamkd.guidance import Pairs
from streamkd.lesson import Lesson
from streamkd.logits import UNSEEN
from streamkd.stack import Group, Stack, leaves

Said = tuple[Tensor, Tensor, Tensor]
ROWS = 16
"""Lessons are filled up to a multiple of this with rows that weigh nothing: each size is compiled once, in seconds."""
CLASSES = 8
"""Likewise classes, to a power of 2, and to this at the least."""
AT_ONCE = 2
"""Updates made ready and taken in one go at the most: those of a batch, as it is shipped; what is compiled, and held in
memory, grows with each."""


@dataclass(frozen=True, slots=True)
class Teaching:
    """What does not change from lesson to lesson: the layers, how students are taught, and whether they step."""

    layers: tuple[nn.Module, ...]
    gate: str
    cap: bool
    steps: bool


class Fused:
    """Updates of a stack by a compiled function.

    Args:
        stack: of the peers.
        gate, cap: of the distillation.

    Attributes:
        layers: of a peer.
        take: the function below, compiled.
        steps: whether it takes the steps as well; if not, it brings the gradients, for optimizers of their own.
        at_once: lessons that it takes in one call, at the most.
    """

    def __init__(self, stack: Stack, *, gate: str, cap: bool) -> None:
        self.steps = stack.descends
        self.at_once = AT_ONCE if self.steps else 1
        self._stack = stack
        self.layers = tuple(leaves(stack.peers[0].module))
        self._width = [layer.out_features for layer in self.layers if isinstance(layer, nn.Linear)][-1]
        self.take = Compiled(partial(take, Teaching(self.layers, gate, cap, self.steps)))

    def __call__(
        self, lessons: Sequence[Lesson], seen: Tensor, pairs: Pairs, paces: Tensor | None
    ) -> list[tuple[Tensor, Tensor, Tensor, list[float]]] | None:
        """Take one step after the other, or none if any of them is not finite.

        Args:
            lessons: plain ones, `at_once` at the most.
            seen: bool, which of the first classes were met so far.
            pairs: among the peers themselves.
            paces: `[2, lessons, peers, 1]`, how far each step goes along its gradient, and by how much the averages
                follow. None takes no step with the one lesson: it brings the peers their gradient, cut.

        Returns:
            Of each lesson the losses, their parts, the answers and the norms, see `Learned`; None where it cannot be
            compiled, or is not finite.
        """
        seen = self.widened(seen)
        rule = (pairs.sources, pairs.students, pairs.alphas, pairs.portions, pairs.temperatures, pairs.betas)
        paced = () if paces is None else (paces,)
        told = self.take(*self._stack.operands, seen, *rule, *paced, *chain.from_iterable(map(_filled, lessons)))
        if told is None:
            return None
        *said, norms = told
        lengths: list[list[float]] = norms.tolist()
        if not all(map(isfinite, chain.from_iterable(lengths))):
            return None
        each = zip(said[::3], said[1::3], said[2::3], strict=True)
        return [(*_cropped(one, len(lesson)), own) for lesson, one, own in zip(lessons, each, lengths, strict=True)]

    @property
    def weights(self) -> Tensor:
        """`[2 * members, all]`, the averages' last."""
        return self._stack.operands[0]

    def widened(self, seen: Tensor) -> Tensor:
        """Fill `seen` up with classes that were never met, so that a class more is seldom compiled for."""
        columns = min(self._width, max(CLASSES, 1 << (len(seen) - 1).bit_length()))
        return functional.pad(seen, (0, columns - len(seen))) if columns > len(seen) else seen

    def stepped(self, going: Sequence[bool]) -> None:
        """Count a step of those peers that took it."""
        for peer, goes in zip(self._stack.peers, going, strict=True):
            if goes:
                peer.stepped()


def fits(groups: Sequence[Group]) -> bool:
    """Whether updates of these groups of peers can be compiled: peers of one architecture."""
    return len(groups) == 1 and isinstance(groups[0], Stack)


def _filled(lesson: Lesson) -> tuple[Tensor, Tensor, Tensor]:
    """Fill a lesson up with rows that weigh nothing."""
    short = -len(lesson) % ROWS
    if not short:
        return lesson.x, lesson.y, lesson.weights
    x = torch.cat([lesson.x, lesson.x.new_zeros(short, *lesson.x.shape[1:])])
    y = functional.pad(lesson.y, (0, short), value=UNLABELLED)
    return x, y, functional.pad(lesson.weights, (0, short))


def _cropped(said: Said, rows: int) -> Said:
    """Leave out what was told of rows that were filled up."""
    losses, parts, answers = said
    return said if len(losses) == rows else (losses[:rows], parts[..., :rows], answers[:, :rows])


def take(teaching: Teaching, *operands: Tensor) -> list[Tensor]:
    """Answer, teach, go back and step, lesson by lesson.

    Args:
        teaching: see there.
        operands: first the peers' weights and below them their averages' `[2 * peers, all]`, where gradients are
            written `[peers, all]`, and the peers' clips `[peers]`; which of the first classes were met so far, all
            others being ruled out `[classes]`; of pairs, sources and students `[pairs]`, alphas, portions and
            temperatures `[pairs, 1]`, and the betas `[peers, 1]`; where steps are taken, the paces, see `Fused`; and of
            each lesson the examples `[m, ...]`, their labels and weights `[m]`.

    Returns:
        Of each lesson the losses `[m]`, their parts `[3, peers, m]` and the answers `[peers, m]`; and last the norms of
        all gradients before they were cut `[lessons, peers]`, not finite where the loss is not; then nothing changes.
    """
    (weights, gradients, clips, seen), rule, rest = operands[:4], operands[4:10], list(operands[10:])
    paces = rest.pop(0) if teaching.steps else None
    rows, averages = weights.chunk(2)
    told: list[Tensor] = []
    norms: list[Tensor] = []
    for number, lesson in enumerate(zip(rest[::3], rest[1::3], rest[2::3], strict=True)):
        said, gradient, norm = _update(teaching, rows, lesson, seen, rule)
        cut = (clips / norm).clamp(max=1.0)[:, None]
        told += said
        norms.append(norm)
        if paces is None:
            gradients.copy_(gradient * cut)
        else:
            rows = rows - gradient * (cut * paces[0, number])
            averages = averages + (rows - averages) * paces[1, number]
    found = torch.stack(norms)
    if paces is not None:
        weights.copy_(torch.where(found.isfinite().all(), torch.cat([rows, averages]), weights))
    return [*told, found]


def _update(
    teaching: Teaching, rows: Tensor, lesson: Sequence[Tensor], seen: Tensor, rule: Sequence[Tensor]
) -> tuple[Said, Tensor, Tensor]:
    """Work out one lesson: losses, their parts, answers, the gradients `[peers, all]`, and their norms."""
    x, y, shares = lesson
    sources, students, alphas, portions, temperatures, betas = rule
    logits, back, *_ = torch.func.vjp(partial(answer, teaching.layers, x, len(seen)), rows)
    logits = logits.masked_fill(~seen[:, None], UNSEEN)
    log_p, known = logits.log_softmax(1), y != UNLABELLED
    truth = (torch.arange(len(seen), device=y.device)[:, None] == y).to(log_p)
    hard = -(log_p * truth).sum(1)
    gradient = torch.where(known, log_p.exp() - truth, 0.0) * betas[..., None]
    heat = temperatures[..., None]
    log_q, log_s = (logits[sources] / heat).log_softmax(1), (logits[students] / heat).log_softmax(1)
    loss = (log_q.exp() * (log_q - log_s)).sum(1) * (temperatures * temperatures)
    gate = gated(teaching.gate, hard[students], hard[sources]) * alphas
    soft = (log_s.exp() - log_q.exp()) * (gate * temperatures)[:, None]
    taught = torch.zeros_like(logits).index_add(0, students, soft)
    if teaching.cap:
        taught = taught * (gradient.norm(dim=1) / taught.norm(dim=1).clamp(min=TINY)).clamp(max=1.0)[:, None]
    nothing = torch.zeros_like(hard)
    parts = (hard, nothing.index_add(0, students, gate * loss), nothing.index_add(0, students, portions * loss))
    (whole,) = back((gradient + taught) * shares)
    norms = torch.where(hard.sum(1).isfinite(), whole.norm(dim=1), torch.nan)
    return (hard.mean(0), torch.stack(parts), logits.argmax(1)), whole, norms


def answer(layers: Sequence[nn.Module], x: Tensor, classes: int, rows: Tensor) -> Tensor:
    """Answer `x` `[m, ...]` by weights `[peers, all]`: the logits of the first `classes`, `[peers, classes, m]`."""
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    parts = torch.split(rows, [parameter.numel() for parameter in parameters], 1)
    left = [part.view(len(rows), *p.shape) for part, p in zip(parts, parameters, strict=True)]
    x = x.flatten(1).T.expand(len(rows), -1, -1)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            kept = classes if layer is layers[-1] else layer.out_features  # what comes after it may look at all
            x = torch.bmm(left.pop(0)[:, :kept], x)
            x = x if layer.bias is None else x + left.pop(0)[:, :kept, None]
        elif isinstance(layer, nn.LayerNorm):
            x = x - x.mean(1, keepdim=True)
            x = x * (x.square().mean(1, keepdim=True) + layer.eps).rsqrt()
            x = x if layer.weight is None else x * left.pop(0)[..., None]
            x = x if layer.bias is None else x + left.pop(0)[..., None]
        elif not isinstance(layer, nn.Flatten):
            x = layer(x)
    return x[:, :classes]

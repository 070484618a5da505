"""One update of peers that lie side by side, compiled into one function of tensors.

At the size of a stream's batches an operation costs more than its arithmetic. `torch.compile` makes one function of the
answer, the lesson and the way back, which takes the place of some eighty operations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamkd.batch import UNLABELLED
from streamkd.distillation import gated
from streamkd.errors import reason
from streamkd.gradients import Pairs, with_gradient
from streamkd.lesson import Lesson
from streamkd.logits import UNSEEN
from streamkd.losses import kd
from streamkd.stack import Group, Stack, leaves

ROWS = 16
"""Lessons are filled up to a multiple of this with rows that weigh nothing: each size is compiled once, in seconds."""
CLASSES = 8
"""Likewise classes, to a power of 2, and to this at the least."""


@dataclass(frozen=True, slots=True)
class Teaching:
    """What does not change from lesson to lesson: the layers, and how students are taught."""

    layers: tuple[nn.Module, ...]
    gate: str
    cap: bool


class Fused:
    """Updates of a stack by a compiled function; compiled at the first lesson of a size, which takes some seconds.

    Args:
        stack: of the peers.
        gate, cap: of the distillation.

    Attributes:
        trouble: why it cannot be compiled here; empty where it can.
        update: the function below, compiled.
    """

    def __init__(self, stack: Stack, *, gate: str, cap: bool) -> None:
        self.trouble = ""
        self._stack = stack
        layers = tuple(leaves(stack.peers[0].module))
        self._teaching = Teaching(layers, gate, cap)
        self._width = [layer.out_features for layer in layers if isinstance(layer, nn.Linear)][-1]
        # One thread compiles: processes that wait to compile more would stay for good.
        self.update: Callable[..., tuple[Tensor, ...]] = torch.compile(
            update, fullgraph=True, dynamic=False, options={"compile_threads": 1}
        )

    @torch.no_grad()
    def __call__(self, lesson: Lesson, seen: Tensor, pairs: Pairs) -> Sequence[Tensor] | None:
        """Bring the gradients, cut; return the parts of the losses, the answers and the norms, see `Learned`.

        Args:
            lesson: without targets.
            seen: bool, which of the first classes were met so far.
            pairs: among the peers themselves.

        Returns:
            None where it cannot be compiled.
        """
        if self.trouble:
            return None
        columns = min(self._width, max(CLASSES, 1 << (len(seen) - 1).bit_length()))
        seen = functional.pad(seen, (0, columns - len(seen)))
        rule = (pairs.sources, pairs.students, pairs.alphas, pairs.portions, pairs.temperatures, pairs.betas)
        try:
            parts, answers, norms = self.update(self._teaching, self._stack.operands, _filled(lesson), seen, rule)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a compiler that is not there, or is another, comes to
            self.trouble = reason(error)
            return None
        return parts[..., : len(lesson)], answers[:, : len(lesson)], norms


def fits(groups: Sequence[Group]) -> bool:
    """Whether updates of these groups of peers can be compiled: peers of one architecture."""
    return len(groups) == 1 and isinstance(groups[0], Stack)


def _filled(lesson: Lesson) -> tuple[Tensor, Tensor, Tensor]:
    short = -len(lesson) % ROWS
    if not short:
        return lesson.x, lesson.y, lesson.weights
    x = torch.cat([lesson.x, lesson.x.new_zeros(short, *lesson.x.shape[1:])])
    y = functional.pad(lesson.y, (0, short), value=UNLABELLED)
    return x, y, functional.pad(lesson.weights, (0, short))


def update(
    teaching: Teaching, peers: Sequence[Tensor], lesson: Sequence[Tensor], seen: Tensor, rule: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Answer, teach and go back.

    Args:
        teaching: see there.
        peers: their weights `[peers, all]`; where their gradients are written, likewise; their clips `[peers]`.
        lesson: `[m, ...]`, `[m]` and `[m]`: the examples, their labels, their weights.
        seen: bool, which of the first classes were met so far; all others are ruled out.
        rule: of pairs, sources and students `[pairs]`, alphas, portions and temperatures `[pairs, 1]`; and the betas
            `[peers, 1]`.

    Returns:
        The parts of the losses `[3, peers, m]`, the answers `[peers, m]`, and the norms of the gradients before they
        are cut.
    """
    rows, gradients, clips = peers
    x, y, weights = lesson
    sources, students, alphas, portions, temperatures, betas = rule
    logits, back, *_ = torch.func.vjp(partial(_answer, teaching.layers, x), _cut(teaching.layers, rows))
    rest = (0, logits.shape[-1] - len(seen))
    logits = logits[..., : len(seen)].masked_fill(~seen, UNSEEN)
    log_p = logits.log_softmax(-1)
    truth = functional.one_hot(y.clamp(min=0), logits.shape[-1]) * (y != UNLABELLED)[:, None]
    hard = -(log_p * truth).sum(-1)
    known = (y != UNLABELLED)[:, None]
    gradient = torch.where(known, log_p.exp() - truth, 0.0) * betas[..., None]
    taught = logits[sources]
    sound = taught.isfinite().all(-1)
    taught = torch.where(sound[..., None], taught, 0.0)
    gate = gated(teaching.gate, hard[students], hard[sources]).nan_to_num(0.0) * sound * alphas
    loss, lesson_gradient = with_gradient(kd, logits[students], taught, y, temperature=temperatures, weights=gate)
    soft = torch.zeros_like(hard).index_add(0, students, gate * loss)
    divergence = torch.zeros_like(hard).index_add(0, students, portions * loss)
    soft_gradient = torch.zeros_like(logits).index_add(0, students, lesson_gradient)
    if teaching.cap:
        room = gradient.norm(dim=-1) / soft_gradient.norm(dim=-1).clamp(min=1e-12)
        soft_gradient = soft_gradient * room.clamp(max=1.0)[..., None]
    parts = back(functional.pad((gradient + soft_gradient) * weights[:, None], rest))
    found = torch.cat([part.reshape(len(rows), -1) for part in parts[0]], 1)
    norms = found.norm(dim=1)
    gradients.copy_(found * (clips / norms).clamp(max=1.0)[:, None])
    norms = torch.where(hard.sum(1).isfinite(), norms, torch.nan)
    return torch.stack([hard, soft, divergence]), logits.argmax(-1), norms


def _cut(layers: Sequence[nn.Module], rows: Tensor) -> list[Tensor]:
    """Cut rows of weights into one tensor a parameter, `[peers, *its shape]`."""
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    parts = torch.split(rows, [parameter.numel() for parameter in parameters], 1)
    return [part.view(len(rows), *p.shape) for part, p in zip(parts, parameters, strict=True)]


def _answer(layers: Sequence[nn.Module], x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Answer `x` by all peers' weights: `[peers, m, classes]`."""
    left = list(weights)
    x = x.flatten(1).expand(len(left[0]), -1, -1)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            x = torch.bmm(x, left.pop(0).transpose(1, 2))
            x = x if layer.bias is None else x + left.pop(0)[:, None]
        elif isinstance(layer, nn.LayerNorm):
            x = functional.layer_norm(x, x.shape[-1:], eps=layer.eps)
            x = x if layer.weight is None else x * left.pop(0)[:, None]
            x = x if layer.bias is None else x + left.pop(0)[:, None]
        elif not isinstance(layer, nn.Flatten):
            x = layer(x)
    return x

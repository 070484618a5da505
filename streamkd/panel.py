"""Everyone who is asked about raw inputs, and what their answers come to: from the inputs to what is served."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from streamkd.cohort import Cohort
from streamkd.compiling import Compiled
from streamkd.fused import ROWS, answer
from streamkd.inputs import Raw, Standardiser
from streamkd.logits import UNSEEN, mask_unseen
from streamkd.pool import Pool
from streamkd.served import Served

MOST = 128
"""Records that are answered by a compiled function at the most: of many it is the arithmetic that takes its time."""


class Panel:
    """Scales inputs, asks the members, rules out what was never met, and weighs what was said.

    Args:
        cohort: of the peers.
        inputs: scaling of the raw inputs.
        served: how members are weighted.
        pool: pools the same members; None: nothing does.

    Attributes:
        say: the function below, compiled; None where the cohort is not.
    """

    def __init__(self, cohort: Cohort, inputs: Standardiser | Raw, served: Served, pool: Pool | None) -> None:
        self.cohort = cohort
        self._inputs, self._served, self._pool = inputs, served, pool
        fused, pooled = cohort.fused, pool.pooled if pool else None
        self.say = Compiled(partial(say, fused.layers, inputs.scaled, pooled)) if fused else None

    def __call__(self, x: Tensor, seen: Tensor, *, again: bool = False) -> tuple[Tensor, Tensor]:
        """Answer `x` `[n, ...]`: log-probabilities `[sources, n, classes]` and what is served, on the CPU.

        The sources are the peers, their averages, and whatever the pool adds to them; what is served are probabilities
        `[n, classes]`.

        Args:
            x: raw, on the device of the models.
            seen: bool, on the CPU, which of the first classes were met so far; all others are ruled out.
            again: records of that shape will come again and again, so that it may be worth to compile for them.
        """
        fitting, soon = self.cohort.fitting, not self.cohort.guidance.updates  # a scale to come, and fewer classes
        if again and self.say and not soon and 0 < len(x) <= min(MOST, fitting.at_once):
            told = fitting(lambda: self._said(x, seen) if len(x) <= fitting.at_once else None, len(x))
            if told is not None:
                return told
        if len(x):
            with self._untracked():
                logits = self.cohort.predict(self._inputs(x), len(seen)).cpu()  # read once: what follows is the CPU's
        else:
            logits = torch.zeros(2 * len(self.cohort), 0, len(seen))
        log_p = mask_unseen(logits, seen).log_softmax(-1)
        served = self._served.answer(log_p)
        return (log_p, served) if self._pool is None else self._pool.serve(log_p, served, seen)

    @property
    def uncompiled(self) -> str:
        """Why answers that were to be compiled are not; empty where they are, or were not to be."""
        return self.say.trouble if self.say else ""

    def _untracked(self) -> AbstractContextManager[None]:
        """Keep nothing for autograd of what the members say, where none of them learns by it."""
        return torch.inference_mode(self.cohort.by_hand)

    def _said(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor] | None:
        """Answer by the compiled function; None where it cannot be compiled, or anything is not finite."""
        fused, say, n = self.cohort.fused, self.say, len(x)
        if fused is None or say is None:
            return None
        if short := -n % ROWS:
            x = torch.cat([x, x.new_zeros(short, *x.shape[1:])])
        learned = (self._served.weights, *(self._pool.learned if self._pool else ()))
        given = [one.to(x.device) for one in (fused.widened(seen), *learned)]
        with self._untracked():
            told = say(fused.weights, x, *given, *self._inputs.scale(x))
        if told is None:
            return None
        everything = told[0].cpu().numpy()[:, :n, : len(seen)]  # read once
        log_p, served = everything[:-1], everything[-1]
        return (torch.from_numpy(log_p), torch.from_numpy(served)) if math.isfinite(served.sum()) else None


def say(
    layers: Sequence[nn.Module],
    scaled: Callable[..., Tensor],
    pooled: Callable[..., tuple[Tensor, Tensor]] | None,
    *operands: Tensor,
) -> list[Tensor]:
    """Scale raw inputs, answer them, and weigh what was said.

    Args:
        layers: of a peer.
        scaled: scales raw inputs.
        pooled: what a pool makes of it, see `Pool`; None: nothing.
        operands: all weights, the averages' last `[members, all]`; inputs `[n, ...]`; which of the first classes were
            met so far `[classes]`; the members' weights in the mixture `[members]`; what the pool learned; and what
            `scaled` asks for.

    Returns:
        One tensor `[sources + 1, n, classes]`: all log-probabilities, and last the probabilities that are served.
    """
    (weights, x, seen, shares), rest = operands[:4], operands[4:]
    count = 3 if pooled else 0
    learned, scale = rest[:count], rest[count:]
    logits = answer(layers, scaled(x, *scale), len(seen), weights).transpose(1, 2)
    log_p = logits.masked_fill(~seen, UNSEEN).log_softmax(-1)
    mixture = (shares.to(log_p)[:, None, None] * log_p.exp()).sum(0)
    log_p, served = pooled(log_p, mixture, seen, *learned) if pooled else (log_p, mixture)
    return [torch.cat([log_p, served[None]])]

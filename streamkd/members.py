"""What everyone says of raw inputs: the peers and, after them, their averages."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from streamkd.cohort import Cohort
from streamkd.compiling import Compiled
from streamkd.fused import ROWS, answer
from streamkd.inputs import Raw, Standardiser
from streamkd.logits import UNSEEN, mask_unseen

MOST = 128
"""Records that are answered by a compiled function at the most: of many it is the arithmetic that takes its time."""


class Members:
    """Scales inputs, asks all members, and rules out what was never met.

    Args:
        cohort: of the peers.
        inputs: scaling of the raw inputs.

    Attributes:
        say: the function below, compiled; None where the cohort is not.
    """

    def __init__(self, cohort: Cohort, inputs: Standardiser | Raw) -> None:
        self._cohort = cohort
        self._inputs = inputs
        fused = cohort.fused
        self.say = Compiled(partial(say, fused.layers, inputs.scaled)) if fused else None

    def __call__(self, x: Tensor, seen: Tensor) -> Tensor:
        """Answer `x` `[n, ...]`: log-probabilities `[2 * peers, n, classes]`, on the CPU.

        Args:
            x: raw, on the device of the models.
            seen: bool, which of the first classes were met so far; all others are ruled out.
        """
        if not len(x):
            return torch.zeros(2 * len(self._cohort), 0, len(seen))
        told = self._cohort.fitting(lambda: self._said(x, seen), len(x))
        if told is None:
            told = mask_unseen(self._cohort.predict(self._inputs(x), len(seen)), seen).log_softmax(-1)
        return told.cpu()  # read once: all that is made of it is made on the CPU

    def _said(self, x: Tensor, seen: Tensor) -> Tensor | None:
        fused, n, classes = self._cohort.fused, len(x), len(seen)
        if fused is None or self.say is None or n > min(MOST, self._cohort.fitting.at_once):
            return None
        if not self._cohort.guidance.updates:  # there will soon be a scale, and fewer classes
            return None
        if short := -n % ROWS:
            x = torch.cat([x, x.new_zeros(short, *x.shape[1:])])
        told = self.say(fused.weights, fused.widened(seen), x, *self._inputs.scale(x))
        return None if told is None else told[0][:, :n, :classes]


def say(
    layers: Sequence[nn.Module], scaled: Callable[..., Tensor], weights: Tensor, seen: Tensor, x: Tensor, *scale: Tensor
) -> list[Tensor]:
    """Scale raw inputs and answer them: log-probabilities `[peers, n, classes]`.

    Args:
        layers: of a peer.
        scaled: scales raw inputs.
        weights: `[peers, all]`.
        seen: bool, which of the first classes were met so far; all others are ruled out.
        x: `[n, ...]`, raw.
        scale: what `scaled` asks for.
    """
    logits = answer(layers, scaled(x, *scale), len(seen), weights).masked_fill(~seen[:, None], UNSEEN)
    return [logits.log_softmax(1).transpose(1, 2).contiguous()]

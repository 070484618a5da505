"""What peers learn from records that will never have a label: what was served of them, doubted and interpolated."""

import torch
from torch import Tensor


def doubted(served: Tensor, seen: Tensor, doubt: float) -> Tensor:
    """Spread the share `doubt` of the served probabilities evenly over the classes that were seen.

    What is taught may be wrong, so it is taught less surely; evenly spread, the doubt changes no answer, which a share
    of the label rates would (label smoothing, Szegedy et al. 2016).

    Args:
        served: `[n, classes]`.
        seen: `[classes]` bool.
        doubt: 0 to 1.
    """
    even = seen.to(served) / seen.sum().clamp(min=1)
    return served + doubt * (even - served)


def interpolated(x: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Mix every record with another one of its batch, and what is to be learned of it in the same proportion.

    The answer is to change evenly on the way from one record to the next, so that boundaries between classes come to
    lie where few records are (interpolation consistency, Verma et al. 2019). Chance is torch's own, of which the
    engine keeps the state.

    Args:
        x: `[n, ...]`, ready for the models.
        targets: `[n, classes]`, probabilities.
        share: the most that comes from the other record; it is drawn evenly from 0 to this. 0 mixes nothing.
    """
    if not share or not len(x):
        return x, targets
    shares = share * torch.rand(len(x)).to(x)
    partners = torch.randperm(len(x)).to(x.device)
    return (
        x.lerp(x[partners], shares.view(-1, *(1,) * (x.dim() - 1))),
        targets.lerp(targets[partners], shares[:, None]),
    )

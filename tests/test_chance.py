"""Everyone's generators go on where they were."""

import random

import numpy as np
import torch
from worlds import stored

from streamkd import chance


def drawn() -> list[float]:
    random.gauss(0, 1)  # keeps a second number back
    np.random.standard_normal()  # noqa: NPY002 - the shared one is the subject
    return [random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(1))]  # noqa: NPY002


def test_what_is_drawn_after_a_restore_is_what_would_have_been() -> None:
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002
    saved = stored(chance.state())
    wanted = drawn()
    drawn()
    chance.restore(saved)
    assert drawn() == wanted

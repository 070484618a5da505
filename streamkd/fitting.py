"""How many rows a device answers or learns at once: all of them, until its memory runs out."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
ALL = 1 << 31
"""As many as there are."""
GROW_EVERY = 256
"""Answers and updates with fewer rows at once, after which twice as many are tried."""


class Fitting:
    """Does the work again with half as many rows at once whenever the device's memory runs out.

    What fits is the device's, and no state: a checkpoint may be taken up by another.

    Args:
        discard: throws away what work that broke off has left behind.

    Attributes:
        at_once: rows.
    """

    def __init__(self, discard: Callable[[], None]) -> None:
        self.at_once = ALL
        self._discard = discard
        self._fitted = 0  # times that so many did, since they were cut down

    def __call__(self, work: Callable[[], T], rows: int) -> T:
        """Do what takes so many rows, `at_once` of them at once. Nothing is kept of work that broke off.

        Raises:
            torch.OutOfMemoryError: there is no room for a single row.
        """
        if self.at_once < ALL:
            self._fitted += 1
            if self._fitted % GROW_EVERY == 0:
                self.at_once = 2 * self.at_once if self.at_once < rows else ALL
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if min(rows, self.at_once) <= 1:
                    raise
            # Out here, where the exception no longer holds on to the tensors that were in the way.
            self._discard()
            self.at_once, self._fitted = -(-min(rows, self.at_once) // 2), 0

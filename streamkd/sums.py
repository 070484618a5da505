"""Totals over many numbers that change a few at a time."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]

FAN = 32
"""Numbers in a block: narrow enough that many blocks are added up in no time."""
TOP = 2_048
"""Numbers that are added up as they are, with no level above them."""


class Totals:
    """A tree over `n` numbers that are not negative, all at first 0: of their sums, or of their maxima.

    To change, find or add up costs a block a level, whatever `n`, and serves many at once. Every total is made from its
    own block anew, never by adding differences: what it comes to depends on the numbers alone, not on their history.

    Args:
        n: how many.
        of: how a block is summed up.
    """

    def __init__(self, n: int, of: np.ufunc = np.add) -> None:
        self._of = of
        self._levels: list[Array] = []
        while n > TOP:
            blocks = -(-n // FAN)
            self._levels.append(np.zeros((blocks, FAN)))
            n = blocks
        self._levels.append(np.zeros((1, n)))

    @property
    def total(self) -> float:
        """The total of all."""
        return float(self._of.reduce(self._levels[-1], None)) if self._levels[0].size else 0.0

    def __getitem__(self, places: Index) -> Array:
        """Return the numbers at `places` `[m]`."""
        return self._levels[0].reshape(-1)[places]

    def __setitem__(self, places: Index, values: Array) -> None:
        """Put `values` `[m]` at `places` `[m]`."""
        self._levels[0].reshape(-1)[places] = values
        for below, level in zip(self._levels, self._levels[1:], strict=False):
            places = places // FAN
            level.reshape(-1)[places] = self._of.reduce(below[places], 1)

    def before(self, place: int) -> float:
        """Return the total of the numbers at 0 to `place` - 1."""
        total = 0.0
        for level in self._levels:
            block, within = divmod(place, level.shape[1]) if len(level) > 1 else (0, place)
            if within:
                total = float(self._of(total, self._of.reduce(level[block, :within])))
            place = block
        return total

    def find(self, depths: Array) -> Index:
        """Return for each of `depths` `[m]`, from 0 up to the total, the place where the running sum gets beyond it.

        Depths drawn evenly find each place in proportion to its number; one of 0 is never found, unless all are 0.
        """
        *blocks, top = self._levels
        sums, row = top.cumsum(1), np.zeros(1, np.int64)
        depths = np.minimum(depths, np.nextafter(sums[0, -1], 0))
        places: Index = sums[0].searchsorted(depths, "right")
        within = places
        for level in reversed(blocks):
            depths = depths - np.where(within > 0, sums[row, within - 1], 0.0)
            sums, row = level[places].cumsum(1), np.arange(len(depths))
            # The block's sum was added up in another order: what is left must stay under what it comes to here.
            depths = np.minimum(depths, np.nextafter(sums[:, -1], 0))
            within = (sums > depths[:, None]).argmax(1)
            places = places * FAN + within
        return places

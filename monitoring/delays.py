"""How long labels take to come."""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from streamkd.batch import Batch, labelled


class LabelDelays:
    """Remembers when each prediction that waits for its label was made.

    What waited before the process started is passed over: nobody knows how long it had waited.

    Args:
        capacity: in predictions; the oldest are forgotten first, as they are in `streamkd.labels.Pending`.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._asked: OrderedDict[str, float] = OrderedDict()

    def update(self, batch: Batch, now: float) -> NDArray[np.float64]:
        """Take in a batch; return how many seconds each label that came with it was waited for.

        Args:
            batch: that was learned.
            now: seconds, by a clock that only goes forward.
        """
        waited = [now - self._asked.pop(name) for name in batch.late if name in self._asked]
        if batch.ids:
            unknown = (~labelled(batch.y)).nonzero()[:, 0].tolist()
            self._asked.update((batch.ids[row], now) for row in unknown)
        while len(self._asked) > self._capacity:
            self._asked.popitem(last=False)
        return np.array(waited, dtype=np.float64)

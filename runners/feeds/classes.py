"""Labels as they are written, and the class indices they stand for."""

from collections.abc import Sequence


class ClassMap:
    """Numbers labels in order of appearance.

    Args:
        limit: most classes there may be: the width of the models' output.
        labels: those known already, in order.
    """

    def __init__(self, limit: int, labels: Sequence[str] = ()) -> None:
        self.limit = limit
        self.labels = list(labels)
        self._index = {label: index for index, label in enumerate(self.labels)}

    def index(self, label: str) -> int | None:
        """Return the index of a label, a new one if it is new; None if there are too many."""
        known = self._index.get(label)
        if known is None and len(self.labels) < self.limit:
            known = self._index[label] = len(self.labels)
            self.labels.append(label)
        return known

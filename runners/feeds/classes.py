"""Labels as they are written, and the class indices they stand for."""

from collections.abc import Iterable, Sequence

from runners.feeds.decode import RefusedError
from streamkd.errors import CheckpointError, ConfigError, one_screen, short


class ClassMap:
    """Numbers labels in order of appearance, or in the order given.

    Args:
        limit: most classes there may be: the width of the models' output.
        given: all the labels that there are, in order; empty where they are taken as they come.

    Raises:
        ConfigError: two of those given are the same, or there are too many.
    """

    def __init__(self, limit: int, given: Sequence[str] = ()) -> None:
        doubles = [label for label in given if list(given).count(label) > 1]
        if doubles:
            raise ConfigError(f"feed.classes: {doubles[0]!r} is there twice; name every class once")
        if len(given) > limit:
            raise ConfigError(f"feed.classes: {len(given)} of them, and max_classes = {limit}; raise max_classes")
        self.limit = limit
        self.labels = list(given)
        self._closed = bool(given)
        self._index = {label: index for index, label in enumerate(self.labels)}

    def index(self, label: str) -> int:
        """Return the index of a label, a new one if it is new.

        Raises:
            RefusedError: it is not one of those given, or there are too many.
        """
        known = self._index.get(label)
        if known is not None:
            return known
        if self._closed:
            raise RefusedError("unknown_class", f"label {short(label)} is not in feed.classes")
        if len(self.labels) >= self.limit:
            raise RefusedError(
                "too_many_classes", f"label {short(label)} would be the {self.limit + 1}th; max_classes = {self.limit}"
            )
        self._index[label] = len(self.labels)
        self.labels.append(label)
        return self._index[label]

    def takes(self, labels: Iterable[str]) -> bool:
        """Whether there is an index, or room for one, for each of these labels."""
        new = set(labels) - self._index.keys()
        return not new or (not self._closed and len(self.labels) + len(new) <= self.limit)

    def restore(self, labels: Sequence[str]) -> None:
        """Go on with the numbers that a checkpoint's models have learned.

        Raises:
            CheckpointError: those given are others.
        """
        if self._closed:
            apart = [(k, was, now) for k, (was, now) in enumerate(zip(labels, self.labels, strict=False)) if was != now]
            gone = [(k, labels[k], "absent") for k in range(len(self.labels), len(labels))]
            if apart or gone:
                lines = [f"  class {k}: {was!r} in the checkpoint, {now!r} configured" for k, was, now in apart + gone]
                raise CheckpointError(
                    "feed.classes: is not the checkpoint's class map\n"
                    + one_screen(lines)
                    + "\ngive back the old order, or start afresh with another checkpoint.directory"
                )
        else:
            self.labels = list(labels)
        self._index = {label: index for index, label in enumerate(self.labels)}

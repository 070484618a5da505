"""What a set of labelled images is, and what its pixels and labels are."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runners.feeds.orders import Image
from streamkd.errors import ConfigError

Labels = NDArray[Any]


class ImageSet(Protocol):
    """Images by their index.

    Attributes:
        shape: of each: channels, height, width.
        labels: `[n]`, of each, as written: text or numbers.
        classes: all labels there are, in their order; empty where the set does not say.
        ids: `[n]` names of the records; or empty.
        about: what a user wants to see of it.
    """

    shape: tuple[int, int, int]
    labels: Labels
    classes: Sequence[str]
    ids: Sequence[str]
    about: Mapping[str, Any]

    def read(self, index: int) -> Image:
        """Return one image `[channels, height, width]`.

        Raises:
            RefusedError: it cannot be used.
        """

    def raw(self, index: int) -> bytes:
        """Return it as it came."""

    def place(self, index: int) -> Mapping[str, Any]:
        """Return where it is to be found."""


def as_pixels(x: NDArray[Any], where: str) -> tuple[Image, frozenset[int]]:
    """Return numbers as bytes, and the indices of images in which not all are finite.

    Bytes stay as they are; truth values, and numbers from 0 to 1 that are no integers, are brought to 0 to 255; numbers
    from 0 to 255 are rounded.

    Args:
        x: `[n, ...]`.
        where: the setting, for the message.

    Raises:
        ConfigError: they are no pixels.
    """
    if x.dtype == np.uint8:
        return x, frozenset()
    if x.dtype.kind not in "biuf":
        raise ConfigError(f"{where}: is of type {x.dtype}; pixels are numbers")
    sound = np.isfinite(x.reshape(len(x), -1)).all(1)
    if not sound.all():
        x = np.where(sound.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    least, most = (x.min(), x.max()) if x.size else (0, 0)
    if least < 0 or most > 255:  # noqa: PLR2004 - a byte
        raise ConfigError(
            f"{where}: its values go from {float(least):g} to {float(most):g}; pixels go from 0 to 255, or from 0 to 1"
        )
    scale = 255 if most <= 1 and x.dtype.kind in "bf" else 1
    return np.rint(x * np.float32(scale)).astype(np.uint8), frozenset(np.flatnonzero(~sound).tolist())


def single(values: Any) -> Labels:
    """Return labels as an array `[n]`, those that are neither numbers nor text as text; empty where there is none."""
    labels = [value.item() if hasattr(value, "item") and np.size(value) == 1 else value for value in values]
    plain = (bool, int, float, str, bytes)
    if all(type(label) is type(labels[0]) and isinstance(label, plain) for label in labels):
        return np.array(labels)
    return np.array(["" if label is None else written(label) for label in labels])


def written(label: Any) -> str:
    """Return a label as text: a whole number is written alike, whatever type holds it."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return label.decode(errors="backslashreplace") if isinstance(label, bytes) else str(label)

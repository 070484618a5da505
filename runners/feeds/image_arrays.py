"""Images in an `.npz` file: arrays of pixels and of labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from runners.feeds.decode import RefusedError
from runners.feeds.image_sets import Labels, as_pixels
from runners.feeds.orders import Image
from streamkd.errors import ConfigError, FeedError, reason
from streamkd.settings import did_you_mean

MOST_CHANNELS = 4
"""An axis of more is not one of channels."""
Channels = Literal["auto", "first", "last"]


class Arrays:
    """Pixels in an array, labels in another.

    Args:
        x: `[n, channels, height, width]`, uint8.
        labels: `[n]`.
        ids: `[n]`, or empty.
        broken: indices of images of which a pixel is not a number.
        about: of the arrays.
    """

    def __init__(
        self, x: Image, labels: Labels, ids: Sequence[str], broken: frozenset[int], about: Mapping[str, Any]
    ) -> None:
        self.shape: tuple[int, int, int] = x.shape[1:]
        self.labels, self.ids, self.about = labels, ids, about
        self.classes: Sequence[str] = ()
        self._x, self._broken = x, broken

    def read(self, index: int) -> Image:
        """See `ImageSet`."""
        if index in self._broken:
            raise RefusedError("not_finite", "one of its pixels is not a finite number")
        image: Image = self._x[index]
        return image

    def raw(self, index: int) -> bytes:
        """See `ImageSet`: its pixels."""
        image: Image = self._x[index]
        return image.tobytes()

    def place(self, index: int) -> Mapping[str, Any]:
        """See `ImageSet`."""
        return {"index": index}


USUAL_X = ("x", "X", "x_train", "X_train", "train_images", "images", "data")
USUAL_Y = ("y", "Y", "y_train", "Y_train", "train_labels", "labels", "label", "targets", "target")


def arrays(path: Path, *, x: str, y: str, id: str, channels: Channels, shape: Sequence[int]) -> Arrays:  # noqa: A002 - the user's word
    """Read an `.npz` file.

    Raises:
        FeedError: it cannot be read.
        ConfigError: an array is not there, or is not of images or labels.
    """
    at = f"feed.path = {str(path)!r}"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            names = list(held)
            names_of = {
                "x": _array_name(x, "x", USUAL_X, names),
                "y": _array_name(y, "y", USUAL_Y, names),
                **({"id": _array_name(id, "id", (), names)} if id else {}),
            }
            found: dict[str, NDArray[Any]] = {key: held[name] for key, name in names_of.items()}
    except OSError as error:
        raise FeedError(f"{at}: cannot be read: {error.strerror or error}; check the path") from None
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile, zlib and numpy have no root in common
        raise FeedError(f"{at}: cannot be read: {reason(error)}; is it an .npz file of plain arrays?") from None
    labels = np.atleast_1d(found["y"])
    labels = labels.reshape(-1) if labels.size == len(labels) else labels
    for key, array in (("y", labels), ("id", found.get("id", labels))):
        if array.shape != found["x"].shape[:1]:
            raise ConfigError(
                f"feed.{key} = {names_of[key]!r}: has shape {list(array.shape)}, and {names_of['x']!r} has "
                f"{list(found['x'].shape)}; one value an image is needed"
            )
    pixels, broken = as_pixels(_upright(found["x"], names_of["x"], channels, shape), f"feed.x = {names_of['x']!r}")
    if 0 in pixels.shape[1:]:
        raise ConfigError(f"feed.x = {names_of['x']!r}: has shape {list(found['x'].shape)}; its images have no pixels")
    about = {"path": str(path), **{f"array {key}": name for key, name in names_of.items()}}
    return Arrays(pixels, labels, [str(name) for name in found.get("id", ())], broken, about)


def _array_name(given: str, key: str, usual: Sequence[str], names: Sequence[str]) -> str:
    if given and given not in names:
        hint = did_you_mean(given, names) or f"; there are {', '.join(names)}"
        raise ConfigError(f"feed.{key} = {given!r}: no such array in the file{hint}")
    name = given or next((name for name in usual if name in names), "")
    if not name:
        raise ConfigError(f"feed.{key}: missing; name the array, of {', '.join(names)}")
    return name


def _upright(x: NDArray[Any], name: str, channels: Channels, shape: Sequence[int]) -> NDArray[Any]:
    """Return images as `[n, channels, height, width]`."""
    where = f"feed.x = {name!r}: has shape {list(x.shape)}"
    if shape:
        if x[:1].size != np.prod(shape) or len(shape) != 3:  # noqa: PLR2004 - channels, height, width
            raise ConfigError(
                f"feed.shape = {list(shape)}: {name!r} has shape {list(x.shape)}; name channels, height and width, "
                "whose product is the pixels of an image, or leave it out"
            )
        return x.reshape(len(x), *shape)
    match x.ndim:
        case 3:
            return x[:, None]
        case 4:
            first, last = x.shape[1] <= MOST_CHANNELS, x.shape[3] <= MOST_CHANNELS
            if channels == "auto" and first == last:
                raise ConfigError(f"{where}; say where its channels are: feed.channels = 'first' or 'last'")
            return np.moveaxis(x, 3, 1) if channels == "last" or (channels == "auto" and last) else x
    raise ConfigError(
        f"{where}; images are [n, height, width], [n, height, width, channels] or [n, channels, height, width]; of "
        "rows of pixels, name feed.shape = [channels, height, width]"
    )

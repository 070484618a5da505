"""Labelled images that lie still: arrays of pixels, files in folders, columns of a table, datasets of torchvision.

A set gives each image as `[channels, height, width]` bytes; what cannot be read as one is refused by itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from runners.feeds.decode import RefusedError
from runners.feeds.formats import imported
from runners.feeds.orders import Image
from streamkd.errors import ConfigError, FeedError, reason, short
from streamkd.parts import parameters
from streamkd.settings import did_you_mean

FIRST_LOOK = 100
"""Images that are looked at before a set is taken for one that can be read."""
MOST_CHANNELS = 4
"""An axis of more is not one of channels."""
Channels = Literal["auto", "first", "last"]
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


def arrays(path: Path, *, x: str, y: str, id: str, channels: Channels, shape: Sequence[int]) -> Arrays:  # noqa: A002
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
    labels = found["y"].reshape(-1) if found["y"].size == len(found["y"]) else found["y"]
    for key, array in (("y", labels), ("id", found.get("id", labels))):
        if array.shape != found["x"].shape[:1]:
            raise ConfigError(
                f"feed.{key} = {names_of[key]!r}: has shape {list(array.shape)}, and {names_of['x']!r} has "
                f"{list(found['x'].shape)}; one value an image is needed"
            )
    pixels, broken = as_pixels(_upright(found["x"], names_of["x"], channels, shape), f"feed.x = {names_of['x']!r}")
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


class Fitted:
    """Images of any size and mode made alike: the first that can be read says how, where the user does not.

    Sides are scaled by themselves, so proportions may change.

    Args:
        size: height and width; empty: those of the first.
        channels: 1 or 3; 0: as the first.
    """

    def __init__(self, size: Sequence[int] = (), channels: int = 0) -> None:
        self.shape: tuple[int, int, int] = (channels, *size) if size else (channels, 0, 0)  # type: ignore[assignment]

    def look(self, first: Iterator[Callable[[], Any]], where: str) -> None:
        """Take size and channels from the first image that can be fetched and read.

        Raises:
            ConfigError: there is none.
        """
        complaint = ""
        for fetch in islice(first, FIRST_LOOK):
            try:
                image = fetch()
                picture = self._opened(image)
                channels, height, width = self.shape
                gray = picture.mode in {"1", "L", "LA", "I", "I;16", "F"}
                self.shape = (channels or (1 if gray else 3), height or picture.height, width or picture.width)
                self(image)
            except RefusedError as error:
                complaint = complaint or error.detail
            else:
                return
        raise ConfigError(f"{where}: none of its first images can be read; the first: {complaint}")

    def __call__(self, image: Any) -> Image:
        """Return an image, bytes or of Pillow's or a tensor, as `[channels, height, width]`.

        Raises:
            RefusedError: it cannot be read.
        """
        from PIL import Image as Pillow  # noqa: PLC0415 - for images only

        channels, height, width = self.shape
        picture = self._opened(image)
        try:
            picture = picture.convert("L" if channels == 1 else "RGB")
            if picture.size != (width, height):
                picture = picture.resize((width, height), Pillow.Resampling.BILINEAR)
            pixels = np.asarray(picture)
        except Exception as error:  # noqa: BLE001 - whatever a decoder does with what is broken
            raise _unreadable(error) from None
        return pixels[None] if channels == 1 else np.moveaxis(pixels, 2, 0)

    def _opened(self, image: Any) -> Any:
        from PIL import Image as Pillow  # noqa: PLC0415 - for images only
        from PIL import ImageOps  # noqa: PLC0415 - likewise

        try:
            if isinstance(image, bytes):
                picture = ImageOps.exif_transpose(Pillow.open(BytesIO(image)))
                return _in_bytes(picture) if picture.mode.startswith("I") else picture
            if isinstance(image, Pillow.Image):
                return image
            pixels, _ = as_pixels(np.asarray(image)[None], "feed.dataset")
            planes = pixels[0]
            return Pillow.fromarray(planes[0] if len(planes) == 1 else np.moveaxis(planes, 0, 2))
        except Exception as error:  # noqa: BLE001 - as above
            raise _unreadable(error) from None


def _in_bytes(picture: Any) -> Any:
    """Return the upper eight bits of the sixteen of a gray image; Pillow would take all that is brighter for white."""
    from PIL import Image as Pillow  # noqa: PLC0415 - for images only

    return Pillow.fromarray((np.asarray(picture).clip(0, 65_535) >> 8).astype(np.uint8))


def _unreadable(error: Exception) -> RefusedError:
    return RefusedError("malformed", f"not an image that can be read: {reason(error)}")


class Encoded:
    """Images as encoded files hold them.

    Args:
        fetch: returns the bytes of one; may raise OSError.
        labels, classes, ids, about: see `ImageSet`.
        fitted: makes them alike.
        names: `[n]`, where each is to be found, or empty.
    """

    def __init__(
        self,
        fetch: Callable[[int], Any],
        labels: Labels,
        fitted: Fitted,
        *,
        where: str,
        classes: Sequence[str] = (),
        ids: Sequence[str] = (),
        names: Sequence[str] = (),
        about: Mapping[str, Any],
    ) -> None:
        self.labels, self.classes, self.ids, self.about = labels, classes, ids, about
        self._fetch = lru_cache(maxsize=1)(fetch)  # what is read as an image is then asked for as it came
        self._fitted, self._names = fitted, names
        fitted.look(map(partial(partial, self._got), range(len(labels))), where)
        self.shape = fitted.shape

    def _got(self, index: int) -> Any:
        try:
            return self._fetch(index)
        except Exception as error:  # noqa: BLE001 - a dataset may do anything
            raise _unreadable(error) from None

    def read(self, index: int) -> Image:
        """See `ImageSet`."""
        return self._fitted(self._got(index))

    def raw(self, index: int) -> bytes:
        """See `ImageSet`."""
        try:
            got = self._got(index)
        except RefusedError:
            return b""
        return got if isinstance(got, bytes) else b""

    def place(self, index: int) -> Mapping[str, Any]:
        """See `ImageSet`."""
        return {"index": index, **({"file": self._names[index]} if self._names else {})}


def folder(path: Path, fitted: Fitted) -> Encoded:
    """Read a folder that has a sub-folder a class, with image files in it at any depth.

    Raises:
        FeedError: it cannot be read, or there is no image in it.
        ConfigError: it has no sub-folder.
    """
    from PIL import Image as Pillow  # noqa: PLC0415 - for images only

    at = f"feed.path = {str(path)!r}"
    try:
        classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise FeedError(f"{at}: cannot be read: {error.strerror or error}; name a folder of images") from None
    if not classes:
        raise ConfigError(f"{at}: has no sub-folder; put the images of each class into one that is named after it")
    known = {suffix for suffix, kind in Pillow.registered_extensions().items() if kind in Pillow.OPEN}
    files = [file for name in classes for file in sorted((path / name).rglob("*")) if file.is_file()]
    images = [file for file in files if file.suffix.lower() in known and not file.name.startswith(".")]
    if not images:
        raise FeedError(f"{at}: there is no image in its sub-folders {', '.join(classes[:5])}")
    names = [str(file.relative_to(path)) for file in images]
    return Encoded(
        lambda index: images[index].read_bytes(),
        np.array([file.relative_to(path).parts[0] for file in images]),
        fitted,
        where=at,
        classes=classes,
        ids=names,
        names=names,
        about={"path": str(path), "files that are no images by their name": len(files) - len(images)},
    )


def dataset_of(name: str, root: Path, arguments: dict[str, Any], fitted: Fitted) -> Encoded:
    """Open a dataset of torchvision's.

    Raises:
        FeedError: it is not there.
        ConfigError: there is none of that name, or its arguments do not fit.
    """
    at = f"feed.dataset = {name!r}"
    datasets = imported("torchvision.datasets", "", at)
    make = getattr(datasets, name, None) if name in datasets.__all__ else None
    if make is None:
        raise ConfigError(f"{at}: torchvision has no such dataset{did_you_mean(name, datasets.__all__)}")
    if "download" in arguments:
        raise ConfigError("feed.arguments.download: nothing is downloaded by a feed; leave it out")
    rooted = {"root": str(root), **arguments} if "root" in parameters(make) else arguments
    try:
        data = make(**rooted)
        total, labels = len(data), _targets(data)
    except (RuntimeError, OSError) as error:  # which is what its datasets raise where files are missing
        call = ", ".join(f"{key}={value!r}" for key, value in rooted.items())
        how = f"{name}({call}, download=True)" if "download" in parameters(make) else f"help({name})"
        raise FeedError(
            f"{at}: cannot be read from feed.root = {str(root)!r}: {reason(error)}; get it first:\n"
            f'  python -c "from torchvision.datasets import {name}; {how}"'
        ) from None
    except Exception as error:  # noqa: BLE001 - whatever a dataset does with arguments that are not its own
        raise ConfigError(f"feed.arguments = {short(arguments)}: do not fit {name}: {reason(error)}") from None
    classes = [str(each) for each in getattr(data, "classes", ())]
    if classes and labels.dtype.kind in "iu" and len(labels) and labels.min() >= 0 and labels.max() < len(classes):
        labels = np.array(classes)[labels]
    else:
        classes = []
    about = {"dataset": name, "root": str(root), "images": total}
    return Encoded(lambda index: data[index][0], labels, fitted, where=at, classes=classes, about=about)


def _targets(data: Any) -> Labels:
    """Return the labels without reading the images, where a dataset has them apart, as most have."""
    for name in ("targets", "labels", "_labels"):
        held = getattr(data, name, None)
        if held is not None and len(held) == len(data):
            return single(held)
    return single([data[index][1] for index in range(len(data))])


def single(values: Any) -> Labels:
    """Return labels as an array `[n]`, those that are neither numbers nor text as text; empty where there is none."""
    labels = [value.item() if hasattr(value, "item") and np.size(value) == 1 else value for value in values]
    plain = (bool, int, float, str, bytes)
    if all(type(label) is type(labels[0]) and isinstance(label, plain) for label in labels):
        return np.array(labels)
    return np.array(["" if label is None else str(label) for label in labels])


def columns(
    path: Path,
    kind: str,
    *,
    image: str,
    label: str,
    id: str,  # noqa: A002 - the user's word for it
    shape: Sequence[int],
    fitted: Fitted,
) -> ImageSet:
    """Open a table of which a column holds images; the column is held in memory, as it is encoded.

    Raises:
        FeedError: it cannot be read.
        ConfigError: a column is not there, or is not of images.
    """
    pyarrow = imported("pyarrow", "arrow", f"feed.kind = {kind!r}")
    dataset = imported("pyarrow.dataset", "arrow", f"feed.kind = {kind!r}")
    at = f"feed.path = {str(path)!r}"
    wanted = {"image": image, "label": label, **({"id": id} if id else {})}
    try:
        data = dataset.dataset(str(path), format=kind)
        present = data.schema.names
        for key, name in wanted.items():
            if name not in present:
                hint = did_you_mean(name, present) or f"; there are {', '.join(present)}"
                raise ConfigError(f"feed.{key} = {name!r}: no such column in {str(path)!r}{hint}")
        table = data.to_table(columns=list(dict.fromkeys(wanted.values())), use_threads=False)
    except (OSError, ValueError) as error:  # of which Arrow's own errors are
        raise FeedError(f"{at}: {reason(error)}; check the path") from None
    held = table[image]
    labels = single(table[label].to_pylist())
    about = {"path": str(path), "image": image, "label": label}
    ids = [str(name) for name in table[id].to_pylist()] if id else []
    types = pyarrow.types
    if types.is_struct(held.type) and "bytes" in [field.name for field in held.type]:
        held = pyarrow.chunked_array([chunk.field("bytes") for chunk in held.chunks], type=pyarrow.binary())
    if types.is_binary(held.type) or types.is_large_binary(held.type):
        return Encoded(lambda index: held[index].as_py(), labels, fitted, where=at, ids=ids, about=about)
    if types.is_fixed_size_list(held.type) or types.is_list(held.type) or types.is_large_list(held.type):
        return _Pixels(held, labels, ids, _checked_shape(shape, held, image), about)
    raise ConfigError(
        f"feed.image = {image!r}: is a column of {held.type}; images are bytes, {{bytes, path}} or lists of pixels"
    )


def _checked_shape(shape: Sequence[int], held: Any, name: str) -> tuple[int, int, int]:
    if len(shape) != 3 or not held.type.value_type.equals("uint8"):  # noqa: PLR2004 - channels, height, width
        raise ConfigError(
            f"feed.shape = {list(shape)}: {name!r} is a column of {held.type}; of lists of pixels, of type uint8, name "
            "feed.shape = [channels, height, width]"
        )
    channels, height, width = shape
    return channels, height, width


class _Pixels:
    """Lists of pixels in a column."""

    def __init__(
        self, held: Any, labels: Labels, ids: Sequence[str], shape: tuple[int, int, int], about: Mapping[str, Any]
    ) -> None:
        self.shape, self.labels, self.ids, self.about = shape, labels, ids, about
        self.classes: Sequence[str] = ()
        self._held = held

    def read(self, index: int) -> Image:
        """See `ImageSet`."""
        pixels = self._pixels(index)
        if len(pixels) != np.prod(self.shape):
            raise RefusedError(
                "width", f"{len(pixels)} pixels, and feed.shape = {list(self.shape)} has {np.prod(self.shape)}"
            )
        return pixels.reshape(self.shape)

    def _pixels(self, index: int) -> Image:
        values = self._held[index].values
        if values is None or values.null_count:
            return np.empty(0, dtype=np.uint8)
        pixels: Image = values.to_numpy()
        return pixels

    def raw(self, index: int) -> bytes:
        """See `ImageSet`: its pixels."""
        return self._pixels(index).tobytes()

    def place(self, index: int) -> Mapping[str, Any]:
        """See `ImageSet`."""
        return {"index": index}

"""Images as encoded files hold them, in folders or in datasets of torchvision, of any size and made alike."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from runners.feeds.decode import RefusedError
from runners.feeds.formats import imported
from runners.feeds.image_sets import Labels, as_pixels, single
from runners.feeds.orders import Image
from streamkd.errors import ConfigError, FeedError, reason, short
from streamkd.parts import parameters
from streamkd.settings import did_you_mean

FIRST_LOOK = 100
"""Images that are looked at before a set is taken for one that can be read."""


class Fitted:
    """Images of any size and mode made alike: the first that can be read says how, where the user does not.

    Sides are scaled by themselves, so proportions may change.

    Args:
        size: height and width; empty: those of the first.
        channels: 1 or 3; 0: as the first.
    """

    def __init__(self, size: Sequence[int] = (), channels: int = 0) -> None:
        self.shape: tuple[int, int, int] = (channels, *size) if size else (channels, 0, 0)  # type: ignore[assignment]  # two sides were checked

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
                return _in_bytes(image) if image.mode.startswith("I") else image
            planes = _finite(image)
            return Pillow.fromarray(planes[0] if len(planes) == 1 else np.moveaxis(planes, 0, 2))
        except RefusedError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            raise _unreadable(error) from None


def _finite(image: Any) -> Image:
    """Return the pixels of a tensor or an array as bytes.

    Raises:
        RefusedError: one is not a finite number.
    """
    pixels, broken = as_pixels(np.asarray(image)[None], "feed.dataset")
    if broken:
        raise RefusedError("not_finite", "one of its pixels is not a finite number")
    planes: Image = pixels[0]
    return planes


def _in_bytes(picture: Any) -> Any:
    """Return the upper eight bits of the sixteen of a gray image; Pillow would take all that is brighter for white."""
    from PIL import Image as Pillow  # noqa: PLC0415 - for images only

    return Pillow.fromarray((np.asarray(picture).clip(0, 65_535) >> 8).astype(np.uint8))


def _unreadable(error: Exception) -> RefusedError:
    from PIL import UnidentifiedImageError  # noqa: PLC0415 - for images only

    # What Pillow says of it is the address of an object.
    said = "of no kind that is known" if isinstance(error, UnidentifiedImageError) else reason(error)
    return RefusedError("malformed", f"not an image that can be read: {said}")


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
        if len(labels):
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

    def holds_image(file: Path) -> bool:
        return file.suffix.lower() in known and not file.name.startswith(".")

    # A link to nothing is a file that cannot be read, and is not passed over.
    files = [
        file
        for name in classes
        for file in sorted((path / name).rglob("*"))
        if file.is_file() or (file.is_symlink() and not file.exists())
    ]
    images = [file for file in files if holds_image(file)]
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
        about={
            "path": str(path),
            "files that are no images by their name": len(files) - len(images),
            "images in no sub-folder, which are left out": sum(map(holds_image, path.iterdir())),
        },
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

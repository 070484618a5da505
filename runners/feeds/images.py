"""Streams of labelled images: an `.npz` file, a folder, a dataset of torchvision, a column of a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from zlib import crc32

import numpy as np
import torch
from pydantic import BeforeValidator, Field

from runners.feeds import NONE, REPLAYABLE, DeadLetter, Refuse, orders
from runners.feeds.classes import ClassMap
from runners.feeds.decode import RefusedError
from runners.feeds.image_arrays import Channels, arrays
from runners.feeds.image_columns import columns
from runners.feeds.image_files import Fitted, dataset_of, folder
from runners.feeds.image_sets import ImageSet, Labels, written
from runners.feeds.orders import Order
from streamkd.batch import UNLABELLED, Batch
from streamkd.errors import CheckpointError, ConfigError, FeedError, short
from streamkd.parts import make
from streamkd.settings import Part, Settings, validate

MOST_REFUSED = 1_000
"""Records refused in a row before the feed comes up for air."""


def _listed(value: Any) -> Any:
    """Let one stand for a list of it, and numbers for text."""
    return [str(each) for each in (value if isinstance(value, (list, tuple)) else [value])]


def _square(value: Any) -> Any:
    return [value, value] if isinstance(value, int) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Size = Annotated[tuple[Annotated[int, Field(ge=1, le=8_192)], ...], BeforeValidator(_square)]
Planes = Annotated[int, Field(ge=0, le=3)]


class Telling(Settings):
    """How a set of labelled images is told: the settings that all such feeds have.

    Attributes:
        order: in which the records come, one of `runners.feeds.orders`.
        classes: all labels that there are, in the order of their indices; a record with another one is refused. Left
            out, they are the set's own, in its order: numbers by their size, text by the alphabet.
        missing: labels that mean "not known", as an empty one always does.
    """

    order: Part = Part(kind="file")
    classes: Names = ()
    missing: Names = ("",)


class ImageFeed:
    """The images of a set as `[n, channels, height, width]` bytes (uint8), in the order that was asked for.

    Attributes:
        order: which record comes where, and the task that is under way there; see `runners.feeds.orders.Order`.
    """

    def __init__(
        self,
        images: ImageSet,
        order: Order,
        classes: ClassMap,
        *,
        kind: str,
        rule: Part,
        strange: Mapping[int, str],
        refuse: Refuse,
    ) -> None:
        self.name = kind
        self.shape: tuple[int, ...] = images.shape
        self.capabilities = REPLAYABLE
        self.connected = True
        self.resets = self.failures = NONE
        self.order = order
        self._images, self._classes, self._refuse = images, classes, refuse
        self._rule = rule.model_dump()
        self._strange = strange
        names = "\0".join(images.ids).encode(errors="surrogatepass")
        self._digest = crc32(names, crc32(order.labels.tobytes(), crc32(order.indices.tobytes())))
        self._place = self._records = 0

    def poll(self, records: int) -> Batch | None:
        """Return the next usable images, up to `records`; None at the end."""
        found: list[orders.Image] = []
        rows: list[int] = []
        raw: list[bytes] = []
        refused = 0
        if self._place == len(self.order.indices):
            return None
        while len(found) < records and refused < MOST_REFUSED and self._place < len(self.order.indices):
            index = int(self.order.indices[self._place])
            try:
                found.append(self._read(index))
                rows.append(index)
                raw.append(self._images.raw(index))
            except RefusedError as error:
                place = {"place": self._place, **self._images.place(index)}
                self._refuse(DeadLetter(error.reason, error.detail, self._images.raw(index), place))
                refused += 1
            self._place += 1
        self._records += len(found)
        return Batch(
            torch.from_numpy(np.stack(found) if found else np.empty((0, *self.shape), dtype=np.uint8)),
            torch.from_numpy(self.order.labels[rows]),
            ids=tuple(self._images.ids[index] for index in rows) if self._images.ids else (),
            position=self.position(),
            raw=tuple(raw),
        )

    def _read(self, index: int) -> orders.Image:
        if index in self._strange:
            raise RefusedError("unknown_class", f"label {short(self._strange[index])} is not in feed.classes")
        return self.order.view(self._images.read(index), int(self.order.tasks[self._place]))

    def position(self) -> dict[str, Any]:
        """Return the next record's place in the order, and what tells that order from others."""
        return {
            "place": self._place,
            "records": self._records,
            "of": len(self.order.indices),
            "digest": self._digest,
            "order": self._rule,
            "shape": list(self.shape),
            "classes": list(self._classes.labels),
        }

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on where `position` was taken.

        Raises:
            CheckpointError: the set, its order or its classes are not those that were being learned.
        """
        now = self.position()
        for key in ("shape", "order"):
            if position[key] != now[key]:
                raise CheckpointError(
                    f"feed.{key} = {now[key]}: it was {position[key]} when the checkpoint was made; give it back, or "
                    "start afresh with another checkpoint.directory"
                )
        self._classes.restore(position["classes"])
        if (position["of"], position["digest"]) != (now["of"], now["digest"]):
            raise CheckpointError(
                f"feed: is not the set of images that it was: {now['of']:,} records, and {position['of']:,} when the "
                "checkpoint was made; records, their names, labels and order count; give it back, or start afresh with "
                "another checkpoint.directory"
            )
        self._place, self._records = position["place"], position["records"]

    def adopt(self, classes: Sequence[str]) -> None:
        """Number these labels first.

        Raises:
            CheckpointError: the set has others.
        """
        self._classes.restore(classes)

    def progress(self) -> float:
        """Return how much of the set was given, 0 to 1."""
        return self._place / len(self.order.indices)

    def lag(self) -> Mapping[str, int]:
        """Return how many records are still to come."""
        return {"0": len(self.order.indices) - self._place}

    def commit(self, position: Mapping[str, Any]) -> None:
        """Do nothing: a set waits for nobody."""

    def describe(self) -> dict[str, Any]:
        """Return where the images are, how many, of what shape and classes, and in which order they come."""
        return {
            **self._images.about,
            "records": len(self.order.indices),
            "shape": list(self.shape),
            "order": ", ".join([self._rule["kind"], *(f"{key} = {self._rule[key]}" for key in [*self._rule][1:])]),
            "tasks": int(self.order.tasks.max()) + 1,
            "classes": list(self._classes.labels),
        }

    def close(self) -> None:
        """Do nothing: what is open is in memory."""


def told(images: ImageSet, settings: Telling, *, kind: str, max_classes: int, refuse: Refuse) -> ImageFeed:
    """Number the labels of a set, put it in order, and make a feed of it.

    Raises:
        FeedError: there is no image in it.
        ConfigError: there are too many classes, or the order does not fit them.
    """
    if not len(images.labels):
        raise FeedError(f"feed.kind = {kind!r}: there is no image in it")
    y, names, strange = numbered(images.labels, settings.classes or images.classes, settings.missing)
    if not names:
        raise ConfigError("feed.missing: no record has a label; name labels that mean 'not known', and no others")
    rule: orders.Rule = make(settings.order, orders, "feed.order")
    try:
        order = rule(y, names)
    except ValueError as error:
        raise ConfigError(f"feed.order.{error}") from None
    classes = ClassMap(max_classes, order.classes)
    return ImageFeed(images, order, classes, kind=kind, rule=settings.order, strange=strange, refuse=refuse)


def numbered(
    labels: Labels, classes: Sequence[str], missing: Sequence[str]
) -> tuple[orders.Integers, Sequence[str], dict[int, str]]:
    """Number labels.

    Args:
        labels: `[n]`, text or numbers.
        classes: in their order; empty: those that there are.
        missing: those that mean "not known", beside the empty one.

    Returns:
        `[n]` class indices, the names that they stand for, and what is written where no class is meant, by record.
    """
    values, inverse = np.unique(labels, return_inverse=True)
    # White space around a label means nothing, but where a class is written with it, as a folder may be.
    texts = [text if (text := written(value)) in classes else text.strip() for value in values.tolist()]
    unknown = {"", "nan", *missing}
    present = [text for text in dict.fromkeys(texts) if text not in unknown]
    names = list(classes) or sorted(present, key=_rank)
    index = {name: number for number, name in enumerate(names)}
    y = np.array([index.get(text, UNLABELLED) for text in texts], dtype=np.int64)[inverse]
    strange = [text for text in present if text not in index]
    places = np.flatnonzero(np.isin(np.array(texts)[inverse], strange)).tolist() if strange else []
    return y, names, {place: texts[inverse[place]] for place in places}


def _rank(name: str) -> tuple[bool, int, str]:
    number = name.removeprefix("-")
    return (False, int(name), "") if number.isascii() and number.isdigit() else (True, 0, name)


def npz(
    path: Path,
    *,
    x: str = "",
    y: str = "",
    id: str = "",  # noqa: A002 - the user's word for it
    channels: Channels = "auto",
    shape: tuple[Annotated[int, Field(ge=1)], ...] = (),
    max_classes: int,
    refuse: Refuse,
    **options: Any,
) -> ImageFeed:
    """Read arrays of images and labels, as `numpy.savez` writes them.

    Args:
        path: of the file.
        x: array of images, `[n, height, width]`, with channels before or after these; the first of the usual names.
        y: array of labels, `[n]`, numbers or text; likewise.
        id: array of the records' names, by which labels can come later.
        channels: the axis of the channels, `first` or `last`, where sizes do not tell.
        shape: of one image, for rows of pixels: [channels, height, width].
        max_classes: most labels there may be.
        refuse: takes the records that cannot be used.
        options: those of `runners.feeds.images.Telling`.

    Raises:
        FeedError: the file cannot be read.
        ConfigError: an array is not there or not of images, or a setting does not fit.
    """
    settings = _telling(options)
    images = arrays(path, x=x, y=y, id=id, channels=channels, shape=shape)
    return told(images, settings, kind="npz", max_classes=max_classes, refuse=refuse)


def image_folder(
    path: Path, *, size: Size = (), channels: Planes = 0, max_classes: int, refuse: Refuse, **options: Any
) -> ImageFeed:
    """Read a folder that has a sub-folder a class, with image files in it.

    Args:
        path: of the folder.
        size: height and width, or one number for both, to which all images are scaled; left out, that of the first.
        channels: 1 for gray, 3 for colour; left out, as the first.
        max_classes: most labels there may be.
        refuse: takes the files that cannot be read as images.
        options: those of `runners.feeds.images.Telling`.

    Raises:
        FeedError: the folder cannot be read, or there is no image in it.
        ConfigError: there is no sub-folder, or a setting does not fit.
    """
    settings = _telling(options)
    images = folder(path, _fitted(size, channels))
    return told(images, settings, kind="images", max_classes=max_classes, refuse=refuse)


def torchvision(
    dataset: str,
    *,
    root: Path = Path("data"),
    arguments: Mapping[str, Any] | None = None,
    size: Size = (),
    channels: Planes = 0,
    max_classes: int,
    refuse: Refuse,
    **options: Any,
) -> ImageFeed:
    """Read a dataset of `torchvision.datasets`, which is there already: nothing is ever downloaded.

    Args:
        dataset: its name, e.g. `CIFAR10`.
        root: folder in which it lies.
        arguments: others of its own, e.g. `{ train = false }`.
        size: as for folders.
        channels: likewise.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be read as images.
        options: those of `runners.feeds.images.Telling`.

    Raises:
        FeedError: it is not there.
        ConfigError: there is no such dataset, or a setting does not fit.
    """
    settings = _telling(options)
    images = dataset_of(dataset, root, dict(arguments or {}), _fitted(size, channels))
    return told(images, settings, kind="torchvision", max_classes=max_classes, refuse=refuse)


def image_column(
    path: Path,
    *,
    kind: str,
    image: str,
    label: str,
    id: str = "",  # noqa: A002 - the user's word for it
    shape: tuple[Annotated[int, Field(ge=1)], ...] = (),
    size: Size = (),
    channels: Planes = 0,
    max_classes: int,
    refuse: Refuse,
    **options: Any,
) -> ImageFeed:
    """Read a table that has a column of images: Parquet or Arrow.

    Args:
        path: of the file.
        kind: `parquet` or `arrow`.
        image: column of encoded images (PNG, JPEG...; bytes, or Hugging Face's `{bytes, path}`), or of lists of pixels.
        label: column of labels.
        id: column of the records' names.
        shape: of one image, for lists of pixels: [channels, height, width].
        size: of encoded images, as for folders.
        channels: likewise.
        max_classes: most labels there may be.
        refuse: takes the records that cannot be read as images.
        options: those of `runners.feeds.images.Telling`.

    Raises:
        FeedError: it cannot be read.
        ConfigError: a column is not there or not of images, or a setting does not fit.
    """
    settings = _telling(options)
    images = columns(path, kind, image=image, label=label, id=id, shape=shape, fitted=_fitted(size, channels))
    return told(images, settings, kind=kind, max_classes=max_classes, refuse=refuse)


def _telling(options: Mapping[str, Any]) -> Telling:
    if "label" in options:
        raise ConfigError(
            f"feed.label = {options['label']!r}: leave it out; of an .npz file, name the array of labels in feed.y"
        )
    return validate(Telling, options, "feed")


def _fitted(size: Sequence[int], channels: int) -> Fitted:
    if channels == 2:  # noqa: PLR2004 - gray with transparency, of which no model makes anything
        raise ConfigError("feed.channels = 2: images are gray (1) or in colour (3)")
    if len(size) not in {0, 2}:
        raise ConfigError(f"feed.size = {list(size)}: name height and width, or one number for both")
    return Fitted(size, channels)

"""Images in a column of a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runners.feeds.decode import RefusedError
from runners.feeds.formats import imported
from runners.feeds.image_files import FIRST_LOOK, Encoded, Fitted
from runners.feeds.image_sets import ImageSet, Labels, single
from runners.feeds.orders import Image
from streamkd.errors import ConfigError, FeedError, reason
from streamkd.settings import did_you_mean


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
        if shape:
            raise ConfigError(
                f"feed.shape = {list(shape)}: {image!r} holds encoded images, which have shapes of their own; "
                "name feed.size and feed.channels, or nothing"
            )
        return Encoded(lambda index: held[index].as_py(), labels, fitted, where=at, ids=ids, about=about)
    if types.is_fixed_size_list(held.type) or types.is_list(held.type) or types.is_large_list(held.type):
        if any(fitted.shape):
            raise ConfigError(
                f"feed.size, feed.channels: {image!r} holds lists of pixels, which are not scaled; leave them out"
            )
        pixels = _Pixels(held, labels, ids, _checked_shape(shape, held, image), about)
        pixels.look(f"feed.shape = {list(shape)}")
        return pixels
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

    def look(self, where: str) -> None:
        """Find one among the first that has the shape.

        Raises:
            ConfigError: there is none.
        """
        complaint = ""
        for index in range(min(FIRST_LOOK, len(self.labels))):
            try:
                self.read(index)
            except RefusedError as error:
                complaint = complaint or error.detail
            else:
                return
        if complaint:
            raise ConfigError(f"{where}: none of the first images has it; the first: {complaint}")

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

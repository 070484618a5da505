"""One TOML file in: everything a process needs to know, checked before anything starts."""

import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import date
from datetime import time as clock
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from runners.feeds import KINDS, STREAMS, Feed, Refuse
from runners.feeds.ahead import Ahead
from runners.feeds.delayed import Delayed
from runners.feeds.joined import Joined
from runners.predictions import KINDS as SINKS
from runners.predictions import Predictions
from runners.shipped import shipped
from streamkd.config import resolve_device
from streamkd.errors import ConfigError, FeedError, StreamkdError, reason
from streamkd.parts import make
from streamkd.settings import EngineSettings, LabelSettings, Part, Settings, validate


class CheckpointSettings(Settings):
    """Where the state is saved, how often, and how many copies are kept."""

    directory: Path = Path("checkpoints")
    every_records: Annotated[int, Field(ge=1, description="records between two checkpoints")] = 10_000
    every_seconds: Annotated[float, Field(ge=0, description="seconds between two checkpoints; 0: records alone")] = 0.0
    keep: Annotated[int, Field(ge=1, description="the newest ones")] = 3
    warm_start: Annotated[
        Path | None, Field(description="a checkpoint to begin with, where the directory has none of its own yet")
    ] = None
    keep_best: Annotated[bool, Field(description="beside the newest, the one at which the accuracy was highest")] = True


class HttpSettings(Settings):
    """Where /metrics, /healthz and /readyz answer."""

    host: Annotated[str, Field(pattern=r"^[\w.:%-]+$", max_length=253)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535, description="0 picks a free one and logs it")] = 9464
    stalled_seconds: Annotated[
        float, Field(gt=0, description="/healthz fails when the loop has made no progress for this long")
    ] = 60.0


class DeadLetterSettings(Settings):
    """Where records go that cannot be used."""

    path: Path = Path("dead-letters.jsonl")
    max_bytes: Annotated[int, Field(ge=0, description="of a file before it is rotated; 0: never")] = 64 << 20
    keep: Annotated[int, Field(ge=1, description="rotated files")] = 10
    max_share: Annotated[float, Field(gt=0, le=1, description="of the latest records; more stop the process")] = 0.5
    window: Annotated[int, Field(ge=1, description="how many are the latest records")] = 1_000


class LogSettings(Settings):
    """What is logged, to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    every_records: Annotated[int, Field(ge=0, description="records between two lines of progress; 0: none")] = 10_000


class LateLabelSettings(LabelSettings):
    """Where labels come from that do not come with their records."""

    feed: Annotated[Part | None, Field(description="of labels, joined to the records by id")] = None
    wait_seconds: Annotated[float, Field(ge=0, description="for a label on that feed; 0: until too many wait")] = 0.0


class Configuration(EngineSettings):
    """The whole file."""

    threads: Annotated[
        int, Field(ge=0, le=1_024, description="of torch; 0 leaves it to torch. Small models are fastest on one")
    ] = 1
    read_ahead: Annotated[
        int,
        Field(
            ge=0,
            le=1_024,
            description="batches decoded while earlier ones are learned, on a thread of their own; 0: none. Pays where "
            "decoding takes long, as that of images does",
        ),
    ] = 0
    shutdown_timeout_seconds: Annotated[
        float, Field(gt=0, le=86_400, description="for the last step and the last save, once asked to stop")
    ] = 25.0
    feed: Part | None = None
    labels: LateLabelSettings = LateLabelSettings()
    predictions: Part = Part(kind="none")
    checkpoint: CheckpointSettings = CheckpointSettings()
    http: HttpSettings = HttpSettings()
    dead_letters: DeadLetterSettings = DeadLetterSettings()
    log: LogSettings = LogSettings()

    def open_predictions(self) -> Predictions:
        """Open what takes the predictions.

        Raises:
            ConfigError: a setting is missing or does not fit.
            FeedError: it cannot be reached.
        """
        return Predictions(make(self.predictions, SINKS, "predictions"))

    def knowing(self, columns: Sequence[str]) -> "Configuration":
        """Return what opens a stream of columns that are known; what waits there now may have others, or be nothing.

        Args:
            columns: that a checkpoint has learned, in order; none: they have to be found out.
        """
        if not columns or self.feed is None or self.feed.kind not in STREAMS:
            return self
        feed = Part.model_validate({**self.feed.model_dump(), "learned": list(columns)})
        return self.model_copy(update={"feed": feed})

    def open_feed(self, refuse: Refuse) -> Feed:
        """Open the feed.

        Args:
            refuse: takes the records that cannot be used.

        Raises:
            ConfigError: a setting of the feed is missing or does not fit.
            FeedError: it cannot be reached.
        """
        if not self.read_ahead:
            return self._open_feed(refuse)
        device = resolve_device(self.device, deterministic=self.deterministic)
        feed = Ahead(self._open_feed, refuse, self.read_ahead, pinned=device.type == "cuda")
        if feed.capabilities.promise == "at most once":
            feed.close()
            raise ConfigError(
                f"read_ahead = {self.read_ahead}: this feed never gives a record again, so what was decoded ahead "
                "would be lost at every stop; give it a spool (feed.spool), or set read_ahead = 0"
            )
        return feed

    def _open_feed(self, refuse: Refuse) -> Feed:
        if self.feed is None:
            raise ConfigError("feed.kind: missing; name the feed, e.g. [feed] kind = 'csv', path = 'data.csv'")
        if self.labels.delay > self.labels.pending_capacity:
            raise ConfigError(
                f"labels.delay = {self.labels.delay}: more than the {self.labels.pending_capacity} predictions that "
                "may wait; raise labels.pending_capacity"
            )
        self._refuse_one_file_for_two()
        if self.labels.feed is not None:
            return self._open_joined(self.feed, self.labels.feed, refuse)
        feed = self._open(self.feed, "feed", refuse)
        return Delayed(feed, self.labels.delay) if self.labels.delay else feed

    def _refuse_one_file_for_two(self) -> None:
        """Refuse to write into a file that is read, or two things into one."""
        parts = {"feed": self.feed, "labels.feed": self.labels.feed, "predictions": self.predictions}
        named = {f"{key}.path": part.options.get("path") for key, part in parts.items() if part is not None}
        files = {key: Path(path) for key, path in named.items() if isinstance(path, str)}
        files["dead_letters.path"] = self.dead_letters.path
        for one, other in combinations(files, 2):
            if not other.endswith("feed.path") and _same_file(files[one], files[other]):
                raise ConfigError(f"{other} = {str(files[other])!r}: is the file of {one}, too; name another")

    def _open_joined(self, records: Part, labels: Part, refuse: Refuse) -> Feed:
        """Open a feed and that of its labels."""
        if self.labels.delay:
            raise ConfigError(f"labels.delay = {self.labels.delay}: labels.feed has delays of its own; set one of them")
        for key, part in (("feed", records), ("labels.feed", labels)):
            if not part.options.get("id"):
                raise ConfigError(f"{key}.id: missing; labels are joined to their records by it")
        if records.options.get("label"):
            raise ConfigError(f"feed.label = {records.options['label']!r}: labels come from labels.feed; set it to ''")
        only = Part.model_validate({**labels.model_dump(), "labels_only": True})
        with ExitStack() as unless_both_open:
            feed = unless_both_open.enter_context(closing(self._open(records, "feed", refuse)))
            answers = self._open(only, "labels.feed", refuse)
            unless_both_open.pop_all()
        return Joined(
            feed,
            answers,
            capacity=self.labels.pending_capacity,
            seconds=self.labels.wait_seconds,
            clock=time.time,
            refuse=refuse,
        )

    def _open(self, part: Part, key: str, refuse: Refuse) -> Feed:
        given = {"kind": part.kind, "max_classes": self.max_classes, "refuse": refuse}
        try:
            feed: Feed = make(part, KINDS, key, **given)
        except StreamkdError as error:
            # Feeds speak of themselves as `feed`; the labels' is another.
            raise (error if key == "feed" else type(error)(f"in labels.feed: {error}")) from error.__cause__
        except Exception as error:  # whatever a feed of the user's own does
            raise FeedError(f"{key}.kind = {part.kind!r}: cannot be opened: {reason(error)}") from error
        missing = [name for name in FEED if not hasattr(feed, name)]
        if missing:
            raise ConfigError(f"{key}.kind = {part.kind!r}: not a feed; it has no {', '.join(missing)}")
        return feed


def _same_file(one: Path, other: Path) -> bool:
    """Say whether two names are of one file, however they are spelt."""
    try:
        return one.resolve() == other.resolve() or one.samefile(other)
    except (OSError, ValueError, RuntimeError):  # one of them is not there yet, or can be no file's name
        return False


FEED = (
    *("name", "shape", "poll", "seek", "progress", "commit", "describe", "close"),
    *("capabilities", "connected", "resets", "failures", "lag"),
)
"""What a feed has."""
RELOADABLE = frozenset(
    {
        "log.level",
        "log.every_records",
        "checkpoint.every_records",
        "checkpoint.every_seconds",
        "checkpoint.keep",
        "checkpoint.keep_best",
        "http.stalled_seconds",
        "shutdown_timeout_seconds",
        "dead_letters.max_share",
    }
)
"""Settings that a running process takes over on SIGHUP."""


def changes(before: Configuration, after: Configuration) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ: key -> (before, after)."""
    old, new = _flat(before.model_dump(mode="json")), _flat(after.model_dump(mode="json"))
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def load(source: str, overrides: Sequence[str] = (), extra: Mapping[str, Any] | None = None) -> Configuration:
    """Read a configuration.

    Args:
        source: a file, or the name of a shipped configuration; a file of that name comes first.
        overrides: `key.path=value` each, the value in TOML's notation or else taken as text.
        extra: key.path -> value, for what the command line sets by options of its own; None is passed over.

    Raises:
        ConfigError: the file cannot be read, or a setting is wrong.
    """
    table = _parse(source)
    written = list(map(_change, overrides))
    changes = [
        *((key, _value(text)) for key, text in written),
        *((key, value) for key, value in (extra or {}).items() if value is not None),
    ]
    # A part of another kind has other options; so kinds come first, and take the old options with them.
    for key, value in sorted(changes, key=lambda change: not change[0].endswith(".kind")):
        _put(table, key, value)
    texts = dict(written)
    for key in _text_wanted(table) & texts.keys():
        _put(table, key, texts[key])
    return validate(Configuration, table)


def _text_wanted(table: Mapping[str, Any]) -> set[str]:
    """Return the keys of numbers, or of true and false, where there has to be text."""
    try:
        Configuration.model_validate(table)
    except ValidationError as error:
        return {
            ".".join(map(str, problem["loc"]))
            for problem in error.errors()
            if problem["type"] in {"string_type", "path_type"} and isinstance(problem["input"], (int, float))
        }
    return set()


def _change(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: write it as key.path=value")
    return key.strip(), value.strip()


def _parse(source: str) -> dict[str, Any]:
    path, ready = Path(source), shipped()
    try:
        if path.is_file():
            return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror or error}; name a file that can") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: is not UTF-8, as TOML must be: {error.reason} at byte {error.start}") from None
    except _NOT_TOML as error:
        raise ConfigError(f"{source}: is not TOML: {error}; mend it there") from None
    if source in ready:
        return tomllib.loads(ready[source])
    close = get_close_matches(source, ready, n=1)
    hint = f"did you mean {close[0]}?" if close else f"shipped are {', '.join(ready)}"
    raise ConfigError(f"{source}: there is no such file, and no shipped configuration of that name; {hint}")


_NOT_TOML = (ValueError, RecursionError)
"""What tomllib raises, numbers of thousands of digits and brackets by the thousand included."""


def _value(text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except _NOT_TOML:
        return text
    return text if isinstance(value, (date, clock)) else value  # no setting is a date, but a label may be called one


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place: Any = table
    for walked, name in enumerate(parents):
        if isinstance(place, list):
            place = place[_index(place, name, ".".join(parents[: walked + 1]))]
        else:
            if isinstance(place.get(name), str):  # a part without options gets one
                place[name] = {"kind": place[name]}
            place = place.setdefault(name, {})
        if not isinstance(place, (dict, list)):
            raise ConfigError(f"{key}: {'.'.join(parents[: walked + 1])} is a value, not a table")
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        if last == "kind" and not _same_family(place.get("kind"), value):
            place.clear()
        place[last] = value


def _same_family(before: Any, after: Any) -> bool:
    """Say whether the options of a part of one kind are those of another: a CSV feed's and a JSON feed's, for one."""
    if before is None or before == after:
        return True
    families = [KINDS.get(kind) if isinstance(kind, str) else None for kind in (before, after)]
    return families[0] is not None and families[0] == families[1]


def _index(place: list[Any], name: str, key: str) -> int:
    if name.isdecimal() and int(name) < len(place):
        return int(name)
    raise ConfigError(f"{key}: no such entry; there are {len(place)}, the first is 0")

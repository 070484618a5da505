"""What a run without a checkpoint of its own begins with: what another run, or `streamkd distill`, has learned."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runners.history import known
from runners.session import Session
from runners.settings import Configuration
from streamkd import checkpoint
from streamkd.errors import CheckpointError, one_screen, reason, short
from streamkd.settings import Part


def begin(running: Session) -> Path | None:
    """Take over what the checkpoint named in `checkpoint.warm_start` has learned; return it, or None if none is named.

    Models, their averages and optimizers, the scaling of the inputs, the classes with their order, the latest memories
    and the teacher in office are taken over. All else begins anew, and so does the feed.

    Raises:
        CheckpointError: there is no checkpoint, it is not whole, or it is of other models or other records.
    """
    place = running.configuration.checkpoint.warm_start
    if place is None:
        return None
    where = f"checkpoint.warm_start = {short(str(place))}"
    try:
        path = checkpoint.newest(place)
        state, about = checkpoint.load(path)
    except CheckpointError as error:
        raise type(error)(f"{where}: {error}") from None
    except (OSError, ValueError) as error:  # what no file system has for a name
        raise CheckpointError(f"{where}: cannot be read: {reason(error)}; name another") from None
    lines = [*_differences(about, running), *_other_records(about.get("feed", {}), known(running.feed))]
    if lines:
        raise CheckpointError(
            f"{where}: {path.name} does not fit this configuration\n{one_screen(lines)}\n"
            "configure it as that one was, name another, or leave checkpoint.warm_start out"
        )
    try:
        if about["feed"]["classes"]:
            running.feed.adopt(about["feed"]["classes"])
        running.engine.take_over({**state["tensors"]["engine"], "replay": state["memories"]})
    except Exception as error:  # a feed of one's own may not know how
        raise CheckpointError(f"{where}: {path}: cannot be taken over: {reason(error)}; name another") from error
    return path


def learned_with(configuration: Configuration) -> dict[str, str]:
    """Return the settings that what is taken over depends on."""
    return {
        "max_classes": str(configuration.max_classes),
        "inputs.standardise": str(configuration.inputs.standardise),
        **{f"peers.{peer.name}.optimizer": gathers(peer.optimizer) for peer in configuration.peers},
    }


def _differences(about: Mapping[str, Any], running: Session) -> Iterator[str]:
    """Tell of peers that are not there or not the same; those that only the checkpoint has are left."""
    models, settings = about["models"], about["settings"]
    new = {f"peers.{peer.name}.optimizer" for peer in running.engine.cohort.peers if peer.name not in models}
    for key, now in learned_with(running.configuration).items():
        if key not in new and settings.get(key) != now:
            yield f"  {key}: {settings.get(key, 'absent')} in the checkpoint, {now} configured"
    for peer in running.engine.cohort.peers:
        if peer.name not in models:
            yield f"  peers: {peer.name} is not in the checkpoint; there are {', '.join(models)}"
            continue
        was, is_ = models[peer.name], peer.shapes()
        for weight in sorted({*was, *is_}):
            before, after = was.get(weight, "absent"), is_.get(weight, "absent")
            if before != after:
                yield f"  {peer.name}.{weight}: {before} in the checkpoint, {after} configured"


def _other_records(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Tell where records are not those that were learned: their columns, their shape, the classes that are given."""
    before, after = was.get("columns", []), now["columns"]
    if before != after:
        gone, new = [name for name in before if name not in after], [name for name in after if name not in before]
        yield (
            f"  the feed's columns are not those of the checkpoint (gone: {gone or 'none'}; new: {new or 'none'}; "
            "order counts)"
        )
    elif was.get("shape") != now["shape"]:
        yield f"  feed.shape: {was.get('shape', 'unknown')} in the checkpoint, {now['shape']} configured"
    classes = was.get("classes", [])
    if now["classes"] and now["classes"][: len(classes)] != classes:
        yield f"  feed.classes: {classes} in the checkpoint, {now['classes']} configured; it may only be longer"


def gathers(optimizer: Part) -> str:
    """Return what an optimizer's state depends on: its kind, and options that make it gather more."""
    kind = optimizer.kind if ":" in optimizer.kind else optimizer.kind.lower()
    more = {"amsgrad", "centered", *(["momentum"] if kind == "rmsprop" else [])}
    return " with ".join([kind, *sorted(name for name in more if optimizer.options.get(name))])

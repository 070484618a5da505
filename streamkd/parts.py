"""Names into objects: what a table of the configuration names is found, checked and called.

A part is a table with a `kind`: a name of its family, or `module:Name`. What is named is a function, and the other
keys of the table are its keyword arguments, checked against its signature.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, cast, get_type_hints

from pydantic import BaseModel, ValidationError, create_model, validate_call

from streamkd.errors import ConfigError, one_screen, reason
from streamkd.settings import Part, complaints, did_you_mean


def make(part: Part, family: ModuleType | Mapping[str, str], key: str, **given: Any) -> Any:
    """Call what `part` names with its options, types and bounds checked, and return what it makes.

    Args:
        part: the table.
        family: as for `find`.
        key: of the table, for the message.
        given: arguments that are not for the user to set; handed over where the function takes them.
    """
    factory = find(part, family, key, given=tuple(given))
    passed = {name: value for name, value in given.items() if name in parameters(factory)}
    checked = validate_call(factory) if inspect.isfunction(factory) else factory  # nothing else can be checked
    try:
        return checked(**passed, **part.options)
    except ValidationError as error:
        raise ConfigError(one_screen(complaints(error, key))) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} = {shown(part)}: {error}") from None


def checked_options(function: Callable[..., Any], part: Part, key: str) -> dict[str, Any]:
    """Return the options of `part`, held to the types and bounds that the function itself is annotated with."""
    hints = get_type_hints(function, include_extras=True) if inspect.isfunction(function) else {}
    known = {name: (hint, ...) for name, hint in hints.items() if name in part.options}
    model: type[BaseModel] = create_model(part.kind, **known)  # type: ignore[call-overload]  # fields by name, which no overload knows
    try:
        return part.options | dict(model.model_validate(part.options))
    except ValidationError as error:
        raise ConfigError(one_screen(complaints(error, key))) from None


def tried(call: Callable[[], Any], part: Part, key: str) -> Any:
    """Call what the user named; whatever it does wrong is a mistake in the configuration."""
    try:
        return call()
    except (ConfigError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of river's compiled detectors is no Exception
        raise ConfigError(f"{key} = {shown(part)}: {reason(error)}") from error


def find(
    part: Part, family: ModuleType | Mapping[str, str], key: str, *, given: Sequence[str] = ()
) -> Callable[..., Any]:
    """Return the function that `part` names, once its options are known to exist.

    Args:
        part: the table.
        family: a module whose public functions are the names, or a mapping name -> `module:Name`.
        key: of the table, for the message.
        given: arguments that are not for the user to set.
    """
    if ":" in part.kind:
        found = imported(part.kind, f"{key}.kind")
    else:
        names = family if isinstance(family, Mapping) else public_functions(family)
        if part.kind not in names:
            raise ConfigError(
                f"{key}.kind = {part.kind!r}: no such part{did_you_mean(part.kind, names)} "
                f"(there are {', '.join(sorted(names))}; one of your own is written module:Name)"
            )
        target = names[part.kind]
        found = imported(target, key) if isinstance(target, str) else target
    known = parameters(found)
    options = [name for name in known if name not in given]
    for name in part.options:
        if (known or inspect.isfunction(found)) and name not in options and not _takes_any(found):
            raise ConfigError(f"{key}.{name}: no such option of {part.kind}{did_you_mean(name, options, key)}")
    return found


def imported(name: str, key: str) -> Callable[..., Any]:
    """Import `module:Name`."""
    module, _, attribute = name.partition(":")
    try:
        inside = import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise ConfigError(f"{key} = {name!r}: cannot be imported: {reason(error)}") from error
    found = getattr(inside, attribute, None)
    if found is None:
        raise ConfigError(
            f"{key} = {name!r}: there is no {attribute} in {module}{did_you_mean(attribute, vars(inside))}"
        )
    if not callable(found):
        raise ConfigError(f"{key} = {name!r}: is not a function or class")
    return cast("Callable[..., Any]", found)


def public_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Return the functions that a family's module defines, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of what was named; none where it has no signature."""
    try:
        return dict(inspect.signature(factory).parameters)
    except ValueError:  # built-ins without a signature
        return {}


def _takes_any(factory: Callable[..., Any]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters(factory).values())


def shown(part: Part) -> str:
    """Return a part as it would be written."""
    return "{" + ", ".join(f"{k} = {v!r}" for k, v in part.model_dump().items()) + "}"

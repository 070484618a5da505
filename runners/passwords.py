"""Passwords come from the environment, and are not shown: not in messages, logs or a configuration that is printed."""

import os
import re
from collections.abc import Mapping
from typing import Any

from streamkd.errors import ConfigError

MASK = "***"
LOGIN = re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]*://[^\s/@:'\"]*):[^\s@/]+@", re.IGNORECASE)
"""Scheme, user and password of a URL."""
SECRET = re.compile(r"(password|passwd|secret|token|key)$", re.IGNORECASE)
"""Ends of the names of settings whose values are secrets; `password_env` is the name of a variable, which is none."""


def from_environment(name: str, key: str) -> str:
    """Return what an environment variable holds; empty where none is named.

    Args:
        name: of the variable.
        key: of the setting that names it.

    Raises:
        ConfigError: there is no such variable, or nothing in it.
    """
    if name and not os.environ.get(name):
        raise ConfigError(f"{key} = {name!r}: there is no such environment variable; set it")
    return os.environ[name] if name else ""


def masked(text: str) -> str:
    """Return a text with the passwords of its URLs masked."""
    return LOGIN.sub(rf"\g<before>:{MASK}@", text)


def without_secrets(value: Any, name: str = "") -> Any:
    """Return plain values, nested as they may be, without passwords.

    Args:
        value: mappings, lists, texts and numbers.
        name: of the value.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(inner, name) for inner in value]
    if isinstance(value, str):
        return MASK if value and SECRET.search(name) else masked(value)
    return value

"""`streamkd dashboards DIR`: all that Prometheus, Alertmanager and Grafana need to watch streamkd."""

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from streamkd.errors import ConfigError

SHIPPED = ("prometheus", "alertmanager", "grafana", "runbooks", "compose.yml", "README.md")
"""What of the package `monitoring` is for other programs, and not for Python."""


def main(folder: Path) -> None:
    """Write the folder.

    Raises:
        ConfigError: there is something of that name in it, or it cannot be written.
    """
    there = [name for name in SHIPPED if (folder / name).exists()]
    if there:
        raise ConfigError(f"{folder}: has {', '.join(there)} already; name another folder, or move them away first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with as_file(files("monitoring")) as source:
            for name in SHIPPED:
                copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
                copy(source / name, folder / name)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror or error}; name a folder that can") from None

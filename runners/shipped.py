"""The configurations that come with the package."""

from importlib.resources import files


def shipped() -> dict[str, str]:
    """Return them: name -> text."""
    folder = files("runners").joinpath("configurations")
    return {
        entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }

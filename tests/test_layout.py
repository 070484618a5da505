import ast
import inspect
import tomllib
from pathlib import Path

import pytest

import streamkd

ROOT = Path(__file__).parents[1]
FLOORS = {"streamkd": set(), "monitoring": {"streamkd"}, "runners": {"streamkd", "monitoring"}}
OURS = set(FLOORS)
NOT_IN_LEARNING = {"socket", "time", "datetime", "threading", "asyncio", "signal", "logging", "subprocess"}

BESIDES = {"feeds", "test", "bench", "dev"}
"""Extras that are not of one broker or format."""


def imported(path: Path) -> set[str]:
    """Return the top-level names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("floor", sorted(FLOORS))
def test_imports_go_one_way(floor: str) -> None:
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files
    for path in files:
        above = imported(path) & (OURS - FLOORS[floor] - {floor})
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_the_learning_knows_no_clock_no_socket_and_no_thread() -> None:
    for path in sorted((ROOT / "streamkd").rglob("*.py")):
        found = imported(path) & NOT_IN_LEARNING
        assert not found, f"{path.name} imports {found}"
        if path.name != "checkpoint.py":
            assert "os" not in imported(path), f"{path.name} imports os"
        assert "environ" not in path.read_text(encoding="utf-8"), path.name


def test_what_is_exported_is_what_the_package_imports_by_name() -> None:
    public = {
        name for name, value in vars(streamkd).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(streamkd.__all__)


def test_every_shipped_configuration_is_toml_and_says_what_it_is_for() -> None:
    files = sorted((ROOT / "runners" / "configurations").glob("*.toml"))
    assert {"default.toml", "demo.toml"} <= {file.name for file in files}
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text.startswith("# ")
        tomllib.loads(text)


def code_blocks(language: str) -> list[str]:
    parts = (ROOT / "README.md").read_text(encoding="utf-8").split(f"```{language}\n")[1:]
    return [part.partition("```")[0] for part in parts]


def test_the_library_example_of_the_readme_runs_and_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = code_blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102 - it is ours
    assert capsys.readouterr().out


def test_the_configuration_example_of_the_readme_is_valid() -> None:
    from runners.settings import Configuration  # noqa: PLC0415
    from streamkd.settings import validate  # noqa: PLC0415

    for example in code_blocks("toml"):
        peers = tomllib.loads((ROOT / "runners/configurations/default.toml").read_text(encoding="utf-8"))["peers"]
        validate(Configuration, {"peers": peers, **tomllib.loads(example)})


def test_the_image_has_the_clients_of_all_brokers() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert extras["feeds"] == [f"streamkd[{','.join(name for name in extras if name not in BESIDES)}]"]
    assert "pip install --no-cache-dir '/src[feeds]'" in (ROOT / "runners" / "Containerfile").read_text(
        encoding="utf-8"
    )

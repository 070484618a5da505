import re
import sys
from collections.abc import Mapping
from contextlib import suppress

import pytest

from runners import cli
from runners.methods_command import FAMILIES, Family, Method
from streamkd.parts import public_functions

METHODS = [method for family in FAMILIES for method in family.methods]


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["streamkd", "methods", *arguments])
    with suppress(SystemExit):
        cli.main()
    printed = capsys.readouterr()
    return printed.out + printed.err


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_part_that_can_be_named_is_listed_in_one_line(
    family: Family, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(monkeypatch, capsys).splitlines()
    for name in family.module if isinstance(family.module, Mapping) else public_functions(family.module):
        assert [line for line in lines if line.split()[0] == name]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.family.name}-{method.name}")
def test_every_method_tells_its_source_and_what_each_of_its_options_is(method: Method) -> None:
    assert method.summary.endswith(".")
    if not isinstance(method.family.module, Mapping):
        assert re.search(r"\(.*(\b(19|20)\d\d|articles|streamkd).*\)", method.summary)
    for name, _, description in method.options:
        assert description, f"{method.name}: {name} is not described"


def test_a_method_tells_its_formula_and_the_defaults_of_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = said(monkeypatch, capsys, "decoupled_kd")
    assert "Zhao et al. 2022" in told
    assert "kd = T^2 * (TCKD + (1 - q_y) * NCKD)" in told
    assert "others = 8.0" in told
    assert "student" not in {line.split()[0] for line in told.splitlines() if "=" in line}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("csv", ["of feeds", "label = to be set", "missing = ('',)", "delimiter = ','", "buckets = 16"]),
        ("kafka", ["of feeds", "of sinks", "topic = to be set", "on_position_lost = 'fail'"]),
        ("images", ["order = {kind = 'file'}"]),
    ],
)
def test_a_feed_tells_its_options_and_those_that_it_has_in_common_with_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, words: list[str]
) -> None:
    told = said(monkeypatch, capsys, kind)
    assert [word for word in words if word not in told] == []
    assert "refuse =" not in told


def test_one_name_in_two_families_tells_of_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = said(monkeypatch, capsys, "never")
    assert "roles.rule" in told
    assert "drift.detector" in told


def test_a_misspelt_method_is_refused_with_the_one_that_was_meant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean dist?" in said(monkeypatch, capsys, "dits")

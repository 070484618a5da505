"""What is secret is not shown."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stack import free_port
from test_commands import streamkd, table

from runners import logs
from runners.passwords import masked, without_secrets

WORDS = st.text("abcXYZ019%._-!$&*+,;=:", min_size=4)


@given(st.sampled_from(["redis", "rediss", "nats", "tls", "mqtt", "https"]), st.text("abc"), WORDS, WORDS)
def test_no_password_of_a_url_is_left_and_the_rest_is(scheme: str, user: str, password: str, before: str) -> None:
    text = f"{before} feed.url = '{scheme}://{user}:{password}@host:1/0': cannot be reached"
    assert masked(text) == f"{before} feed.url = '{scheme}://{user}:***@host:1/0': cannot be reached"


@pytest.mark.parametrize("text", ["redis://host:6379/0", "a@b.c", "http://host:1/a:b@c", "nats://user@host"])
def test_what_is_no_password_stays(text: str) -> None:
    assert masked(text) == text


def test_secrets_are_known_by_their_names() -> None:
    settings: dict[str, Any] = {
        "client": {"ssl.key.password": "sesame", "ssl.ca.location": "ca.pem"},
        "password_env": "THE_NAME",
        "servers": ["a:1", "kafka://u:sesame@b:1"],
        "shape": [1, 2],
        "token": "",
    }
    shown = without_secrets(settings)
    assert "sesame" not in json.dumps(shown)
    assert shown["client"]["ssl.ca.location"] == "ca.pem"
    assert shown["password_env"] == "THE_NAME"  # noqa: S105 - a name
    assert shown["shape"] == [1, 2]
    assert shown["token"] == ""


def test_logs_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info").info("reloaded", changed={"feed.url": "redis://u:sesame@h", "feed.password": "sesame"})
    said = capsys.readouterr().err
    assert "reloaded" in said
    assert "sesame" not in said


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("kind", ["redis", "nats", "mqtt"])
def test_no_command_shows_one(
    command: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"{kind}://me:sesame@127.0.0.1:{free_port()}"
    settings = [f"--set=feed.url={url}", "--set=http.port=0", "--set=feed.nonsense=1"]
    for some in (settings[:-1], settings):
        assert streamkd(monkeypatch, command, kind, *some) in {2, 3}
        shown = "".join(capsys.readouterr())
        assert "feed." in shown
        assert "sesame" not in shown


def test_check_shows_a_configuration_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    table(Path("d.csv"), 40)
    source = "feed={kind='iterable', source='test_passwords:pairs', arguments={password='sesame'}}"
    assert streamkd(monkeypatch, "check", "default", "--set", source, "--set=http.port=0") == 0
    shown = capsys.readouterr().out
    assert 'password = "***"' in shown
    assert "sesame" not in shown


def pairs(password: str) -> list[tuple[list[float], str]]:
    return [([float(n), float(len(password))], "ab"[n % 2]) for n in range(10)]

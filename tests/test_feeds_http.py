"""HTTP: records pushed to the feed's own port."""

import json
import resource
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from stack import PATIENCE, free_port, waited
from test_commands import fetched, started, streamkd, told
from test_warm_start import saving

from runners import session
from runners.bench.kill import RECORDS, TABLE, kill_loop, write_table
from runners.feeds import DeadLetter, conformance
from runners.feeds.conformance import Law, Stand
from runners.feeds.http_push import http
from runners.feeds.numbered import NumberedSpool, record_of
from runners.feeds.stream import StreamFeed
from runners.settings import load
from streamkd import checkpoint
from streamkd.errors import ConfigError, FeedError

COMMON: dict[str, Any] = {"label": "y", "id": "id", "max_classes": 5, "columns": ("a", "b")}


def nobody(letter: DeadLetter) -> None:
    raise AssertionError(letter.detail)


def lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def post(port: int, body: bytes, **headers: str) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    """Send a body; return status, answer and headers."""
    try:
        with urlopen(Request(f"http://127.0.0.1:{port}/v1/records", body, headers), timeout=PATIENCE) as answer:
            return answer.status, json.load(answer), dict(answer.headers)
    except HTTPError as error:
        with error:
            return error.code, json.load(error), dict(error.headers)


class Caller:
    """Posts records when somebody listens, those that came before that, too."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._open = partial(http, port=self.port, spool=folder / "spool", **COMMON)
        self._waiting: list[bytes] = []
        self._feed: StreamFeed | None = None

    def open(self, **options: Any) -> StreamFeed:
        """Open the feed, and post what waits."""
        self._feed = self._open(**{"columns": ("a", "b", *options.get("ignore", ())), **options})
        self.say(b"")
        return self._feed

    def say(self, body: bytes) -> None:
        """Post a body, now or later."""
        self._waiting += [body] if body else []
        try:
            while self._feed is not None and self._waiting:
                assert post(self.port, self._waiting[0])[0] == 202
                self._waiting.pop(0)
        except (URLError, ConnectionError):
            self._feed = None


@pytest.mark.parametrize("law", conformance.LAWS)
def test_it_keeps_the_laws_of_feeds(law: Law, tmp_path: Path) -> None:
    caller = Caller(tmp_path)
    law(
        Stand(
            open=caller.open,
            publish=lambda rows: caller.say(lines(rows)),
            spoil=lambda: caller.say(lines([{"a": "two", "b": 1, "y": "a", "id": "spoilt"}])),
        )
    )


@pytest.mark.parametrize(
    "body",
    [
        lines(conformance.rows(0, 3)),
        json.dumps(conformance.rows(0, 3)).encode(),
        json.dumps(conformance.rows(0, 3), indent=2).encode(),
        lines(conformance.rows(0, 3)).replace(b"\n", b"\r\n"),
    ],
    ids=["lines", "list", "indented list", "lines of another world"],
)
def test_json_may_be_lines_or_a_list(body: bytes, tmp_path: Path) -> None:
    caller = Caller(tmp_path)
    with_records = caller.open(refuse=nobody)
    assert post(caller.port, body)[:2] == (202, {"accepted": 3})
    batch = with_records.poll(16)
    with_records.close()
    assert batch is not None
    assert batch.ids == ("r0", "r1", "r2")


def test_msgpack_is_a_record_a_body(tmp_path: Path) -> None:
    msgpack = pytest.importorskip("msgpack")
    port = free_port()
    feed = http(port=port, spool=tmp_path, format="msgpack", refuse=nobody, **COMMON)
    for row in conformance.rows(9, 11):
        assert post(port, msgpack.packb(row))[0] == 202
    batch = feed.poll(16)
    feed.close()
    assert batch is not None
    assert batch.ids == ("r9", "r10")


def numbered(client: str, sequence: int) -> dict[str, str]:
    return {"Streamkd-Client": client, "Streamkd-Sequence": str(sequence)}


@pytest.mark.parametrize("format", ["json", "msgpack"])
def test_a_request_that_is_sent_again_is_not_taken_again(format: str, tmp_path: Path) -> None:  # noqa: A002
    """Not by another process either, nor after what it brought has left the spool."""
    port = free_port()
    body = lines(conformance.rows(0, 1, filler="x" * 10_000))
    if format == "msgpack":
        body = pytest.importorskip("msgpack").packb(json.loads(body))
    opened = partial(http, port=port, spool=tmp_path, spool_bytes=1 << 16, format=format, refuse=nobody, **COMMON)
    feed = opened()
    assert post(port, body, **numbered("one", 1))[:2] == (202, {"accepted": 1})
    assert post(port, body, **numbered("one", 1))[:2] == (202, {"accepted": 0})
    assert post(port, body, **numbered("two", 1))[:2] == (202, {"accepted": 1})
    assert post(port, body, **numbered("one", 2))[:2] == (202, {"accepted": 1})
    batch = feed.poll(16)
    assert batch is not None
    for _ in range(2):
        feed.commit(batch.position)
    assert not (tmp_path / "000000000001.lines").exists()
    feed.close()
    feed = opened()
    assert post(port, body, **numbered("two", 1))[:2] == (202, {"accepted": 0})
    assert post(port, body, **numbered("one", 2))[:2] == (202, {"accepted": 0})
    assert post(port, body, **numbered("one", 1))[0] == 409
    assert post(port, body, **numbered("one", 3))[:2] == (202, {"accepted": 1})
    feed.close()


def test_a_spool_that_cannot_be_pruned_now_is_pruned_later(tmp_path: Path) -> None:
    caller = Caller(tmp_path)
    feed = caller.open(refuse=nobody)
    spool = tmp_path / "spool"
    body = lines(conformance.rows(0, 1, filler="x" * 9_000_000))
    for sequence in range(3):
        assert post(caller.port, body, **numbered("me", sequence))[0] == 202
    batch = feed.poll(16)
    assert batch is not None
    in_the_way = spool / "clients.new"
    in_the_way.mkdir()
    for _ in range(2):
        feed.commit(batch.position)
    assert feed.poll(16) is not None
    assert len(list(spool.glob("*.lines"))) == 2
    in_the_way.rmdir()
    feed.commit(batch.position)
    assert len(list(spool.glob("*.lines"))) == 1
    feed.close()


@pytest.mark.parametrize("headers", [{"Streamkd-Client": "me"}, {"Streamkd-Sequence": "1"}, numbered("me", -1)])
def test_half_a_number_is_refused(headers: Mapping[str, str], tmp_path: Path) -> None:
    caller = Caller(tmp_path)
    feed = caller.open(refuse=nobody)
    assert post(caller.port, lines(conformance.rows(0, 1)), **headers)[0] == 400
    feed.close()


def test_of_a_request_that_a_kill_cut_short_the_rest_is_taken(tmp_path: Path) -> None:
    """At any byte of what was written of it."""
    rows = [line + b"\n" for line in lines(conformance.rows(0, 4)).splitlines()]
    whole = NumberedSpool(tmp_path / "whole")
    whole.append_once("me", 7, rows)
    whole.close()
    written = next((tmp_path / "whole").glob("*.lines")).read_bytes()
    for size in range(len(written) + 1):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "000000000001.lines").write_bytes(written[:size])
        spool = NumberedSpool(folder)
        spool.append(b"{}\n")
        come = written[:size].count(b"\n")
        assert spool.append_once("me", 7, rows) == 4 - come
        assert [record_of(line) for line, _ in spool.lines(spool.first())] == [*rows[:come], b"{}\n", *rows[come:]]
        spool.close()


def test_a_body_that_is_too_deep_is_a_dead_letter(tmp_path: Path) -> None:
    caller, refused = Caller(tmp_path), list[DeadLetter]()
    feed = caller.open(refuse=refused.append)
    assert post(caller.port, b"[" * 100_000)[0] == 202
    assert feed.poll(16) is not None
    feed.close()
    assert [letter.reason for letter in refused] == ["malformed"]


def test_what_waits_in_the_spool_is_told(tmp_path: Path) -> None:
    caller = Caller(tmp_path)
    feed = caller.open(refuse=nobody)
    caller.say(lines(conformance.rows(0, 2_000)))
    batch = feed.poll(16)
    assert feed.lag() == {"0": 2_000 - 16}
    feed.close()
    feed = caller.open(refuse=nobody)
    assert batch is not None
    feed.seek(batch.position)
    assert feed.lag() == {"0": 2_000 - 16}
    while len(feed.poll(100) or ()):
        pass
    assert feed.lag() == {"0": 0}
    feed.close()


def test_when_there_is_no_room_a_client_is_asked_to_wait_and_then_served(tmp_path: Path) -> None:
    port = free_port()
    feed = http(port=port, spool=tmp_path, spool_bytes=1 << 16, refuse=nobody, **COMMON)
    body = lines(conformance.rows(0, 100, filler="x" * 100))
    accepted = 0
    while (answer := post(port, body))[0] == 202:
        accepted += 100
    assert answer[0] == 429
    assert answer[2]["retry-after"] == "1"
    assert 300 <= accepted <= 1_000
    for _ in range(accepted // 100):
        batch = feed.poll(100)
        assert batch is not None
        assert len(batch) == 100
        feed.commit(batch.position)
    assert post(port, body)[0] == 202
    feed.close()


def filled(port: int, rows: int, **options: Any) -> list[str]:
    """Post records until so many are in the spool, or it is full; return the settings to learn them to the end."""
    feed = http(port=port, spool=Path("spool"), refuse=nobody, **COMMON, **options)
    for begin in range(0, rows, 100):
        if post(port, lines(conformance.rows(begin, begin + 100, filler="x" * 100)))[0] != 202:
            break
    feed.close()
    given = {"kind": "http", "port": port, "spool": "spool", "columns": ["a", "b"], "label": "y", **options}
    return [*(f"feed.{key}={value}" for key, value in given.items()), "checkpoint.directory=saved", "http.port=0"]


def test_what_came_after_the_checkpoint_before_the_newest_can_be_learned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [*filled(free_port(), 1_400, spool_bytes=1 << 18), "feed.follow=false", "checkpoint.every_records=500"]
    command = ["run", "default", *(f"--set={setting}" for setting in settings)]
    assert streamkd(monkeypatch, *command) == 0
    assert not (tmp_path / "spool" / "000000000001.lines").exists()
    newest, before = checkpoint.found(Path("saved"))[:2]
    assert checkpoint.about(before)["position"]["place"]["segment"] < 4
    assert max((tmp_path / "spool").glob("*.lines")).stem == "000000000004"
    (newest / "tensors.pt").write_bytes(b"nothing")
    assert streamkd(monkeypatch, *command) == 0
    assert checkpoint.about(checkpoint.found(Path("saved"))[0])["records"] == 1_400


def test_a_spool_that_is_full_of_what_is_in_the_newest_checkpoint_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that saved it may have been killed before it could tell."""
    monkeypatch.chdir(tmp_path)
    settings = filled(port := free_port(), 1_000, spool_bytes=1 << 16)
    command = ["run", "default", *(f"--set={setting}" for setting in settings)]
    assert streamkd(monkeypatch, *command, "--set=feed.follow=false") == 0
    made = session.start(load("default", settings))
    assert post(port, lines(conformance.rows(0, 1)))[0] == 429
    with saving(made):
        assert post(port, lines(conformance.rows(0, 1)))[0] == 202
    made.close()


def test_a_disk_that_is_full_is_told_and_the_record_is_not_taken(tmp_path: Path) -> None:
    port = free_port()
    feed = http(port=port, spool=tmp_path, refuse=nobody, **COMMON)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, before[1]))
    try:
        for _ in range(2):  # what a second attempt leaves may be another thing
            post(port, lines(conformance.rows(0, 3)))
        status, answer, headers = post(port, lines(conformance.rows(0, 3)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, headers["retry-after"]) == (503, "1")
    assert "cannot be written" in answer["error"]
    assert post(port, lines(conformance.rows(3, 5)))[0] == 202
    batch = feed.poll(16)
    feed.close()
    assert batch is not None
    assert batch.ids == ("r3", "r4")


def test_without_the_token_nothing_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"feed\.token_env = 'FEED_TOKEN': there is no such"):
        http(spool=tmp_path, token_env="FEED_TOKEN", refuse=nobody, **COMMON)  # noqa: S106 - a name
    monkeypatch.setenv("FEED_TOKEN", "open sesame")
    port = free_port()
    feed = http(port=port, spool=tmp_path, token_env="FEED_TOKEN", refuse=nobody, **COMMON)  # noqa: S106 - a name
    body = lines(conformance.rows(0, 1))
    assert post(port, body)[0] == 401
    assert post(port, body, Authorization="Bearer close sesame")[0] == 401
    assert post(port, body, Authorization="Bearer open sesame")[0] == 202
    assert post(port, b" ", Authorization="Bearer open sesame")[0] == 400
    feed.close()


def test_of_two_on_one_spool_the_second_is_refused_and_what_the_first_takes_stays(tmp_path: Path) -> None:
    caller = Caller(tmp_path)
    feed = caller.open(refuse=nobody)
    with pytest.raises(ConfigError, match=r"feed\.spool = .*: another process takes records in there; end it, or name"):
        http(port=free_port(), spool=tmp_path / "spool", refuse=nobody, **COMMON)
    assert post(caller.port, lines(conformance.rows(0, 3)))[0] == 202
    batch = feed.poll(16)
    assert batch is not None
    assert batch.ids == ("r0", "r1", "r2")
    feed.close()
    http(port=caller.port, spool=tmp_path / "spool", refuse=nobody, **COMMON).close()


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    port = free_port()
    feed = http(port=port, spool=tmp_path / "one", refuse=nobody, **COMMON)
    with pytest.raises(FeedError, match=rf"feed\.port = {port}: cannot listen on .*in use; .*--set feed\.port=N"):
        http(port=port, spool=tmp_path / "two", refuse=nobody, **COMMON)
    feed.close()


@pytest.mark.slow
def test_from_the_spool_a_killed_run_ends_where_an_unbroken_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(TABLE)
    columns, *rows = TABLE.read_text(encoding="utf-8").splitlines()
    port, named = free_port(), json.dumps(columns.split(","))
    feed = http(
        port=port,
        spool=Path("spool"),
        format="csv",
        columns=columns.split(","),
        label="y",
        max_classes=5,
        refuse=nobody,
    )
    for sequence in range(0, RECORDS, 100):
        body = "\n".join(rows[sequence : sequence + 100]).encode()
        assert post(port, body, **numbered("me", sequence))[0] == 202
    feed.close()
    given = ["feed.kind=http", f"feed.port={port}", "feed.spool=spool", "feed.format=csv", f"feed.columns={named}"]
    outcome = kill_loop("default", 4, seed=1, feed=[*given, "feed.label=y", "feed.follow=false"])
    assert outcome.equal == outcome.ends >= 1


@pytest.mark.slow
def test_whatever_was_sent_until_it_was_answered_is_learned_once_though_the_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    port, kills, answered = free_port(), 2, [0]
    given = ["feed.kind=http", f"feed.port={port}", "feed.spool=spool", "feed.columns=['a', 'b']", "feed.label=y"]
    given += ["checkpoint.directory=saved", "checkpoint.every_records=160", "http.port=0", "log.level=info"]
    command = ["run", "default", *(f"--set={setting}" for setting in given)]

    def push() -> None:
        """Post until nobody answers, beginning with what was not answered."""
        with suppress(URLError, ConnectionError, HTTPException):  # the latter where an answer was cut short
            for _ in range(500):
                assert post(port, lines(conformance.rows(0, 20)), **numbered("me", answered[0]))[0] == 202
                answered[0] += 1

    for _ in range(kills):
        with started(*command) as daemon:
            told(daemon, "running")
            client = Thread(target=push)
            client.start()
            told(daemon, "checkpoint")
            daemon.kill()
            client.join()
    with started(*command) as daemon:
        at = told(daemon, "listening")["port"]
        told(daemon, "running")
        body = lines(conformance.rows(0, 20))
        assert post(port, body, **numbered("me", answered[0]))[0] == 202
        sent = 20 * (answered[0] + 1)
        assert waited(lambda: json.loads(fetched(at, "/v1/status")[1]).get("records", 0) >= sent)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE) == 0
    assert checkpoint.about(checkpoint.found(Path("saved"))[0])["records"] == sent

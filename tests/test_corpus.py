"""Broken and borderline inputs, each given to `check`, `eval` and `run`: nothing is lost, and nobody sees a traceback.

What is given is written out below, as data. The law: the exit code is the right one; a mistake is told on one screen;
and every line of a file is learned, predicted without a label, blank, or in the dead letters with a reason.
"""

import gzip
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runners import cli
from runners.feeds import REASONS

CONFIGURATION = b"""
max_classes = 5

[feed]
kind = "csv"
path = "d.csv"
label = "y"

[[peers]]
name = "one"
model = { widths = [8] }

[[peers]]
name = "two"
model = { widths = [4] }

[replay]
capacity = 50
updates = 1
records = 4

[http]
port = 0
"""
HEADER = b"a,b,y\n"
GOOD = [b"%d,%.1f,%s\n" % (k % 7, k % 5 - 2.5, b"xz"[k % 2 :][:1]) for k in range(40)]
OBJECTS = [b'{"a": %d, "b": %.1f, "y": "%s"}\n' % (k % 7, k % 5 - 2.5, b"xz"[k % 2 :][:1]) for k in range(40)]
ALL = len(GOOD)
MIB = 1 << 20


def csv(*odd: bytes) -> bytes:
    """Return a good file with odd lines in its middle."""
    return b"".join([HEADER, *GOOD[:20], *odd, *GOOD[20:]])


def objects(*odd: bytes) -> bytes:
    return b"".join([*OBJECTS[:20], *odd, *OBJECTS[20:]])


def bad_crc(content: bytes) -> bytes:
    return gzip.compress(content)[:-8] + b"\0" * 8


class Shown:
    """What a command showed, held against the law for messages: no traceback, no mistake longer than a screen."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        assert "Traceback" not in err + out
        assert not code or len(err.splitlines()) < 25

    def tells(self, *words: str) -> None:
        """Assert that each is said, wherever lines are broken."""
        said = "".join(self.err.split())
        for word in words:
            assert "".join(word.split()) in said, self.err


class Commands:
    """The three commands, on `d.csv` (or another file) in a folder of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: "Given") -> None:
        self._monkeypatch, self._capsys, self._given = monkeypatch, capsys, given

    def call(self, *arguments: str) -> Shown:
        """Call any command."""
        self._monkeypatch.setattr(sys, "argv", ["streamkd", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Shown(code, *self._capsys.readouterr())

    def check(self) -> Shown:
        """Call `streamkd check`."""
        return self.call("check", "c.toml", *self._settings("check"))

    def eval(self) -> Shown:
        """Call `streamkd eval`."""
        return self.call("eval", "c.toml", self._given.file, "--json", "-", *self._settings("eval"))

    def run(self) -> Shown:
        """Call `streamkd run`."""
        return self.call("run", "c.toml", *self._settings("run"))

    def inspect(self) -> dict[str, Any]:
        """Return what is in the newest checkpoint."""
        found: dict[str, Any] = json.loads(self.call("inspect", "checkpoints", "--json").out)
        return found

    def _settings(self, command: str) -> list[str]:
        given = [f"feed.path={self._given.file}", f"dead_letters.path={command}.jsonl", *self._given.settings]
        if self._given.kind:
            given.insert(0, f"feed.kind={self._given.kind}")
        return [f"--set={pair}" for pair in given]


def letters(path: str) -> list[dict[str, Any]]:
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def lines_of(content: bytes) -> int:
    return content.count(b"\n") + (not content.endswith(b"\n") and bool(content))


@dataclass(frozen=True)
class Given:
    """An input.

    Attributes:
        name: of the case.
        content: of the file; None for none.
        file: its name.
        kind: of the feed.
        settings: besides those of `CONFIGURATION`.
    """

    name: str
    content: bytes | None = None
    file: str = "d.csv"
    kind: str = ""
    settings: tuple[str, ...] = ()

    def put(self) -> None:
        """Write it down, with the configuration."""
        Path("c.toml").write_bytes(CONFIGURATION)
        if self.content is not None:
            Path(self.file).write_bytes(self.content)


@dataclass(frozen=True)
class Read(Given):
    """A file that is read to its end.

    Attributes:
        learned: records learned or predicted.
        unlabelled: of these, predicted alone.
        refused: by reason.
        idle: lines that are no records: the header, blank lines, and newlines inside of quotes.
        text: what can be read of the file, where it is not its content.
        unread: dead letters that stand for no line.
    """

    learned: int = ALL
    unlabelled: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    idle: int = 1
    text: bytes | None = None
    unread: int = 0


@dataclass(frozen=True)
class Refused(Given):
    """A file that is refused at the start, with an exit code and words."""

    code: int = 2
    words: tuple[str, ...] = ()


def jsonl(case: type[Read], name: str, content: bytes, **expected: Any) -> Read:
    return case(name, content, "d.jsonl", "jsonl", **{"idle": 0, **expected})


BAD_BYTES = [b"1,2,\xff\n", b"\xc0\x80,2,x\n", b"1,2,\xed\xa0\x80\n", b"1,2,\xe2\x82\n", b"\x80\n"]
NOT_FINITE = [b"nan,2,x\n", b"1,inf,x\n", b"-inf,2,x\n", b"1e400,2,x\n", b"1,1e39,x\n", b"1," + b"9" * 5000 + b",x\n"]
NOT_NUMBERS = [b"1_000,2,x\n", b"0x10,2,x\n", b"1,\xe2\x88\x922,x\n", b"1,2 3,x\n", b"1,--2,x\n", b'"1""",2,x\n']
ODD_NUMBERS = [b" 1 ,\t2,x\n", b"+1,-.5e-3,x\n", b"1e-400,00,x\n", b"\xd9\xa1,2,x\n"]
WIDTHS = [b"1\n", b"1,2\n", b"1,2,x,\n", b"1,2,x,4,5\n", b"# a remark\n", b"a;b;y\n"]
MARKUP = [b"1,2,[/x]\n", b"1,2,[red]\n", b"1,2,\x1b[31m\n"]
TEXT = b"".join([HEADER, *GOOD])

CSV = [
    Read("nothing wrong", TEXT),
    Read("a byte order mark", b"\xef\xbb\xbf" + TEXT),
    Read("lines that are not UTF-8", csv(*BAD_BYTES), refused={"encoding": 5}),
    Read("latin-1 in some labels", csv(b"1,2,caf\xe9\n", b"3,4,na\xefve\n"), refused={"encoding": 2}),
    Read("a quote that is not closed", csv(b'7,"8,x\n'), refused={"malformed": 1}),
    Read("a quote that is not closed at the end", TEXT + b'7,"8,x', refused={"malformed": 1}),
    Read("two quotes that are not closed", csv(b'7,8" pipe,x\n', b'7,8" pipe,x\n'), refused={"malformed": 2}),
    Read("newlines in a quoted number", csv(b'1,"2\n\n3",x\n'), refused={"not_a_number": 1}),
    Read("newlines in a quoted label", csv(b'1,2,"x\n\nz"\n'), learned=ALL + 1, idle=3),
    Read("a header in quotes", b'"a","b ""q""",y\n' + b"".join(GOOD)),
    Read("NUL bytes in cells", csv(b"1\0,2,x\n", b"1,2,\0\n"), learned=ALL + 1, refused={"not_a_number": 1}),
    Read("a line of 2 MiB", csv(b"1," + b"9" * 2 * MIB + b",x\n"), refused={"too_long": 1}),
    Read("a last line of 2 MiB", TEXT + b"1" * 2 * MIB, refused={"too_long": 1}),
    Read("a cell of 200 kB", csv(b"1,2," + b"x" * 200_000 + b"\n"), refused={"malformed": 1}),
    Read("numbers that are not finite", csv(*NOT_FINITE), refused={"not_finite": 6}),
    Read("cells that are no numbers", csv(*NOT_NUMBERS), refused={"not_a_number": 6}),
    Read("numbers written oddly", csv(*ODD_NUMBERS), learned=ALL + 4),
    Read("cells that are empty", csv(b",,x\n", b"  ,2,z\n", b",,\n"), learned=ALL + 3, unlabelled=1),
    Read("rows too short and too long", csv(*WIDTHS), refused={"width": 6}),
    Read("blank lines", b"\n\r\n" + csv(b"\n", b"  \t\n") + b"\n\n", idle=7),
    Read("labels in some records only", TEXT.replace(b"x\n", b"\n"), unlabelled=20),
    Read("labels from the middle on", HEADER + b"1,2,\n" * 20 + b"".join(GOOD), learned=ALL + 20, unlabelled=20),
    Read("one class only", TEXT.replace(b"z\n", b"x\n")),
    Read(
        "more classes than there may be",
        HEADER + b"".join(b"1,%d,l%d\n" % (k, k % 7) for k in range(70)),
        learned=50,
        refused={"too_many_classes": 20},
    ),
    Read(
        "labels that are not in the list",
        csv(b"1,2,w\n"),
        refused={"unknown_class": 1},
        settings=("feed.classes=['x', 'z']",),
    ),
    Read("CRLF", TEXT.replace(b"\n", b"\r\n")),
    Read("CR within lines", csv(b"1,2,x\r3,4,z\n", b"1,2\r,x\n", b"1,2,x\r\r\n"), refused={"malformed": 3}),
    Read("no newline at the end", TEXT[:-1]),
    Read("half a row at the end", TEXT + b"1,", refused={"width": 1}),
    Read("a comma at the end of every line", TEXT.replace(b"\n", b",\n")),
    Read("the header again and again", csv(HEADER, HEADER), refused={"not_a_number": 2}),
    Read("a first record that is broken", HEADER + b"?\n" + b"".join(GOOD), refused={"width": 1}),
    Read("labels that look like markup", csv(*MARKUP), learned=ALL + 3),
    Read("columns that look like markup", TEXT.replace(b"a,b", b"[/a],[red]")),
    Read("a semicolon, as told", TEXT.replace(b",", b";"), settings=("feed.delimiter=;",)),
    Read("gzip", gzip.compress(TEXT), "d.csv.gz", text=TEXT),
    Read("gzip of two members", gzip.compress(TEXT[:300]) + gzip.compress(TEXT[300:]), text=TEXT),
    Read("called gzip", TEXT, "d.csv.gz"),
    Read("gzip with a bad sum", bad_crc(TEXT), text=TEXT, refused={"truncated": 1}, unread=1),
    Read("gzip with garbage after it", gzip.compress(TEXT) + b"more", text=TEXT, refused={"truncated": 1}, unread=1),
    Read(
        "gzip that breaks off within quotes",
        bad_crc(TEXT + b'1,"2,x\n' + b"".join(GOOD)),
        text=TEXT + b'1,"2,x\n' + b"".join(GOOD),
        learned=2 * ALL,
        refused={"malformed": 1, "truncated": 1},
        unread=1,
    ),
    Read("labels that come later", TEXT, settings=("labels.delay=7",)),
    Read("labels that come after the end", TEXT, settings=("labels.delay=1000",)),
    Refused("latin-1 in the header", TEXT.replace(b"b,", b"\xe9,"), code=3, words=("feed.path", "UTF-8", "convert")),
    Refused("UTF-16", TEXT.decode().encode("utf-16"), code=3, words=("feed.path", "UTF-8", "convert")),
    Refused(
        "UTF-16 without its mark", TEXT.decode().encode("utf-16-le"), code=3, words=("feed.path", "NUL", "convert")
    ),
    Refused("a PNG", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20, code=3, words=("feed.path", "UTF-8")),
    Refused("only CR", TEXT.replace(b"\n", b"\r"), code=3, words=("feed.path", "header", "newline")),
    Refused(
        "a newline in the header", b'"a\nb",b,y\n' + b"".join(GOOD), code=3, words=("feed.path", "header", "one line")
    ),
    Refused("a header of 2 MiB", b"a" * 2 * MIB + TEXT, code=3, words=("feed.path", "header", "bytes")),
    Refused("columns with names of 100 kB", TEXT.replace(b"b,y", b"b" * 100_000 + b",w"), words=("feed.label = 'y'",)),
    Refused("two columns of one name", TEXT.replace(b"a,b", b"a,a"), words=("'a'", "rename")),
    Refused("an empty file", b"", code=3, words=("feed.path = 'd.csv'", "empty")),
    Refused("blank lines alone", b"\n \n\r\n", code=3, words=("feed.path = 'd.csv'", "empty")),
    Refused("a header alone", HEADER, code=3, words=("feed.path = 'd.csv'", "no record")),
    Refused("a label alone", b"y\n" + b"x\nz\n" * 30, words=("no column is left", "'y'")),
    Refused("no label column", TEXT.replace(b"y\n", b"w\n"), words=("feed.label = 'y'", "'w'")),
    Refused("no header", b"".join(GOOD), words=("feed.label = 'y'", "no such column", "'0'")),
    Refused("labels that are all empty", HEADER + b"1,2,\n" * 40, words=("feed.label = 'y'", "name the column")),
    Refused("nothing that can be used", HEADER + b"foo,2,x\n" * 40, words=("line 2", "'foo'", "feed.categorical")),
    Refused(
        "labels of 100 kB, not in the list",
        HEADER + b"1,2," + b"x" * 100_000,
        settings=("feed.classes=['x']",),
        words=("feed.classes",),
    ),
    Refused("a semicolon, untold", TEXT.replace(b",", b";"), words=("feed.label = 'y'", 'feed.delimiter = ";"')),
    Refused("gzip of nothing", gzip.compress(b""), code=3, words=("feed.path = 'd.csv'", "empty")),
    Refused("gzip that breaks off at once", gzip.compress(TEXT)[:12], code=3, words=("feed.path", "breaks off")),
    Refused("two bytes of gzip", b"\x1f\x8b", code=3, words=("feed.path", "breaks off")),
    Refused("no file", None, code=3, words=("feed.path = 'd.csv'", "check the path")),
    Refused("a folder", None, ".", "csv", code=3, words=("feed.path = '.'", "not a file")),
    Refused("a name too long", None, "d" * 300 + ".csv", code=3, words=("feed.path", "too long")),
    Refused("JSON called CSV", b"".join(OBJECTS), words=("feed.label = 'y'", "feed.kind = 'jsonl'")),
    Refused(
        "a shape that does not fit", TEXT, settings=("feed.shape=[3, 3]",), words=("feed.shape = [3, 3]", "leave it")
    ),
]

SCALARS = [b"1\n", b'"x"\n', b"null\n", b"true\n", b"[]\n", b'[{"a": 1, "b": 2, "y": "x"}]\n']
NOT_JSON = [
    b"{\n",
    b"{'a': 1, 'b': 2, 'y': 'x'}\n",
    b'{"a": 1, "b": 2, "y": "x",}\n',
    b'{"a": 01}\n',
    b"\xef\xbb\xbf\n",
]
DEEP = [mark * 100_000 + b"\n" for mark in (b"[", b'{"a":')]
NESTED = [
    b'{"a": %s%s, "b": 2, "y": "x"}\n' % (b"[" * 100, b"]" * 100),
    b'{"a": [1], "b": 2, "y": "x"}\n',
    b'{"a": {"b": 1}, "b": 2, "y": "x"}\n',
]
LITERALS = [b'{"a": NaN, "b": 2, "y": "x"}\n', b'{"a": 1, "b": -Infinity, "y": "x"}\n', b'{"a": 1, "b": 2, "y": NaN}\n']
HUGE = [b'{"a": 1%s, "b": 2, "y": "x"}\n' % (b"0" * digits) for digits in (400, 39)]
MEANT = [
    b'{"a": true, "b": false, "y": true}\n',
    b'{"a": "1.5", "b": -0, "y": 1}\n',
    b'{"a": 1E2, "b": null, "y": 0.5}\n',
]
SURROGATES = [b'{"a": 1, "b": 2, "y": "\\ud800"}\n', b'{"a": 1, "b": 2, "\\udfff": 3, "y": "x"}\n']

JSON = [
    jsonl(Read, "good objects", b"".join(OBJECTS)),
    jsonl(Read, "objects after a byte order mark", b"\xef\xbb\xbf" + b"".join(OBJECTS)),
    jsonl(Read, "values that are no objects", objects(*SCALARS), refused={"malformed": 6}),
    jsonl(Read, "lines that are not JSON", objects(*NOT_JSON), refused={"malformed": 5}),
    jsonl(Read, "100,000 brackets", objects(*DEEP), refused={"malformed": 2}),
    jsonl(Read, "nested values", objects(*NESTED), refused={"not_a_number": 3}),
    jsonl(
        Read,
        "keys missing, and keys too many",
        objects(b'{"y": "x"}\n', b'{"a": 1, "c": 7, "y": "x"}\n'),
        learned=ALL + 2,
    ),
    jsonl(Read, "no label key in some", objects(b"{}\n", b'{"a": 1, "b": 2}\n'), refused={"no_label_column": 2}),
    jsonl(Read, "a key twice", objects(b'{"a": 1, "a": 2, "b": 3, "y": "x"}\n'), learned=ALL + 1),
    jsonl(Read, "NaN and Infinity", objects(*LITERALS), refused={"not_finite": 3}),
    jsonl(Read, "integers of 40 and 400 digits", objects(*HUGE), refused={"not_finite": 2}),
    jsonl(Read, "an integer of 5,000 digits", objects(HUGE[0].replace(b"0", b"0" * 20)), refused={"malformed": 1}),
    jsonl(Read, "booleans, and numbers in quotes", objects(*MEANT), learned=ALL + 3),
    jsonl(
        Read, "labels that are null", objects(*[b'{"a": 1, "b": 2, "y": null}\n'] * 3), learned=ALL + 3, unlabelled=3
    ),
    jsonl(Read, "labels that are tables", objects(b'{"a": 1, "b": 2, "y": {"x": 1}}\n'), refused={"malformed": 1}),
    jsonl(Read, "half of a character", b"".join([*SURROGATES, *OBJECTS]), learned=ALL + 2),
    jsonl(
        Read,
        "half of a character as a number",
        objects(b'{"a": "\\ud800", "b": 2, "y": "x"}\n'),
        refused={"not_a_number": 1},
    ),
    jsonl(Read, "half an object at the end", b"".join(OBJECTS)[:-9], learned=ALL - 1, refused={"malformed": 1}),
    jsonl(Read, "two objects on a line", objects(OBJECTS[0][:-1] + OBJECTS[1]), refused={"malformed": 1}),
    jsonl(Read, "CRLF and blank lines", b"\r\n" + objects(b"\n", b" \n").replace(b"\n", b"\r\n"), idle=3),
    jsonl(Read, "an object of 2 MiB", objects(b'{"a": "%s"}\n' % (b"9" * 2 * MIB)), refused={"too_long": 1}),
    jsonl(Read, "objects that are not UTF-8", objects(b'{"a": 1, "b": 2, "y": "\xe9"}\n'), refused={"encoding": 1}),
    jsonl(
        Read,
        "an array over several lines",
        b"[\n" + b",\n".join(o[:-1] for o in OBJECTS) + b"\n]\n",
        learned=1,
        refused={"malformed": ALL + 1},
    ),
    jsonl(
        Read,
        "objects in gzip with a bad sum",
        bad_crc(b"".join(OBJECTS)),
        text=b"".join(OBJECTS),
        refused={"truncated": 1},
        unread=1,
    ),
    Refused(
        "an array on one line",
        b"[" + b",".join(o[:-1] for o in OBJECTS) + b"]",
        "d.jsonl",
        "jsonl",
        code=3,
        words=("feed.path = 'd.jsonl'", "no JSON object", "one object a line"),
    ),
    Refused(
        "an object over several lines",
        b'{\n"a": 1,\n"y": 2\n}\n' * 20,
        "d.jsonl",
        "jsonl",
        code=3,
        words=("no JSON object", "one object a line"),
    ),
    Refused(
        "objects parted by CR",
        b"".join(OBJECTS).replace(b"\n", b"\r"),
        "d.jsonl",
        "jsonl",
        code=3,
        words=("no JSON object",),
    ),
    Refused("no object", b"", "d.jsonl", "jsonl", code=3, words=("feed.path = 'd.jsonl'", "empty")),
    Refused("CSV called JSON", TEXT, "d.jsonl", "jsonl", code=3, words=("no JSON object", "feed.kind = 'csv'")),
    Refused("objects with a label alone", b'{"y": 1}\n' * 40, "d.jsonl", "jsonl", words=("no column is left", "'y'")),
    Refused(
        "objects in UTF-16",
        b"".join(OBJECTS).decode().encode("utf-16"),
        "d.jsonl",
        "jsonl",
        code=3,
        words=("no JSON object",),
    ),
]


@dataclass(frozen=True)
class Mistake(Given):
    """A configuration that does not do, with a file that does.

    Attributes:
        configuration: the TOML file; None for none.
        codes: of `check`, `eval` and `run`.
        words: said by those that fail.
        beside: other files, by name; a folder where the content is None.
    """

    content: bytes | None = TEXT
    configuration: bytes | None = CONFIGURATION
    codes: tuple[int, int, int] = (2, 2, 2)
    words: tuple[str, ...] = ()
    beside: Mapping[str, bytes | None] = field(default_factory=dict)

    def put(self) -> None:
        """Write all of it down."""
        super().put()
        Path("c.toml").unlink()
        if self.configuration is not None:
            Path("c.toml").write_bytes(self.configuration)
        for name, content in self.beside.items():
            if content is None:
                Path(name).mkdir(parents=True)
            else:
                Path(name).write_bytes(content)


def toml(name: str, configuration: bytes | None, *words: str, **more: Any) -> Mistake:
    return Mistake(name, configuration=configuration, words=words, **more)


def wrong(setting: str, *words: str, **more: Any) -> Mistake:
    """Return a case of one setting that does not do; its key is said."""
    key = setting.partition("=")[0]
    return Mistake(f"{setting:.60}", settings=(setting,), words=(key, *words), **more)


def own(name: str, code: str, *words: str, key: str = "peers.0.model", **more: Any) -> Mistake:
    """Return a case of a part of the user's own, a model if no `key` says else, named `Own` in a module of its own."""
    module = f"own_{name.replace(' ', '_').replace(chr(39), '')}"
    return Mistake(
        name,
        settings=(f"{key}={{ kind = '{module}:Own' }}",),
        words=words,
        beside={f"{module}.py": code.encode()},
        **more,
    )


FINE = (0, 0, 0)
NOT_EVAL = (2, 0, 2)
FLAKY = """
import torch

class Own(torch.nn.Linear):
    def __init__(self, shape, classes):
        super().__init__(shape[0], classes)

    def forward(self, x):
        if len(x) > 10:
            raise ZeroDivisionError("worn out")
        return super().forward(x)
"""

FAILING = b"""
class Own(DriftingFeed):
    def __init__(self, path):
        super().__init__(100, 0)

    def poll(self, records):
        raise RuntimeError("no server")
"""

CONFIGURATIONS = [
    toml("an empty file of settings", b"", "peers: missing"),
    toml("not TOML", b"peers = [", "c.toml", "is not TOML"),
    toml("a key twice", b"batch = 1\nbatch = 2\n" + CONFIGURATION, "c.toml", "is not TOML", "line 2"),
    toml("settings that are not UTF-8", CONFIGURATION + b"# \xff", "c.toml", "UTF-8"),
    toml("settings in UTF-16", CONFIGURATION.decode().encode("utf-16"), "c.toml", "UTF-8"),
    toml("an integer of 5,000 digits", b"batch = " + b"9" * 5000, "c.toml", "is not TOML"),
    toml("brackets by the thousand", b"batch = " + b"[" * 5000, "c.toml", "is not TOML"),
    toml("no file of settings", None, "c.toml", "no such file", "default"),
    toml("a folder of settings", None, "c.toml", "no such file", beside={"c.toml": None}),
    toml("2 MiB of remarks", (b"#" + b" nothing" * 128 + b"\n") * 2048 + CONFIGURATION, codes=FINE),
    toml("settings with CRLF", CONFIGURATION.replace(b"\n", b"\r\n"), codes=FINE),
    wrong("bacth=3", "no such setting", "did you mean batch?"),
    wrong("peers.0.modle={}", "did you mean peers.0.model?"),
    wrong("peers.0.optimizer={ kind = 'sgd', lrr = 1 }", "lrr", "did you mean lr?"),
    wrong("batch=many", "'many'", "integer"),
    wrong("batch=16.5", "16.5", "integer"),
    wrong("batch=0", "0", "greater than or equal to 1"),
    wrong("seed=-1", "-1", "greater than or equal to 0"),
    wrong("seed=2147483648", "less than"),
    wrong("peers=3", "3", "write a list"),
    Mistake("a peer that is not there", settings=("peers.7.name=x",), words=("peers.7", "there are 2")),
    Mistake("a feed that is no table", settings=("feed=3",), words=("feed",)),
    wrong("feed.kind=cvs", "did you mean csv?"),
    wrong("feed.kind=[1]", "write text, in quotes"),
    wrong("feed.max_classes=3", "no such option"),
    wrong("log.level=loud", "'loud'", "'info'"),
    wrong("device=tpu", "'tpu'", "auto"),
    wrong("max_classes=1", "1", "greater than or equal to 2"),
    wrong("http.stalled_seconds=nan", "nan"),
    wrong("replay.alpha=nan", "nan"),
    wrong("served.gamma=inf", "inf"),
    wrong("inputs.clip=-inf", "-inf"),
    wrong("checkpoint.every_seconds=nan", "nan"),
    wrong("drift.rate_boost=0.5", "0.5", "greater than or equal to 1"),
    Mistake(
        "a negative rate", settings=("peers.0.optimizer.lr=-1",), words=("peers.0.optimizer", "lr = -1", "Invalid")
    ),
    wrong("peers.0.optimizer.lr=nan", "not a finite number"),
    wrong("peers.0.optimizer.lr=inf", "not a finite number"),
    wrong("peers.0.optimizer.kind=sdg", "no such optimizer", "did you mean sgd?"),
    wrong("peers.0.name=two", "taken"),
    wrong("peers.0.name=served", "taken"),
    wrong("peers.0.model={ kind = 'mpl' }", "no such model", "did you mean mlp?"),
    wrong("peers.0.model={ kind = 'no_such_module:Net' }", "no_such_module", "cannot be imported"),
    wrong("peers.0.model={ kind = 'math:Net' }", "there is no Net in math"),
    wrong("peers.0.model={ kind = 'math:pi' }", "is not a function or class"),
    wrong("peers.0.model={ kind = 'builtins:dict' }", "not a torch.nn.Module"),
    wrong("peers.0.model={ kind = ':' }", "cannot be imported"),
    wrong("peers.0.model={ widths = [-1] }", "widths.0 = -1", "greater than or equal to 1"),
    wrong("peers.0.model={ widths = ['wide'] }", "widths.0 = 'wide'", "integer"),
    wrong("peers.0.model={ widths = [1000000000000000] }", "widths = [1000000000000000]", "memory"),
    own("raises at import", "raise ZeroDivisionError('at once')", "ZeroDivisionError", "at once"),
    own("raises when called", "def Own():\n    raise KeyError('late')", "KeyError", "late"),
    own("raises on larger batches", FLAKY, "ZeroDivisionError: worn out", "streamkd check", codes=(0, 5, 5)),
    wrong("distillation.temperature={ kind = 'constant', value = 0 }", "the least"),
    wrong("drift.detector={ kind = 'adwin', delta = 7 }", "delta"),
    wrong("distillation.scheme=leder", "'leder'", "'leader'"),
    wrong("labels.delay=20000", "20000", "pending_capacity"),
    wrong("feed.classes=['x', 'x']", "'x' is there twice"),
    wrong("feed.classes=['a', 'b', 'c', 'd', 'e', 'f']", "raise max_classes"),
    wrong("feed.ignore=y", "'y'", "feed.label has it, too"),
    wrong("feed.categorical=y", "'y'", "feed.label has it, too"),
    Mistake(
        "a column ignored and categorical",
        settings=("feed.ignore=a", "feed.categorical=a"),
        words=("'a'", "feed.ignore has it, too"),
    ),
    wrong("feed.delimiter=", "delimiter", "at least 1"),
    wrong("feed.delimiter=;;", "';;'", "at most 1"),
    wrong('feed.delimiter="\\n"', "'\\n'"),
    wrong('feed.delimiter="\\""'),
    wrong("feed.shape=[-1]", "-1"),
    wrong("feed.buckets=1", "1", "greater than or equal to 2"),
    Mistake("deterministic on a GPU", settings=("deterministic=true", "device=cuda"), words=("device = 'cuda'", "cpu")),
    wrong("feed.path=", "not a file", codes=(2, 0, 3)),
    wrong("feed.path=below", "not a file", codes=(2, 0, 3), beside={"below": None}),
    Mistake(
        "NUL in a path", settings=('feed.path="a\\u0000b"',), codes=NOT_EVAL, words=("path = 'a\\x00b'", "null byte")
    ),
    wrong("dead_letters.path=below", "cannot be written", beside={"below": None}),
    wrong("dead_letters.path=d.csv", "'d.csv'", "feed.path"),
    wrong("dead_letters.max_share=0", "0", "greater than 0"),
    wrong("checkpoint.directory=d.csv", "'d.csv'", "cannot be written", codes=NOT_EVAL),
    wrong("checkpoint.keep=0", "0", "greater than or equal to 1"),
    wrong("http.port=65536", "65536", "less than or equal to 65535"),
    wrong("http.port=-1", "-1", "greater than or equal to 0"),
    Mistake(
        "a checkpoint that is not whole",
        codes=(2, 0, 4),
        words=("checkpoints",),
        beside={"checkpoints/step-000000000001": None},
    ),
    wrong("dead_letters.path=" + "x" * 300, "cannot be written"),
    wrong('dead_letters.path="a\\u0000b"', "cannot be written"),
    wrong("feed.label=" + "q" * 5000, "no such column", codes=(2, 2, 2)),
    Mistake(
        "a feed of one's own that cannot be opened",
        codes=(2, 3, 3),
        settings=("feed.kind=own_feed:Own",),
        words=("feed.kind = 'own_feed:Own'", "RuntimeError: no server"),
        beside={"own_feed.py": b"def Own(path):\n    raise RuntimeError('no server\\nat all')\n"},
    ),
    Mistake(
        "a feed of one's own that is none",
        settings=("feed.kind=own_list:Own",),
        words=("feed.kind = 'own_list:Own'", "no name, shape, poll"),
        beside={"own_list.py": b"def Own(path):\n    return [path]\n"},
    ),
    own("an optimizer that is none", "def Own(p): return 7", "made a int, not a torch Opt", key="peers.0.optimizer"),
    own("a loss that is none", "def Own(*said): return 7", "gives int", "a value each", key="distillation.loss"),
    own("a loss that fails", "def Own(*said): return 1 / 0", "ZeroDivisionError", key="distillation.loss"),
    own("a module that ends the process", "import sys\nsys.exit(3)", "cannot be imported: SystemExit"),
    own("a module with much to say", "raise ValueError('one\\n' * 60)", "cannot be imported: ValueError: one"),
    own("a module that lacks something", "import math\nmath.nothing", "has no attribute 'nothing'"),
    own("a name misspelt", "def Owner(): return 1", "there is no Own in", "did you mean Owner?"),
    wrong("peers.0.optimizer={ kind = 'sgd', lr = 0.1, momentum = nan }", "momentum = nan", "not a finite"),
    wrong("peers.0.optimizer={ kind = 'sgd', lr = 0.1, weight_decay = inf }", "weight_decay = inf"),
    wrong("batch=" + "q" * 5_000, "integer"),
    Mistake(
        "200 wrong peers",
        settings=("peers=[" + "{ name = 3, model = 3 }, " * 200 + "]",),
        words=("peers.0.name", "and 388 more"),
    ),
    wrong("replay.capacity=100000000000", "less than or equal to"),
    wrong("replay.records=100000000000", "less than or equal to"),
    wrong("checkpoint.directory=" + "x" * 300, "cannot be written", codes=NOT_EVAL),
    wrong('checkpoint.directory="a\\u0000b"', "cannot be written", codes=NOT_EVAL),
    wrong('http.host="a\\u0000b"', "pattern"),
    Mistake(
        "a feed of one's own that breaks off",
        codes=(2, 3, 3),
        settings=("feed.kind=own_fails:Own",),
        words=("feed: cannot be read on: RuntimeError: no server",),
        beside={"own_fails.py": b"from runners.feeds.drifting import DriftingFeed\n\n" + FAILING},
    ),
    Mistake("no equals sign", settings=("batch",), words=("batch", "key.path=value")),
]

EVERY = [*CSV, *JSON]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("case", [case for case in EVERY if isinstance(case, Read)], ids=lambda case: case.name)
def test_every_line_is_learned_or_in_the_dead_letters_and_nothing_is_learned_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: Read
) -> None:
    case.put()
    commands = Commands(monkeypatch, capsys, case)
    checked = commands.check()
    assert checked.code == 0, checked.err
    evaluated = commands.eval()
    assert evaluated.code == 0, evaluated.err
    found = json.loads(evaluated.out)
    assert (found["records"], found["dead_letters"]) == (case.learned, case.refused)
    assert found["labelled"] == case.learned - case.unlabelled
    first = commands.run()
    assert first.code == 0, first.err
    events = {entry["event"]: entry for entry in map(json.loads, first.err.splitlines())}
    saved = commands.inspect()
    assert (events["stopped"]["records"], saved["records"]) == (case.learned, case.learned)
    assert events["stopped"]["refused"] == sum(case.refused.values())
    assert ("records refused" in events) == bool(case.refused)
    for command in ("eval", "run"):
        written = letters(f"{command}.jsonl")
        assert Counter(letter["reason"] for letter in written) == case.refused
        assert {letter["reason"] for letter in written} <= set(REASONS)
        assert all(letter["detail"] for letter in written)
        refused = sum(lines_of(letter["raw"].encode()) or 1 for letter in written) - case.unread
        text = case.content if case.text is None else case.text
        assert text is not None
        assert case.learned + refused + case.idle == lines_of(text)
    second = commands.run()
    assert second.code == 0, second.err
    events = {entry["event"]: entry for entry in map(json.loads, second.err.splitlines())}
    assert events["restored"]["records"] == events["stopped"]["records"] == case.learned
    assert commands.inspect()["records"] == case.learned


@pytest.mark.parametrize("case", [case for case in EVERY if isinstance(case, Refused)], ids=lambda case: case.name)
def test_a_file_that_cannot_be_learned_is_told_by_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: Refused
) -> None:
    case.put()
    commands = Commands(monkeypatch, capsys, case)
    for command, code in ((commands.check, 2), (commands.eval, case.code), (commands.run, case.code)):
        shown = command()
        assert shown.code == code, shown.err
        shown.tells(*case.words)
    assert not list(Path().glob("*.jsonl.*"))
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=lambda case: case.name)
def test_a_configuration_that_does_not_do_is_told_by_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: Mistake
) -> None:
    case.put()
    commands = Commands(monkeypatch, capsys, case)
    for command, code in zip((commands.check, commands.eval, commands.run), case.codes, strict=True):
        shown = command()
        assert shown.code == code, shown.err
        if code:
            shown.tells(*case.words)


def test_a_port_in_use_is_told_by_those_who_need_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        case = Mistake("a port in use", settings=(f"http.port={port}",))
        case.put()
        commands = Commands(monkeypatch, capsys, case)
        for command in (commands.check, commands.run):
            shown = command()
            assert shown.code == 2
            shown.tells(f"http.port = {port}", "--set http.port=N")
        assert commands.eval().code == 0


@pytest.mark.parametrize(("forbidden", "codes"), [("c.toml", (2, 2, 2)), ("d.csv", (2, 3, 3))])
def test_a_file_that_must_not_be_read_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forbidden: str, codes: tuple[int, int, int]
) -> None:
    case = Mistake("forbidden")
    case.put()
    Path(forbidden).chmod(0)
    if os.access(forbidden, os.R_OK):
        pytest.skip("nothing is forbidden to root")
    commands = Commands(monkeypatch, capsys, case)
    for command, code in zip((commands.check, commands.eval, commands.run), codes, strict=True):
        shown = command()
        assert shown.code == code
        shown.tells(forbidden, "Permission denied")

"""The commands as a user types them."""

import json
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch
from stack import PATIENCE
from test_checkpoint import Planted, seal

from runners import cli
from streamkd import checkpoint


def table(path: Path, records: int = 600, label: str = "y") -> Path:
    """Write a CSV that is easy to learn."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (records,), generator=generator)
    x = torch.randn(records, 4, generator=generator) * 0.4 + torch.eye(4)[y] * 2
    lines = [",".join(f"{v:.5f}" for v in row) + f",class {k}" for row, k in zip(x.tolist(), y.tolist(), strict=True)]
    path.write_text(f"a,b,c,d,{label}\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def streamkd(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run a command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["streamkd", *arguments])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a process of its own; it is ended when the block is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "runners.cli", *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def told(process: subprocess.Popen[str], event: str) -> dict[str, Any]:
    """Read the log of a process up to an event."""
    assert process.stderr is not None
    for line in process.stderr:
        entry: dict[str, Any] = json.loads(line)
        if entry["event"] == event:
            return entry
    raise AssertionError(f"{event} was never logged")


def fetched(port: int, path: str) -> tuple[int, str]:
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_init_lists_the_shipped_configurations_and_writes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert streamkd(monkeypatch, "init") == 0
    assert {"default", "demo", "mission"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert streamkd(monkeypatch, "init", "default") == 0
    assert "[[peers]]" in Path("default.toml").read_text(encoding="utf-8")
    assert streamkd(monkeypatch, "init", "default") == 2
    assert "is there already" in capsys.readouterr().err
    assert streamkd(monkeypatch, "init", "defualt") == 2


def test_eval_prints_a_table_and_writes_json_and_a_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"))
    arguments = ["eval", "default", "d.csv", "--label", "y", "--json", "out.json", "--plot", "out.png"]
    assert streamkd(monkeypatch, *arguments) == 0
    shown = capsys.readouterr().out
    for word in ("served", "quick", "no-change", "majority", "temporal", "records per second"):
        assert word in shown
    result = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert (result["records"], result["batch"], result["seed"]) == (600, 16, 0)
    assert result["accuracy"] > 0.8
    assert set(result["peers"]) == {"quick", "middle", "steady"}
    for key in ("balanced_accuracy", "records_per_second", "drifts", "role_swaps", "cohen_kappa", "log_loss"):
        assert isinstance(result[key], (int, float))
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_with_tabs_is_read_as_the_error_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = table(Path("d.csv")).read_text(encoding="utf-8").replace(",", "\t")
    Path("d.csv").write_text(content, encoding="utf-8")
    assert streamkd(monkeypatch, "eval", "default", "d.csv", "--label", "y") == 2
    advice = re.search(r"set (feed\.delimiter = .*)", capsys.readouterr().err)
    assert advice is not None
    assert streamkd(monkeypatch, "eval", "default", "d.csv", "--label", "y", "--set", advice[1]) == 0


def test_eval_of_several_seeds_gives_a_list_on_standard_output_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 200)
    for seeds in (["--seed", "1", "2"], ["--seed", "1", "--seed", "2"]):
        assert streamkd(monkeypatch, "eval", "default", "d.csv", "--label", "y", "--json", "-", *seeds) == 0
        results = json.loads(capsys.readouterr().out)
        assert [result["seed"] for result in results] == [1, 2]
        assert results[0]["log_loss"] != results[1]["log_loss"]


def test_eval_gives_the_same_figures_twice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table(Path("d.csv"), 300)
    results = []
    for _ in range(2):
        assert streamkd(monkeypatch, "eval", "default", "d.csv", "--label", "y", "--json", "-") == 0
        result = json.loads(capsys.readouterr().out)
        results.append({key: value for key, value in result.items() if "second" not in key})
    assert results[0] == results[1]


def test_eval_says_why_nothing_was_compiled_and_learns_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 200)
    settings = ["--set", "compile=true", "--set", "distillation.scheme=ensemble", "--seed", "1", "2"]
    arguments = ["eval", "default", "d.csv", "--label", "y", "--json", "out.json", *settings]
    assert streamkd(monkeypatch, *arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("not compiled: it takes peers of one architecture") == 1
    results = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert [(result["records"], result["uncompiled"][:8]) for result in results] == [(200, "it takes")] * 2


def test_eval_refuses_broken_rows_counts_them_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = table(Path("d.csv")).read_text(encoding="utf-8").splitlines()
    lines[100], lines[200], lines[300] = "1,2", "1,2,x,4,class 1", "1,2,inf,4,class 1"
    Path("d.csv").write_text("\n".join(lines), encoding="utf-8")
    assert streamkd(monkeypatch, "eval", "default", "d.csv", "--label", "y", "--json", "out.json") == 0
    assert json.loads(Path("out.json").read_text())["records"] == 597
    assert "1 not_a_number" in capsys.readouterr().out
    letters = [json.loads(line) for line in Path("dead-letters.jsonl").read_text().splitlines()]
    assert [(letter["line"], letter["reason"]) for letter in letters] == [
        (101, "width"),
        (201, "not_a_number"),
        (301, "not_finite"),
    ]
    assert letters[0]["raw"] == "1,2\n"


def test_check_prints_the_configuration_the_records_and_the_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"))
    assert streamkd(monkeypatch, "check", "default", "--set", "feed.path=d.csv", "--set", "feed.label=y") == 0
    shown = capsys.readouterr().out
    for word in ("every_records = 10000", "a, b, c, d", "class 2", "15,780", "SGD", "It would run."):
        assert word in shown


BAD = [
    ("run nowhere.toml", 2, ["nowhere.toml", "no such file", "default"]),
    ("run defualt", 2, ["did you mean default?"]),
    ("run default", 2, ["feed.path: missing", "feed.label: missing"]),
    ("run default --set feed.path=no.csv --set feed.label=y", 3, ["feed.path", "no.csv", "check the path"]),
    ("run default --set feed.path=d.csv --set feed.label=z", 2, ["feed.label = 'z'", "no such column"]),
    ("run default --set feed.path=d.csv --set feed.lable=y", 2, ["feed.lable", "did you mean feed.label?"]),
    ("run default --set feed.kind=cvs", 2, ["feed.kind = 'cvs'", "did you mean csv?"]),
    ("check default --set feed.path=no.csv --set feed.label=y", 2, ["feed.path", "no.csv"]),
    ("check default --set replay.capasity=3", 2, ["replay.capasity", "did you mean replay.capacity?"]),
    ("eval default d.csv", 2, ["feed.label: missing"]),
    ("eval default no.csv --label y", 3, ["no.csv"]),
    ("eval default empty.csv --label y", 3, ["empty.csv", "empty"]),
    ("eval default unlabelled.csv --label y", 2, ["feed.label = 'y'", "has a label"]),
    ("eval default d.csv --label y --json no/where.json", 2, ["no/where.json"]),
    ("eval default no.csv --label y --plot out.nonsense", 2, ["out.nonsense", ".png, .svg or .pdf"]),
    ("eval default no.csv --label y --plot no/where.png", 2, ["no/where.png", "there is no folder"]),
    ("demo --records 5 --picture no/where.png", 2, ["no/where.png", "there is no folder"]),
    ("demo --records 5 --picture out.nonsense", 2, ["out.nonsense", ".png, .svg or .pdf"]),
    ("eval default d.csv --label y --batch 0", 2, ["batch = 0"]),
    ("eval default d.csv --label y --seed -1", 2, ["seed"]),
    ("demo --records 5", 2, ["feed.records = 5"]),
    ("dmeo", 2, ["dmeo", "demo"]),
]


@pytest.mark.parametrize(("line", "code", "words"), BAD, ids=[line for line, _, _ in BAD])
def test_a_mistake_is_told_on_one_screen_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, code: int, words: list[str]
) -> None:
    table(Path("d.csv"), 40)
    Path("empty.csv").touch()
    Path("unlabelled.csv").write_text("a,y\n1,\n2,\n", encoding="utf-8")
    assert streamkd(monkeypatch, *line.split()) == code
    shown = capsys.readouterr()
    for word in words:
        assert word in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert len(shown.err.splitlines()) < 25


def test_a_port_in_use_is_told_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert streamkd(monkeypatch, "demo", "--records", "200", "--port", str(port), "--no-live") == 2
    message = capsys.readouterr().err
    assert f"http.port = {port}" in message
    assert "http.port=N" in message


@pytest.mark.slow
def test_the_demo_ends_with_a_table_and_a_picture() -> None:
    command = [sys.executable, "-m", "runners.cli", "demo", "--records", "2000", "--port", "0", "--no-live"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "true drifts at 400, 800, 1,200, 1,600" in shown
    for word in ("/metrics", "served", "quick", "The served answer at each true drift"):
        assert word in shown
    assert Path("demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_serves_metrics_and_a_second_run_goes_on_where_a_signal_stopped_the_first() -> None:
    header, *rows = table(Path("d.csv"), 6_000).read_text(encoding="utf-8").splitlines(keepends=True)
    Path("d.csv").write_text("".join([header, *rows[:3_008]]), encoding="utf-8")  # whole batches
    Path("mine.toml").write_text(
        Path(cli.__file__).with_name("configurations").joinpath("default.toml").read_text(encoding="utf-8"),
        encoding="utf-8",
    )
    pairs = ["feed.kind=tail", "feed.format=csv", "feed.path=d.csv", "feed.label=y", "http.port=0"]
    given = [f"--set={pair}" for pair in [*pairs, "checkpoint.every_records=1000"]]
    settings = [*given, "--set=checkpoint.directory=saved"]
    with started("run", "mine.toml", *settings) as first:
        port = told(first, "listening")["port"]
        told(first, "checkpoint")
        assert fetched(port, "/healthz")[0] == 200
        status, ready = fetched(port, "/readyz")
        assert (status, json.loads(ready)["state"]) == (200, "running")
        metrics = fetched(port, "/metrics")[1]
        assert re.search(r'streamkd_state\{state="running"\} 1', metrics)
        assert fetched(port, "/nothing")[0] == 404
        first.send_signal(signal.SIGTERM)
        stopped = told(first, "stopped")
        assert first.wait(PATIENCE) == 0
    assert 1000 <= stopped["records"] <= 3_008
    _, about = checkpoint.load(checkpoint.found(Path("saved"))[0])
    assert about["records"] == stopped["records"]
    with Path("d.csv").open("a", encoding="utf-8") as file:
        file.writelines(rows[3_008:])
    with started("run", "mine.toml", *settings, "--set=feed.follow=false") as second:
        assert told(second, "restored")["records"] == stopped["records"]
        assert told(second, "stopped")["records"] == 6_000
        assert second.wait(PATIENCE) == 0
    unbroken = [*given, "--set=checkpoint.directory=unbroken", "--set=feed.follow=false"]
    with started("run", "mine.toml", *unbroken) as third:
        told(third, "stopped")
        assert third.wait(PATIENCE) == 0
    ends = [checkpoint.load(checkpoint.found(Path(folder))[0])[0] for folder in ("saved", "unbroken")]
    for one, other in zip(_leaves(ends[0]), _leaves(ends[1]), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def test_records_with_ids_give_the_same_figures_where_few_labels_are_revealed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    header, *rows = table(Path("d.csv"), 1_600).read_text(encoding="utf-8").splitlines()
    Path("d.csv").write_text(
        "\n".join([f"{header},name", *(f"{row},r{n}" for n, row in enumerate(rows))]), encoding="utf-8"
    )
    found = []
    for setting in ("feed.id=name", "feed.ignore=name"):
        few = ("eval", "default", "d.csv", "--label", "y", "--labels", "0.1", "--json", "-", "--set", setting)
        assert streamkd(monkeypatch, *few) == 0
        figures = json.loads(capsys.readouterr().out)
        found.append({key: value for key, value in figures.items() if "second" not in key})
    assert found[0] == found[1]


def test_a_history_has_its_labels_beside_it_wherever_those_of_the_stream_come_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 200)
    apart = "labels.feed={kind='redis', url='redis://nowhere', stream='labels', id='name', label='y'}"
    few = ("eval", "default", "d.csv", "--label", "y", "--json", "-", "--set", apart)
    assert streamkd(monkeypatch, *few) == 0
    assert json.loads(capsys.readouterr().out)["labelled"] == 200


def run_once(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    given = ["feed.path=d.csv", "feed.label=y", "http.port=0", "checkpoint.directory=saved", *overrides]
    return streamkd(monkeypatch, "run", "default", *(part for text in given for part in ("--set", text)))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"))
    assert run_once(monkeypatch, "checkpoint.every_records=200") == 0
    newest, before = checkpoint.found(Path("saved"))[:2]
    (newest / "tensors.pt").write_bytes(b"nothing")
    capsys.readouterr()
    assert run_once(monkeypatch) == 0
    log = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [entry["path"] for entry in log if entry["event"] == "checkpoint refused"] == [str(newest)]
    assert [entry["path"] for entry in log if entry["event"] == "restored"] == [str(before)]


def test_a_pickle_planted_in_a_detector_does_not_run_and_the_checkpoint_before_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"))
    assert run_once(monkeypatch, "checkpoint.every_records=200") == 0
    newest, before = checkpoint.found(Path("saved"))[:2]
    state, _ = checkpoint.load(newest)
    planted = pickle.dumps(Planted(Path("ran")), protocol=4)
    state["tensors"]["engine"]["drift"]["river"]["body"] = torch.frombuffer(bytearray(planted), dtype=torch.uint8)
    torch.save(state["tensors"], newest / "tensors.pt")
    seal(newest)
    capsys.readouterr()
    assert run_once(monkeypatch) == 0
    log = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (refused,) = [entry for entry in log if entry["event"] == "checkpoint refused"]
    assert "is not a part of river's objects" in refused["reason"]
    assert [entry["path"] for entry in log if entry["event"] == "restored"] == [str(before)]
    assert not Path("ran").exists()


def test_no_whole_checkpoint_and_other_models_are_refused_with_exit_code_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"))
    assert run_once(monkeypatch) == 0
    capsys.readouterr()
    assert run_once(monkeypatch, "peers.0.model.widths=[32]") == 4
    message = capsys.readouterr().err
    assert "quick.1.weight: [128, 4] in the checkpoint, [32, 4] configured" in message
    for path in checkpoint.found(Path("saved")):
        (path / "tensors.pt").write_bytes(b"nothing")
    assert run_once(monkeypatch) == 4
    assert "none of its 1 checkpoints can be used; the newest: " in capsys.readouterr().err


def test_a_full_disk_does_not_stop_the_learning_and_is_told_at_the_end() -> None:
    table(Path("d.csv"))
    settings = ["feed.path=d.csv", "feed.label=y", "http.port=0", "checkpoint.every_records=100"]
    limited = (
        "import resource, sys; from runners import cli;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); cli.main()"
    )
    command = [sys.executable, "-c", limited, "run", "default", *(f"--set={pair}" for pair in settings)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 4
    events = [json.loads(line)["event"] for line in ended.stderr.splitlines() if line.startswith("{")]
    assert events.count("checkpoint failed") >= 1
    assert "feed ended" in events
    assert "the last save failed" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert checkpoint.found(Path("checkpoints")) == []
    assert not list(Path("checkpoints").glob(".step-*"))


@pytest.mark.parametrize("key", ["checkpoint.directory", "dead_letters.path"])
def test_what_cannot_be_written_is_told_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    table(Path("d.csv"))
    Path("taken").write_text("a file", encoding="utf-8")
    for command in ("run", "check"):
        given = ["feed.path=d.csv", "feed.label=y", "http.port=0", f"{key}=taken/below"]
        assert streamkd(monkeypatch, command, "default", *(f"--set={pair}" for pair in given)) == 2
        assert f"{key} = 'taken/below'" in capsys.readouterr().err


def test_settings_that_the_state_depends_on_are_refused_and_others_may_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"))
    assert run_once(monkeypatch) == 0
    for change in (
        "replay.capacity=50",
        "drift.detector.kind=never",
        "peers.0.optimizer.kind=adamw",
        "peers.0.optimizer={kind='rmsprop', centered=true}",
        "max_classes=7",
        "served.pool=False",
        "served.label_memories=[0.5]",
        "served.answer_memories=[]",
    ):
        capsys.readouterr()
        assert run_once(monkeypatch, change) == 4
        message = capsys.readouterr().err
        assert change.removesuffix("=true}").rpartition("=")[2].rpartition(" ")[2] in message
        assert "in the checkpoint" in message
    assert run_once(monkeypatch, "peers.0.optimizer.lr=0.05", "distillation.scheme=mutual") == 0


def test_peers_in_another_order_do_not_take_over_one_another_s_roles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"))
    for number, order in enumerate(("ab", "ba")):
        peers = "".join(f"[[peers]]\nname = '{name}'\nmodel = {{ kind = 'mlp', widths = [8] }}\n" for name in order)
        Path(f"{number}.toml").write_text(
            f"[feed]\nkind = 'csv'\npath = 'd.csv'\nlabel = 'y'\n[http]\nport = 0\n{peers}", encoding="utf-8"
        )
    assert streamkd(monkeypatch, "run", "0.toml") == 0
    assert streamkd(monkeypatch, "run", "1.toml") == 4
    assert "peers: a, b in the checkpoint, b, a configured" in capsys.readouterr().err


def test_a_model_that_fails_while_it_learns_ends_with_exit_code_5(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"))
    Path("flaky.py").write_text(
        "import torch\n\n\nclass Flaky(torch.nn.Linear):\n"
        "    def __init__(self, shape, classes):\n        super().__init__(shape[0], classes)\n"
        "        self.calls = 0\n\n"
        "    def forward(self, x):\n        self.calls += 1\n        if self.calls > 50:\n"
        "            raise ZeroDivisionError('worn out')\n        return super().forward(x)\n",
        encoding="utf-8",
    )
    assert run_once(monkeypatch, "peers.0.model={kind='flaky:Flaky'}") == 5
    message = capsys.readouterr().err
    assert "ZeroDivisionError: worn out" in message
    assert "Traceback" not in message


def test_inspect_tells_what_is_in_the_newest_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"))
    digests = []
    for directory in ("one", "two"):
        assert run_once(monkeypatch, f"checkpoint.directory={directory}", "deterministic=true") == 0
        capsys.readouterr()
        assert streamkd(monkeypatch, "inspect", directory, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["records"], found["verified"], found["position"]["classes"]) == (
            600,
            True,
            ["class 2", "class 0", "class 1"],
        )
        digests.append(found["digest"])
    assert digests[0] == digests[1]
    assert streamkd(monkeypatch, "inspect", "one") == 0
    monkeypatch.setenv("COLUMNS", "80")
    shown = capsys.readouterr().out
    assert "every file is as the manifest says" in shown
    assert streamkd(monkeypatch, "inspect", "one") == 0
    values = "".join(
        line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines() if line.count("│") == 3
    )
    assert digests[0] in values
    assert f"{100 * found['accuracy']:.1f} %" in values
    assert streamkd(monkeypatch, "inspect", "nowhere") == 4
    newest = checkpoint.found(Path("one"))[0]
    (newest / "memories.pt").unlink()
    capsys.readouterr()
    assert streamkd(monkeypatch, "inspect", "one", "--json") == 4
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["verified"]) == (str(newest), False)
    assert "memories.pt" in said["reason"]


def test_help_comes_without_the_heavy_libraries() -> None:
    script = "import sys; from runners import cli; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False"]


def test_importing_streamkd_brings_no_compiler() -> None:
    script = "import sys, streamkd; print(*({'triton', 'torch._dynamo', 'torch._inductor'} & {*sys.modules}))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not shown.strip()


def test_learning_does_not_import_torchvision() -> None:
    script = (
        "import sys; from runners.settings import load; from streamkd.config import build_engine;"
        "build_engine(load('default'), (4,)); print('torchvision' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "False"


def test_time_is_not_of_the_essence() -> None:
    """The engine's clock is handed to it: without one, every stage takes no time at all."""
    from worlds import batches, engine  # noqa: PLC0415

    assert set(engine().step(batches()[0]).seconds.values()) == {0.0}
    ticking = engine(clock=time.perf_counter)
    assert min(ticking.step(batches()[0]).seconds.values()) > 0


def test_labels_that_come_late_are_labels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = table(Path("d.csv"), 600).read_text(encoding="utf-8").splitlines()
    late = ("eval", "default", "d.csv", "--label", "y", "--set", "labels.delay=50", "--json", "-")
    assert streamkd(monkeypatch, *late) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [found[name] for name in ("records", "labelled", "unlabelled")] == [600, 600, 0]
    assert "unlabelled" not in shown.err
    lines[1:101] = [line.rpartition(",")[0] + "," for line in lines[1:101]]
    Path("d.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert streamkd(monkeypatch, *late) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [found[name] for name in ("records", "labelled", "unlabelled")] == [600, 500, 100]
    assert "600 records, 100 of them unlabelled," in shown.err


def test_labels_that_are_never_revealed_are_scored_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("d.csv"), 1_600)
    few = ("eval", "default", "d.csv", "--label", "y", "--labels", "0.1", "--json", "-")
    assert streamkd(monkeypatch, *few) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["labelled"]) == (1_600, 1_600)
    assert 1_300 < found["unlabelled"] < 1_550
    assert found["accuracy"] > 0.6
    lines = Path("d.csv").read_text(encoding="utf-8").splitlines()
    holes = [line.rpartition(",")[0] + "," if row % 4 == 1 else line for row, line in enumerate(lines)]
    Path("holes.csv").write_text("\n".join(holes) + "\n", encoding="utf-8")
    assert streamkd(monkeypatch, *("holes.csv" if word == "d.csv" else word for word in few)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["labelled"]) == (1_600, 1_200)
    assert streamkd(monkeypatch, *few, "--set", "labels.delay=3") == 2
    assert streamkd(monkeypatch, *few[:-3], "0") == 2
    assert "--labels 0" in capsys.readouterr().err

"""Labels on a feed of their own: joined by id, bounded by count and time, kept through a kill."""

# ruff: noqa: D102 - what a feed's methods do is told in its contract

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from runners.bench.kill import RECORDS, TABLE, arguments, ended, in_a_child, kill_loop, write_table
from runners.feeds import NONE, REPLAYABLE, Capabilities, DeadLetter
from runners.feeds.joined import Joined
from runners.settings import load
from streamkd import UNLABELLED, Batch, checkpoint
from streamkd.errors import ConfigError


class Given:
    """A feed of batches that a test has made; an empty one where it has None yet."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.name, self.shape, self.capabilities, self.connected = "given", (1,), REPLAYABLE, True
        self.resets = self.failures = NONE
        self._batches = list(batches)
        self._given = 0

    def poll(self, records: int) -> Batch | None:  # noqa: ARG002 - as many as the test has put together
        if self._given == len(self._batches):
            return None
        self._given += 1
        return self._batches[self._given - 1]

    def seek(self, position: Any) -> None:
        self._given = position["given"]

    def lag(self) -> Any:
        return NONE

    def progress(self) -> None:
        return None

    def commit(self, position: Any) -> None:
        self.committed = position

    def describe(self) -> Any:
        return {"classes": ["a", "b"]}

    def close(self) -> None:
        pass


def batches(*names: Sequence[str], labels: bool = False) -> Given:
    made = []
    for number, some in enumerate(names):
        y = [len(name) % 2 for name in some] if labels else [UNLABELLED] * len(some)
        made.append(
            Batch(torch.zeros(len(some), 1), torch.tensor(y).long(), tuple(some), position={"given": number + 1})
        )
    return Given(made)


@pytest.mark.parametrize("weaker", [Capabilities(replayable, "at least once") for replayable in (True, False)])
def test_together_they_promise_what_the_weaker_one_does(weaker: Capabilities) -> None:
    feed, labels = batches(), batches(labels=True)
    labels.capabilities = weaker
    assert joined(feed, labels)[0].capabilities == joined(labels, feed)[0].capabilities == weaker


def joined(feed: Given, labels: Given, capacity: int = 100, seconds: float = 0.0) -> tuple[Joined, list[DeadLetter]]:
    refused: list[DeadLetter] = []
    now = iter(range(1_000))
    made = Joined(
        feed, labels, capacity=capacity, seconds=seconds, clock=lambda: float(next(now)), refuse=refused.append
    )
    return made, refused


def drained(feed: Joined) -> list[Batch]:
    found = []
    while (batch := feed.poll(16)) is not None:
        found.append(batch)
    return found


def test_a_label_comes_with_a_later_batch_than_its_record_whichever_feed_is_ahead() -> None:
    chance = random.Random(0)  # noqa: S311 - not for secrets
    names = [f"{n:0{2 + n % 2}}" for n in range(60)]
    shuffled = chance.sample(names, len(names))
    questions = [names[begin : begin + 4] for begin in range(0, 60, 4)]
    answers = [shuffled[begin : begin + 7] for begin in range(0, 60, 7)]
    for before, after in (([], [[]] * 20), ([[]] * 20, []), ([], [])):
        made, refused = joined(batches(*before, *questions), batches(*answers, *after, labels=True))
        asked: set[str] = set()
        answered: dict[str, int] = {}
        for batch in drained(made):
            assert set(batch.late) <= asked
            assert not set(batch.late) & set(answered)
            asked |= set(batch.ids)
            answered |= batch.late
        assert answered == {name: len(name) % 2 for name in names}
        assert not refused


def test_from_any_position_the_join_goes_on_as_it_would_have() -> None:
    def made() -> Joined:
        questions = batches(["a", "bb"], ["ccc"], [], ["dd", "e"], [])
        return joined(questions, batches(["e"], ["a", "dd"], ["bb"], ["ccc"], labels=True))[0]

    whole = drained(made())
    for cut, batch in enumerate(whole):
        again = made()
        again.seek(json.loads(json.dumps(batch.position)))
        assert [(b.ids, b.late) for b in drained(again)] == [(b.ids, b.late) for b in whole[cut + 1 :]]


def test_a_record_that_has_waited_too_long_is_given_up() -> None:
    made, _ = joined(batches(["a"], [], [], [], []), batches(labels=True), seconds=2.5)
    assert [dict(batch.late) for batch in drained(made)].count({"a": UNLABELLED}) == 1


def test_labels_that_are_far_ahead_are_left_where_they_are() -> None:
    names = [f"n{n}" for n in range(40)]
    made, refused = joined(
        batches(*([name] for name in names)), batches(*([name] for name in names[1::2]), labels=True), capacity=4
    )
    found = drained(made)
    assert max(len(batch.position["early"]) for batch in found) <= 4
    assert [name for batch in found for name in batch.late] == names[1::2]
    assert not refused


def test_labels_whose_records_do_not_come_are_dead_lettered() -> None:
    records, strangers = [f"n{n}" for n in range(100)], [f"s{n}" for n in range(4)]
    made, refused = joined(
        batches(*([name] for name in records), *([[]] * 60)),
        batches(strangers, *([name] for name in records[60:]), labels=True),
        capacity=4,
    )
    found = drained(made)
    assert [letter.place["id"] for letter in refused] == strangers
    assert {letter.reason for letter in refused} == {"no_record"}
    assert [name for batch in found for name in batch.late] == records[60:]


def test_labels_left_over_when_the_records_have_ended_are_dead_lettered_and_the_feed_ends() -> None:
    strangers = [f"s{n}" for n in range(40)]
    made, refused = joined(batches(["a"]), batches(*([name] for name in strangers), ["a"], labels=True), capacity=4)
    assert {name: y for batch in drained(made) for name, y in batch.late.items()} == {"a": 1}
    assert [letter.place["id"] for letter in refused] == strangers


def settings(labels: str) -> list[str]:
    feed = ["feed.path=records.csv", "feed.id=id", "feed.label=", "feed.ignore=y"]
    return [*feed, f"labels.feed={{kind='csv', path='{labels}', id='id', label='y'}}", "labels.delay=0"]


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records without their labels, and the labels in an order a little of their own."""
    monkeypatch.chdir(tmp_path)
    write_table(TABLE)
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [{"id": f"r{n}", **row} for n, row in enumerate(csv.DictReader(file))]
    order = sorted(range(len(rows)), key=lambda n: n + random.Random(n).uniform(0, 100))  # noqa: S311
    for path, some in (("records.csv", rows), ("labels.csv", [rows[n] for n in order])):
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(some)


@pytest.mark.slow
@pytest.mark.usefixtures("tables")
def test_every_label_is_learned_and_a_killed_run_ends_where_an_unbroken_one_ends() -> None:
    outcome = kill_loop("default", 8, seed=4, feed=settings("labels.csv"))
    assert outcome.equal == outcome.ends >= 1
    state, _ = checkpoint.load(checkpoint.found(Path("undisturbed"))[0])
    pending = state["tensors"]["engine"]["pending"]
    assert (pending["joined"], pending["expired"], pending["ids"]) == (RECORDS, 0, [])


@pytest.mark.slow
@pytest.mark.usefixtures("tables")
def test_records_that_wait_are_bounded_and_those_given_up_counted() -> None:
    lines = Path("labels.csv").read_text(encoding="utf-8").splitlines()
    Path("labels.csv").write_text("\n".join(lines[:1] + lines[1::2]) + "\n", encoding="utf-8")
    feed = [*settings("labels.csv"), "labels.pending_capacity=200"]
    assert ended(in_a_child(*arguments("default", Path("saved"), feed))) == 0
    state, _ = checkpoint.load(checkpoint.found(Path("saved"))[0])
    pending = state["tensors"]["engine"]["pending"]
    assert pending["joined"] + pending["expired"] + len(pending["ids"]) == RECORDS
    assert pending["joined"] == RECORDS // 2
    assert len(pending["ids"]) <= 200


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("labels.delay=3", r"labels\.delay = 3: labels\.feed has delays of its own"),
        ("feed.label=y", r"feed\.label = 'y': labels come from labels\.feed; set it to ''"),
        ("feed.id=", r"feed\.id: missing"),
        ("labels.feed.id=", r"labels\.feed\.id: missing"),
        ("labels.feed.path=nowhere.csv", r"in labels\.feed: feed\.path = 'nowhere\.csv'"),
        ("labels.feed.lable=y", r"labels\.feed\.lable: no such option of csv; did you mean labels\.feed\.label\?"),
    ],
)
@pytest.mark.usefixtures("tables")
def test_a_setting_that_does_not_fit_is_told(change: str, told: str) -> None:
    configuration = load("default", [*settings("labels.csv"), change])
    with pytest.raises(Exception, match=told) as refused:
        configuration.open_feed(lambda _: None)
    assert isinstance(refused.value, ConfigError) or "nowhere" in change

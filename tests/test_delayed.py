from pathlib import Path

import pytest

from runners.feeds.delayed import Delayed
from runners.feeds.drifting import drifting
from runners.feeds.files import text_file
from runners.settings import load
from streamkd import UNLABELLED, Batch
from streamkd.errors import ConfigError
from streamkd.testing import check_feed


def delayed(delay: int) -> Delayed:
    return Delayed(drifting(records=200, seed=1), delay)


def drained(feed: Delayed, size: int) -> list[Batch]:
    batches = []
    while (batch := feed.poll(size)) is not None:
        batches.append(batch)
    return batches


@pytest.mark.parametrize("delay", [1, 7, 50, 500])
@pytest.mark.parametrize("size", [1, 16])
def test_every_label_comes_once_and_no_sooner_than_its_delay(delay: int, size: int) -> None:
    truth: list[int] = []
    feed = drifting(records=200, seed=1)
    while (batch := feed.poll(16)) is not None:
        truth += batch.y.tolist()
    asked, answered = [], {}
    for batch in drained(delayed(delay), size):
        assert all(y == UNLABELLED for y in batch.y.tolist())
        asked += list(batch.ids)
        assert not set(batch.late) & set(answered)
        assert not set(batch.late) & set(batch.ids)  # an answer within the question's own batch would be passed over
        assert len(batch.late) <= size
        if len(batch):
            assert all(int(name) < len(asked) - delay for name in batch.late)
        answered |= batch.late
    assert asked == [str(index) for index in range(200)]
    assert [answered[name] for name in asked] == truth


def test_from_any_position_come_the_labels_still_withheld() -> None:
    batches = drained(delayed(30), 16)
    for cut, batch in enumerate(batches):
        again = delayed(30)
        again.seek(batch.position)
        rest = drained(again, 16)
        assert [(later.ids, later.late) for later in rest] == [(later.ids, later.late) for later in batches[cut + 1 :]]


def test_records_keep_their_ids_and_one_that_comes_again_has_the_label_of_the_later(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("id,x,y\na,1,0\nb,2,1\na,3,2\nc,4,0\nb,5,\nd,6,1\n", encoding="utf-8")
    made = Delayed(text_file(path, kind="csv", label="y", id="id", max_classes=3, refuse=lambda _: None), 1)
    batches = drained(made, 3)
    made.close()
    assert [batch.ids for batch in batches] == [("a", "b", "a"), ("c", "b", "d"), ()]
    assert [dict(batch.late) for batch in batches] == [{}, {"a": 2}, {"c": 0, "d": 1}]


def test_it_is_a_feed_like_any_other() -> None:
    check_feed(lambda: delayed(20))


def test_a_delay_longer_than_predictions_may_wait_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"labels\.delay = 20000.*labels\.pending_capacity"):
        load("demo", ["labels.delay=20000"]).open_feed(lambda _: None)

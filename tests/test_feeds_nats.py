"""NATS JetStream, beside a real nats-server."""

import asyncio
import csv
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from brokers import Broker, nats_server
from outage import costs_nothing
from stack import PATIENCE, names, taken

from runners.bench.kill import RECORDS, TABLE, arguments, ended, in_a_child, kill_loop, write_table
from runners.feeds import conformance
from runners.feeds.conformance import Law, Stand
from runners.feeds.jetstream import jetstream
from streamkd.errors import FeedError

nats = pytest.importorskip("nats", reason="the client is not installed: pip install 'streamkd[nats]'")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    made = nats_server(tmp_path_factory.mktemp("nats"))
    yield made
    made.stop()


@pytest.fixture
def broker(server: Broker) -> Broker:
    """Running, whatever the last test did."""
    server.start()
    return server


def url(broker: Broker) -> str:
    return f"nats://127.0.0.1:{broker.port}"


def asked(broker: Broker, work: Callable[[Any], Awaitable[Any]]) -> None:
    async def run() -> None:
        client = await nats.connect(url(broker))
        try:
            await work(client.jetstream(timeout=PATIENCE))
        finally:
            await client.close()

    asyncio.run(run())


def publish(broker: Broker, rows: Sequence[Mapping[str, Any]]) -> None:
    async def work(context: Any) -> None:
        for begin in range(0, len(rows), 200):
            some = rows[begin : begin + 200]
            await asyncio.gather(*(context.publish("records.a", json.dumps(row).encode()) for row in some))

    asked(broker, work)


def stand(broker: Broker, **options: Any) -> Stand:
    """Return a stand on an empty stream."""

    async def remake(context: Any) -> None:
        with suppress(nats.js.errors.NotFoundError):
            await context.delete_stream("s")
        await context.add_stream(name="s", subjects=["records.*"])

    async def forget(context: Any, records: int) -> None:
        state = (await context.stream_info("s")).state
        await context.purge_stream("s", seq=state.first_seq + records)

    asked(broker, remake)
    given = {"label": "y", "id": "id", "max_classes": 5, "stream": "s", "url": url(broker), **options}
    return Stand(
        open=partial(jetstream, **given),
        publish=partial(publish, broker),
        spoil=lambda: publish(broker, [{"a": "two", "b": 1, "y": "a", "id": "spoilt"}]),
        stop=broker.stop,
        start=broker.start,
        forget=lambda records: asked(broker, partial(forget, records=records)),
        empty=lambda: asked(broker, remake),
    )


@pytest.mark.parametrize("law", conformance.LAWS)
def test_it_keeps_the_laws_of_feeds(law: Law, broker: Broker) -> None:
    law(stand(broker))


@pytest.mark.parametrize("law", conformance.LAWS)
def test_with_a_durable_consumer_it_keeps_the_laws_of_feeds(law: Law, broker: Broker) -> None:
    law(stand(broker, durable="d"))


def test_a_durable_consumer_goes_back_to_where_a_checkpoint_is(broker: Broker) -> None:
    """What it was told of a later one is given again, so nothing is lost where that one was damaged."""
    made = stand(broker, durable="d")
    made.publish(conformance.rows(0, 40))
    feed = made.open(refuse=lambda _: None)
    position = taken(feed, 20)[-1].position
    feed.commit(taken(feed, 20)[-1].position)
    feed.close()
    again = made.open(refuse=lambda _: None)
    again.seek(position)
    assert again.capabilities.replayable
    assert names(taken(again, 20)) == [f"r{n}" for n in range(20, 40)]
    again.close()


def test_what_a_durable_consumer_lost_while_nobody_read_is_told(broker: Broker) -> None:
    made = stand(broker, durable="d")
    made.publish(conformance.rows(0, 20))
    feed = made.open(refuse=lambda _: None)
    position = taken(feed, 5)[-1].position
    feed.commit(position)
    feed.close()
    # The server moves what the consumer knows, too; it is the checkpoint's position that tells.
    asked(broker, lambda context: context.update_stream(name="s", subjects=["records.*"], max_msgs=8))
    feed = made.open(refuse=lambda _: None)
    with pytest.raises(FeedError, match=r"7 messages after 5 were removed .*feed\.on_position_lost"):
        feed.seek(position)
    feed.close()
    feed = made.open(refuse=lambda _: None, on_position_lost="earliest")
    feed.seek(position)
    assert names(taken(feed, 8)) == [f"r{n}" for n in range(12, 20)]
    feed.close()
    assert dict(feed.resets) == {"trimmed": 1}


def test_only_the_subjects_wanted_come_and_others_are_no_loss(broker: Broker) -> None:
    made = stand(broker, subject="records.b", columns=("a", "b"))
    made.publish(conformance.rows(0, 10))
    feed = made.open(refuse=lambda _: None)
    for _ in range(2):
        batch = feed.poll(16)
        assert batch is not None
        assert len(batch) == 0
    assert made.forget is not None
    made.forget(10)
    asked(broker, lambda context: context.publish("records.b", json.dumps(conformance.rows(7, 8)[0]).encode()))
    assert names(taken(feed, 1)) == ["r7"]
    feed.close()


def test_a_message_is_as_old_as_the_server_says(broker: Broker) -> None:
    made = stand(broker)
    began = time.time() - 1
    made.publish(conformance.rows(0, 3))
    feed = made.open(refuse=lambda _: None)
    times = [at for batch in taken(feed, 3) for at in batch.times]
    feed.close()
    assert len(times) == 3
    assert all(began < at < time.time() + 1 for at in times)


@pytest.fixture
def table(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stream that drifts, published; the settings to learn it."""
    monkeypatch.chdir(tmp_path)
    write_table(TABLE)
    made = stand(broker)
    with TABLE.open(encoding="utf-8", newline="") as file:
        made.publish(
            [{name: cell if name == "y" else float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
        )
    return ["feed.kind=nats", f"feed.url={url(broker)}", "feed.stream=s", "feed.label=y"]


@pytest.mark.slow
def test_a_killed_run_ends_where_an_unbroken_one_ends(table: list[str]) -> None:
    outcome = kill_loop("default", 4, seed=2, feed=[*table, "feed.follow=false"])
    assert outcome.equal == outcome.ends >= 1


@pytest.mark.slow
def test_a_server_that_is_gone_for_ten_seconds_costs_nothing_and_is_told(broker: Broker, table: list[str]) -> None:
    rows = [{"x0": n, "y": "1"} for n in range(100)]
    costs_nothing(broker, [*table, "feed.durable=d"], lambda: publish(broker, rows), more=len(rows))


@pytest.mark.slow
def test_a_durable_consumer_knows_what_is_in_a_checkpoint(broker: Broker, table: list[str]) -> None:
    command = arguments("default", Path("saved"), [*table, "feed.durable=d", "feed.follow=false", "labels.delay=0"])
    assert ended(in_a_child(*command)) == 0
    floors: list[int] = []

    async def look(context: Any) -> None:
        floors.append((await context.consumer_info("s", "d")).ack_floor.stream_seq)

    asked(broker, look)
    assert floors == [RECORDS]


def test_a_server_that_is_away_is_given_up_at_once(broker: Broker) -> None:
    """The client goes on asking for as long as a slow server may take, unless it is kept from that."""
    made = stand(broker)
    broker.stop()
    with pytest.raises(FeedError, match=r"feed\.url = .*: cannot be reached \(nats: no servers available"):
        made.open(refuse=lambda _: None)

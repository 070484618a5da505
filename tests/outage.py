"""A broker that is gone for ten seconds, or a daemon that is killed, and what that costs."""

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from brokers import Broker
from stack import PATIENCE, waited
from test_commands import fetched, started, told

from runners.bench.kill import RECORDS
from streamkd import checkpoint

SECONDS = 10


def costs_nothing(broker: Broker, feed: Sequence[str], publish: Callable[[], None], *, more: int) -> None:
    """Hold that a daemon learns every record, and that health and metrics tell what went on.

    Args:
        broker: which is killed while the daemon learns, and started again.
        feed: settings of a feed on it that has `RECORDS` records.
        publish: appends more when it is back.
        more: how many.
    """
    kind = next(setting.removeprefix("feed.kind=") for setting in feed if setting.startswith("feed.kind="))
    settings = [*feed, "http.port=0", "checkpoint.every_records=400", "checkpoint.directory=saved"]
    with started("run", "default", *(f"--set={setting}" for setting in settings)) as daemon:
        port = told(daemon, "listening")["port"]
        told(daemon, "checkpoint")
        broker.stop()
        try:
            assert told(daemon, "feed disconnected")["reason"]
            assert waited(lambda: fetched(port, "/readyz")[0] == 503)
            checks = fetched(port, "/readyz")[1]
            assert json.loads(checks)["checks"]["feed_connected"] is False
            assert fetched(port, "/healthz")[0] == 200
            time.sleep(SECONDS)
            text = fetched(port, "/metrics")[1]
            assert f'streamkd_feed_connected{{feed="{kind}"}} 0.0' in text
            assert f'streamkd_feed_errors_total{{error_type="unreachable",feed="{kind}",stage="read"}}' in text
        finally:
            broker.start()
        told(daemon, "feed connected")
        publish()
        wanted = (
            f'streamkd_feed_records_total{{feed="{kind}"}} {float(RECORDS + more)}',
            f'streamkd_feed_lag_records{{feed="{kind}",partition="0"}} 0.0',
            f'streamkd_feed_connected{{feed="{kind}"}} 1.0',
        )

        def missing() -> list[str]:
            text = fetched(port, "/metrics")[1]
            return [line for line in wanted if line not in text]

        assert waited(lambda: not missing()), missing()
        assert fetched(port, "/readyz")[0] == 200
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE) == 0


def newest_interval(directory: Path) -> int:
    """Return how many records are in the newest checkpoint and not in the one before it, where there is one."""
    newest, *before = [checkpoint.about(path)["records"] for path in checkpoint.found(directory)[:2]]
    return int(newest - sum(before))

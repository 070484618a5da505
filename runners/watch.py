"""`streamkd watch`: the view of the demo, of any daemon, from its /metrics."""

import time
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPException
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from monitoring.standing import Reader, Standing
from runners.view import View, events, peers_table
from streamkd.errors import ConfigError

TIMEOUT_SECONDS = 3.0


class Watcher:
    """Asks a daemon how things stand, and remembers it when there is no answer.

    Args:
        url: of the daemon; the scheme and /metrics may be left out.
    """

    def __init__(self, url: str) -> None:
        with_scheme = url if "://" in url else f"http://{url}"
        self.url = f"{with_scheme.rstrip('/').removesuffix('/metrics')}/metrics"
        self._reader = Reader()
        self._answered = 0.0
        self._latest: Standing | None = None
        self._failure = ""

    def ask(self) -> Standing:
        """Return how things stand now; where there is no answer, how they stood, and that nobody knows any more.

        Raises:
            ConfigError: there never was an answer.
        """
        try:
            self._latest = self._read()
            self._answered, self._failure = time.monotonic(), ""
        except (OSError, HTTPException, ValueError) as error:
            self._failure = str(getattr(error, "reason", error))
            if self._latest is None:
                raise ConfigError(
                    f"{self.url}: no daemon's metrics ({self._failure}); name its http.host and http.port"
                ) from None
            self._latest = replace(self._latest, state="no answer", speed=0.0)
        return self._latest

    def _read(self) -> Standing:
        with urlopen(self.url, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310 - whatever the user names
            families = list(text_string_to_metric_families(answer.read().decode()))
        standing = self._reader.read(families, time.time())
        if not standing.peers:
            raise ValueError("it is starting" if standing.state == "starting" else "it gives other metrics")
        return standing

    def heading(self) -> str:
        """Return whom it asks, and since when there is no answer."""
        silent = (
            f"; no answer for {time.monotonic() - self._answered:,.0f} s ({self._failure})" if self._failure else ""
        )
        return f"{self.url}{silent}"


def main(url: str, console: Console, *, once: bool) -> None:
    """Show how things stand each second until Ctrl-C, or once.

    Raises:
        ConfigError: there is no daemon.
    """
    watcher = Watcher(url)
    standing = watcher.ask()
    if once:
        console.print(
            watcher.heading(), peers_table(standing), events(standing), sep="\n", highlight=False, markup=False
        )
        return
    view = View(console, watcher.ask, heading=watcher.heading, per_second=1)
    with suppress(KeyboardInterrupt), view.live:
        while True:
            time.sleep(1)

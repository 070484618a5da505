"""Is it alive, and is it ready?"""

from collections.abc import Callable
from dataclasses import dataclass, field

STATES = ("starting", "restoring", "running", "draining", "stopped", "failed")


@dataclass(slots=True)
class Health:
    """What the loop says of itself; written by the loop, read by the server.

    Attributes:
        clock: reads seconds; any origin will do.
        stalled_seconds: without progress for this long, the loop is taken for stuck.
        connected: whether the feed can be read now.
    """

    clock: Callable[[], float]
    stalled_seconds: float
    state: str = "starting"
    restored: bool = False
    connected: bool = True
    last_progress: float = field(init=False)

    def __post_init__(self) -> None:
        self.last_progress = self.clock()

    def progress(self) -> float:
        """Say that the loop went round, with a batch or without one; return when."""
        self.last_progress = self.clock()
        return self.last_progress

    def alive(self) -> dict[str, bool]:
        """Return the checks of liveness: nothing outside this process; a long restore is no standstill."""
        stuck = self.state == "running" and self.clock() - self.last_progress > self.stalled_seconds
        return {"progress": not stuck, "not_failed": self.state != "failed"}

    def ready(self) -> dict[str, bool]:
        """Return the checks of readiness."""
        running = self.state == "running"
        return {"restored": self.restored, "running": running, "feed_connected": self.connected, **self.alive()}

"""Has the world changed? river's detectors behind one small protocol, listening for a rise only.

Each factory below makes a detector of one stream of errors. Streams that an online learner repairs by itself make
two-sided detectors fire at every recovery, so by default an alarm counts only if the mean rose.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from streamkd import pickles
from streamkd.report import Scored


class DriftDetector(Protocol):
    """Reads one value a record, in the order in which labels arrive."""

    @property
    def width(self) -> int:
        """How many of the latest records belong to the present world."""

    def update(self, value: float) -> bool:
        """Take in one value between 0 and 1; True on an alarm."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that was learned."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


class Never:
    """The detector of a run without drift."""

    def __init__(self) -> None:
        self.width = 0

    def update(self, value: float) -> bool:  # noqa: ARG002 - the protocol's
        """Count the record; never an alarm."""
        self.width += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"width": self.width}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.width = state["width"]


Level = Callable[[Any], float]


class River:
    """A detector of river's.

    Args:
        detector: anything with river's `update` and `drift_detected`.
        past, present: read what the detector holds for the mean before, and for the mean now. An alarm counts only if
            `present`, read after it, is higher than `past`, read before it. None where falls count too, or where the
            detector itself hears rises only.
        of_correct: it reads correct bits, not error bits.
    """

    def __init__(
        self, detector: Any, past: Level | None = None, present: Level | None = None, *, of_correct: bool = False
    ) -> None:
        self._detector = detector
        self._past, self._present = past, present
        self._of_correct = of_correct
        self._since = 0

    @property
    def width(self) -> int:
        """ADWIN's own window; for the others, the records since the last alarm."""
        return int(getattr(self._detector, "width", self._since))

    def update(self, value: float) -> bool:
        """Take in one value; True on an alarm."""
        before = self._past(self._detector) if self._past else 0.0
        self._detector.update(1 - value if self._of_correct else value)
        alarm = bool(self._detector.drift_detected)
        self._since = 0 if alarm else self._since + 1
        return alarm and (self._present is None or self._present(self._detector) > before)

    def state_dict(self) -> dict[str, Any]:
        """Return the detector as bytes: river's objects have no state of plain values."""
        return {"since": self._since, "river": pickles.dump(self._detector)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on."""
        self._since = state["since"]
        self._detector = pickles.load(state["river"])


@dataclass(frozen=True, slots=True)
class DriftWatch:
    """What is watched for drift: a detector, its name for reports, and whether it reads `error` bits or `loss`."""

    detector: DriftDetector
    name: str = "adwin"
    signal: str = "error"

    def read(self, scored: Scored) -> list[int]:
        """Let the detector read what was scored; return the rows at which it raised an alarm."""
        if self.signal == "error":
            values = (scored.answers.numpy()[-1] != scored.y.numpy()).astype(np.float32)
        else:
            values = np.minimum(scored.losses.numpy()[-1], WORST) / WORST
        return [row for row, value in enumerate(values.tolist()) if self.detector.update(value)]


WORST = 5.0
"""The log-loss, in nats, that counts as 1 where `loss` is watched."""


Share = Annotated[float, Field(gt=0, lt=1)]


def adwin(delta: Share = 0.002, *, one_sided: bool = True, **options: Any) -> River:
    """Adaptive windowing (Bifet and Gavalda 2007): two sub-windows whose means differ. Any value in [0, 1].

    Args:
        delta: how often an alarm may be false.
        one_sided: an alarm counts only if the errors became more.
        **options: of river's class.
    """
    return River(_rivers().ADWIN(delta=delta, **options), *((_estimation, _estimation) if one_sided else ()))


def kswin(*, one_sided: bool = True, seed: int = 0, **options: Any) -> River:
    """Kolmogorov-Smirnov windowing (Raab et al. 2020). Any value; a thousand times slower than ADWIN.

    Args:
        one_sided: an alarm counts only if the errors became more.
        seed: of what is drawn from its window.
        **options: of river's class.
    """
    return River(_rivers().KSWIN(seed=seed, **options), *((_older, _recent) if one_sided else ()))


def page_hinkley(threshold: Annotated[float, Field(gt=0)] = 10.0, *, one_sided: bool = True, **options: Any) -> River:
    """Page's cumulative sum with Hinkley's test (Page 1954). Any value; `threshold` is in units of its sum.

    Args:
        threshold: of the sum, at which there is an alarm.
        one_sided: an alarm counts only if the errors became more.
        **options: of river's class.
    """
    mode = "up" if one_sided else "both"
    return River(_rivers().PageHinkley(threshold=threshold, mode=mode, **options))


def ddm(**options: Any) -> River:
    """Drift detection method (Gama et al. 2004), on error bits: the error rate leaves its minimum by 3 sigma.

    Args:
        **options: of river's class.
    """
    return River(_rivers().binary.DDM(**options))


def eddm(**options: Any) -> River:
    """Early drift detection (Baena-Garcia et al. 2006), on error bits: errors come closer together.

    Args:
        **options: of river's class.
    """
    return River(_rivers().binary.EDDM(**options))


def hddm_a(*, one_sided: bool = True, **options: Any) -> River:
    """Hoeffding bound on averages (Frias-Blanco et al. 2014), on error bits.

    Args:
        one_sided: an alarm counts only if the errors became more.
        **options: of river's class.
    """
    return River(_rivers().binary.HDDMA(two_sided_test=not one_sided, **options))


def hddm_w(*, one_sided: bool = True, **options: Any) -> River:
    """Hoeffding bound on weighted averages (Frias-Blanco et al. 2014), on error bits: the quickest of the family.

    Args:
        one_sided: an alarm counts only if the errors became more.
        **options: of river's class.
    """
    return River(_rivers().binary.HDDMW(two_sided_test=not one_sided, **options))


def fhddm(**options: Any) -> River:
    """Fast Hoeffding drift detection (Pesaranghader and Viktor 2016), on error bits.

    Args:
        **options: of river's class.
    """
    return River(_rivers().binary.FHDDM(**options), of_correct=True)


def never() -> Never:
    """No drift detection."""
    return Never()


def _rivers() -> Any:
    """Import river's detectors, once one is asked for: they bring all of scipy.stats."""
    return import_module("river.drift")


def _estimation(detector: Any) -> float:
    return float(detector.estimation)


def _recent(detector: Any) -> float:
    """Mean of KSWIN's recent sample, to which an alarm cuts its window."""
    window = list(detector.window)[-detector.stat_size :]
    return float(np.mean(window)) if window else 0.0


def _older(detector: Any) -> float:
    """Mean of what KSWIN holds its recent sample against."""
    window = list(detector.window)[: -detector.stat_size]
    return float(np.mean(window)) if window else 0.0

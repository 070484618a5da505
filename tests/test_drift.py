import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from river import drift as river_drift
from worlds import stored

from streamkd import DriftWatch
from streamkd.drift import (
    DriftDetector,
    adwin,
    ddm,
    eddm,
    fhddm,
    hddm_a,
    hddm_w,
    kswin,
    never,
    page_hinkley,
)
from streamkd.report import SERVED, Scored

Make = Callable[[], DriftDetector]
LISTENING: list[Make] = [adwin, kswin, page_hinkley, ddm, eddm, hddm_a, hddm_w, fhddm]
ONE_SIDED: list[Any] = [adwin, kswin, page_hinkley, hddm_a, hddm_w]


def errors(seed: int, *stretches: tuple[int, float]) -> list[float]:
    """Error bits, in stretches of so many at such a rate."""
    chance = random.Random(seed)  # noqa: S311 - a stream of test data
    return [float(chance.random() < rate) for n, rate in stretches for _ in range(n)]


def alarms(detector: DriftDetector, values: list[float]) -> list[int]:
    return [index for index, value in enumerate(values) if detector.update(value)]


@pytest.mark.parametrize("make", LISTENING)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_abrupt_rise_of_the_errors_is_heard(make: Make, seed: int) -> None:
    found = alarms(make(), errors(seed, (1_000, 0.1), (1_000, 0.6)))
    assert any(index >= 1_000 for index in found)


@pytest.mark.parametrize("make", [adwin, page_hinkley, hddm_a, hddm_w])
@pytest.mark.parametrize("seed", [2, 5])
def test_a_rise_is_heard_soon_and_nothing_before_it(make: Make, seed: int) -> None:
    first = alarms(make(), errors(seed, (500, 0.1), (500, 0.6)))[0]
    assert 500 <= first < 600


@pytest.mark.parametrize("make", [*ONE_SIDED, ddm, fhddm])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_errors_that_fall_are_no_alarm(make: Make, seed: int) -> None:
    found = alarms(make(), errors(seed, (500, 0.6), (500, 0.1)))
    assert [index for index in found if index >= 500] == []


@pytest.mark.parametrize("make", [adwin, kswin, hddm_a, hddm_w])
def test_a_two_sided_detector_hears_the_fall(make: Any) -> None:
    values = errors(3, (500, 0.9), (500, 0.1))
    assert any(index >= 500 for index in alarms(make(one_sided=False), values))


@pytest.mark.parametrize("make", [adwin, kswin])
@pytest.mark.parametrize("seed", range(4))
def test_to_hear_rises_only_costs_no_rise(make: Any, seed: int) -> None:
    values = errors(seed, (300, 0.1), (100, 0.8))
    both = [index for index in alarms(make(one_sided=False), values) if index >= 300]
    one_sided = [index for index in alarms(make(), values) if index >= 300]
    assert one_sided == both


@pytest.mark.parametrize("make", LISTENING)
def test_the_width_is_of_the_present_world_once_the_world_has_changed(make: Make) -> None:
    detector = make()
    alarms(detector, errors(4, (1_000, 0.1), (700, 0.6)))
    assert 0 <= detector.width <= 800


@pytest.mark.parametrize("make", [*LISTENING, never])
@pytest.mark.parametrize("cut", [0, 120, 320])
def test_a_restored_detector_raises_the_alarms_it_would_have_raised(make: Make, cut: int) -> None:
    values = errors(5, (300, 0.1), (300, 0.7))
    detector, restored = make(), make()
    alarms(detector, values[:cut])
    restored.load_state_dict(stored(detector.state_dict()))
    assert alarms(detector, values[cut:]) == alarms(restored, values[cut:])
    assert detector.width == restored.width


def test_no_drift_is_never_an_alarm() -> None:
    detector = never()
    assert alarms(detector, errors(6, (300, 0.0), (300, 1.0))) == []
    assert detector.width == 600


class Planted:
    """A pickle of it calls `function(*arguments)` when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def refuses(planted: object) -> None:
    """Hold a detector to refusing a state that carries `planted`."""
    raw = torch.frombuffer(bytearray(pickle.dumps(planted, protocol=4)), dtype=torch.uint8)
    with pytest.raises(pickle.UnpicklingError, match="is not a part of river's objects"):
        adwin().load_state_dict({"since": 0, "river": {"strings": [], "body": raw}})


def test_a_planted_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    refuses(Planted(os.system, f"touch {mark}"))
    refuses(Planted(eval, f"open({str(mark)!r}, 'w')"))
    refuses(Planted(mark.touch))
    refuses([river_drift.ADWIN(), Planted(os.mkdir, str(mark))])
    assert not mark.exists()
    pickle.loads(pickle.dumps(Planted(os.mkdir, str(mark))))  # noqa: S301 - it would have run
    assert mark.exists()


@pytest.mark.parametrize("owner", ["text", river_drift.ADWIN(), river_drift.PageHinkley()])
def test_getattr_reaches_nothing_but_page_hinkleys_own_test(owner: object) -> None:
    refuses(Planted(getattr, owner, "__class__"))
    refuses(Planted(getattr, owner, "__reduce_ex__"))


class Recorder:
    """A detector that keeps what it reads, and raises an alarm at every value over a half."""

    def __init__(self) -> None:
        self.read: list[float] = []
        self.width = 0

    def update(self, value: float) -> bool:
        """Keep it."""
        self.read.append(value)
        return value > 0.5

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing."""


@pytest.mark.parametrize(
    ("signal", "read", "rows"), [("error", [0, 1, 1, 0], [1, 2]), ("loss", [0.02, 0.4, 1.0, 0.0], [2])]
)
def test_a_watch_reads_the_served_answer_in_the_order_in_which_labels_came(
    signal: str, read: list[float], rows: list[int]
) -> None:
    scored = Scored(
        ("peer", SERVED),
        torch.tensor([0, 1, 2, 3]),
        torch.tensor([[0, 0, 0, 0], [0, 0, 1, 3]]),
        torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.1, 2.0, 9.0, 0.0]]),
    )
    recorder = Recorder()
    assert DriftWatch(recorder, signal=signal).read(scored) == rows
    assert recorder.read == pytest.approx(read)

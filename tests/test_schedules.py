import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkd import Signals
from streamkd.schedules import (
    annealing,
    capacity_prior,
    capacity_ratio,
    competence,
    complement,
    constant,
    curriculum,
    loss_driven,
    mission_alpha,
    mission_temperature,
)

lawful = settings(max_examples=50, deadline=None)
losses = st.floats(0, 10)
ratios = st.floats(1e-3, 1e3)


def signals_at(rho: float, teacher_rho: float = 0.2, *, classes: int = 10) -> Signals:
    """Losses given as shares of a blind guess's."""
    return Signals(classes=classes, loss=rho * math.log(classes), teacher_loss=teacher_rho * math.log(classes))


@lawful
@given(ratios)
def test_the_missions_alpha_solves_its_own_circular_definition(ratio: float) -> None:
    alpha = mission_alpha()(Signals(capacity=ratio, teacher_capacity=1))
    assert alpha == pytest.approx(1 / (1 + math.exp(-ratio * (1 - alpha))), abs=1e-8)


@pytest.mark.parametrize(("ratio", "alpha"), [(0.25, 0.529), (0.5, 0.555), (1, 0.599), (4, 0.739)])
def test_the_missions_alpha_hardly_depends_on_the_ratio(ratio: float, alpha: float) -> None:
    assert mission_alpha()(Signals(capacity=ratio * 700, teacher_capacity=700)) == pytest.approx(alpha, abs=5e-4)


@lawful
@given(ratios, st.floats(1.01, 10))
def test_a_larger_student_gets_a_larger_mission_alpha(ratio: float, factor: float) -> None:
    alpha = mission_alpha()
    assert alpha(Signals(capacity=ratio * factor, teacher_capacity=1)) > alpha(
        Signals(capacity=ratio, teacher_capacity=1)
    )


@pytest.mark.parametrize(
    ("loss", "previous", "temperature"),
    [
        (0.05, None, 4.5),  # from its start of 5
        (0.7, None, 5.5),
        (0.3, None, 5.0),
        (0.1, 3.0, 3.0),  # at a threshold is between them
        (0.5, 3.0, 3.0),
        (0.09, 2.0, 1.8),
        (0.51, 2.0, 2.2),
        (0.0, 1.05, 1.0),
        (9.0, 9.9, 10.0),
    ],
)
def test_the_missions_temperature_follows_the_published_rule(
    loss: float, previous: float | None, temperature: float
) -> None:
    assert mission_temperature()(Signals(loss=loss, previous=previous)) == pytest.approx(temperature)


@lawful
@given(st.lists(losses, min_size=1, max_size=40))
def test_the_missions_temperature_never_leaves_its_bounds(history: list[float]) -> None:
    value = None
    for loss in history:
        value = mission_temperature()(Signals(loss=loss, previous=value))
        assert 1 <= value <= 10


@lawful
@given(losses, st.integers(3, 1000), st.floats(1, 4), st.floats(1.01, 2))
def test_temperature_moves_by_at_most_its_rate_a_step(loss: float, classes: int, previous: float, rate: float) -> None:
    value = loss_driven(rate=rate)(Signals(classes=classes, loss=loss, previous=previous))
    assert 1 / rate - 1e-9 <= value / previous <= rate + 1e-9


@lawful
@given(st.floats(0, 2), st.integers(2, 1000), st.floats(1, 4))
def test_temperature_reaches_its_target_and_stays(rho: float, classes: int, start: float) -> None:
    top = min(max(1 + math.log2(classes / 2), 1), 4)
    target = top ** min(max((rho - 0.1) / 0.4, 0), 1)
    signals = replace(signals_at(rho, classes=classes), previous=start)
    for _ in range(16):  # 1.1 ** 15 > 4, the largest distance there is
        signals = replace(signals, previous=loss_driven()(signals))
    assert signals.previous == pytest.approx(target)


@lawful
@given(st.lists(losses, min_size=1, max_size=20))
def test_two_classes_have_nothing_to_soften(history: list[float]) -> None:
    value = None
    for loss in history:
        value = loss_driven()(Signals(classes=2, loss=loss, previous=value))
        assert value == 1


def test_the_first_lesson_starts_from_plain_temperature() -> None:
    assert loss_driven()(signals_at(1.0, classes=100)) == pytest.approx(1.1)
    assert loss_driven()(signals_at(0.05, classes=100)) == 1


@lawful
@given(losses, losses, st.integers(0, 500), ratios, st.floats(0.1, 5))
def test_competence_stays_between_zero_and_its_maximum(
    loss: float, teacher_loss: float, calm: int, ratio: float, maximum: float
) -> None:
    signals = Signals(loss=loss, teacher_loss=teacher_loss, updates_since_drift=calm, capacity=ratio)
    assert 0 <= competence(maximum)(signals) <= maximum


@lawful
@given(st.floats(0, 2), st.floats(0, 1), st.integers(1, 500))
def test_nobody_is_believed_at_an_alarm_and_belief_comes_back_by_halves(
    rho: float, teacher_rho: float, half_life: int
) -> None:
    schedule = competence(half_life=half_life)
    signals = signals_at(rho, teacher_rho)
    calm = schedule(signals)
    assert schedule(replace(signals, updates_since_drift=0)) == 0
    for halvings in (1, 2, 3):
        after = schedule(replace(signals, updates_since_drift=halvings * half_life))
        assert after == pytest.approx(calm * (1 - 0.5**halvings))


@lawful
@given(st.floats(0, 2), st.floats(0.01, 1), st.floats(0, 0.99))
def test_the_further_a_student_lags_the_more_it_listens(rho: float, lag: float, teacher_rho: float) -> None:
    schedule = competence()
    near, far = schedule(signals_at(rho, teacher_rho)), schedule(signals_at(rho + lag, teacher_rho))
    assert far >= near
    if rho < teacher_rho - 0.01:  # behind its teacher it listens with all its ear already
        assert far > near


@lawful
@given(st.floats(0.02, 0.99), st.floats(0.01, 0.99), ratios, st.floats(1.1, 10))
def test_a_larger_teacher_is_believed_sooner(teacher_rho: float, lead: float, ratio: float, factor: float) -> None:
    schedule = competence()
    signals = replace(signals_at(teacher_rho * (1 - lead), teacher_rho), capacity=1.0, teacher_capacity=ratio)
    larger = schedule(replace(signals, teacher_capacity=ratio * factor))
    assert larger >= schedule(signals)
    if schedule(signals) < 0.99 * (1 - teacher_rho):  # not yet believed all it can be
        assert larger > schedule(signals)


@pytest.mark.parametrize("teacher_rho", [1.0, 1.5])
def test_a_teacher_no_better_than_a_blind_guess_is_not_listened_to(teacher_rho: float) -> None:
    assert competence()(signals_at(3.0, teacher_rho)) == 0


def test_competence_is_the_documented_formula() -> None:
    signals = replace(signals_at(0.3, 0.4), capacity=100, teacher_capacity=200, updates_since_drift=32)
    lag = 8 * (0.3 - 0.4) + 0.5 * math.log(2)
    expected = 2 * (1 - 0.4) * 2 / (1 + math.exp(-lag)) * 0.5
    assert competence(2.0)(signals) == pytest.approx(expected)


@lawful
@given(st.floats(0, 1))
def test_labels_and_lessons_share_the_whole_where_beta_is_the_complement(alpha: float) -> None:
    assert complement()(Signals(alpha=alpha)) + alpha == pytest.approx(1)


@lawful
@given(losses, losses, st.integers(2, 100))
def test_a_constant_hears_no_signal(value: float, loss: float, classes: int) -> None:
    assert constant(value)(Signals(loss=loss, classes=classes, previous=value + 1)) == value


@lawful
@given(st.integers(0, 10_000), st.floats(1, 10), st.floats(1, 10), st.floats(1, 1_000))
def test_annealing_goes_from_its_start_to_its_end_and_halves_the_way_each_half_life(
    update: int, start: float, end: float, half_life: float
) -> None:
    temperature = annealing(start, end, half_life)
    assert temperature(Signals(update=0)) == pytest.approx(start)
    assert temperature(Signals(update=10**9, updates_since_drift=10**9)) == pytest.approx(end)
    way = [temperature(Signals(update=at)) - end for at in (update, update + 2)]
    assert way[1] == pytest.approx(way[0] * 0.5 ** (2 / half_life), abs=1e-9)
    # A changed world is a new one.
    assert temperature(Signals(update=update, updates_since_drift=0)) == pytest.approx(start)


@lawful
@given(st.integers(0, 5_000), st.floats(-100, 100), st.floats(1, 10))
def test_a_curriculum_climbs_the_loss_within_its_bounds_and_not_before_it_begins(
    update: int, slope: float, previous: float
) -> None:
    rule = curriculum(minimum=1.0, maximum=10.0, growth=1_000)
    assert rule(Signals(update=0, slope=slope, previous=previous)) == pytest.approx(previous)
    value = rule(Signals(update=update, slope=slope, previous=previous))
    assert 1 <= value <= 10
    assert previous / 1.1 - 1e-9 <= value <= previous * 1.1 + 1e-9
    assert (value - previous) * slope >= 0
    later = rule(Signals(update=update + 500, slope=slope, previous=previous))
    assert abs(later - previous) >= abs(value - previous) - 1e-12


@lawful
@given(ratios, ratios, st.floats(0.01, 3))
def test_strength_by_capacity_grows_with_the_ratio_and_is_corrected_to_fall_with_it(
    ratio: float, scale: float, steepness: float
) -> None:
    def at(capacity: float) -> Signals:
        return Signals(capacity=capacity * scale, teacher_capacity=scale)

    assert 0.5 <= capacity_ratio()(at(ratio)) <= capacity_ratio()(at(ratio * 2)) <= 1
    assert capacity_ratio(2.0)(at(ratio)) == pytest.approx(1 / (1 + math.exp(-min(2 * ratio, 60))))
    prior = capacity_prior(2.0, steepness)
    assert 0 < prior(at(ratio * 2)) <= prior(at(ratio)) <= 2
    assert prior(at(min(ratio, 1))) == pytest.approx(2)  # an equal, or an abler one: all of it
    if ratio > 1:
        assert prior(at(ratio)) == pytest.approx(4 / (1 + ratio**steepness))

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkd.sums import Array, Totals

lawful = settings(max_examples=60, deadline=None)
numbers = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=3_000)


def filled(values: list[float], **options: np.ufunc) -> tuple[Totals, Array]:
    made, plain = Totals(len(values), **options), np.array(values)
    made[np.arange(len(values))] = plain
    return made, plain


@lawful
@given(numbers, st.data())
def test_totals_are_those_of_the_numbers(values: list[float], data: st.DataObject) -> None:
    made, plain = filled(values)
    assert made.total == pytest.approx(plain.sum())
    place = data.draw(st.integers(0, len(values)))
    assert made.before(place) == pytest.approx(plain[:place].sum())
    assert filled(values, of=np.maximum)[0].total == plain.max()


@lawful
@given(numbers, st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 100)), max_size=30))
def test_what_they_come_to_depends_on_the_numbers_and_not_on_their_history(
    values: list[float], changes: list[tuple[int, float]]
) -> None:
    made, plain = filled(values)
    for place, value in changes:
        places = np.array([place % len(values)])
        made[places] = plain[places] = np.array([value])
    again, _ = filled(plain.tolist())
    assert made.total == again.total
    assert np.array_equal(made[np.arange(len(values))], plain)
    assert made.before(len(values) // 2) == again.before(len(values) // 2)


@lawful
@given(numbers, st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=50))
def test_a_depth_is_found_where_the_running_sum_gets_beyond_it(values: list[float], shares: list[float]) -> None:
    made, plain = filled(values)
    if not plain.any():
        return
    depths = np.array(shares) * made.total
    found = made.find(depths)
    running = plain.cumsum()
    slack = 1e-9 * running[-1]
    assert (plain[found] > 0).all()
    assert (running[found] >= depths - slack).all()
    assert (running[found] - plain[found] <= depths + slack).all()


@pytest.mark.parametrize("n", [5, 3_000, 70_000])
def test_a_depth_right_at_a_sum_or_beside_it_is_never_found_at_a_number_of_none(n: int) -> None:
    for seed in range(20):
        chance = np.random.default_rng(seed)
        values = chance.random(n) ** 8
        values[chance.random(n) < 0.5] = 0.0
        values[0] = 1e-3
        made, _ = filled(values.tolist())
        sums = made._levels[-1][0].cumsum()  # noqa: SLF001 - where one block ends, and the next one begins
        ends = np.array([0.0, made.total, np.nextafter(made.total, 0)])
        found = made.find(np.concatenate([ends, sums, np.nextafter(sums, 0)]))
        assert (found < n).all()
        assert (values[found] > 0).all()


def test_a_million_are_found_in_proportion() -> None:
    made = Totals(1_000_000)
    places = np.array([3, 500_000, 999_999])
    made[places] = np.array([1.0, 2.0, 7.0])
    found = made.find(made.total * np.random.default_rng(0).random(20_000))
    assert np.array_equal(np.unique(found), places)
    shares = [(found == place).mean() for place in places]
    assert shares == pytest.approx([0.1, 0.2, 0.7], abs=0.015)

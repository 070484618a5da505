"""An order is a permutation, and says which task is under way."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runners.feeds import orders
from runners.feeds.orders import Order, Rule
from streamkd.batch import UNLABELLED

lawful = settings(max_examples=40, deadline=None)
CLASSES = tuple("abcdef")
labels = st.lists(st.sampled_from([*range(len(CLASSES)), UNLABELLED]), min_size=1, max_size=80)
rules = st.one_of(
    st.just(orders.file()),
    st.builds(lambda seed: orders.shuffled(seed=seed), st.integers(0, 99)),
    st.builds(
        lambda tasks, shuffle, seed: orders.class_incremental(tasks=tasks, shuffle=shuffle, seed=seed),
        st.integers(1, len(CLASSES)),
        st.booleans(),
        st.integers(0, 99),
    ),
    st.builds(
        lambda tasks, by, seed: orders.domain_incremental(tasks=tasks, by=by, seed=seed),
        st.integers(1, len(CLASSES)),
        st.sampled_from(["rotation", "permutation", "classes"]),
        st.integers(0, 99),
    ),
)


def put(rule: Rule, y: Sequence[int]) -> Order:
    return rule(np.array(y, dtype=np.int64), CLASSES)


@lawful
@given(rules, labels)
def test_every_record_comes_exactly_once(rule: Rule, y: Sequence[int]) -> None:
    assert sorted(put(rule, y).indices) == list(range(len(y)))


@lawful
@given(rules, labels)
def test_tasks_come_one_after_the_other(rule: Rule, y: Sequence[int]) -> None:
    order = put(rule, y)
    assert list(order.tasks) == sorted(order.tasks)
    assert order.task_of(0) == order.tasks[0]


@lawful
@given(rules, labels)
def test_a_record_without_a_label_stays_without(rule: Rule, y: Sequence[int]) -> None:
    order = put(rule, y)
    assert [int(label) == UNLABELLED for label in order.labels] == [label == UNLABELLED for label in y]
    assert all(label == UNLABELLED or 0 <= label < len(order.classes) for label in order.labels)


@lawful
@given(st.integers(1, 6), st.booleans(), st.integers(0, 99), labels)
def test_a_class_is_of_one_task_whatever_the_records(tasks: int, shuffle: bool, seed: int, y: Sequence[int]) -> None:  # noqa: FBT001 - drawn
    rule = orders.class_incremental(tasks=tasks, shuffle=shuffle, seed=seed)
    everything = put(rule, [*range(6)] * 3)
    home = {int(everything.labels[i]): int(task) for i, task in zip(everything.indices, everything.tasks, strict=True)}
    assert sorted(np.bincount(list(home.values()), minlength=tasks)) == sorted(
        map(len, np.array_split(range(6), tasks))
    )
    order = put(rule, y)
    for index, task in zip(order.indices, order.tasks, strict=True):
        assert y[index] == UNLABELLED or home[y[index]] == task


def test_groups_of_classes_are_in_label_order() -> None:
    order = put(orders.class_incremental(tasks=3), [5, 4, 3, 2, 1, 0])
    assert [sorted(order.labels[order.indices[order.tasks == task]]) for task in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert order.classes == CLASSES


def test_in_a_domain_of_classes_the_label_is_the_place_in_the_group() -> None:
    order = put(orders.domain_incremental(tasks=3, by="classes"), [*range(6), UNLABELLED])
    assert order.labels.tolist() == [0, 1, 0, 1, 0, 1, UNLABELLED]
    assert order.classes == ("a/c/e", "b/d/f")


@lawful
@given(st.integers(0, 3), st.integers(0, 99))
def test_a_permutation_moves_pixels_and_changes_none(task: int, seed: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    view = put(orders.domain_incremental(tasks=4, by="permutation", seed=seed), [0] * 8).view
    seen = view(image, task)
    assert seen.shape == image.shape
    assert np.array_equal(np.sort(seen.reshape(3, -1)), np.sort(image.reshape(3, -1)))
    assert np.array_equal(seen, view(image, task))
    assert (task == 0) <= np.array_equal(seen, image)


def test_a_rotation_grows_with_the_task() -> None:
    image = np.zeros((2, 9, 9), dtype=np.uint8)
    image[:, 4, :4] = 200
    view = put(orders.domain_incremental(tasks=4, by="rotation", degrees=360.0), [0] * 8).view
    for task in range(4):
        assert np.array_equal(view(image, task), np.rot90(image, task, axes=(1, 2)))


@pytest.mark.parametrize("rule", [orders.class_incremental, orders.domain_incremental])
def test_more_tasks_than_classes_are_refused(rule: Any) -> None:
    options = {"by": "classes"} if rule is orders.domain_incremental else {}
    with pytest.raises(ValueError, match="tasks = 7: there are 6 classes"):
        put(rule(tasks=7, **options), [0])

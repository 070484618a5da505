import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import stored

from streamkd.transfer import TransferEfficiency

lawful = settings(max_examples=25, deadline=None)


def answers(n: int, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))


def efficiency(*given: Tensor, teacher: int = 0) -> list[float]:
    transfer = TransferEfficiency(len(given), 20_000)
    transfer.update(torch.stack(given), teacher)
    values: list[float] = transfer.values
    return values


@lawful
@given(
    st.integers(2, 5).flatmap(
        lambda k: st.tuples(
            st.just(k), st.lists(st.tuples(*[st.integers(0, k - 1)] * 3), min_size=1, max_size=40), st.integers(0, 2)
        )
    )
)
def test_efficiency_lies_between_none_and_all(case: tuple[int, list[tuple[int, int, int]], int]) -> None:
    _, rows, teacher = case
    values = efficiency(*torch.tensor(rows).T, teacher=teacher)
    assert all(0 <= value <= 1 for value in values)
    varied = len({row[teacher] for row in rows}) > 1
    assert values[teacher] == pytest.approx(float(varied), abs=1e-4)


def test_a_student_that_always_answers_with_its_teacher_has_learned_all() -> None:
    taught = answers(300)
    assert efficiency(taught, taught) == pytest.approx([1, 1], abs=1e-4)


def test_an_answer_that_tells_the_teachers_counts_though_the_names_of_the_classes_differ() -> None:
    taught = answers(300)
    assert efficiency(taught, (taught + 1) % 3)[1] == pytest.approx(1, abs=1e-4)


def test_an_independent_student_has_learned_nothing() -> None:
    assert efficiency(answers(20_000, seed=1), answers(20_000, seed=2))[1] < 1e-3


def test_a_teacher_that_always_says_the_same_can_teach_nothing() -> None:
    assert efficiency(torch.ones(50, dtype=torch.int64), answers(50)) == [0, 0]


def test_what_a_teacher_said_long_ago_is_not_taken_for_variety() -> None:
    transfer = TransferEfficiency(2, window=250)
    transfer.update(torch.stack([answers(50), answers(50)]), 0)
    for _ in range(3):
        transfer.update(torch.ones(2, 100, dtype=torch.int64), 0)
    assert transfer.values == [0, 0]


def test_before_the_first_answer_nothing_has_been_learned() -> None:
    assert TransferEfficiency(2).values == [0, 0]


def test_efficiency_is_mutual_information_over_the_teachers_entropy() -> None:
    # Teacher: 0 and 1 by halves. The student errs once in four where the teacher says 1.
    taught, learned = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 0])
    joint = torch.tensor([[4.0, 0.0], [1.0, 3.0]]) / 8
    outer = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    information = torch.xlogy(joint, joint / outer).sum() / torch.log(torch.tensor(2.0))
    assert efficiency(taught, learned)[1] == pytest.approx(float(information), abs=1e-5)


@lawful
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 25), st.data())
def test_the_latest_answers_count_whatever_batches_they_come_in_and_stay_what_they_were(
    sizes: list[int], window: int, data: st.DataObject
) -> None:
    transfer, since, seen = TransferEfficiency(2, window), torch.zeros(2, 0, dtype=torch.int64), []
    for number, size in enumerate(sizes):
        said, teacher = torch.stack([answers(size, seed=number), answers(size, seed=-1 - number)]), transfer.teacher
        if data.draw(st.integers(0, 5)) == 0:
            teacher, since = 1 - teacher, since[:, :0]
        transfer.update(said, teacher)
        since = torch.cat([since, said], 1)
        seen.append((transfer.answers, since[:, -window:]))
    assert all(torch.equal(torch.from_numpy(kept), expected) for kept, expected in seen)


def test_a_new_teacher_starts_anew() -> None:
    transfer = TransferEfficiency(3)
    transfer.update(torch.stack([answers(500, seed=seed) for seed in range(3)]), 0)
    taught = answers(30, seed=9)
    transfer.update(torch.stack([taught, taught, taught]), 1)
    assert transfer.values == pytest.approx([1, 1, 1], abs=1e-4)


def test_agreement_of_long_ago_is_forgotten() -> None:
    transfer = TransferEfficiency(2, window=300)
    taught = answers(500)
    transfer.update(torch.stack([taught, taught]), 0)
    for seed in range(3):
        transfer.update(torch.stack([answers(100, seed=seed), answers(100, seed=seed + 50)]), 0)
    assert float(transfer.values[1]) < 0.1


def test_what_was_restored_goes_on_as_it_would_have() -> None:
    transfer, restored = TransferEfficiency(2), TransferEfficiency(2)
    both = torch.stack([answers(200, seed=1), answers(200, seed=1).roll(1)])
    transfer.update(both, 1)
    restored.load_state_dict(stored(transfer.state_dict()))
    for one in (transfer, restored):
        one.update(both.flip(1)[:, :20], 1)
    assert transfer.values == restored.values


def test_what_two_learn_after_a_restore_is_their_own() -> None:
    transfer, restored = TransferEfficiency(2), TransferEfficiency(2)
    taught = answers(100)
    transfer.update(torch.stack([taught, taught]), 0)
    restored.load_state_dict(transfer.state_dict())
    restored.update(torch.stack([answers(400, seed=3), answers(400, seed=4)]), 0)
    assert float(transfer.values[1]) == pytest.approx(1, abs=1e-4)

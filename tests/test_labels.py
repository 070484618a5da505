from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import stored

from streamkd import UNLABELLED, Batch
from streamkd.checkpoint import digest
from streamkd.labels import Answers, Pending
from streamkd.logits import UNSEEN

lawful = settings(max_examples=25, deadline=None)


def asked(start: int, stop: int, known: dict[int, int] | None = None, late: dict[int, int] | None = None) -> Batch:
    """Records that are named and carry their number; those in `known` with their label."""
    numbers = range(start, stop)
    return Batch(
        torch.arange(start, stop, dtype=torch.float32)[:, None],
        torch.tensor([(known or {}).get(number, UNLABELLED) for number in numbers], dtype=torch.int64),
        ids=tuple(str(number) for number in numbers),
        late={str(number): y for number, y in (late or {}).items()},
    )


def said_of(batch: Batch, seed: int = 0) -> Answers:
    """Three members' answers to a batch, which no other batch gets."""
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.randn(3, len(batch), 4, generator=generator).log_softmax(-1)
    return Answers(batch.x, batch.y, log_p, log_p.exp().mean(0))


def numbers_of(answers: Answers) -> list[int]:
    numbers: list[int] = answers.x[:, 0].long().tolist()
    return numbers


def same(one: Answers, other: Answers) -> bool:
    def columns(answers: Answers) -> list[Tensor]:
        return [answers.x, answers.y, answers.log_p, answers.served]

    return all(torch.equal(left, right) for left, right in zip(columns(one), columns(other), strict=True))


def test_a_batch_whose_labels_are_all_there_passes_through_unchanged() -> None:
    pending, batch = Pending(), asked(0, 4, dict.fromkeys(range(4), 1))
    said = said_of(batch)
    assert same(pending.join(batch, said), said)
    assert (len(pending), pending.joined, pending.expired) == (0, 0, 0)


def test_a_late_label_meets_the_answer_that_was_given_when_asked() -> None:
    pending, batch = Pending(), asked(0, 3, {1: 2})
    said = said_of(batch, seed=1)
    first = pending.join(batch, said)
    assert same(first, said.rows(torch.tensor([1])))
    later = asked(3, 5, {3: 0, 4: 0}, late={2: 3})
    joined = pending.join(later, said_of(later, seed=2))
    assert joined.y.tolist() == [3, 0, 0]
    assert torch.equal(joined.log_p[:, 0], said.log_p[:, 2])
    assert torch.equal(joined.served[0], said.served[2])
    assert torch.equal(joined.x[0], said.x[2])
    assert (len(pending), pending.joined) == (1, 1)


def test_late_answers_come_first_in_the_order_of_their_labels() -> None:
    pending, batch = Pending(), asked(0, 4)
    pending.join(batch, said_of(batch))
    later = asked(4, 7, {4: 1, 6: 1}, late={3: 0, 0: 2})
    joined = pending.join(later, said_of(later))
    assert numbers_of(joined) == [3, 0, 4, 6]
    assert joined.y.tolist() == [0, 2, 1, 1]


def test_a_label_for_nobody_who_waits_is_passed_over() -> None:
    pending, batch = Pending(), asked(0, 2)
    pending.join(batch, said_of(batch))
    for late, learned in [({99: 1}, []), ({1: 1}, [1]), ({1: 0}, [])]:  # never seen, waiting, answered before
        empty = asked(2, 2, late=late)
        assert numbers_of(pending.join(empty, said_of(empty))) == learned
    assert (len(pending), pending.joined, pending.expired) == (1, 1, 0)


def test_of_too_many_the_oldest_are_given_up_and_counted() -> None:
    pending = Pending(capacity=3)
    for start in (0, 2, 4):
        batch = asked(start, start + 2)
        pending.join(batch, said_of(batch))
    assert (len(pending), pending.expired) == (3, 3)
    late = asked(6, 6, late=dict.fromkeys(range(6), 1))
    assert numbers_of(pending.join(late, said_of(late))) == [3, 4, 5]


def test_of_two_records_of_one_id_the_later_waits_and_the_other_is_given_up() -> None:
    pending = Pending(capacity=3)
    for start in (0, 10):
        batch = replace(asked(start, start + 2), ids=("a", "b"))
        pending.join(batch, said_of(batch))
    assert (len(pending), pending.expired) == (2, 2)
    late = asked(20, 20, late={"b": 1})
    assert numbers_of(pending.join(late, said_of(late))) == [11]


def test_without_capacity_nothing_waits() -> None:
    pending, batch = Pending(capacity=0), asked(0, 3, {1: 1})
    assert numbers_of(pending.join(batch, said_of(batch))) == [1]
    assert (len(pending), pending.expired) == (0, 2)


def test_a_record_without_a_name_cannot_wait() -> None:
    pending = Pending()
    batch = Batch(torch.zeros(3, 1), torch.tensor([UNLABELLED, 1, UNLABELLED]))
    assert pending.join(batch, said_of(batch)).y.tolist() == [1]
    assert (len(pending), pending.expired) == (0, 0)


@lawful
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.dictionaries(st.integers(0, 25), st.integers(0, 3), max_size=5),
            st.dictionaries(st.integers(0, 25), st.integers(0, 3), max_size=5),
        ),
        max_size=8,
    ),
    st.integers(0, 6),
)
def test_every_question_is_answered_once_or_waits_or_is_given_up(
    history: list[tuple[int, dict[int, int], dict[int, int]]], capacity: int
) -> None:
    pending, learned, start = Pending(capacity), [], 0
    for size, known, late in history:
        batch = asked(start, start + size, known, late)
        learned += numbers_of(pending.join(batch, said_of(batch, start)))
        start += size
        assert len(pending) <= capacity
    assert len(set(learned)) == len(learned)
    assert len(learned) + len(pending) + pending.expired == start


def test_restored_questions_wait_on_with_their_answers() -> None:
    pending, restored = Pending(capacity=5), Pending(capacity=5)
    for start in (0, 4):
        batch = asked(start, start + 4, {start: 1})
        pending.join(batch, said_of(batch, start))
    restored.load_state_dict(stored(pending.state_dict()))
    assert (len(restored), restored.joined, restored.expired) == (5, 0, 1)
    later = asked(8, 10, late={6: 2, 2: 1, 7: 0})
    said = said_of(later, 8)
    assert same(pending.join(later, said), restored.join(later, said))
    last = asked(10, 10, late=dict.fromkeys(range(10), 3))
    assert same(pending.join(last, said_of(last)), restored.join(last, said_of(last)))
    assert (len(restored), restored.joined, restored.expired) == (0, pending.joined, pending.expired)


def test_what_waits_is_kept_among_the_classes_that_could_come_and_answered_among_all() -> None:
    pending, restored, plain = Pending(), Pending(), Pending()
    for start, met in ((0, 2), (3, 3), (6, 4)):
        batch = asked(start, start + 3)
        said = said_of(batch, start)
        said.log_p[..., met:], said.served[..., met:] = UNSEEN, 0.0
        pending.join(batch, said, met)
        plain.join(batch, said)
    sizes = [sum(tensor.numel() for tensor in one.state_dict()["answers"].values()) for one in (pending, plain)]
    assert sizes[0] == sizes[1]  # for the last of them all classes could come
    late = asked(9, 9, late=dict.fromkeys((7, 8), 1))
    assert same(pending.join(late, said_of(late)), plain.join(late, said_of(late)))
    restored.load_state_dict(stored(pending.state_dict()))
    late = asked(9, 9, late=dict.fromkeys((6, 3, 1), 1))
    joined = [one.join(late, said_of(late)) for one in (pending, restored, plain)]
    assert same(joined[0], joined[2])
    assert same(joined[1], joined[2])
    assert digest(pending.state_dict()) == digest(restored.state_dict())
    assert pending.state_dict()["answers"]["served"].shape == (4, 3)


def test_nothing_waiting_is_restored_as_nothing_waiting() -> None:
    restored = Pending()
    batch = asked(0, 2)
    restored.join(batch, said_of(batch))
    restored.load_state_dict(stored(Pending().state_dict()))
    assert len(restored) == 0

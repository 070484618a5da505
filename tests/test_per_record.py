import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamkd import UNLABELLED, Output, per_record
from streamkd.logits import mask_unseen
from streamkd.parts import public_functions
from streamkd.per_record import certainty, difficulty, even

lawful = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**20)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 7))  # pairs, records, classes
warmth = st.floats(1, 10)


def world(shape: tuple[int, int, int], seed: int) -> tuple[Output, Output, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (Output(3 * torch.randn(*shape, generator=generator)) for _ in range(2))
    return student, teacher, torch.randint(0, shape[-1], (shape[1],), generator=generator)


@lawful
@given(seeds, shapes, warmth)
def test_every_record_is_between_plain_and_as_soft_as_the_student_may_have_it(
    seed: int, shape: tuple[int, int, int], temperature: float
) -> None:
    student, teacher, y = world(shape, seed)
    warm = torch.full((shape[0], 1), temperature)
    for name, function in public_functions(per_record).items():
        value = function(student, teacher, y, warm).expand(shape[:2])
        assert float(value.min()) >= 1 - 1e-5, name
        assert float(value.max()) <= temperature * (1 + 1e-5), name
    assert even(student, teacher, y, warm) is warm


def test_what_the_teacher_is_certain_of_is_softened_and_what_it_doubts_is_not() -> None:
    teacher = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [50.0, 0.0, 0.0]])
    value = certainty(Output(teacher), Output(teacher), torch.zeros(3).long(), torch.tensor([4.0]))
    assert torch.allclose(value[[0, 2]], torch.tensor([1.0, 4.0]))
    assert 1 < float(value[1]) < 4


def test_what_the_student_finds_hard_is_softened() -> None:
    student = torch.tensor([[50.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    y = torch.tensor([0, 1, UNLABELLED])
    value = difficulty(Output(student), Output(student), y, torch.tensor([4.0]))
    assert torch.allclose(value, torch.tensor([1.0, 4.0, 4.0]))


@lawful
@given(seeds, warmth)
def test_classes_that_were_never_met_do_not_count(seed: int, temperature: float) -> None:
    student, teacher, y = world((2, 4, 3), seed)
    seen = torch.tensor([True, True, True, False, False])
    wide = [Output(mask_unseen(torch.cat([side.logits, torch.ones(2, 4, 2)], -1), seen)) for side in (student, teacher)]
    warm = torch.full((2, 1), temperature)
    for function in (certainty, difficulty):
        assert torch.allclose(function(*wide, y, warm), function(student, teacher, y, warm), atol=1e-5)

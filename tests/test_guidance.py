import pytest

from streamkd import Distillation
from streamkd.guidance import Guidance
from streamkd.schedules import Schedule, Signals, complement, constant


def scheduled(guidance: Guidance, times: int, teacher: int = 0) -> Guidance:
    for _ in range(times):
        guidance.schedule(teacher, 2)
        guidance.updates += 1
    return guidance


def recorded(given: list[float | None], *, grow: float = 2.0) -> Schedule:
    """Say 1, then each time `grow` times as much; note what it is told it has said."""

    def schedule(signals: Signals) -> float:
        given.append(signals.previous)
        return 1.0 if signals.previous is None else grow * signals.previous

    return schedule


def test_a_schedule_begins_with_nothing_after_the_burn_in_and_is_then_given_what_it_said() -> None:
    alphas: list[float | None] = []
    betas: list[float | None] = []
    rule = Distillation(alpha=recorded(alphas), beta=recorded(betas), burn_in=3)
    scheduled(Guidance(rule, [1, 1]), 6)
    assert alphas == betas == [None, 1, 2]


def test_what_a_gap_takes_off_is_not_taken_off_what_the_schedule_said() -> None:
    given: list[float | None] = []
    guidance = Guidance(Distillation(alpha=recorded(given, grow=1.0), widest_gap=4, burn_in=0), [16, 1])
    for _ in range(3):
        scheduled(guidance, 1)
        assert guidance.alphas == {(0, 1): 0.25}
    assert given == [None, 1, 1]


def test_of_several_teachers_the_labels_are_left_what_their_mean_leaves() -> None:
    rule = Distillation(scheme="mutual", alpha=lambda s: s.teacher_capacity / 10, beta=complement(), burn_in=0)
    guidance = scheduled(Guidance(rule, [1, 3, 8]), 1)
    assert guidance.betas == pytest.approx([1 - 0.55, 1 - 0.45, 1 - 0.2])


def test_a_restored_guidance_schedules_on() -> None:
    rule = Distillation(alpha=recorded([]), beta=recorded([], grow=3.0), temperature=recorded([]), burn_in=1)
    one, other = scheduled(Guidance(rule, [1, 2]), 4), Guidance(rule, [1, 2])
    other.load_state_dict(one.state_dict())
    for guidance in (one, other):
        scheduled(guidance, 2)
    assert one.state_dict() == other.state_dict()
    assert one.alphas == {(0, 1): 16}
    assert one.betas[1] == 81


def test_who_listens_to_nobody_has_its_labels_alone() -> None:
    guidance = scheduled(Guidance(Distillation(beta=constant(0.3), burn_in=0), [1, 1, 1]), 1, teacher=1)
    assert guidance.betas == [0.3, 1, 0.3]

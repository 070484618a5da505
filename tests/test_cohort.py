from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from worlds import stored

from streamkd import UNLABELLED, Cohort, Distillation, Output, Peer
from streamkd.cohort import STUCK
from streamkd.lesson import Learned, Lesson, agreement, means
from streamkd.losses import kd
from streamkd.models import mlp
from streamkd.per_record import certainty
from streamkd.schedules import Schedule, complement, constant, curriculum, loss_driven

CLASSES = 3
SCHEMES = ["leader", "mutual", "ensemble", "average", "self", "static", "none"]
SEEN = torch.ones(CLASSES, dtype=torch.bool)

lawful = settings(max_examples=25, deadline=None)


class Table(nn.Module):
    """A logit for each record and class, so that a step of SGD shows the gradient at the logits; `x` is row numbers."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(2 * torch.randn(rows, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Look up."""
        return self.logits[x[:, 0].long()]


def plainly(scheme: str, alpha: float = 1.0, **options: Any) -> Distillation:
    """Distillation without any schedule: constant alpha, temperature one, every lesson taken, from the first update."""
    given: dict[str, Any] = {"gate": "open", "burn_in": 0, "temperature": constant(1.0)}
    return Distillation(scheme=scheme, alpha=constant(alpha), **given | options)


def tables(rule: Distillation, *, rows: int = 6, seed: int = 0, peers: int = 3) -> Cohort:
    """Peers whose weights are their logits, moved by exactly the gradient (rate 1, no clipping)."""
    optimizer = partial(torch.optim.SGD, lr=1.0)
    return Cohort(
        [Peer(str(i), partial(Table, rows), optimizer, clip=1e9, seed=seed * 100 + i) for i in range(peers)], rule
    )


def networks(rule: Distillation, names: str = "abc", **options: Any) -> Cohort:
    """Small networks of differing width and rate; a name stands for the same peer in any order."""
    made = {
        name: Peer(
            name,
            partial(mlp, (4,), CLASSES, widths=(width,)),
            partial(torch.optim.SGD, lr=rate, momentum=0.5),
            seed=width,
            **options,
        )
        for name, width, rate in (("a", 4, 0.3), ("b", 6, 0.1), ("c", 8, 0.03))
    }
    return Cohort([made[name] for name in names], rule)


def lesson_of_rows(y: Sequence[int]) -> Lesson:
    """One record for each row of a table, each of weight one."""
    return Lesson(torch.arange(len(y))[:, None].float(), torch.tensor(y), torch.ones(len(y)))


def lesson_of(seed: int, n: int = 8) -> Lesson:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 4, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)
    return Lesson(x, y, torch.rand(n, generator=generator) / n)


def learn(cohort: Cohort, lesson: Lesson, teacher: int = 0, weights: Tensor | None = None) -> Learned:
    cohort.guidance.schedule(teacher, CLASSES)
    members = 2 * len(cohort)
    even = torch.full((members,), 1 / members)
    return cohort.learn([lesson], teacher=teacher, seen=SEEN, weights=even if weights is None else weights)[0]


def rows_of(cohort: Cohort) -> Tensor:
    return torch.stack([next(peer.module.parameters()).detach().clone() for peer in cohort.peers])


def flat(peer: Peer) -> Tensor:
    return nn.utils.parameters_to_vector(peer.module.parameters()).detach().clone()


def gradients(cohort: Cohort, lesson: Lesson, **options: Any) -> Tensor:
    """Take one step and return the gradient at the logits `[peers, rows, classes]` by which each peer moved."""
    before = rows_of(cohort)
    learn(cohort, lesson, **options)
    return before - rows_of(cohort)


def one_hot(y: Tensor) -> Tensor:
    return nn.functional.one_hot(y, CLASSES).float()


@pytest.mark.parametrize(
    ("scheme", "pairs"),
    [
        ("leader", {(1, 0), (1, 2)}),
        ("static", {(1, 0), (1, 2)}),
        ("mutual", {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}),
        ("average", {(3, 1), (3, 2), (4, 0), (4, 2), (5, 0), (5, 1)}),
        ("self", {(3, 0), (4, 1), (5, 2)}),
        ("ensemble", {(6, 0), (6, 1), (6, 2)}),
        ("none", set()),
    ],
)
def test_each_scheme_says_who_teaches_whom(scheme: str, pairs: set[tuple[int, int]]) -> None:
    cohort = networks(plainly(scheme))
    assert set(cohort.guidance.pairs(1)) == pairs
    assert len(cohort.guidance.pairs(1)) == len(pairs)
    names = {cohort.source_names[source] for source, _ in pairs}
    assert names == {"leader": {"b"}, "static": {"b"}, "ensemble": {"served"}, "none": set()}.get(scheme, set("abc"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_student_is_drawn_to_the_mean_of_its_teachers_as_they_were_before_the_step(scheme: str) -> None:
    cohort, lesson, alpha = tables(plainly(scheme, 0.01)), lesson_of_rows([0, 1, 2, 0, 1, 2]), 0.01
    for _ in range(3):  # so that the averages lie elsewhere than the weights
        learn(cohort, lesson)
    weights = torch.tensor([0.3, 0.1, 0.1, 0.2, 0.1, 0.2])
    members = cohort.predict(lesson.x).softmax(-1)
    p, averages = members.chunk(2)
    assert not torch.allclose(p, averages, atol=1e-2)
    served = torch.einsum("m,mnc->nc", weights, members)
    others = [[i for i in range(3) if i != j] for j in range(3)]
    expected = p - one_hot(lesson.y)
    for j in range(3):
        match scheme:
            case "leader" | "static":
                taught = p[2] if j != 2 else p[j]  # the leader listens to nobody
            case "mutual":
                taught = p[others[j]].mean(0)  # the sum over P - 1
            case "average":
                taught = averages[others[j]].mean(0)
            case "self":
                taught = averages[j]
            case "ensemble":
                taught = served
            case _:
                taught = p[j]
        expected[j] += alpha * (p[j] - taught)
    assert torch.allclose(gradients(cohort, lesson, teacher=2, weights=weights), expected, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_updates_are_simultaneous_so_the_order_of_peers_changes_nothing(scheme: str) -> None:
    rule = plainly(scheme, 0.7, gate="soft", temperature=constant(2.0))
    one, other = networks(rule, "abc"), networks(rule, "cab")
    members = torch.tensor([0.3, 0.1, 0.1, 0.2, 0.1, 0.2])
    order = torch.tensor([2, 0, 1])
    for update in range(6):
        lesson = lesson_of(update)
        learned = learn(one, lesson, 0, members)
        again = learn(other, lesson, 1, torch.cat([members[:3][order], members[3:][order]]))
        assert np.allclose(means([learned])[0][1][order], means([again])[0][1], atol=1e-6)
        assert agreement([learned]) == agreement([again])
    for name in "abc":
        index, place = one.names.index(name), other.names.index(name)
        assert torch.allclose(flat(one.peers[index]), flat(other.peers[place]), atol=1e-5)


def test_alone_a_peer_takes_a_plain_step_on_its_weighted_cross_entropy() -> None:
    cohort = networks(plainly("none"), clip=1e9)
    by_hand = networks(plainly("none"))
    for update in range(4):
        lesson = lesson_of(update)
        learned = learn(cohort, lesson)
        for index, peer in enumerate(by_hand.peers):
            losses = nn.functional.cross_entropy(peer.module(lesson.x), lesson.y, reduction="none")
            total = (losses * lesson.weights).sum()
            total.backward()  # type: ignore[no-untyped-call]
            peer.optimizer.step()
            peer.optimizer.zero_grad()
            assert float(means([learned])[0][3][index]) == pytest.approx(float(total.detach()), rel=1e-4)
            assert float(means([learned])[0][0][index]) == pytest.approx(float(losses.detach().mean()), rel=1e-4)
            assert torch.allclose(flat(cohort.peers[index]), flat(peer), atol=1e-6)


@pytest.mark.parametrize("options", [{"cap": True}, {"cap": False}, {"beta": constant(0.7)}])
@pytest.mark.parametrize("gate", ["better", "soft", "open"])
@pytest.mark.parametrize("scheme", ["leader", "mutual", "none"])
@lawful
@given(st.integers(0, 2**20), st.floats(0.02, 8), st.sampled_from([(True,) * 3, (True, True), (True, False, True)]))
def test_a_plain_lesson_worked_out_in_arrays_is_what_torch_comes_to(  # noqa: PLR0917 - pytest's
    scheme: str, gate: str, options: dict[str, Any], seed: int, temperature: float, met: tuple[bool, ...]
) -> None:
    options = {"gate": gate, "temperature": constant(temperature), **options}
    # By a loss that it does not know by name, torch works everything out step by step.
    losses = (kd, partial(kd))
    seen, weights, said = torch.tensor(met), torch.full((6,), 1 / 6), []
    cohorts = [networks(plainly(scheme, 0.8, loss=loss, **options)) for loss in losses]
    for update in range(3):
        lesson = lesson_of(seed + update)
        lesson = replace(lesson, y=seen.nonzero()[:, 0][lesson.y % sum(met)])
        for cohort in cohorts:
            cohort.guidance.schedule(1, sum(met))
        said = [cohort.learn([lesson], teacher=1, seen=seen, weights=weights)[0] for cohort in cohorts]
        one, other = said
        assert torch.allclose(one.parts, other.parts, rtol=1e-4, atol=1e-4)  # T^2 times what cancels
        assert torch.equal(one.answers, other.answers)
        assert one.norms == pytest.approx(other.norms, rel=1e-4, abs=1e-6)
    for one_peer, other_peer in zip(*(cohort.peers for cohort in cohorts), strict=True):
        assert torch.allclose(flat(one_peer), flat(other_peer), atol=1e-5)


@pytest.mark.parametrize("scheme", ["leader", "static"])
def test_the_leader_learns_as_if_there_were_no_distillation(scheme: str) -> None:
    taught, alone = networks(plainly(scheme, 5.0)), networks(plainly("none"))
    for update in range(5):
        for cohort in (taught, alone):
            learn(cohort, lesson_of(update), teacher=1)
    assert torch.equal(flat(taught.peers[1]), flat(alone.peers[1]))
    for student in (0, 2):
        assert not torch.allclose(flat(taught.peers[student]), flat(alone.peers[student]), atol=1e-3)


@lawful
@given(
    st.integers(0, 2**16),
    st.sampled_from(["leader", "mutual", "ensemble", "average", "self"]),
    st.lists(st.sampled_from([UNLABELLED, 0, 1, 2]), min_size=6, max_size=6),
    st.sampled_from([0.1, 1.0, 1000.0]),
    st.sampled_from([1.0, 4.0]),
)
def test_on_no_record_does_distillation_outweigh_the_label(
    seed: int, scheme: str, y: list[int], alpha: float, temperature: float
) -> None:
    lesson, rule = lesson_of_rows(y), plainly(scheme, alpha, temperature=constant(temperature))
    hard = gradients(tables(plainly("none"), seed=seed), lesson)
    soft = gradients(tables(rule, seed=seed), lesson) - hard
    assert bool((soft.norm(dim=-1) <= hard.norm(dim=-1) * (1 + 1e-4) + 1e-5).all())
    if alpha == 1000 and scheme == "mutual":  # the cap is reached, and no more than the length is cut
        length = hard.norm(dim=-1)
        assert torch.allclose(soft.norm(dim=-1), length, rtol=1e-2, atol=1e-3)


def test_the_gate_drops_lessons_from_a_teacher_who_knows_no_better() -> None:
    lesson = lesson_of_rows([0, 1, 2, 0, 1, 2])
    cohort = tables(plainly("leader", gate="better"))
    p = cohort.predict(lesson.x)[:3].softmax(-1)
    right = p.gather(2, lesson.y.expand(3, -1)[..., None])[..., 0]
    hard = gradients(tables(plainly("none")), lesson)
    changed = (gradients(cohort, lesson) - hard).norm(dim=-1) > 1e-6
    better = right[0] > right
    assert torch.equal(changed, better)
    assert bool(better.any())
    assert not bool(better[1:].all())


@pytest.mark.parametrize("gate", ["better", "soft", "open"])
def test_a_lesson_weighs_alpha_times_its_gate(gate: str) -> None:
    lesson = lesson_of_rows([0, 1, 2, 0, 1, 2])
    cohort = tables(plainly("leader", 0.6, gate=gate, temperature=constant(3.0)))
    logits = cohort.predict(lesson.x)[:3]
    losses = torch.stack([nn.functional.cross_entropy(each, lesson.y, reduction="none") for each in logits])
    gaps = losses - losses[0]
    gates = {"better": (gaps > 0).float(), "soft": 2 * torch.sigmoid(2 * gaps), "open": torch.ones_like(gaps)}[gate]
    said = [kd(Output(each), Output(logits[0]), lesson.y, torch.tensor(3.0)) for each in logits]
    learned = learn(cohort, lesson)
    for student in (1, 2):
        assert float(means([learned])[0][1][student]) == pytest.approx(
            float((0.6 * gates[student] * said[student]).mean())
        )
        assert float(means([learned])[0][2][student]) == pytest.approx(float(said[student].mean()))
    assert [float(means([learned])[0][1][0]), float(means([learned])[0][2][0])] == [0, 0]


def test_nobody_teaches_before_the_burn_in_is_over() -> None:
    taught, alone = networks(plainly("mutual", 3.0, burn_in=4, beta=complement())), networks(plainly("none"))
    for update in range(4):
        for cohort in (taught, alone):
            learn(cohort, lesson_of(update))
        assert set(taught.guidance.alphas.values()) == {0.0}
    assert all(torch.equal(flat(one), flat(other)) for one, other in zip(taught.peers, alone.peers, strict=True))
    learn(taught, lesson_of(4))
    assert set(taught.guidance.alphas.values()) == {3.0}


def test_a_swap_changes_roles_and_no_weight() -> None:
    swapped, steady = networks(plainly("none")), networks(plainly("none"))
    for update in range(6):
        learn(swapped, lesson_of(update), teacher=update % 3)
        learn(steady, lesson_of(update), teacher=0)
    # Momentum included: every optimizer stays with its peer.
    assert all(torch.equal(flat(one), flat(other)) for one, other in zip(swapped.peers, steady.peers, strict=True))
    cohort = networks(plainly("leader"))
    before = [flat(peer) for peer in cohort.peers]
    cohort.guidance.schedule(0, CLASSES)
    cohort.guidance.schedule(2, CLASSES)
    assert {source for source, _ in cohort.guidance.alphas} == {2}
    assert all(torch.equal(flat(peer), weights) for peer, weights in zip(cohort.peers, before, strict=True))


def test_to_a_newly_elected_leader_its_labels_count_in_full() -> None:
    cohort = networks(plainly("leader", 0.7, beta=complement()))
    cohort.guidance.schedule(0, CLASSES)
    assert cohort.guidance.betas == pytest.approx([1, 0.3, 0.3])
    cohort.guidance.schedule(1, CLASSES)
    assert cohort.guidance.betas == pytest.approx([0.3, 1, 0.3])


def test_beta_is_the_weight_of_the_labels() -> None:
    lesson = lesson_of_rows([0, 1, 2, 0, 1, 2])
    hard = gradients(tables(plainly("none")), lesson)
    # A teacher that is told to weigh nothing leaves its students a quarter of their own gradient.
    quartered = gradients(tables(plainly("leader", 0.0, beta=constant(0.25))), lesson)
    assert torch.allclose(quartered[0], hard[0], atol=1e-6)
    assert torch.allclose(quartered[1:], hard[1:] / 4, atol=1e-6)


def test_a_static_teacher_stops_learning_and_goes_on_teaching() -> None:
    cohort = networks(plainly("static", freeze_after=3))
    before = flat(cohort.peers[0])
    for update in range(3):
        learn(cohort, lesson_of(update))
    frozen = flat(cohort.peers[0])
    assert not torch.allclose(frozen, before)
    average = nn.utils.parameters_to_vector(cohort.peers[0].average.parameters()).clone()
    students = [flat(peer) for peer in cohort.peers[1:]]
    for update in range(3, 7):
        learned = learn(cohort, lesson_of(update))
    assert torch.equal(flat(cohort.peers[0]), frozen)
    assert torch.equal(nn.utils.parameters_to_vector(cohort.peers[0].average.parameters()), average)
    assert not any(torch.equal(flat(peer), weights) for peer, weights in zip(cohort.peers[1:], students, strict=True))
    assert float(means([learned])[0][1][1:].min()) > 0
    assert learned.norms[0] == 0.0 < min(learned.norms[1:])


@pytest.mark.parametrize("at_once", [2, 4, 6])
def test_a_loss_that_is_not_finite_is_found_in_whatever_part_it_lies_though_its_gradient_is(at_once: int) -> None:
    cohort = tables(plainly("none"))
    cohort.fitting.at_once = at_once
    for peer in cohort.peers:
        peer.module.logits.data[5] = torch.tensor([-3e38, 3e38, 3e38])  # type: ignore[union-attr]
    learned = learn(cohort, lesson_of_rows([0, 1, 2, 0, 1, 0]))
    assert learned.faulty == (5,)
    assert learned.finite


def test_a_teacher_with_no_weight_left_to_train_can_teach() -> None:
    frozen = Peer("t", lambda: mlp((4,), CLASSES, widths=(4,)).requires_grad_(requires_grad=False))
    cohort = Cohort([frozen, *networks(plainly("none")).peers], Distillation(scheme="static", burn_in=0, gate="open"))
    cohort.guidance.observe([0.2, 0.9, 0.9, 0.9], [0.5] * 4)
    before = flat(frozen)
    learned = learn(cohort, lesson_of(0))
    assert torch.equal(flat(frozen), before)
    assert float(means([learned])[0][1][1:].min()) > 0


def test_a_raised_rate_fades_by_half_each_half_life_after_an_alarm() -> None:
    cohort = networks(plainly("none", rate_boost=3.0, boost_half_life=2))
    learn(cohort, lesson_of(0))
    rates = [peer.optimizer.param_groups[0]["lr"] for peer in cohort.peers]
    assert rates == pytest.approx([0.3, 0.1, 0.03])
    cohort.guidance.alarm()
    factors = []
    for update in range(5):
        learn(cohort, lesson_of(update))
        factors.append([peer.optimizer.param_groups[0]["lr"] for peer in cohort.peers])
    for update in (0, 2, 4):
        assert factors[update] == pytest.approx([rate * (1 + 2 * 0.5 ** (update / 2)) for rate in (0.3, 0.1, 0.03)])


def test_lessons_are_softer_after_an_alarm() -> None:
    lesson = lesson_of_rows([0, 1, 2, 0, 1, 2])
    cohort = tables(plainly("leader", temperature=constant(2.0), temperature_boost=1.5))
    logits = cohort.predict(lesson.x)[:3]
    cohort.guidance.alarm()
    learned = learn(cohort, lesson)
    softened = kd(Output(logits[1]), Output(logits[0]), lesson.y, torch.tensor(2.0 * 1.5)).mean()
    assert float(means([learned])[0][2][1]) == pytest.approx(float(softened))


def test_each_record_may_have_a_temperature_of_its_own() -> None:
    lesson = lesson_of_rows([0, 1, 2, 0, 1, 2])
    cohort = tables(plainly("leader", temperature=constant(3.0), per_record=certainty))
    logits = cohort.predict(lesson.x)[:3]
    student, teacher = Output(logits[1]), Output(logits[0])
    warm = certainty(student, teacher, lesson.y, torch.tensor([3.0]))
    assert len(set(warm.tolist())) == 6
    expected = kd(student, teacher, lesson.y, warm).mean()
    assert float(means([learn(cohort, lesson)])[0][2][1]) == pytest.approx(float(expected))


def test_a_curriculum_makes_the_next_lesson_harder() -> None:
    lesson = lesson_of_rows([0, 1, 2, 0, 1, 2])
    rule = curriculum(start=2.0, minimum=0.1, growth=1e-9, rate=0.01)
    for wanted in ("leader", "mutual"):
        cohort = tables(plainly(wanted, temperature=rule))
        for peer in cohort.peers:  # so that nothing but the temperature changes
            peer.rates = [0.0]
        before = learn(cohort, lesson)
        assert [slope != 0 for slope in cohort.guidance.slopes] == [wanted == "mutual", True, True]
        cohort.guidance.schedule(0, CLASSES)
        after = learn(cohort, lesson)
        assert bool((means([after])[0][2][1:] > means([before])[0][2][1:]).all())


def test_past_the_widest_gap_of_capacities_a_lesson_is_weakened_by_what_is_beyond_it() -> None:
    for widest in (1.5, 1_000.0):
        cohort = networks(plainly("mutual", 1.0, widest_gap=widest))
        sizes = [peer.capacity for peer in cohort.peers]
        cohort.guidance.schedule(0, CLASSES)
        for (teacher, student), alpha in cohort.guidance.alphas.items():
            assert alpha == pytest.approx(min(1.0, widest * sizes[student] / sizes[teacher]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_class_that_was_never_seen_moves_no_weight(scheme: str) -> None:
    cohort = tables(plainly(scheme))
    before = rows_of(cohort)
    cohort.guidance.schedule(0, 2)
    seen = torch.tensor([True, False, True])
    cohort.learn([lesson_of_rows([0, 2, 0, 2, 0, 2])], teacher=0, seen=seen, weights=torch.full((6,), 1 / 6))
    assert torch.equal(rows_of(cohort)[..., 1], before[..., 1])
    assert not torch.allclose(rows_of(cohort)[..., 0], before[..., 0], atol=1e-2)


@pytest.mark.parametrize("gate", ["open", "soft"])
@pytest.mark.parametrize("scheme", ["leader", "mutual", "average", "ensemble"])
def test_a_teacher_that_broke_down_teaches_nothing(scheme: str, gate: str) -> None:
    lesson = lesson_of_rows([0, 1, 2, 0, 1, 2])
    cohort, alone = tables(plainly(scheme, gate=gate)), tables(plainly("none"))
    for broken in (cohort.peers[0].module, cohort.peers[0].average):
        for weight in broken.parameters():
            weight.data.fill_(float("nan"))
    taught, hard = gradients(cohort, lesson)[1:], gradients(alone, lesson)[1:]
    assert bool(taught.isfinite().all())
    assert cohort.peers[0].skipped == 1
    # The leader's students are left with their labels, and the others with those who are well.
    assert torch.allclose(taught, hard, atol=1e-6) == (scheme == "leader")


def test_a_peer_that_stays_broken_is_restarted_from_one_that_is_well() -> None:
    cohort = networks(plainly("none"), "ab")
    weight = next(cohort.peers[1].module.parameters())
    weight.data.fill_(float("nan"))
    for update in range(STUCK):
        assert cohort.peers[1].restarts == 0
        learn(cohort, lesson_of(update), teacher=1)
    assert [peer.restarts for peer in cohort.peers] == [0, 1]
    assert bool(flat(cohort.peers[1]).isfinite().all())
    learn(cohort, lesson_of(STUCK), teacher=1)
    assert cohort.peers[1].stuck == 0


def test_what_was_observed_is_a_mean_over_fifty_batches() -> None:
    cohort = networks(plainly("none"))
    values = torch.rand(80, 3, generator=torch.Generator().manual_seed(0))
    for batch in range(80):
        cohort.guidance.observe(values[batch].tolist(), (1 - values[batch]).tolist())
        if batch == 39:
            assert cohort.guidance.losses == pytest.approx(values[:40].mean(0).tolist(), abs=1e-6)
    expected = values[:50].mean(0)
    for value in values[50:]:
        expected = expected + (value - expected) / 50
    assert cohort.guidance.losses == pytest.approx(expected.tolist(), abs=1e-5)
    assert cohort.guidance.accuracies == pytest.approx((1 - expected).tolist(), abs=1e-5)


def test_peers_answer_first_and_then_their_averages() -> None:
    cohort = networks(plainly("mutual"))
    for update in range(3):
        learn(cohort, lesson_of(update))
    x = lesson_of(9).x
    said = cohort.predict(x)
    for index, peer in enumerate(cohort.peers):
        assert torch.equal(said[index], peer.predict(x).logits)
        assert torch.equal(said[3 + index], peer.predict_average(x).logits)
    assert not said.requires_grad


def test_agreement_is_counted_over_all_pairs() -> None:
    cohort, lesson = tables(plainly("none"), rows=40), lesson_of_rows([0, 1] * 20)
    answers = cohort.predict(lesson.x)[:3].argmax(-1)
    same = sum(int((answers[i] == answers[j]).sum()) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert agreement([learn(cohort, lesson)]) == (same, 3 * 40)


def test_updates_told_of_together_are_told_of_one_by_one() -> None:
    cohort = tables(plainly("mutual"), rows=40)
    updates = [learn(cohort, lesson_of_rows([0, 1] * size)) for size in (1, 20, 7)]
    assert np.allclose(means(updates), np.concatenate([means([one]) for one in updates]))
    assert agreement(updates) == tuple(map(sum, zip(*(agreement([one]) for one in updates), strict=True)))
    assert agreement([]) == (0, 0)


def changing(temperature: Schedule) -> Distillation:
    """Every schedule by its default, so that all that a schedule remembers is at work."""
    return Distillation(
        scheme="mutual",
        gate="soft",
        burn_in=2,
        beta=complement(),
        temperature=temperature,
        rate_boost=2,
        temperature_boost=1.5,
    )


def go_on(cohort: Cohort, updates: range, *, schedule: bool = True) -> None:
    values = torch.rand(12, 3, generator=torch.Generator().manual_seed(1))
    for update in updates:
        cohort.guidance.observe(values[update].tolist(), values[update].tolist())
        if schedule:
            cohort.guidance.schedule(update % 3, CLASSES)
        cohort.learn([lesson_of(update)], teacher=0, seen=SEEN, weights=torch.full((6,), 1 / 6))


@pytest.mark.parametrize("schedule", [True, False])
@pytest.mark.parametrize("temperature", [loss_driven(), curriculum(growth=10)])
def test_a_restored_cohort_learns_what_it_would_have_learned(temperature: Schedule, *, schedule: bool) -> None:
    cohort, restored = networks(changing(temperature)), networks(changing(temperature))
    go_on(cohort, range(4))
    cohort.guidance.alarm()
    go_on(cohort, range(4, 8))
    restored.load_state_dict(stored(cohort.state_dict()))
    # What the schedules said last is in force, and reported, until they are asked again.
    for one in (cohort, restored):
        go_on(one, range(8, 12), schedule=schedule)
    assert all(torch.equal(flat(one), flat(other)) for one, other in zip(cohort.peers, restored.peers, strict=True))
    assert restored.guidance.temperatures == cohort.guidance.temperatures
    assert restored.guidance.alphas == cohort.guidance.alphas
    assert restored.guidance.betas == cohort.guidance.betas
    assert restored.guidance.updates == 12

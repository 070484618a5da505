import math

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import stored

from streamkd import LabelRates, Pool
from streamkd.logits import UNSEEN, mask_unseen

nan = float("nan")


def said(members: int, n: int, classes: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(members, n, classes, generator=generator).log_softmax(-1)


def pool(members: int = 2, classes: int = 3, rate: float = 0.002) -> Pool:
    return Pool(members, LabelRates(classes, (0.9, 0.99), (0.9,)), rate=rate)


def everything(seen: int = 3, classes: int = 3) -> Tensor:
    return torch.arange(classes) < seen


def serve(made: Pool, log_p: Tensor) -> tuple[Tensor, Tensor]:
    return made.serve(log_p, log_p.exp().mean(0), everything(classes=log_p.shape[-1]))


def test_it_starts_as_the_geometric_mean_of_the_members() -> None:
    log_p = said(2, 5)
    sources, _ = serve(pool(), log_p)
    assert torch.allclose(sources[-1], log_p.mean(0).log_softmax(-1), atol=1e-6)
    assert torch.allclose(sources[-2], log_p.exp().mean(0).log(), atol=1e-6)


def test_a_step_goes_down_the_gradient_of_its_log_loss() -> None:
    made, log_p, y = pool(rate=0.01), said(2, 8), torch.arange(8) % 3
    sources, _ = serve(made, log_p)
    coefficients = made.coefficients.clone().requires_grad_()
    logits = torch.einsum("s,snc->nc", coefficients, sources[:-2])
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y, reduction="sum"), coefficients)
    made.update(sources, y)
    assert torch.allclose(made.coefficients, coefficients - 0.01 * gradient, atol=1e-6)


def test_it_grows_surer_than_members_that_are_too_shy_and_what_is_served_follows() -> None:
    made = pool()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(300):
        y = torch.randint(0, 3, (16,), generator=generator)
        shy = (0.8 * torch.nn.functional.one_hot(y, 3)).log_softmax(-1).expand(2, -1, -1)
        sources, served = serve(made, shy)
        losses.append(-float(served.gather(1, y[:, None]).log().mean()))
        made.update(sources, y)
    assert losses[-1] < 0.5 * losses[0]


def test_labels_that_come_in_runs_are_told_by_their_rates() -> None:
    made, right = pool(), 0
    blind = torch.full((2, 16, 3), 1 / 3).log()
    for batch in range(400):
        y = torch.full((16,), batch // 8 % 3)
        sources, served = serve(made, blind)
        right += int((served.argmax(1) == y).sum()) if batch >= 200 else 0
        made.update(sources, y)
    assert right / (200 * 16) > 0.8


def test_rates_are_discounted_counts_whatever_the_batches() -> None:
    whole, parts = LabelRates(3, (0.9,), ()), LabelRates(3, (0.9,), ())
    y = torch.tensor([0, 2, 2, 1, 0])
    whole.update(y)
    for label in y:
        parts.update(label[None])
    by_hand = [0.9**5 / 3 + 0.1 * sum(0.9 ** (4 - i) for i in range(5) if y[i] == k) for k in range(3)]
    assert whole.rates[0].tolist() == pytest.approx(by_hand)
    assert torch.allclose(whole.rates, parts.rates)
    assert np.exp(whole.log_p(np.full(3, fill_value=True))).sum(-1).tolist() == [pytest.approx(1)]


def test_labels_and_answers_are_counted_apart_and_alike() -> None:
    rates, y = LabelRates(3, (0.9, 0.5), (0.9, 0.5)), torch.tensor([0, 2, 2, 1])
    rates.update(y)
    assert torch.equal(rates.rates[2:], torch.full((2, 3), 1 / 3, dtype=torch.float64))
    rates.assume(y)
    assert torch.equal(rates.rates[:2], rates.rates[2:])


def test_answers_change_nothing_before_one_is_counted() -> None:
    with_answers, without = (Pool(2, LabelRates(3, (0.9,), answered), rate=0.01) for answered in ((0.9, 0.5), ()))
    for batch in range(20):
        sources, served = serve(with_answers, said(2, 8, seed=batch))
        fewer, expected = serve(without, said(2, 8, seed=batch))
        assert torch.allclose(served, expected, atol=1e-6)
        with_answers.update(sources, torch.arange(8) % 3)
        without.update(fewer, torch.arange(8) % 3)


def test_classes_that_come_in_runs_are_told_by_the_answers_where_few_records_have_a_label() -> None:
    generator = torch.Generator().manual_seed(0)
    right = {True: 0, False: 0}
    for assumed in right:
        made = pool(rate=0.01)
        for batch in range(600):
            y = torch.full((16,), batch // 4 % 3)
            weak = 0.7 * torch.nn.functional.one_hot(y, 3) + torch.randn(2, 16, 3, generator=generator)
            sources, served = serve(made, weak.log_softmax(-1))
            right[assumed] += int((served.argmax(1) == y).sum()) if batch >= 300 else 0
            made.update(sources[:, :1], y[:1])
            if assumed:
                made.assume(sources[:, 1:])
    assert right[True] > 1.1 * right[False]


def test_a_class_that_was_never_seen_stays_impossible() -> None:
    seen = everything(2, 4)
    log_p = mask_unseen(said(2, 6, 4), seen).log_softmax(-1)
    sources, served = pool(classes=4).serve(log_p, log_p.exp().mean(0), seen)
    assert served[:, 2:].max() < 1e-20
    assert float(sources[-1, :, 2:].max()) <= UNSEEN / 2


def test_a_member_that_is_not_a_number_has_no_opinion() -> None:
    made, log_p = pool(), said(2, 5)
    sources, _ = serve(made, log_p)
    made.update(sources, torch.zeros(5, dtype=torch.int64))
    log_p[1, 2, 0] = nan
    sources, served = made.serve(log_p, log_p[0].exp(), everything())
    expected = made.coefficients.clone()
    expected[1] = 0
    assert torch.allclose(sources[-1], torch.einsum("s,snc->nc", expected, sources[:-2].nan_to_num()).log_softmax(-1))
    made.update(sources, torch.zeros(5, dtype=torch.int64))
    assert bool(made.coefficients.isfinite().all())
    assert bool(served.isfinite().all())


def test_no_batch_is_too_large_for_its_step() -> None:
    small, large, log_p = pool(rate=0.01), pool(rate=0.01), said(2, 16)
    y = torch.arange(16) % 3
    small.update(serve(small, log_p)[0], y)
    large.update(serve(large, log_p.repeat(1, 16, 1))[0], y.repeat(16))
    assert torch.allclose(small.coefficients, large.coefficients, atol=1e-6)


def test_nothing_to_say_is_said_of_no_records() -> None:
    sources, served = serve(pool(), said(2, 0))
    assert sources.shape == (2 + 3 + 2, 0, 3)
    assert served.shape == (0, 3)


def test_a_restored_pool_goes_on_as_it_would_have() -> None:
    made, restored = pool(), pool()
    for batch in range(3):
        made.update(serve(made, said(2, 8, seed=batch))[0], torch.arange(8) % 3)
    made.assume(serve(made, said(2, 8, seed=9))[0])
    made.shorten()
    restored.load_state_dict(stored(made.state_dict()))
    for batch in range(3, 6):
        answers = [serve(one, said(2, 8, seed=batch)) for one in (made, restored)]
        assert torch.equal(answers[0][1], answers[1][1])
        for one, (sources, _) in zip((made, restored), answers, strict=True):
            one.update(sources, torch.arange(8) % 3)
    assert math.isfinite(float(made.coefficients.sum()))

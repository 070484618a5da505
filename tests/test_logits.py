import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from streamkd import UNLABELLED
from streamkd.logits import cross_entropy, mask_unseen

lawful = settings(max_examples=25, deadline=None)
masks = st.lists(st.booleans(), min_size=2, max_size=8).filter(any)


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@lawful
@given(masks, st.integers(0, 2**20))
def test_unseen_classes_have_probability_exactly_zero_and_the_seen_share_it_all(mask: list[bool], seed: int) -> None:
    raw, seen = logits(2, 4, len(mask), seed=seed), torch.tensor(mask)
    p = mask_unseen(raw, seen).softmax(-1)
    assert int(p[..., ~seen].count_nonzero()) == 0
    assert torch.allclose(p[..., seen], raw[..., seen].softmax(-1))


@lawful
@given(masks, st.integers(0, 2**20))
def test_unseen_classes_get_no_gradient_from_a_label(mask: list[bool], seed: int) -> None:
    seen = torch.tensor(mask)
    raw = logits(4, len(mask), seed=seed).requires_grad_()
    y = seen.nonzero()[:, 0][torch.arange(4) % int(seen.sum())]
    (gradient,) = torch.autograd.grad(cross_entropy(mask_unseen(raw, seen), y).sum(), raw)
    assert int(gradient[:, ~seen].count_nonzero()) == 0
    assert torch.allclose(gradient[:, seen].sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12)


@lawful
@given(st.lists(st.sampled_from([UNLABELLED, 0, 1, 2]), min_size=1, max_size=8), st.integers(0, 2**20))
def test_cross_entropy_is_torchs_for_every_peer_and_zero_without_a_label(labels: list[int], seed: int) -> None:
    y, said = torch.tensor(labels), logits(3, len(labels), 3, seed=seed).requires_grad_()
    losses = cross_entropy(said, y)
    expected = torch.stack([functional.cross_entropy(peer, y, reduction="none") for peer in said])
    assert torch.allclose(losses, expected)
    (gradient,) = torch.autograd.grad(losses.sum(), said)
    unknown = y == UNLABELLED
    assert int(losses[:, unknown].count_nonzero()) == 0
    assert int(gradient[:, unknown].count_nonzero()) == 0


def test_one_bold_mistake_costs_what_it_says_and_no_infinity() -> None:
    losses = cross_entropy(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))
    assert losses.tolist() == [2e4]

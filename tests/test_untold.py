import pytest
import torch

from streamkd.untold import doubted, interpolated

SEEN = torch.tensor([True, True, True, False])


def answers(n: int) -> torch.Tensor:
    return torch.randn(n, 4).masked_fill(~SEEN, -1e9).softmax(-1)


@pytest.mark.parametrize("doubt", [0.0, 0.2, 0.9])
def test_doubt_leaves_probabilities_and_what_is_answered(doubt: float) -> None:
    torch.manual_seed(0)
    served = answers(200)
    targets = doubted(served, SEEN, doubt)
    torch.testing.assert_close(targets.sum(-1), torch.ones(200))
    assert torch.equal(targets.argmax(-1), served.argmax(-1))
    assert float(targets[:, 3].abs().max()) == 0.0
    assert float(targets[:, :3].min()) >= doubt / 3 - 1e-6


def test_full_doubt_says_nothing_and_none_says_all() -> None:
    served = answers(5)
    assert torch.equal(doubted(served, SEEN, 0.0), served)
    torch.testing.assert_close(doubted(served, SEEN, 1.0), SEEN.float().expand(5, -1) / 3)


@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)])
def test_inputs_and_targets_are_mixed_in_the_same_proportion(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    targets = torch.eye(16)
    x = torch.arange(16.0).view(-1, *(1,) * len(shape)).expand(-1, *shape)
    mixed, mixed_targets = interpolated(x, targets, 0.5)
    assert mixed.shape == x.shape
    torch.testing.assert_close(mixed.flatten(1)[:, 0], mixed_targets @ torch.arange(16.0))
    assert float(mixed_targets.diagonal().min()) >= 0.5
    assert not torch.equal(mixed, x)


def test_without_a_share_nothing_is_mixed_and_no_chance_is_used() -> None:
    x, targets = torch.randn(4, 3), answers(4)
    before = torch.get_rng_state()
    same, same_targets = interpolated(x, targets, 0.0)
    none, _ = interpolated(x[:0], targets[:0], 0.5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(same, x)
    assert torch.equal(same_targets, targets)
    assert len(none) == 0

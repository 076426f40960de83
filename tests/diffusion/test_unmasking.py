"""Confidence of each order and the choice of positions, by hand."""

import math

import pytest
import torch

from diffusion.unmasking import (
    ORDERS,
    Remasking,
    choose,
    confidence,
    mixed_confidence,
    on_grid,
    ranking,
)

PROBS = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0]])
TOKEN = torch.tensor([1, 1])
UNIFORM = torch.tensor([0.3, 0.7], dtype=torch.float64)


@pytest.mark.parametrize(
    ("remasking", "expected"),
    [
        # -(1/2 ln 2 + 2 * 1/4 ln 4) = -1.5 ln 2; a sure row has entropy 0, not NaN.
        ("entropy", [-1.5 * math.log(2), 0.0]),
        ("low_confidence", [0.25, 1.0]),  # of the candidate, not of the likeliest
        ("margin", [0.25, 1.0]),
        ("random", [0.3, 0.7]),
    ],
)
def test_confidence_by_hand(remasking: Remasking, expected: list[float]) -> None:
    found = confidence(PROBS, TOKEN, remasking, UNIFORM)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected)


SURE = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.9, 0.8, 0.2, 0.3], [0.4, 0.4, 0.4, 0.4]])
MASKED = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)


def chosen(steps_left: int, threshold: float | None = None) -> list[list[int]]:
    return choose(SURE, MASKED, steps_left, threshold).int().tolist()


def test_the_surest_first_by_hand() -> None:
    # 4 steps: one of four, one of two. A row that is done gets nothing.
    assert chosen(4) == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    # 3 steps: ceil(4/3) = 2 of four, ceil(2/3) = 1 of two.
    assert chosen(3) == [[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert chosen(2) == [[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert chosen(1) == [[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]  # the last step fixes all


def test_ties_go_left() -> None:
    ties = torch.full((1, 4), 0.4)
    masked = torch.tensor([[0, 1, 1, 1]], dtype=torch.bool)
    assert choose(ties, masked, 2, None).int().tolist() == [[0, 1, 1, 0]]


def test_threshold_acts_on_every_row() -> None:
    """Defect 10: only row 0 of the batch was updated."""
    # Row 0: 0.9 and 0.7 are above 0.6. Row 1: 0.8 is; its 0.9 is not masked any more.
    assert chosen(4, threshold=0.6) == [[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert chosen(4, threshold=0.05) == [[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_threshold_fixes_the_surest_at_least() -> None:
    assert chosen(4, threshold=0.99) == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert chosen(4, threshold=0.9) == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]  # strictly above


def test_negative_confidences_are_no_obstacle() -> None:
    entropy = torch.tensor([[-3.0, -1.0, -2.0]])
    masked = torch.tensor([[True, False, True]])
    assert choose(entropy, masked, 2, None).int().tolist() == [[0, 0, 1]]
    assert choose(entropy, masked, 2, -2.5).int().tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("size", [1, 4, 7, 32])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_a_block_is_done_in_exactly_its_steps(size: int, share: float) -> None:
    """Every step fixes something, and the last one leaves nothing."""
    steps = max(1, round(size * share))
    masked = torch.ones(1, size, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        fixed = choose(torch.rand(1, size, generator=generator), masked, steps - step, None)
        assert fixed.any() and not (fixed & ~masked).any()
        masked &= ~fixed
    assert not masked.any()


# Rows of their own settings, and the tie rule


def test_rounding_ties_and_the_left_wins() -> None:
    """1 - 6e-8 before 1: the same to sixteen digits. A clear difference still counts."""
    sure = torch.tensor([[1 - 2**-24, 1.0, 0.5], [0.99, 1.0, 0.5]])
    masked = torch.ones(2, 3, dtype=torch.bool)
    assert choose(sure, masked, 3, None).int().tolist() == [[1, 0, 0], [0, 1, 0]]
    entropy = torch.tensor([[-3e-7, -1e-8, -1.0]])
    assert choose(entropy, masked[:1], 3, None).int().tolist() == [[1, 0, 0]]


def test_small_probabilities_keep_their_order() -> None:
    """A flat distribution over 150 000 tokens: its largest numbers are far below 2^-16."""
    flat = torch.tensor([[6.60e-6, 6.62e-6, 6.61e-6]])
    masked = torch.ones(1, 3, dtype=torch.bool)
    assert choose(flat, masked, 3, None).int().tolist() == [[0, 1, 0]]


def test_grid_by_hand() -> None:
    third = 21845 / 2**16  # 1/3 = 0.010101... in binary: sixteen digits from its leading one
    values = torch.tensor([0.0, 1.0, 2**-30, -0.5, -(2**-20), 1 / 3])
    found = on_grid(values).tolist()
    assert found[:5] == [0.0, 1.0, 2**-30, -0.5, 0.0]
    assert found[5] == pytest.approx(third, abs=2**-17) and (found[5] * 2**17).is_integer()


def test_every_row_has_its_own_steps_and_threshold() -> None:
    sure = SURE[:1].expand(4, -1)
    masked = torch.ones(4, 4, dtype=torch.bool)
    steps = torch.tensor([4, 2, 1, 1])
    threshold = torch.tensor([float("nan"), float("nan"), 0.6, 0.95])
    found = choose(sure, masked, steps, threshold).int().tolist()
    assert found == [[0, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0]]


def test_mixed_orders_are_the_orders_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(10, 7, generator=generator).softmax(-1)
    uniform, token = torch.rand(10, generator=generator), torch.arange(10) % 7
    order = torch.arange(10) % len(ORDERS)
    found = mixed_confidence(probs, token, order, uniform)
    for n in range(10):
        one = confidence(probs[n : n + 1], token[n : n + 1], ORDERS[order[n]], uniform[n : n + 1])
        assert float(found[n]) == pytest.approx(float(one))


def test_left_to_right_goes_by_place_and_others_by_confidence() -> None:
    order = torch.tensor([ORDERS.index("left_to_right"), ORDERS.index("margin")])
    rank = ranking(SURE[:2], order, torch.zeros(2), torch.full((2, 4), 0.5))
    assert rank.argsort(-1, descending=True).tolist() == [[0, 1, 2, 3], [0, 1, 3, 2]]


def test_order_temperature_draws_in_proportion() -> None:
    """Gumbel's trick: the first place is p with chance softmax(confidence / tau)[p]."""
    draws, tau = 20_000, 0.5
    sure = torch.tensor([0.0, 0.5, 1.0]).expand(draws, -1)
    uniform = torch.rand(draws, 3, generator=torch.Generator().manual_seed(0))
    order = torch.full((draws,), ORDERS.index("entropy"))
    rank = ranking(sure, order, torch.full((draws,), tau), uniform)
    share = rank.argmax(-1).bincount(minlength=3) / draws
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(-1)
    assert share.tolist() == pytest.approx(expected.tolist(), abs=0.015)

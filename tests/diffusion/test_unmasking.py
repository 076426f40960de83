"""Confidence of each order and the choice of positions, by hand."""

import math

import pytest
import torch

from diffusion.unmasking import Remasking, choose, confidence

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

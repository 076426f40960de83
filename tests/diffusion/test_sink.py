"""Certainty of a known distribution, and distances of a mask drawn by hand."""

import math

import pytest
import torch

from diffusion.sink import certainty, distance_from_first_mask

MASK = 3


def test_certainty_leaves_the_mask_token_out() -> None:
    # 1/2, 1/4, 1/4 among the three real tokens; the mask token would win by far.
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0, 50.0], [0.0, 0.0, 0.0, 50.0]])
    confidence, entropy = certainty(logits, MASK)
    assert confidence.tolist() == pytest.approx([0.5, 1 / 3])
    assert entropy.tolist() == pytest.approx([1.5 * math.log(2), math.log(3)])


def test_distance_is_from_the_leftmost_hidden_place_of_the_block() -> None:
    # Two blocks of three; x is hidden.    x x x | x x x      . x . | . . x      . . . | x . x
    hidden = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 1]]).bool()
    distance = distance_from_first_mask(hidden, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert distance[hidden].tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 0, 2]
    # Without blocks, from the leftmost of all.
    distance = distance_from_first_mask(hidden, torch.zeros(6, dtype=torch.int64))
    assert distance[hidden].tolist() == [0, 1, 2, 3, 4, 5, 0, 4, 0, 2]


def test_blocks_may_be_of_any_length() -> None:
    hidden = torch.ones(1, 5, dtype=torch.bool)
    block = torch.tensor([0, 1, 1, 1, 2])
    assert distance_from_first_mask(hidden, block)[0].tolist() == [0, 0, 1, 2, 0]

"""AR-ness of small decodes by hand. A step map gives, per position, the step that fixed it."""

import pytest

from diffusion.arness import global_ar_ness, local_ar_ness

FORWARD = [0, 1, 2, 3]
BACKWARD = [3, 2, 1, 0]
MIXED = [0, 3, 1, 2]  # positions in order: 0, 2, 3, 1


@pytest.mark.parametrize(
    ("step_map", "k", "expected"),
    [
        (FORWARD, 1, 1.0),
        (FORWARD, 2, 1.0),
        (FORWARD, 8, 1.0),  # the run from position 0 counts though it is shorter than k
        (BACKWARD, 1, 0.0),
        (MIXED, 1, 2 / 4),  # 0: start. 2 after 0: no. 3 after 2: yes. 1 after 3: no
        (MIXED, 2, 1 / 4),  # 3 after 0, 2: the run of two is broken
        ([1, 2, 0], 1, 1 / 3),  # order 2, 0, 1: only 1 after 0
        ([], 1, 0.0),
    ],
)
def test_local_by_hand(step_map: list[int], k: int, expected: float) -> None:
    assert local_ar_ness(step_map, k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step_map", "k", "expected"),
    [
        (FORWARD, 1, 1.0),
        (BACKWARD, 1, 1 / 4),  # only the last one left is the leftmost
        (BACKWARD, 2, 2 / 4),
        (BACKWARD, 4, 1.0),
        (MIXED, 1, 2 / 4),  # 2 and 3 go while 1 is still masked
        (MIXED, 2, 1.0),  # 2 of {1, 2}, 3 of {1, 3}
        ([], 1, 0.0),
    ],
)
def test_global_by_hand(step_map: list[int], k: int, expected: float) -> None:
    assert global_ar_ness(step_map, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_tokens_of_one_step_are_ordered_by_position(k: int) -> None:
    # Blocks of two decoded left to right, two tokens a step: as good as AR.
    assert local_ar_ness([0, 0, 1, 1, 2, 2], k) == 1.0
    assert global_ar_ness([0, 0, 1, 1, 2, 2], k) == 1.0

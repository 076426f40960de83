"""AR-ness of small decodes by hand. A step map gives, per position, the step that fixed it."""

from collections.abc import Callable

import pytest

from diffusion.arness import ar_ness, global_ar_ness, local_ar_ness, random_order
from diffusion.masking import generator

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


@pytest.mark.parametrize("seed", range(20))
def test_all_k_at_once_are_the_definition(seed: int) -> None:
    """Several tokens a step, blocks, orders near AR and far from it."""
    gen, ks = generator(seed), (1, 2, 3, 8, 50)
    step_map = [step // (1 + seed % 3) for step in random_order(30 + seed, 1 + seed, gen)]
    order = sorted(range(len(step_map)), key=lambda position: (step_map[position], position))
    local, whole = ar_ness(step_map, ks)
    for place, k in enumerate(ks):
        hits, near, masked = 0, 0, sorted(order)
        for event, position in enumerate(order):
            run = order[max(0, event - k) : event]
            follows = run == list(range(position - len(run), position))
            hits += follows and (len(run) == k or position == event)
            near += position in masked[:k]
            masked.remove(position)
        assert local[place] == hits / len(order)
        assert whole[place] == near / len(order)


def test_a_random_order_within_blocks_by_hand() -> None:
    """Means over many draws against the closed form, blocks of four."""
    length, draws = 40, 400
    gen = generator(0)
    maps = [random_order(length, 4, gen) for _ in range(draws)]
    for step_map in maps:
        for start in range(0, length, 4):
            assert sorted(step_map[start : start + 4]) == list(range(start, start + 4))
    # With n of a block still masked, the one that goes is the leftmost with probability 1 / n.
    global_1 = (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    assert _mean(global_ar_ness, maps, 1) == pytest.approx(global_1, abs=0.01)
    assert _mean(global_ar_ness, maps, 2) == pytest.approx((1 + 1 + 2 / 3 + 2 / 4) / 4, abs=0.01)
    assert _mean(global_ar_ness, maps, 4) == 1.0
    # Each of 3 pairs of neighbours is consecutive in 3! of the 4! orders; over a block's edge the
    # last place goes last and the first place first. The very first event counts by itself if it
    # is at place 0, which is 1 in 4 and not 1 in 16.
    blocks = length / 4
    local_1 = (blocks * 3 / 4 + (blocks - 1) / 16 + 1 / 4) / length
    assert _mean(local_ar_ness, maps, 1) == pytest.approx(local_1, abs=0.01)


def test_a_random_order_of_a_short_last_block() -> None:
    assert sorted(random_order(6, 4, generator(1))[4:]) == [4, 5]


def test_a_random_order_of_a_first_block_that_the_prompt_shares() -> None:
    step_map = random_order(6, 4, generator(1), given=3)
    assert step_map[0] == 0 and sorted(step_map[1:5]) == [1, 2, 3, 4] and step_map[5] == 5


def _mean(measure: Callable[[list[int], int], float], maps: list[list[int]], k: int) -> float:
    return sum(measure(step_map, k) for step_map in maps) / len(maps)

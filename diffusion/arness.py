"""How autoregressive a decode was (DiffuCoder, section 3): from its step map alone, no model.

Defined for one token a step; tokens that were fixed in the same step are ordered by position.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence

import torch


def local_ar_ness(step_map: Sequence[int], k: int) -> float:
    """Share of unmaskings at a position p such that the k before it were exactly p-1, ..., p-k.

    Unmaskings with fewer than k predecessors count only if they continue a run from position 0:
    an AR decode scores 1.0. Range 0 .. 1; 0.0 for an empty map.
    """
    return ar_ness(step_map, (k,))[0][0]


def global_ar_ness(step_map: Sequence[int], k: int) -> float:
    """Share of unmaskings among the k leftmost positions that were still masked. Range 0 .. 1."""
    return ar_ness(step_map, (k,))[1][0]


def ar_ness(step_map: Sequence[int], ks: Sequence[int]) -> tuple[list[float], list[float]]:
    """Local and global AR-ness for each k, for less than one of each: every rollout is measured."""
    order = _order(step_map)
    runs, ranks = _runs(order), _ranks(order)
    count = max(len(order), 1)
    return (
        [sum(run >= k for run in runs) / count for k in ks],
        [sum(rank < k for rank in ranks) / count for k in ks],
    )


def _runs(order: list[int]) -> list[float]:
    """Per unmasking at p, how many just before it were p-1, p-2, ...; infinite for a run from 0."""
    runs: list[float] = []
    before, run = -1, math.inf
    for position in order:
        run = run + 1 if position == before + 1 else 0
        runs.append(run)
        before = position
    return runs


def _ranks(order: list[int]) -> list[int]:
    """Per unmasking, how many positions left of it were still masked."""
    gone: list[int] = []
    ranks = []
    for position in order:
        ranks.append(position - bisect_left(gone, position))
        insort(gone, position)
    return ranks


def random_order(length: int, block_size: int, gen: torch.Generator, given: int = 0) -> list[int]:
    """The step map of a decode without any preference: blocks in order, each in random order.

    The first block is short by the `given` tokens that the prompt has in it. What there is to
    compare with: a small block leaves little room to be anything but AR.
    """
    step_map: list[int] = []
    while (start := len(step_map)) < length:
        size = min(block_size - (0 if start else given), length - start)
        step_map += (start + torch.randperm(size, generator=gen)).tolist()
    return step_map


def _order(step_map: Sequence[int]) -> list[int]:
    return sorted(range(len(step_map)), key=step_map.__getitem__)  # stable: ties by position

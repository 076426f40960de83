"""How autoregressive a decode was (DiffuCoder, section 3): from its step map alone, no model.

Defined for one token a step; tokens that were fixed in the same step are ordered by position.
"""

from collections.abc import Sequence

import torch


def local_ar_ness(step_map: Sequence[int], k: int) -> float:
    """Share of unmaskings at a position p such that the k before it were exactly p-1, ..., p-k.

    Unmaskings with fewer than k predecessors count only if they continue a run from position 0:
    an AR decode scores 1.0. Range 0 .. 1; 0.0 for an empty map.
    """
    order = _order(step_map)
    hits = 0
    for event, position in enumerate(order):
        run = order[max(0, event - k) : event]
        wanted = list(range(position - len(run), position))
        hits += run == wanted and (len(run) == k or position == event)
    return hits / max(len(order), 1)


def global_ar_ness(step_map: Sequence[int], k: int) -> float:
    """Share of unmaskings among the k leftmost positions that were still masked. Range 0 .. 1."""
    order = _order(step_map)
    masked = sorted(order)
    hits = 0
    for position in order:
        hits += position in masked[:k]
        masked.remove(position)
    return hits / max(len(order), 1)


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
    return sorted(range(len(step_map)), key=lambda position: (step_map[position], position))

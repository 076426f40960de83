"""How much better a completion is than its neighbours. Pure numbers; not the loss, not batching.

Sources: GRPO (arXiv 2402.03300) for the group mean and the division by the standard deviation,
DiffuCoder (2506.20639) for the leave-one-out form (RLOO).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Baseline = Literal["mean", "leave_one_out"]
GroupState = Literal["kept", "no_spread", "too_few"]

# Rewards are sums of a few weighted fractions: anything closer than this is rounding.
SPREAD_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Advantages:
    """One group after its baseline.

    values: one per reward; None where the sample is dropped. All None unless `state` is "kept".
    state: "no_spread" if all valid rewards are equal, "too_few" if fewer than two are valid.
    missing: rewards that were None.
    """

    values: tuple[float | None, ...]
    state: GroupState
    missing: int


def group_advantages(
    rewards: Sequence[float | None], kind: Baseline = "mean", scale_by_std: bool = False
) -> Advantages:
    """Advantages of one group of G completions of one prompt.

    `mean`: r - mean. `leave_one_out`: r - mean of the others, which is G / (G - 1) * (r - mean).
    `scale_by_std` divides by the sample standard deviation (G - 1 in the denominator). A reward of
    None (a failed reward is never a number) takes no part in any of the means.
    """
    valid = [reward for reward in rewards if reward is not None]
    missing = len(rewards) - len(valid)
    nothing: tuple[float | None, ...] = (None,) * len(rewards)
    if len(valid) < 2:
        return Advantages(nothing, "too_few", missing)
    if max(valid) - min(valid) <= SPREAD_TOLERANCE:
        return Advantages(nothing, "no_spread", missing)
    scale = _scale(valid, kind, scale_by_std)
    mean = sum(valid) / len(valid)
    values = tuple(None if reward is None else scale * (reward - mean) for reward in rewards)
    return Advantages(values, "kept", missing)


def _scale(valid: list[float], kind: Baseline, scale_by_std: bool) -> float:
    size = len(valid)
    scale = size / (size - 1) if kind == "leave_one_out" else 1.0
    if scale_by_std:
        mean = sum(valid) / size
        variance = sum((reward - mean) ** 2 for reward in valid) / (size - 1)
        scale /= variance**0.5
    return scale

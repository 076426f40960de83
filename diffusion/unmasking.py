"""The order of unmasking: how sure a position is, and which positions a step fixes.

Not the draw of tokens (`diffusion.sampling`). Orders: entropy (Dream, DiffuCoder), low_confidence
(LLaDA: the least confident are remasked), margin, random, left_to_right. Each row of a batch may
have its own order, number of steps and threshold.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Remasking = Literal["entropy", "low_confidence", "margin", "random", "left_to_right"]
ORDERS: tuple[Remasking, ...] = get_args(Remasking)
# Binary digits to which scores are compared (`on_grid`).
GRID_BITS = 16


def confidence(
    probs_NV: Tensor, token_N: Tensor, remasking: Remasking, uniform_N: Tensor
) -> Tensor:
    """How sure each position is of its candidate, float32 [N]; larger goes first.

    `entropy`: negative entropy of the row. `low_confidence`: probability of the candidate.
    `margin`: gap between the two likeliest tokens. `random`: `uniform_N`. `left_to_right`: as
    `low_confidence`, though the order is not by it (`ranking`).
    """
    if remasking == "entropy":
        return torch.special.entr(probs_NV).sum(-1).neg()
    if remasking == "margin":
        top = probs_NV.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
    if remasking == "random":
        return uniform_N.float()
    return probs_NV.gather(-1, token_N[:, None])[:, 0]


def most_certain(remasking: Remasking) -> float:
    """The confidence of a position about which there is no doubt."""
    return 0.0 if remasking == "entropy" else 1.0


def mixed_confidence(
    probs_NV: Tensor, token_N: Tensor, order_N: Tensor, uniform_N: Tensor
) -> Tensor:
    """`confidence` where position n belongs to a request of order `ORDERS[order_N[n]]`."""
    kinds = order_N.unique().tolist()
    if len(kinds) == 1:
        return confidence(probs_NV, token_N, ORDERS[kinds[0]], uniform_N)
    sure = torch.zeros_like(uniform_N, dtype=torch.float32)
    for kind in kinds:
        here = order_N == kind
        sure[here] = confidence(probs_NV[here], token_N[here], ORDERS[kind], uniform_N[here])
    return sure


def ranking(
    confidence_RP: Tensor, order_R: Tensor, order_temperature_R: Tensor, uniform_RP: Tensor
) -> Tensor:
    """What positions are ranked by, float32 [R, P]; larger goes first.

    The confidence, or the place for `left_to_right`. With an order temperature tau the positions
    are drawn without replacement in proportion to exp(confidence / tau) (Dream's `alg_temp`): tau
    times a Gumbel number is added, and the largest win.
    """
    place = -torch.arange(confidence_RP.shape[1], device=confidence_RP.device).float()
    by_place = order_R == ORDERS.index("left_to_right")
    score = torch.where(by_place[:, None], place, confidence_RP)
    tiny = torch.finfo(torch.float32).tiny
    gumbel = -(-uniform_RP.clamp(min=tiny).log()).clamp(min=tiny).log()
    return score + order_temperature_R[:, None] * gumbel


def on_grid(score: Tensor) -> Tensor:
    """Scores to sixteen binary digits: after the leading one above 0, after the point below.

    A trained model is often as sure of several positions as float32 can say; what then differs is
    the rounding of a batched product, which depends on the batch. On the grid they tie, and ties
    go to the left. Rounding moves logits by about 1e-6 whatever they are, hence probabilities by
    that share of themselves (a flat distribution over 150 000 tokens still has an order), but
    entropies, which are negative here, by that amount.
    """
    mantissa, exponent = torch.frexp(score)
    relative = torch.ldexp((mantissa * 2**GRID_BITS).round(), exponent - GRID_BITS)
    absolute = (score * 2**GRID_BITS).round() / 2**GRID_BITS
    return torch.where(score > 0, relative, absolute)


def choose(
    confidence_RP: Tensor,
    masked_RP: Tensor,
    steps_left: Tensor | int,
    threshold: Tensor | float | None,
    rank_RP: Tensor | None = None,
) -> Tensor:
    """Which masked positions this step fixes: bool [R, P].

    Without a threshold every row fixes ceil(masked / steps_left) positions, the first by
    `rank_RP` (None: the confidence), ties to the left. With one, every position whose confidence
    exceeds it, and at least the first (parallel decoding). Each row is decided alone (defect 10
    of ALGORITHMS: only row 0 was updated); `steps_left` and `threshold` are numbers or [R], where
    a threshold of NaN is none.
    """
    device = confidence_RP.device
    limit = torch.as_tensor(
        float("nan") if threshold is None else threshold, dtype=torch.float32, device=device
    ).reshape(-1, 1)
    steps = torch.as_tensor(steps_left, device=device).reshape(-1, 1)
    score = on_grid(confidence_RP if rank_RP is None else rank_RP)
    score = score.masked_fill(~masked_RP, float("-inf"))
    order = score.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=device).expand_as(order)
    )
    left = masked_RP.sum(-1, keepdim=True)
    count = torch.div(left + steps - 1, steps, rounding_mode="floor")
    count = torch.where(limit.isnan(), count, 1)
    return masked_RP & ((confidence_RP > limit) | (rank < count))  # NaN is exceeded by nothing

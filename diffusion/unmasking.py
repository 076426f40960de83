"""The order of unmasking: how sure a position is, and which positions a step fixes.

Not the draw of tokens (`diffusion.sampling`). Orders: entropy (Dream, DiffuCoder), low_confidence
(LLaDA: the least confident are remasked), margin, random.
"""

from typing import Literal

import torch
from torch import Tensor

Remasking = Literal["entropy", "low_confidence", "margin", "random"]


def confidence(
    probs_NV: Tensor, token_N: Tensor, remasking: Remasking, uniform_N: Tensor
) -> Tensor:
    """How sure each position is of its candidate, float32 [N]; larger goes first.

    `entropy`: negative entropy of the row. `low_confidence`: probability of the candidate.
    `margin`: gap between the two likeliest tokens. `random`: `uniform_N`.
    """
    if remasking == "entropy":
        return torch.special.entr(probs_NV).sum(-1).neg()
    if remasking == "low_confidence":
        return probs_NV.gather(-1, token_N[:, None])[:, 0]
    if remasking == "margin":
        top = probs_NV.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
    return uniform_N.float()


def choose(
    confidence_RP: Tensor, masked_RP: Tensor, steps_left: int, threshold: float | None
) -> Tensor:
    """Which masked positions this step fixes: bool [R, P].

    Without a threshold every row fixes ceil(masked / steps_left) positions, the surest first, ties
    to the left. With one, every position above it, and at least the surest (parallel decoding).
    Each row is decided alone (defect 10 of ALGORITHMS: only row 0 was updated).
    """
    score = confidence_RP.masked_fill(~masked_RP, float("-inf"))
    order = score.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    if threshold is not None:
        return masked_RP & ((confidence_RP > threshold) | (rank == 0))
    left = masked_RP.sum(-1, keepdim=True)
    count = torch.div(left + steps_left - 1, steps_left, rounding_mode="floor")
    return masked_RP & (rank < count)

"""From logits to one token and its confidence. Not the choice of positions (`diffusion.unmasking`).

Tokens are drawn by inverting the cumulative distribution at a uniform number that belongs to the
request and the position, so a draw does not depend on which other rows share the batch.
"""

import torch
from torch import Tensor


def target_distribution(
    logits_NV: Tensor, temperature: float, top_p: float, top_k: int, mask_token_id: int
) -> Tensor:
    """The distribution that is sampled from: float32 [N, V], rows sum to 1.

    The mask token is excluded first, then temperature, top-k, top-p (nucleus: the smallest set of
    likeliest tokens whose mass reaches `top_p`). temperature 0 keeps the model's own
    distribution: the greedy choice is made by `draw`.
    """
    logits = logits_NV.float().clone()
    logits[:, mask_token_id] = float("-inf")
    if temperature > 0:
        logits /= temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(-1)
    if top_p < 1.0:
        ordered, index = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass strictly likelier than this token
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs_NV: Tensor, uniform_N: Tensor, temperature: float) -> Tensor:
    """One token per row, int64 [N]: arg max at temperature 0, else the inverse CDF at uniform."""
    if temperature == 0:
        return probs_NV.argmax(-1)
    cumulative = probs_NV.double().cumsum(-1)
    point = uniform_N.double()[:, None] * cumulative[:, -1:]
    # right=True: a token of probability zero is never hit, not even by a uniform of exactly 0.
    index = torch.searchsorted(cumulative, point, right=True)[:, 0]
    return index.clamp(max=probs_NV.shape[-1] - 1)

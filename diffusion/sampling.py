"""From logits to one token and its confidence. Not the choice of positions (`diffusion.unmasking`).

Tokens are drawn by inverting the cumulative distribution at a uniform number that belongs to the
request and the position, so a draw does not depend on which other rows share the batch. Every
setting is one number, or one per row: requests with settings of their own share a batch.
"""

import torch
from torch import Tensor

# A nucleus is looked for among so many tokens first: sorting 150 000 costs some twenty times more.
NUCLEUS_TOKENS = 1024


def target_distribution(
    logits_NV: Tensor,
    temperature: Tensor | float,
    top_p: Tensor | float,
    top_k: Tensor | int,
    mask_token_id: int,
) -> Tensor:
    """The distribution that is sampled from: float32 [N, V], rows sum to 1.

    The mask token is excluded first, then temperature, top-k, top-p (nucleus: the smallest set of
    likeliest tokens whose mass reaches `top_p`). temperature 0 keeps the model's own
    distribution: the greedy choice is made by `draw`. Settings are numbers or [N].
    """
    logits = logits_NV.to(torch.float32, copy=True)
    logits[:, mask_token_id] = float("-inf")
    heat = per_row(temperature, logits)
    scale = heat.where(heat > 0, 1.0)
    if (scale != 1.0).any():
        logits /= scale[:, None]
    _keep_top_k(logits, per_row(top_k, logits).long())
    probs = logits.softmax(-1)
    _keep_nucleus(probs, per_row(top_p, logits))
    return probs


def draw(probs_NV: Tensor, uniform_N: Tensor, temperature: Tensor | float) -> Tensor:
    """One token per row, int64 [N]: arg max at temperature 0, else the inverse CDF at uniform."""
    hot = per_row(temperature, probs_NV) > 0
    warm, cold = hot.nonzero()[:, 0], (~hot).nonzero()[:, 0]
    token = torch.empty(len(probs_NV), dtype=torch.int64, device=probs_NV.device)
    if len(cold):
        token[cold] = _rows(probs_NV, cold).argmax(-1)
    if len(warm):
        cumulative = _rows(probs_NV, warm).double().cumsum(-1)
        point = uniform_N[warm].double()[:, None] * cumulative[:, -1:]
        # right=True: a token of probability zero is never hit, not even by a uniform of exactly 0.
        index = torch.searchsorted(cumulative, point, right=True)[:, 0]
        token[warm] = index.clamp(max=probs_NV.shape[-1] - 1)
    return token


def per_row(setting: Tensor | float, like_N: Tensor) -> Tensor:
    """A setting as float32 [N] beside `like_N` [N, ...]."""
    value = torch.as_tensor(setting, dtype=torch.float32, device=like_N.device)
    return value.expand(like_N.shape[0])


def _keep_top_k(logits_NV: Tensor, top_k_N: Tensor) -> None:
    """In place, and only where a row asks for it: the filters cost more than the softmax."""
    rows = ((top_k_N > 0) & (top_k_N < logits_NV.shape[-1])).nonzero()[:, 0]
    if not len(rows):
        return
    count, part = top_k_N[rows], _rows(logits_NV, rows)
    best = part.topk(int(count.max()), dim=-1).values
    least = best.gather(1, count[:, None] - 1)
    logits_NV[rows] = part.masked_fill(part < least, float("-inf"))


def _keep_nucleus(probs_NV: Tensor, top_p_N: Tensor) -> None:
    """In place. Of tokens that are equally likely at the edge, those of lower ids are kept."""
    rows = (top_p_N < 1.0).nonzero()[:, 0]
    vocabulary = probs_NV.shape[-1]
    for width in (min(NUCLEUS_TOKENS, vocabulary), vocabulary):
        if not len(rows):
            return
        limit = top_p_N[rows][:, None]
        likeliest = _rows(probs_NV, rows).topk(width, dim=-1).values
        before = likeliest.cumsum(-1) - likeliest  # mass strictly likelier than this token
        known = (before[:, -1:] >= limit)[:, 0] | (width == vocabulary)
        count = (before < limit).sum(-1, keepdim=True)
        _keep_first(probs_NV, rows[known], likeliest[known], count[known])
        rows = rows[~known]


def _keep_first(probs_NV: Tensor, rows_R: Tensor, likeliest_RK: Tensor, count_R1: Tensor) -> None:
    """Of each row keep the `count` likeliest tokens, scaled to 1; in place."""
    if not len(rows_R):
        return
    part, width = _rows(probs_NV, rows_R), likeliest_RK.shape[1]
    least = likeliest_RK.gather(-1, count_R1 - 1)
    part = part.masked_fill(part < least, 0.0)
    after = likeliest_RK.gather(-1, count_R1.clamp(max=width - 1))
    tied = ((after == least) & (count_R1 < width)).nonzero()[:, 0]
    if len(tied):
        level = part[tied] == least[tied]
        room = count_R1[tied] - (likeliest_RK[tied] > least[tied]).sum(-1, keepdim=True)
        part[tied] = part[tied].masked_fill(level & (level.cumsum(-1) > room), 0.0)
    probs_NV[rows_R] = part / part.sum(-1, keepdim=True)


def _rows(values_NV: Tensor, rows: Tensor) -> Tensor:
    """Rows of a big tensor; no copy where it is all of them."""
    return values_NV if len(rows) == len(values_NV) else values_NV[rows]

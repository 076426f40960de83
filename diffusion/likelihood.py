"""Log-likelihood of completions under a masked diffusion model, token by token.

Not a loss: callers weigh and sum. Which masks each estimator shows the model, and what weight each
answer has, is in `diffusion.views`; here the views of a whole batch become one forward pass.
"""

from collections.abc import Sequence as List
from typing import Literal, Protocol

import torch
from torch import Tensor

from diffusion.attention import BlockOrigin
from diffusion.layout import Sequence, TokenRows, build_rows, row_tokens
from diffusion.views import EstimatorConfig, Views, count_views, make_views


class TokenScorer(Protocol):
    """Log-probabilities float32 [N] of `rows.targets` under the plain, untempered model."""

    def __call__(self, rows: TokenRows) -> Tensor: ...


class Denoising(Protocol):
    """The facts of a checkpoint that a likelihood needs (`models.spec.DiffusionSpec`)."""

    @property
    def mask_token_id(self) -> int: ...
    @property
    def logit_shift(self) -> bool: ...
    @property
    def attention(self) -> Literal["causal", "bidirectional", "block_causal"]: ...
    @property
    def block_size(self) -> int | None: ...
    @property
    def block_origin(self) -> BlockOrigin: ...


def forward_tokens(spec: Denoising, sequence: Sequence, config: EstimatorConfig) -> int:
    """Tokens one completion adds to a forward pass: the unit of token-budget micro-batches."""
    views = count_views(sequence, config, spec.block_size, spec.block_origin)
    return row_tokens(sequence, views, spec.block_size, spec.block_origin)


def estimate_logps(
    score: TokenScorer,
    spec: Denoising,
    sequences: List[Sequence],
    seeds: List[int],
    config: EstimatorConfig,
) -> Tensor:
    """Estimated log-probability of every supervised token: float32 [B, C], 0 behind the end.

    C is the longest supervised length. Differentiable through `score`. `seeds[b]` fixes the masks
    of completion b alone: equal seeds give equal masks in any batch.
    """
    plans = [
        make_views(s, config, spec.block_size, seed, spec.block_origin)
        for s, seed in zip(sequences, seeds, strict=True)
    ]
    rows = build_rows(
        sequences,
        [views.hidden for views in plans],
        mask_token_id=spec.mask_token_id,
        block_size=spec.block_size,
        logit_shift=spec.logit_shift,
        scored=[views.scored for views in plans],
        block_origin=spec.block_origin,
    )
    logps = score(rows)
    place, weight = _scatter_plan(sequences, plans)
    width = max(s.supervised for s in sequences)
    out = torch.zeros(len(sequences) * width, dtype=logps.dtype, device=logps.device)
    out = out.index_add(0, place.to(logps.device), logps * weight.to(logps.device))
    return out.view(len(sequences), width)


def _scatter_plan(sequences: List[Sequence], plans: List[Views]) -> tuple[Tensor, Tensor]:
    """For every scored token, in `build_rows` order: its flat cell of [B, C] and its weight."""
    width = max(s.supervised for s in sequences)
    places, weights = [], []
    for number, views in enumerate(plans):
        places.append(number * width + views.scored.nonzero()[:, 1])
        weights.append(views.weight[views.scored])
    return torch.cat(places), torch.cat(weights)

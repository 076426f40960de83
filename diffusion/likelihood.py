"""Log-likelihood of completions under a masked diffusion model, token by token.

Not a loss: callers weigh and sum. Estimators of ALGORITHMS section 4: coupled complementary masks
(DiffuCoder 4.2) beside one full-mask pass; `num_pairs = 0` is the full-mask (d1) estimator.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from diffusion.layout import Sequence, TokenRows, build_rows, row_tokens
from diffusion.masking import coupled_masks


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


@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """How a completion's log-probability is estimated.

    mode: `normalised` is the mean of the 1 + num_pairs evaluations of a token; `parity` divides
        each coupled term by its mask ratio first, as apple/ml-diffucoder does: on average 1.5
        times a log-probability for one pair.
    num_pairs: coupled pairs beside the full mask (lambda); 0 is the d1 estimator.
    mask_ratio_min, mask_ratio_max: range of t.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    mode: Literal["normalised", "parity"] = "normalised"
    num_pairs: int = 1
    mask_ratio_min: float = 0.2
    mask_ratio_max: float = 0.8

    def __post_init__(self) -> None:
        if self.num_pairs < 0:
            raise ValueError("num_pairs must not be negative")
        # Both ends open: `parity` divides by t and by 1 - t.
        if not 0 < self.mask_ratio_min <= self.mask_ratio_max < 1:
            raise ValueError("0 < mask_ratio_min <= mask_ratio_max < 1 must hold")

    @property
    def views(self) -> int:
        """Masks per completion."""
        return 1 + 2 * self.num_pairs


def forward_tokens(spec: Denoising, sequence: Sequence, config: EstimatorConfig) -> int:
    """Tokens one completion adds to a forward pass: the unit of token-budget micro-batches."""
    return row_tokens(sequence, config.views, spec.block_size)


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
    plans = [_views(s, seed, config) for s, seed in zip(sequences, seeds, strict=True)]
    rows = build_rows(
        sequences,
        [masks for masks, _ in plans],
        mask_token_id=spec.mask_token_id,
        block_size=spec.block_size,
        logit_shift=spec.logit_shift,
    )
    logps = score(rows)
    place, weight = _scatter_plan(sequences, plans)
    width = max(s.supervised for s in sequences)
    out = torch.zeros(len(sequences) * width, dtype=logps.dtype, device=logps.device)
    out = out.index_add(0, place.to(logps.device), logps * weight.to(logps.device))
    return out.view(len(sequences), width)


def _views(sequence: Sequence, seed: int, config: EstimatorConfig) -> tuple[Tensor, Tensor]:
    """Masks [V, length] and the weight [V] of each view's log-probabilities in the estimate."""
    length = len(sequence.completion_ids)
    ratio_range = (config.mask_ratio_min, config.mask_ratio_max)
    masks, ratios = coupled_masks(length, ratio_range, config.num_pairs, seed)
    full = torch.ones(1, length, dtype=torch.bool)
    scale = 1.0 / ratios if config.mode == "parity" else torch.ones_like(ratios)
    weight = torch.cat([torch.ones(1), scale]) / (1 + config.num_pairs)
    return torch.cat([full, masks]), weight


def _scatter_plan(
    sequences: List[Sequence], plans: List[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """For every scored token, in `build_rows` order: its flat cell of [B, C] and its weight."""
    width = max(s.supervised for s in sequences)
    places, weights = [], []
    for number, (sequence, (masks, view_weight)) in enumerate(zip(sequences, plans, strict=True)):
        view, column = masks[:, : sequence.supervised].nonzero(as_tuple=True)
        places.append(number * width + column)
        weights.append(view_weight[view])
    return torch.cat(places), torch.cat(weights)

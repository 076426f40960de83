"""What each estimator shows the model: one completion, several masks ("views"), their weights.

Not a forward pass (`diffusion.likelihood`) and not the draws themselves (`diffusion.masking`). An
estimate is sum over views of weight * log p(token | view), and every estimator is a `Views`.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffusion.attention import BlockOrigin, block_index, first_place
from diffusion.layout import Sequence
from diffusion.masking import counted_masks, coupled_masks, independent_masks

Kind = Literal["full_mask", "coupled", "uncoupled", "elbo", "trace"]


@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """How a completion's log-probability is estimated.

    kind, and what its estimate of a token is (`a`: under the full mask; `b`: under a mask):
        full_mask: a (d1).
        coupled: a and `num_pairs` (lambda) complementary pairs (DiffuCoder); 0 pairs is full_mask.
        uncoupled: a and `num_masks` independent masks: some hide a token twice, some never.
        elbo: `num_samples` draws, each of a count of hidden tokens, uniform, and of that many
            places (LLaDA eq. 6; per block if block-causal). Unbiased for the ELBO of the
            completion: the mean over all orders in which it could have been written.
        trace: exact, in the contexts in which decoding fixed each token (needs its step map).
    mode: `normalised` is the mean of a token's evaluations; `parity` divides each coupled term by
        its mask ratio first, as apple/ml-diffucoder does: on average 1.5 times a log-probability
        for one pair (or two masks). Only coupled and uncoupled have ratios.
    mask_ratio_min, mask_ratio_max: range of t for coupled and uncoupled.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    kind: Kind = "coupled"
    mode: Literal["normalised", "parity"] = "normalised"
    num_pairs: int = 1
    num_masks: int = 2
    num_samples: int = 3
    mask_ratio_min: float = 0.2
    mask_ratio_max: float = 0.8

    def __post_init__(self) -> None:
        if self.num_pairs < 0:
            raise ValueError("num_pairs must not be negative; 0 is the full mask alone")
        if self.num_masks < 1 or self.num_samples < 1:
            raise ValueError("num_masks and num_samples must be at least 1")
        # Both ends open: `parity` divides by t and by 1 - t.
        if not 0 < self.mask_ratio_min <= self.mask_ratio_max < 1:
            raise ValueError("0 < mask_ratio_min <= mask_ratio_max < 1 must hold")
        if self.mode == "parity" and self.kind not in ("coupled", "uncoupled"):
            raise ValueError(
                f"mode parity divides by mask ratios, and kind {self.kind} has none; "
                "use mode normalised"
            )


@dataclass(frozen=True)
class Views:
    """The passes of one completion: [V, length] each.

    hidden: bool, what a view shows as the mask token. scored: bool, subset of `hidden`, what is
    read off there (never behind `supervised`). weight: float32, of what is read off.
    """

    hidden: Tensor
    scored: Tensor
    weight: Tensor


def count_views(
    sequence: Sequence,
    config: EstimatorConfig,
    block_size: int | None,
    block_origin: BlockOrigin = "prompt",
) -> int:
    """Views that `make_views` will make, without a draw: the cost of a completion.

    Raises:
        ValueError: `trace` of a completion without a step map.
    """
    if config.kind == "coupled":
        return 1 + 2 * config.num_pairs
    if config.kind == "uncoupled":
        return 1 + config.num_masks
    if config.kind == "trace":
        return (
            int(_steps(sequence, completion_blocks(sequence, block_size, block_origin)).max()) + 1
        )
    return config.num_samples if config.kind == "elbo" else 1


def make_views(
    sequence: Sequence,
    config: EstimatorConfig,
    block_size: int | None,
    seed: int,
    block_origin: BlockOrigin = "prompt",
) -> Views:
    """The views of one completion; `seed` alone fixes every draw.

    Args:
        block_size: of a block-causal model; None if it is bidirectional.

    Raises:
        ValueError: `trace` of a completion without a step map.
    """
    if config.kind == "trace":
        step = _steps(sequence, completion_blocks(sequence, block_size, block_origin))
        now = torch.arange(int(step.max()) + 1)[:, None]
        return _scored(sequence, step >= now, (step == now).float())
    if config.kind == "elbo":
        return _elbo_views(
            sequence, config, completion_blocks(sequence, block_size, block_origin), seed
        )
    length = len(sequence.completion_ids)
    between = (config.mask_ratio_min, config.mask_ratio_max)
    masks, ratios = torch.zeros(0, length, dtype=torch.bool), torch.zeros(0)
    if config.kind == "coupled" and config.num_pairs:
        masks, ratios = coupled_masks(length, between, config.num_pairs, seed)
    elif config.kind == "uncoupled":
        masks, ratios = independent_masks(length, between, config.num_masks, seed)
    hidden = torch.cat([torch.ones(1, length, dtype=torch.bool), masks])
    if config.mode == "parity":
        # Two masks hide a token once on average: both kinds divide by 1 + half their masks.
        scale = torch.cat([torch.ones(1), 1.0 / ratios]) / (1 + len(ratios) / 2)
        return _scored(sequence, hidden, scale[:, None] * hidden)
    return _scored(sequence, hidden, hidden / hidden.sum(0))


def completion_blocks(
    sequence: Sequence, block_size: int | None, block_origin: BlockOrigin
) -> Tensor:
    """The block of each completion token, int64 [length], from 0; one if there are none.

    Prompt tokens of the first block are not counted: it is short by so many.
    """
    length = len(sequence.completion_ids)
    if block_size is None:
        return torch.zeros(length, dtype=torch.int64)
    prompt = len(sequence.prompt_ids)
    first = first_place(prompt, block_size, block_origin)
    return block_index(torch.arange(prompt, prompt + length), first, block_size)


def _elbo_views(sequence: Sequence, config: EstimatorConfig, block: Tensor, seed: int) -> Views:
    """In each block of n tokens k are hidden, k uniform in 1 .. n, with weight n / k.

    A token is then hidden with each number of companions equally often, as in a random order.
    """
    hidden, weight = counted_masks(block, config.num_samples, seed)
    return _scored(sequence, hidden, weight / config.num_samples)


def _scored(sequence: Sequence, hidden: Tensor, weight: Tensor) -> Views:
    supervised = torch.arange(hidden.shape[1]) < sequence.supervised
    return Views(hidden, hidden & supervised & (weight > 0), weight)


def _steps(sequence: Sequence, block: Tensor) -> Tensor:
    """The denoising step of each token, int64 [length], counted from 0 in every `block`.

    Blocks of a block-causal model do not see each other's noise, so all of them take their s-th
    step in one view. Steps that fixed nothing are left out.
    """
    if sequence.step_map is None:
        raise ValueError("estimator trace needs the step map of every completion")
    steps = torch.tensor(sequence.step_map, dtype=torch.int64)
    if len(steps) != len(sequence.completion_ids):
        raise ValueError(f"{len(steps)} steps for {len(sequence.completion_ids)} tokens")
    parts: List[Tensor] = steps.split(block.bincount().tolist())
    return torch.cat([part.unique(return_inverse=True)[1] for part in parts])

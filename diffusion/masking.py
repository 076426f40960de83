"""Which tokens are hidden: forward corruption for pretraining, coupled masks for the likelihood.

Not the schedule of levels (`diffusion.schedule`) and not the order of unmasking
(`diffusion.unmasking`). Every draw takes a generator or a seed made from names: the same sample
gets the same masks whatever the batch, the rank or the accumulation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.seeding import derive_seed
from diffusion.schedule import clipped_ratio, elbo_weight


def generator(seed: int) -> torch.Generator:
    """A CPU generator, so that a seed means the same draw on every device."""
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Corruption:
    """One draw of the forward process over rows of tokens.

    masked [B, L] bool; weight [B, L] float (the ELBO weight of each token; 1 during warm-up);
    fallback_rate: share of blocks that drew no mask and got one by force.
    """

    masked: Tensor
    weight: Tensor
    fallback_rate: float


def corrupt_blocks(
    segment_BL: Tensor,
    corruptible_BL: Tensor,
    block_size: int,
    gen: torch.Generator,
    u_max: float = 1.0,
    weighted: bool = True,
) -> Corruption:
    """Block-wise clipped noise with a forced mask (Stable-DiffCoder, section 3.3).

    Args:
        segment_BL: int64, number of each token's block within its row, 0 .. blocks - 1; two
            documents of a packed row never share a number.
        corruptible_BL: bool, tokens that may be hidden (not prompts, not pads).
        block_size: nominal tokens of a block (the clip is at 1 / block_size).
        gen: source of the levels and of the masks.
        u_max: levels are drawn from U(0, u_max) (warm-up).
        weighted: False drops the weight w = 1 / u (warm-up).
    """
    rows, length = segment_BL.shape
    blocks = int(segment_BL.max()) + 1
    level = clipped_ratio(torch.rand(rows, blocks, generator=gen) * u_max, block_size)
    ratio_BL = level.gather(1, segment_BL)
    # A position that must stay clean never has the smallest noise of its block.
    noise_BL = torch.rand(rows, length, generator=gen).masked_fill(~corruptible_BL, 2.0)
    least = torch.full((rows, blocks), 2.0).scatter_reduce(1, segment_BL, noise_BL, "amin")
    # The smallest of independent uniforms sits at a uniformly random place, also when it is known
    # that none is below the level: the forced mask needs no second draw.
    masked = ((noise_BL < ratio_BL) | (noise_BL == least.gather(1, segment_BL))) & corruptible_BL
    weight = elbo_weight(ratio_BL) if weighted else torch.ones_like(ratio_BL)
    active = least < 2.0
    forced = active & (least >= level)
    return Corruption(masked, weight, float(forced.sum() / active.sum().clamp(min=1)))


def corrupt_canvas(
    corruptible_BL: Tensor, gen: torch.Generator, u_max: float = 1.0, weighted: bool = True
) -> Corruption:
    """One level per row, for full-canvas models (LLaDA); at least one token of a row is masked."""
    rows, length = corruptible_BL.shape
    segment = torch.zeros(rows, length, dtype=torch.int64)
    return corrupt_blocks(segment, corruptible_BL, length, gen, u_max, weighted)


def coupled_masks(
    length: int, ratio_range: tuple[float, float], num_pairs: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Complementary mask pairs over one completion (DiffuCoder, section 4.2).

    Every pair draws its own t ~ U(ratio_range), hides each token with probability t, and its
    second mask is the complement (ratio 1 - t): together they hide every token exactly once.

    Returns:
        masks bool [2 * num_pairs, length] and the nominal ratios float [2 * num_pairs].
    """
    masks, ratios = [], []
    low, high = ratio_range
    for pair in range(num_pairs):
        gen = generator(derive_seed(seed, "pair", pair))
        t = low + (high - low) * torch.rand((), generator=gen)
        mask = torch.rand(length, generator=gen) < t
        masks += [mask, ~mask]
        ratios += [t, 1.0 - t]
    if not masks:
        return torch.zeros(0, length, dtype=torch.bool), torch.zeros(0)
    return torch.stack(masks), torch.stack(ratios)


def independent_masks(
    length: int, ratio_range: tuple[float, float], num_masks: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Masks that know nothing of each other, each with its own t ~ U(ratio_range).

    Returns:
        masks bool [num_masks, length] and the nominal ratios float [num_masks].
    """
    masks, ratios = [], []
    low, high = ratio_range
    for number in range(num_masks):
        gen = generator(derive_seed(seed, "mask", number))
        t = low + (high - low) * torch.rand((), generator=gen)
        masks.append(torch.rand(length, generator=gen) < t)
        ratios.append(t)
    return torch.stack(masks), torch.stack(ratios)


def counted_masks(block: Tensor, num_masks: int, seed: int) -> tuple[Tensor, Tensor]:
    """In every block of n tokens hide k of them, k uniform in 1 .. n (LLaDA, eq. 6).

    Args:
        block: int64 [length], number of each token's block: 0, 1, ... without gaps.

    Returns:
        masks bool [num_masks, length] and each token's n / k, float [num_masks, length].
    """
    masks, weights = [], []
    length, blocks = len(block), int(block[-1]) + 1
    size = torch.bincount(block)
    for number in range(num_masks):
        gen = generator(derive_seed(seed, "sample", number))
        # Double: in float32 u * n may round up to n.
        count = 1 + (torch.rand(blocks, generator=gen, dtype=torch.float64) * size).long()
        noise = torch.rand(length, generator=gen, dtype=torch.float64)
        # Rank of each token's noise within its own block.
        smaller = (noise[None, :] < noise[:, None]) & (block[None, :] == block[:, None])
        masks.append(smaller.sum(1) < count[block])
        weights.append((size / count)[block].float())
    return torch.stack(masks), torch.stack(weights)

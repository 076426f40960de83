"""Attention kernels behind stock layers: FlexAttention and flash-attn, fed with a `Pattern`.

Not the choice between them (`models.attention`) and not the rule (`diffusion.attention`). Imported
only where one of them is used: torch's compiler takes a second to import.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffusion.attention import Pattern, may_see
from models.attention import NAME, TILE

# Kernels of one process: {policy, without gradients, reference} x {first, length, rows, one row}.
RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class Segments:
    """Flattened rows cut where nothing is seen across: int32 [N + 1] bounds, longest in tokens."""

    bounds: Tensor
    longest: int


def block_mask(pattern: Pattern) -> BlockMask:
    """The pattern for FlexAttention: which tiles to skip, which are whole, the rule for the rest.

    One strip of TILE queries at a time: never S * S answers at once, and nothing to compile
    (`create_block_mask` must be compiled to avoid them).
    """
    view, block, document, valid = pattern.view, pattern.block, pattern.document, pattern.valid
    length = view.shape[1]
    some, whole = [], []
    for start in range(0, length, TILE):
        tiles = pattern.dense(start, start + TILE).unflatten(2, (-1, TILE))
        some.append(tiles.any(3).any(1))
        whole.append(tiles.all(3).all(1))
    touched, full = torch.stack(some, 1)[:, None], torch.stack(whole, 1)[:, None]

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_see(view, block, document, valid, row, query, key)

    return BlockMask.from_kv_blocks(
        *_listed(touched & ~full),
        *_listed(full),
        BLOCK_SIZE=TILE,
        mask_mod=rule,
        seq_lengths=(length, length),
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool [B, 1, Q, K]: how many are true in each row [B, 1, Q], and theirs first [.., K]."""
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)


def segments(pattern: Pattern) -> Segments:
    """The documents of all rows, end to end; padding is a document of its own.

    Raises:
        ValueError: some token does not see its whole document.
    """
    starts = _changes(pattern.valid)
    if pattern.document is not None:
        starts |= _changes(pattern.document)
    # Pads may see each other: nobody sees them, and nobody reads their states.
    hidden = (_changes(pattern.view) | _changes(pattern.block)) & pattern.valid & ~starts
    if hidden.any():
        raise ValueError("flash attention shows a token its whole document; this pattern does not")
    end = torch.tensor([starts.numel()], device=starts.device)
    bounds = torch.cat([starts.flatten().nonzero()[:, 0], end]).to(torch.int32)
    return Segments(bounds, int(bounds.diff().max()))


def _changes(values: Tensor) -> Tensor:
    """Where a column differs from the one before it: bool [B, S]; a row's first always does."""
    return pad(values[:, 1:] != values[:, :-1], (1, 0), value=True)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    scaling: float | None = None,
    segments: Segments | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What stock layers call: query [B, H, S, D], key and value [B, H', K, D] -> [B, S, H, D]."""
    # Under autocast rotated queries and keys are float32 and values are not.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(attention_mask, BlockMask):
        kernel = _flex_kernel()
        out = kernel(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    if segments is not None:
        return _flash(query, key, value, segments, scaling), None
    if attention_mask is None:
        raise ValueError("no mask: a causal one would be assumed in silence")
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, query, key, value, attention_mask, scaling=scaling, **others)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    # The kernel takes 16 bits only; a reference policy is kept in float32.
    dtype = value.dtype if value.itemsize == 2 else torch.bfloat16
    flat = (part.transpose(1, 2).flatten(0, 1).to(dtype) for part in (query, key, value))
    lengths = (segments.bounds, segments.bounds, segments.longest, segments.longest)
    out: Tensor = flash_attn_varlen_func(*flat, *lengths, softmax_scale=scaling, causal=False)
    return out.unflatten(0, (len(query), -1)).to(value.dtype)


@cache
def _flex_kernel() -> Any:
    """Compiled at first use, then for lengths and numbers of rows that vary, one row, gradients.

    Beyond its limit dynamo would go on uncompiled, with all scores in memory: hence a higher limit,
    and an error (`fullgraph`) if even that is reached.
    """
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(flex_attention, fullgraph=True)


AttentionInterface.register(NAME, _attend)

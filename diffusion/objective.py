"""Pretraining objectives on packed rows: what to show the network and how to weigh its answers.

Not the likelihood of completions (`diffusion.likelihood`) and not an optimizer. Each objective
turns clean rows into one forward pass and per-token weights; the loss is
`-(weight * logp).sum() / normaliser`, with a normaliser counted before sharding.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from diffusion.attention import Pattern
from diffusion.layout import TokenRows
from diffusion.masking import Corruption, corrupt_blocks, corrupt_canvas

Objective = Literal["ar", "block", "bidirectional", "causal_diffusion"]
Packing = Literal["per_document", "mutually_visible"]


class Rows(Protocol):
    """Packed rows (see `pretrain.data.PackedRows`), [B, L] each."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def document(self) -> Tensor: ...
    @property
    def position(self) -> Tensor: ...
    @property
    def block(self) -> Tensor: ...
    @property
    def segment(self) -> Tensor: ...
    @property
    def supervised(self) -> Tensor: ...
    @property
    def valid(self) -> Tensor: ...


@dataclass(frozen=True)
class Noise:
    """How to corrupt one batch: source of randomness, warm-up and packing rule."""

    generator: torch.Generator
    block_size: int
    mask_token_id: int
    logit_shift: bool
    u_max: float = 1.0
    weighted: bool = True
    packing: Packing = "per_document"


@dataclass(frozen=True)
class TrainingRows:
    """One forward pass with the weight [N] of each scored token, and the measured fallback rate."""

    rows: TokenRows
    weight: Tensor
    fallback_rate: float = 0.0


def next_token_rows(rows: Rows, packing: Packing = "per_document") -> TrainingRows:
    """AR: every supervised token is predicted from the position before it, causally.

    A document's first token has no position before it and is not scored.
    """
    zeros = torch.zeros_like(rows.tokens)
    document = _documents(rows, packing)
    order = torch.arange(rows.tokens.shape[1]).expand_as(rows.tokens)
    pattern = Pattern(zeros, order, document, rows.valid)
    wanted = rows.supervised & (rows.position > 0)
    place = wanted.flatten().nonzero()[:, 0]
    batch = TokenRows(
        rows.tokens, _positions(rows, packing), pattern, place - 1, rows.tokens[wanted]
    )
    return TrainingRows(batch, torch.ones(len(place)))


def block_diffusion_rows(rows: Rows, noise: Noise) -> TrainingRows:
    """Block diffusion in one pass: input `[x_t ; x_0]`, loss on the first half (BD3-LM).

    With `logit_shift` the first token of a block is predicted from the clean token before it,
    which is final when the block is decoded.
    """
    drawn = corrupt_blocks(
        rows.segment,
        rows.supervised,
        noise.block_size,
        noise.generator,
        noise.u_max,
        noise.weighted,
    )
    length = rows.tokens.shape[1]
    noisy = rows.tokens.masked_fill(drawn.masked, noise.mask_token_id)
    mutual = noise.packing == "mutually_visible"
    # Mutually visible rows number blocks along the row, so that "earlier" spans documents.
    block = rows.segment if mutual else rows.block
    view = torch.cat([torch.ones_like(block), torch.zeros_like(block)], 1)
    document = _documents(rows, noise.packing)
    pattern = Pattern(
        view, _twice(block), None if document is None else _twice(document), _twice(rows.valid)
    )
    select = _noisy_places(drawn.masked, rows, noise.logit_shift, 2 * length)
    batch = TokenRows(
        torch.cat([noisy, rows.tokens], 1),
        _twice(_positions(rows, noise.packing)),
        pattern,
        select,
        rows.tokens[drawn.masked],
    )
    return TrainingRows(batch, drawn.weight[drawn.masked], drawn.fallback_rate)


def canvas_rows(rows: Rows, noise: Noise, causal: bool) -> TrainingRows:
    """Full-canvas masked diffusion (LLaDA, Dream), or with causal attention (ARDLLM).

    Without a position before it, a document's first token is scored only without `logit_shift`.
    """
    corruptible = rows.supervised
    if noise.logit_shift:
        corruptible = corruptible & (rows.position > 0)
    drawn: Corruption = corrupt_canvas(corruptible, noise.generator, noise.u_max, noise.weighted)
    length = rows.tokens.shape[1]
    block = torch.arange(length).expand_as(rows.tokens) if causal else torch.zeros_like(rows.tokens)
    view = torch.zeros_like(block)
    pattern = Pattern(view, block, _documents(rows, noise.packing), rows.valid)
    place = drawn.masked.flatten().nonzero()[:, 0] - int(noise.logit_shift)
    batch = TokenRows(
        rows.tokens.masked_fill(drawn.masked, noise.mask_token_id),
        _positions(rows, noise.packing),
        pattern,
        place,
        rows.tokens[drawn.masked],
    )
    return TrainingRows(batch, drawn.weight[drawn.masked], drawn.fallback_rate)


def _noisy_places(masked: Tensor, rows: Rows, shift: bool, width: int) -> Tensor:
    """Flat places in `[x_t ; x_0]` rows of `width` columns that predict the masked tokens."""
    row, column = masked.nonzero(as_tuple=True)
    if not shift:
        return row * width + column
    length = masked.shape[1]
    before = (column - 1).clamp(min=0)
    first = rows.segment[row, before] != rows.segment[row, column]
    # A block's first token: from the clean half. A document's very first has nothing before it
    # and is predicted from its own masked position.
    column_before = torch.where(first, length + before, before)
    opening = rows.position[row, column] == 0
    return row * width + torch.where(opening, column, column_before)


def _documents(rows: Rows, packing: Packing) -> Tensor | None:
    return None if packing == "mutually_visible" else rows.document


def _positions(rows: Rows, packing: Packing) -> Tensor:
    """Position ids: per document, or along the row where documents see each other."""
    if packing == "per_document":
        return rows.position
    return torch.arange(rows.tokens.shape[1]).expand_as(rows.tokens)


def _twice(values: Tensor) -> Tensor:
    return torch.cat([values, values], 1)

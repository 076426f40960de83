"""Who sees whom: one rule for every attention pattern. Not an attention kernel.

A row is a list of tokens, each with a *view* and a *block*. View 0 is clean text (x_0); views
1, 2, ... are noisy copies (x_t). Clean tokens see clean tokens of their own and earlier blocks.
A noisy token sees the clean tokens of earlier blocks and its own view of its own block. With one
view this is the `[x_t ; x_0]` form of block diffusion (BD3-LM, SDAR, Stable-DiffCoder); with
several it scores several masks of one completion over one shared clean context.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

# Where a checkpoint's blocks are counted from: the prompt's end, or the start of the sequence.
BlockOrigin = Literal["prompt", "sequence"]


def first_place(prompt_length: int, block_size: int | None, origin: BlockOrigin) -> int:
    """The place where the first block that holds completion tokens begins.

    With origin `sequence` that block also holds the prompt's last `prompt_length % block_size`
    tokens, the *given* ones: they see and are seen like the rest of it, but are never hidden.
    """
    if origin == "prompt" or block_size is None:
        return prompt_length
    return prompt_length // block_size * block_size


def block_index(position: Tensor, origin: Tensor | int, block_size: int) -> Tensor:
    """The block of each token: blocks are counted from `origin`, and go negative before it.

    In SFT, RL and decoding alike `origin` is `first_place` of the prompt: by our own stages a
    completion starts on a block boundary whatever its prompt, and the prompt's first block is the
    short one. For plain documents it is the document's start. Everybody calls this: training and
    decoding agree.
    """
    return torch.div(position - origin, block_size, rounding_mode="floor")


def may_see(
    view: Tensor,
    block: Tensor,
    document: Tensor | None,
    valid: Tensor,
    row: Tensor,
    query: Tensor,
    key: Tensor,
) -> Tensor:
    """May the token in column `query` see the one in column `key`? The rule, written once.

    Args:
        view, block, document, valid: as in `Pattern`. Tensors, not the object: attention kernels
            compile this function.
        row, query, key: int; they broadcast, or are scalars inside a kernel.
    """
    query_view, key_view = view[row, query], view[row, key]
    query_block, key_block = block[row, query], block[row, key]
    earlier = (key_view == 0) & (key_block < query_block)
    same_block = (query_view == key_view) & (query_block == key_block)
    allowed = (earlier | same_block) & valid[row, query] & valid[row, key]
    if document is not None:
        allowed = allowed & (document[row, query] == document[row, key])
    return allowed | (query == key)


@dataclass(frozen=True)
class Pattern:
    """Who sees whom in B rows of S tokens, said token by token: O(S) numbers for S * S answers.

    view: int [B, S], 0 for clean tokens, v >= 1 for the v-th noisy view.
    block: int [B, S]. Equal everywhere: bidirectional; equal to the position: causal.
    document: int [B, S], packed documents do not see each other; None makes them mutually visible
        (Stable-DiffCoder's packing: then blocks must be numbered along the row).
    valid: bool [B, S], False for padding. A pad sees only itself (never nothing: softmax over an
        empty row is NaN, and NaN leaks through masked keys).
    """

    view: Tensor
    block: Tensor
    document: Tensor | None
    valid: Tensor

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The answers for queries in [start, stop): bool [B, stop - start, S]."""
        rows, length = self.view.shape
        device = self.view.device
        row = torch.arange(rows, device=device)[:, None, None]
        column = torch.arange(length, device=device)
        query = column[start:stop, None]
        return may_see(self.view, self.block, self.document, self.valid, row, query, column)

    def to(self, device: torch.device) -> "Pattern":
        """The same on another device."""
        document = None if self.document is None else self.document.to(device)
        return Pattern(self.view.to(device), self.block.to(device), document, self.valid.to(device))

    def padded(self, width: int) -> "Pattern":
        """With `width` more columns of padding on the right."""
        document = None if self.document is None else pad(self.document, (0, width))
        return Pattern(
            pad(self.view, (0, width)),
            pad(self.block, (0, width)),
            document,
            pad(self.valid, (0, width)),
        )

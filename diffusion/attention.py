"""Who sees whom: one rule for every attention pattern, as boolean masks. Not an attention kernel.

A row is a list of tokens, each with a *view* and a *block*. View 0 is clean text (x_0); views
1, 2, ... are noisy copies (x_t). Clean tokens see clean tokens of their own and earlier blocks.
A noisy token sees the clean tokens of earlier blocks and its own view of its own block. With one
view this is the `[x_t ; x_0]` form of block diffusion (BD3-LM, SDAR, Stable-DiffCoder); with
several it scores several masks of one completion over one shared clean context.
"""

from typing import Literal

import torch
from torch import Tensor

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


def visibility(
    view_BS: Tensor, block_BS: Tensor, document_BS: Tensor | None, valid_BS: Tensor
) -> Tensor:
    """Which query (row) may see which key (column): bool [B, S, S].

    Args:
        view_BS: int, 0 for clean tokens, v >= 1 for the v-th noisy view.
        block_BS: int, block of each token. Equal everywhere: bidirectional; equal to the
            position: causal.
        document_BS: int, packed documents do not see each other; None makes them mutually
            visible (Stable-DiffCoder's packing: then blocks must be numbered along the row).
        valid_BS: bool, False for padding. A pad sees only itself (never nothing: softmax over
            an empty row is NaN, and NaN leaks through masked keys).
    """
    query_view, key_view = view_BS[:, :, None], view_BS[:, None, :]
    query_block, key_block = block_BS[:, :, None], block_BS[:, None, :]
    clean_key = key_view == 0
    earlier = clean_key & (key_block < query_block)
    same_block = (query_view == key_view) & (query_block == key_block)
    allowed = earlier | same_block
    if document_BS is not None:
        allowed &= document_BS[:, :, None] == document_BS[:, None, :]
    allowed &= valid_BS[:, :, None] & valid_BS[:, None, :]
    return allowed | torch.eye(view_BS.shape[1], dtype=torch.bool, device=view_BS.device)

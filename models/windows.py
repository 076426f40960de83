"""What the network is shown while a block is decoded: hidden states for the block's positions.

Not sampling. `BlockWindow` keeps an exact key/value cache (block-causal and causal models);
`CanvasWindow` shows the whole canvas in every pass (bidirectional models: nothing can be kept).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffusion.attention import block_index
from models.cache import BlockCache, prompt_positions
from models.denoiser import Denoiser


class Window(Protocol):
    """A view of rows under decoding; `tokens` is the canvas [R, gen_length]."""

    def hidden(self, tokens: Tensor, block: int) -> Tensor:
        """States [R, block_size, D] that predict columns [block, block + block_size)."""

    def finish_block(self, tokens: Tensor, block: int) -> None:
        """The block that starts at column `block` will not change any more."""

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but `rows`."""


def _left_pad(prompts: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts [R, P] aligned at their right end, and the padding [R] in front of each."""
    longest = max(len(p) for p in prompts)
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    return ids, pad


class BlockWindow:
    """Exact cached decoding, block by block.

    Right-aligned prompts put every row's completion at the same slots. The clean pass of a
    finished block (and of the prompt) is fused with the first denoising pass of the next block:
    both go through the network together, once.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        prompts: Sequence[tuple[int, ...]],
        gen_length: int,
        block_size: int,
    ) -> None:
        device = next(denoiser.parameters()).device
        self.denoiser = denoiser
        self.block_size = block_size
        self.pending, self.pad = _left_pad(prompts, device)
        self.prompt_slots = self.pending.shape[1]
        self.cache = BlockCache(self.prompt_slots + gen_length)
        self.final = 0  # slots whose keys and values will not change
        self.boundary: Tensor | None = None
        slots = torch.arange(self.prompt_slots + gen_length, device=device)
        self.block_of = block_index(slots, self.prompt_slots, block_size)
        self.slots = slots

    def hidden(self, tokens: Tensor, block: int) -> Tensor:
        fresh = self.pending.shape[1]
        current = tokens[:, block : block + self.block_size]
        states = self._forward(torch.cat([self.pending, current], dim=1))
        if fresh:
            self.boundary = states[:, fresh - 1 : fresh]
            self.final += fresh
            self.pending = self.pending[:, :0]
        states = states[:, fresh:]
        if not self.denoiser.spec.logit_shift:
            return states
        assert self.boundary is not None  # the first pass of a block always carries clean tokens
        return torch.cat([self.boundary, states[:, :-1]], dim=1)

    def finish_block(self, tokens: Tensor, block: int) -> None:
        self.pending = tokens[:, block : block + self.block_size]

    def keep_rows(self, rows: Tensor) -> None:
        self.cache.keep_rows(rows)
        self.pad = self.pad[rows]
        self.pending = self.pending[rows]
        self.boundary = None if self.boundary is None else self.boundary[rows]

    def _forward(self, ids: Tensor) -> Tensor:
        """Run tokens at slots [final, final + n), over everything cached before."""
        end = self.final + ids.shape[1]
        query, key = self.slots[self.final : end], self.slots[:end]
        allowed = self.block_of[key][None, None, :] <= self.block_of[query][None, :, None]
        allowed = allowed & (key[None, None, :] >= self.pad[:, None, None])
        allowed = allowed | (key[None, None, :] == query[None, :, None])
        self.cache.start = self.final
        positions = prompt_positions(query, self.pad)
        return self.denoiser.hidden(ids, positions, allowed[:, None], self.cache)


class CanvasWindow:
    """Exact uncached decoding of the full canvas (LLaDA, Dream, DiffuCoder)."""

    def __init__(
        self,
        denoiser: Denoiser,
        prompts: Sequence[tuple[int, ...]],
        gen_length: int,
        block_size: int,
    ) -> None:
        device = next(denoiser.parameters()).device
        self.denoiser = denoiser
        self.block_size = block_size
        self.prompt, self.pad = _left_pad(prompts, device)
        self.slots = torch.arange(self.prompt.shape[1] + gen_length, device=device)

    def hidden(self, tokens: Tensor, block: int) -> Tensor:
        ids = torch.cat([self.prompt, tokens], dim=1)
        real = self.slots[None, :] >= self.pad[:, None]
        allowed = (real[:, None, :] & real[:, :, None]) | torch.eye(
            len(self.slots), dtype=torch.bool, device=ids.device
        )
        positions = prompt_positions(self.slots, self.pad)
        states = self.denoiser.hidden(ids, positions, allowed[:, None])
        start = self.prompt.shape[1] + block - int(self.denoiser.spec.logit_shift)
        return states[:, start : start + self.block_size]

    def finish_block(self, tokens: Tensor, block: int) -> None:
        """Nothing is cached."""

    def keep_rows(self, rows: Tensor) -> None:
        self.prompt, self.pad = self.prompt[rows], self.pad[rows]

"""What the network is shown while blocks are decoded: hidden states for the blocks under work.

Not sampling. `BlockWindow` keeps an exact key/value cache (block-causal and causal models);
`CanvasWindow` shows the whole canvas in every pass (bidirectional models: nothing can be kept);
`CachedCanvasWindow` keeps what it should not, the approximations of Fast-dLLM. What a row is
shown depends on that row alone: neighbours only decide how many of its places are padding.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffusion.attention import block_index
from models.cache import Rows, SlotCache
from models.denoiser import Denoiser
from models.slots import Slots

# Tokens of prompts that go through the network at once: bounds the memory of admission.
PREFILL_TOKENS = 8192
# Keys are read in multiples of this: few shapes, so kernels and allocations are used again.
KEY_STEP = 32


class Window(Protocol):
    """A view of the active slots."""

    def admit(self, rows: Sequence[int]) -> None:
        """Requests have just been put into these slots."""

    def hidden(self) -> Tensor:
        """States [A, block_size, D] that predict the places `slots.block()`."""

    def move(self, source: Tensor, target: Tensor) -> None:
        """Slots are copied over slots."""


class BlockWindow:
    """Exact cached decoding, block by block.

    The clean pass of a finished block (and of the last whole block of the prompt) is fused with
    the first denoising pass of the next block: both go through the network together, once. What
    the prompt has before that block goes through when the request is admitted.
    """

    def __init__(self, denoiser: Denoiser, slots: Slots, cache: SlotCache) -> None:
        self.denoiser, self.slots, self.cache = denoiser, slots, cache
        self.boundary: Tensor | None = None

    def admit(self, rows: Sequence[int]) -> None:
        block = self.slots.block_size
        lengths = {row: int(self.slots.start[row]) - block for row in rows}
        long = sorted((row for row in rows if lengths[row] > 0), key=lambda row: lengths[row])
        while long:
            part = long[: max(1, PREFILL_TOKENS // lengths[long[-1]])]
            self._prefill(torch.tensor(part, device=self.slots.ids.device), lengths[part[-1]])
            long = long[len(part) :]

    def hidden(self) -> Tensor:
        slots = self.slots
        active, block = slots.active, slots.block_size
        start, clean = slots.start[:active], slots.clean[:active]
        width = block + int((start - clean).max())
        # Right-aligned: the blocks under work are the last columns of every row.
        places = (start + block - width)[:, None] + torch.arange(width, device=start.device)
        pending = places >= clean[:, None]
        states = self._pass(places.where(pending, slots.places), places.clamp(min=0))
        if width > block:
            self._remember(states[:, -block - 1], start > clean)
            slots.clean[:active] = start
        if not self.denoiser.spec.logit_shift:
            return states[:, -block:]
        if self.boundary is None:
            # Nothing stands before any block: each begins with a prompt token, never predicted.
            return torch.cat([states[:, :1], states[:, :-1]], dim=1)
        return torch.cat([self.boundary[:active, None], states[:, -block:-1]], dim=1)

    def move(self, source: Tensor, target: Tensor) -> None:
        self.cache.move(source, target)
        if self.boundary is not None:
            self.boundary[target] = self.boundary[source]

    def _remember(self, states: Tensor, fresh: Tensor) -> None:
        """With a shift, the state before a block predicts its first token in every pass."""
        if not self.denoiser.spec.logit_shift:
            return
        if self.boundary is None:
            self.boundary = states.new_zeros(len(self.slots.ids), states.shape[-1])
        here = self.boundary[: len(states)]
        self.boundary[: len(states)] = torch.where(fresh[:, None], states, here)

    def _pass(self, write: Tensor, positions: Tensor) -> Tensor:
        """Run the tokens at `positions` [A, W] of the active slots over all that is cached."""
        slots = self.slots
        active, top = slots.active, int(slots.start[: slots.active].max()) + slots.block_size
        seen = min(-(-top // KEY_STEP) * KEY_STEP, slots.places)
        keys = torch.arange(seen, device=write.device)
        allowed = self._allowed(positions, keys.expand(active, -1), slots.start[:active])
        index = torch.arange(active, device=write.device)
        self.cache.aim(slice(0, active), index, write, seen)
        ids = slots.ids[:active].gather(1, positions)
        return self.denoiser.hidden(ids, positions, allowed[:, None], self.cache)

    def _prefill(self, rows: Tensor, longest: int) -> None:
        slots = self.slots
        start = slots.start[rows]
        length = start - slots.block_size
        positions = torch.arange(longest, device=rows.device).expand(len(rows), -1)
        write = positions.where(positions < length[:, None], slots.places)
        # Padding stands behind the row's last full block here, so no token of it is earlier.
        allowed = self._allowed(positions, positions, start)
        self.cache.aim(rows, rows, write, None)
        ids = slots.ids[rows][:, :longest]
        self.denoiser.hidden(ids, positions, allowed[:, None], self.cache)
        slots.clean[rows] = length

    def _allowed(self, query: Tensor, key: Tensor, start: Tensor) -> Tensor:
        """A token sees its own and earlier blocks: bool [A, W, K]; one begins at `start` [A]."""
        size = self.slots.block_size
        query_block = block_index(query, start[:, None], size)
        key_block = block_index(key, start[:, None], size)
        return key_block[:, None, :] <= query_block[:, :, None]


class CanvasWindow:
    """Exact uncached decoding of the full canvas (LLaDA, Dream, DiffuCoder)."""

    def __init__(self, denoiser: Denoiser, slots: Slots) -> None:
        self.denoiser, self.slots = denoiser, slots

    def admit(self, rows: Sequence[int]) -> None:
        """Nothing is cached."""

    def hidden(self) -> Tensor:
        return self._full(slice(0, self.slots.active))

    def move(self, source: Tensor, target: Tensor) -> None:
        """Nothing is cached."""

    def _full(self, rows: Rows, cache: SlotCache | None = None) -> Tensor:
        """The whole canvas of `rows`: states [N, block_size, D] of their blocks."""
        slots = self.slots
        end, start = slots.end[rows], slots.start[rows]
        length = int(end.max())
        positions = torch.arange(length, device=end.device).expand(len(end), -1)
        allowed = (positions < end[:, None])[:, None, :].expand(-1, length, -1)
        if cache is not None:
            number = torch.arange(len(slots.ids), device=end.device)[rows]
            cache.aim(rows, number, positions.where(positions < end[:, None], cache.dump), None)
        ids = slots.ids[rows][:, :length]
        states = self.denoiser.hidden(ids, positions, allowed[:, None], cache)
        block = torch.arange(slots.block_size, device=end.device)
        places = start[:, None] + block - int(self.denoiser.spec.logit_shift)
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))


class CachedCanvasWindow(CanvasWindow):
    """Fast-dLLM's caches: a row's full pass at the start of each of its blocks, short ones after.

    Approximate: keys and values outside the short pass are those of the block's start. `dual`
    runs the block alone; otherwise (prefix) all behind it runs too.
    """

    def __init__(self, denoiser: Denoiser, slots: Slots, cache: SlotCache, dual: bool) -> None:
        super().__init__(denoiser, slots)
        self.cache, self.dual = cache, dual

    def hidden(self) -> Tensor:
        slots = self.slots
        everyone = slice(0, slots.active)
        fresh = slots.step[everyone] == 0
        if fresh.all():
            return self._full(everyone, self.cache)
        if not fresh.any():
            return self._short(everyone)
        # Never a full pass for a row because its neighbour needs one: it would change the row.
        full, short = fresh.nonzero()[:, 0], (~fresh).nonzero()[:, 0]
        states = self._full(full, self.cache)
        both = states.new_empty(slots.active, *states.shape[1:])
        both[full], both[short] = states, self._short(short)
        return both

    def move(self, source: Tensor, target: Tensor) -> None:
        self.cache.move(source, target)

    def _short(self, rows: Rows) -> Tensor:
        slots, shift = self.slots, int(self.denoiser.spec.logit_shift)
        end, first = slots.end[rows], slots.start[rows] - shift
        device = end.device
        stop = slots.start[rows] + slots.block_size if self.dual else end
        width, seen = int((stop - first).max()), int(end.max())
        positions = first[:, None] + torch.arange(width, device=device)
        real = positions < stop[:, None]
        allowed = torch.arange(seen, device=device) < end[:, None]
        write, positions = positions.where(real, slots.places), positions.clamp(max=slots.places)
        number = torch.arange(len(slots.ids), device=device)[rows]
        self.cache.aim(rows, number, write, seen)
        ids = slots.ids[rows].gather(1, positions)
        mask = allowed[:, None, None, :].expand(-1, 1, width, -1)
        return self.denoiser.hidden(ids, positions, mask, self.cache)[:, : slots.block_size]

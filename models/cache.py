"""Preallocated key/value memory for block decoding. Not a policy: the decoder says what is final.

Exact for block-causal models: finished blocks never change, and the block under work is written
again in every pass, over its own slots.
"""

from torch import Tensor


class BlockCache:
    """Keys and values [rows, heads, slots, head_dim] per layer, written at a moving window.

    Quacks like a transformers `Cache` as far as stock attention layers ask: `update` only.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.start = 0
        self._layers: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Store at [start, start + new) and return everything up to there."""
        if layer == len(self._layers):
            shape = (*key.shape[:2], self.slots, key.shape[-1])
            self._layers.append((key.new_zeros(shape), value.new_zeros(shape)))
        keys, values = self._layers[layer]
        end = self.start + key.shape[2]
        keys[:, :, self.start : end] = key
        values[:, :, self.start : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but `rows` (int64): finished requests free their memory."""
        self._layers = [(k[rows], v[rows]) for k, v in self._layers]

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens stored before the window (asked by stock models for default positions)."""
        return self.start


def prompt_positions(slots: Tensor, pad: Tensor) -> Tensor:
    """Position ids [R, S] of slots [S] in rows whose prompts start after `pad` [R] slots."""
    return (slots[None, :] - pad[:, None]).clamp(min=0)

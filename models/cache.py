"""Preallocated key/value memory of the decoder's slots. Not a policy: windows say what is final.

A slot is one row of memory that requests use one after the other. Nothing is wiped when one
leaves: a request sees only places that it has written itself.
"""

from torch import Tensor
from transformers import PretrainedConfig

from common.errors import UserError
from models.attention import head_size
from models.request import DecodingConfig
from models.spec import DiffusionSpec

MIB = 2**20
Rows = slice | Tensor


class SlotCache:
    """Keys and values [slots, heads, places + 1, head_dim] per layer.

    The last place is a dump: what padding computes is written there, and nobody may see it.
    Quacks like a transformers `Cache` as far as stock attention layers ask: `update` only.
    """

    def __init__(self, slots: int, places: int) -> None:
        self.slots = slots
        self.dump = places
        self._layers: list[tuple[Tensor, Tensor]] = []

    def aim(self, rows: Rows, row_index: Tensor, places: Tensor, seen: int | None) -> None:
        """Where the next pass writes and what it reads.

        Args:
            rows: the slots of the pass; a slice is read without a copy.
            row_index: the same as numbers, [A].
            places: [A, W] where each token's key and value go.
            seen: the pass reads places [0, seen); None: only what it brings itself (its tokens
                are the first of their rows).
        """
        self.rows, self.row_index, self.places, self.seen = rows, row_index, places, seen

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Store [A, heads, W, head_dim]; return the keys and values that the pass may look at."""
        if layer == len(self._layers):
            shape = (self.slots, key.shape[1], self.dump + 1, key.shape[-1])
            # Zeros, not empty: a masked key has weight zero, and zero times NaN is NaN.
            self._layers.append((key.new_zeros(shape), value.new_zeros(shape)))
        keys, values = self._layers[layer]
        slot = self.row_index[:, None]
        keys[slot, :, self.places] = key.transpose(1, 2)
        values[slot, :, self.places] = value.transpose(1, 2)
        if self.seen is None:
            return key, value
        return keys[self.rows, :, : self.seen], values[self.rows, :, : self.seen]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` over slots `target` (int64 [N] each, disjoint)."""
        for pair in self._layers:
            for memory in pair:
                memory[target] = memory[source]

    def get_seq_length(self, layer: int = 0) -> int:
        """Asked by stock models for default positions; ours are always given."""
        return 0


def needs_cache(spec: DiffusionSpec, decoding: DecodingConfig) -> bool:
    """Whether decoding keeps keys and values at all."""
    return spec.attention != "bidirectional" or decoding.cache != "exact"


def slot_bytes(config: PretrainedConfig, places: int, itemsize: int) -> int:
    """Bytes of one slot with room for `places` tokens, of a model whose numbers take `itemsize`."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config)
    return int(numbers * (places + 1) * itemsize)


def affordable_slots(
    config: PretrainedConfig, places: int, wanted: int, cache_mib: int, itemsize: int
) -> int:
    """How many of `wanted` slots fit into `cache_mib`.

    Raises:
        UserError: not even one.
    """
    each = slot_bytes(config, places, itemsize)
    slots = min(wanted, cache_mib * MIB // each)
    if not slots:
        raise UserError(
            f"decoding.cache_mib {cache_mib}: one request of {places} tokens needs {each} bytes of "
            f"key/value cache; set it to {-(-each // MIB)} or more, or shorten gen_length"
        )
    return slots

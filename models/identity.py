"""Which model a checkpoint folder holds, in a few numbers; and all of it but the weights.

Not a loader (`models.checkpoint`): no tensor is read.
"""

import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.outline import Outline

SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
SAMPLE_BYTES = 2**20


def architecture(outline: Outline) -> dict[str, Any]:
    """What must be equal for two models to take each other's parameters and mean the same.

    The sizes of the stock model (of a public folder: as it would be mapped) and `diffusion.json`.
    """
    sizes = {name: getattr(outline.config, name, None) for name in SIZES}
    return {name: size for name, size in sizes.items() if size is not None} | asdict(outline.spec)


def weights_mark(folder: Path) -> int:
    """A CRC-32 over names, sizes, and the first and last MiB of each file of weights.

    Two trainings never agree in it, though most bytes are not read.
    """
    mark = 0
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        mark = zlib.crc32(f"{path.name}:{size}\x1f".encode(), mark)
        with path.open("rb") as file:
            mark = zlib.crc32(file.read(SAMPLE_BYTES), mark)
            file.seek(max(0, size - SAMPLE_BYTES))
            mark = zlib.crc32(file.read(SAMPLE_BYTES), mark)
    return mark


def save_outline(outline: Outline, out: Path) -> None:
    """Write config, tokenizer and `diffusion.json`: a checkpoint folder without its weights."""
    out.mkdir(parents=True, exist_ok=True)
    outline.config.save_pretrained(out)
    outline.tokenizer.save_pretrained(out)
    outline.spec.save(out)

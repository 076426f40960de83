"""Which model a checkpoint folder holds, in a few numbers; and all of it but the weights.

Not a loader (`models.checkpoint`): nothing here reads a tensor.
"""

import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from common.errors import UserError
from models.checkpoint import REFUSALS, check_checkpoint
from models.public import public_plan
from models.spec import DiffusionSpec
from models.tokenizer import load_tokenizer

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


def architecture(folder: Path) -> dict[str, Any]:
    """What must be equal for two models to take each other's parameters and mean the same.

    The sizes of the stock model (of a public folder: as it would be mapped) and `diffusion.json`.

    Raises:
        UserError: the folder holds no model that can be understood.
    """
    config, spec = _config(folder)
    sizes = {name: getattr(config, name) for name in SIZES if hasattr(config, name)}
    return sizes | asdict(spec)


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


def save_description(folder: Path, out: Path) -> None:
    """Write config, tokenizer and `diffusion.json` of `folder` into `out`: all but the weights."""
    config, spec = _config(folder)
    plan = public_plan(folder)
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    (load_tokenizer(folder) if plan is None else plan.tokenizer).save_pretrained(out)
    spec.save(out)


def _config(folder: Path) -> tuple[PretrainedConfig, DiffusionSpec]:
    check_checkpoint(folder)
    plan = public_plan(folder)
    if plan is not None:
        return plan.config, plan.spec
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except REFUSALS as error:
        raise UserError(
            f"{folder}: cannot read config.json: {' '.join(str(error).split())}"
        ) from error
    return config, DiffusionSpec.load(folder)

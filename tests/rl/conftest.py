"""A checkpoint that is small enough to be made anew for a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint import new_model, save_checkpoint
from models.spec import DiffusionSpec
from models.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """`write_checkpoint(folder, logit_shift=..., **architecture)`: 2 layers of width 32."""

    def write(
        folder: Path,
        *,
        logit_shift: bool = False,
        attention: Any = "block_causal",
        block_size: int | None = 4,
        **changes: Any,
    ) -> Path:
        tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 3, vocab_size=262)
        architecture = {
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "eos_token_id": tokenizer.eos_token_id,
        }
        spec = DiffusionSpec(
            mask_token_id=int(tokenizer.mask_token_id),
            logit_shift=logit_shift,
            attention=attention,
            block_size=block_size,
        )
        save_checkpoint(folder, new_model(architecture | changes, seed=0), tokenizer, spec)
        return folder

    return write

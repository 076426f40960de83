"""A two-layer Qwen2 of width 32 with random weights, in every role, and a tokenizer of 24 words."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from models.checkpoint import new_model
from models.decoding import Decoder
from models.denoiser import Denoiser
from models.request import Request
from models.spec import DiffusionSpec

VOCABULARY, PAD_ID, EOS_ID, MASK_ID = 24, 0, 1, 2
MakeDenoiser = Callable[..., Denoiser]


@cache
def _model(seed: int) -> nn.Module:
    architecture = {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        # Large: attention then really looks at what it may see, and logits are far apart.
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    return new_model(architecture, seed).eval()


@pytest.fixture(scope="session")
def make_denoiser() -> MakeDenoiser:
    """`make_denoiser("block_causal", shift=False, block_size=4)`; equal weights for equal seeds."""

    def make(
        attention: str = "block_causal",
        shift: bool = False,
        block_size: int | None = 4,
        seed: int = 0,
    ) -> Denoiser:
        whole = {"causal": 1, "bidirectional": None}
        spec = DiffusionSpec(
            mask_token_id=MASK_ID,
            logit_shift=shift,
            attention=attention,  # type: ignore[arg-type]
            block_size=whole.get(attention, block_size),
        )
        return Denoiser(_model(seed), spec)

    return make


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0, 1, 2 are pad, EOS and mask; 3 .. 23 the words w3 .. w23."""
    words = ["<|pad|>", "<|endoftext|>", "<|mask|>"] + [f"w{n}" for n in range(3, VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=words[0], eos_token=words[1], mask_token=words[2]
    )


@pytest.fixture
def prompts() -> list[tuple[int, ...]]:
    """Eight prompts of eight lengths, 1 .. 9; none holds a special token."""
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 1, 9, 4, 2, 7, 3, 8)
    return [
        tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())
        for length in lengths
    ]


@pytest.fixture
def requests(prompts: list[tuple[int, ...]]) -> list[Request]:
    """One request for each prompt, with seeds from 100 on."""
    return [Request(prompt, seed=100 + number) for number, prompt in enumerate(prompts)]


@pytest.fixture
def make_decoder(
    make_denoiser: MakeDenoiser, word_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Decoder]:
    """`make_decoder("bidirectional", shift=True)`: arguments of `make_denoiser`."""

    def make(*args: Any, **options: Any) -> Decoder:
        return Decoder(make_denoiser(*args, **options), word_tokenizer)

    return make

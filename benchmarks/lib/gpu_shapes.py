"""Models that `benchmarks/gpu.py` measures: architectures, random weights, counted FLOPs.

Not the measuring. Imports torch, transformers, diffusion and models only.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from diffusion.layout import TokenRows
from diffusion.masking import generator
from models.attention import head_size
from models.denoiser import Denoiser
from models.request import DecodingConfig
from models.spec import DiffusionSpec

EOS = 1
STRIP = 64  # queries at a time when pairs are counted


@dataclass(frozen=True)
class Shape:
    """A model without its weights, and the lengths and kinds of decoding it is measured at."""

    architecture: dict[str, Any]
    spec: DiffusionSpec
    decoding: dict[str, DecodingConfig]
    prompt: int = 200
    completion: int = 256


def sampled(completion: int, block: int, **options: Any) -> DecodingConfig:
    """As configs/rl does it: entropy first, then a draw with top-p."""
    common = {"temperature": 1.0, "top_p": 0.95, "remasking": "entropy", "cache_mib": 2**16}
    return DecodingConfig(gen_length=completion, block_size=block, **{**common, **options})


def bidirectional(architecture: dict[str, Any], mask: int, prompt: int, completion: int) -> Shape:
    """The exact canvas is timed over 16 passes that fix 1/16 each: like 256 passes that fix one
    token, they show a canvas that is half masked on average."""
    spec = DiffusionSpec(
        mask_token_id=mask, logit_shift=True, attention="bidirectional", block_size=None
    )
    part = completion // 8
    decoding = {
        "exact": sampled(completion, completion, steps_per_block=16),
        "dual": sampled(completion, part, cache="dual"),
        "prefix": sampled(completion, part, cache="prefix"),
    }
    return Shape({"model_type": "qwen2", **architecture}, spec, decoding, prompt, completion)


def block_causal(architecture: dict[str, Any], mask: int, prompt: int, completion: int) -> Shape:
    """One token a pass, and two."""
    spec = DiffusionSpec(
        mask_token_id=mask, logit_shift=False, attention="block_causal", block_size=4
    )
    decoding = {
        "4 passes a block": sampled(completion, 4),
        "2 passes a block": sampled(completion, 4, steps_per_block=2),
    }
    return Shape({"model_type": "llama", **architecture}, spec, decoding, prompt, completion)


TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SHAPES = {
    # config.json of apple/DiffuCoder-7B-Instruct and ByteDance-Seed/Stable-DiffCoder-8B-Instruct.
    "diffucoder_7b": bidirectional(
        {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
         "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
         "max_position_embeddings": 131072, "rms_norm_eps": 1e-6},
        151666, 200, 256,
    ),
    "stable_diffcoder_8b": block_causal(
        {"vocab_size": 155136, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 128, "max_position_embeddings": 8192},
        5, 200, 256,
    ),
    "tiny_bidirectional": bidirectional(TINY, 2, 9, 16),
    "tiny_block": block_causal(TINY, 2, 9, 16),
}  # fmt: skip


def build(shape: Shape, device: torch.device) -> Denoiser:
    """Random weights in bfloat16, on the device from the first."""
    values = dict(shape.architecture)
    config = AutoConfig.for_model(
        values.pop("model_type"),
        **values,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Denoiser(model, shape.spec).eval()


def random_ids(shape: Shape, count: int) -> list[list[int]]:
    """`count` texts as long as prompt and completion; none holds a special token."""
    length, vocabulary = shape.prompt + shape.completion, shape.architecture["vocab_size"]
    high = min(vocabulary, shape.spec.mask_token_id) if shape.spec.mask_token_id > 99 else 99
    return torch.randint(6, high, (count, length), generator=generator(1)).tolist()


def pass_flops(config: Any, rows: TokenRows) -> float:
    """FLOPs of one forward pass over what is no padding; a backward pass takes twice as many."""
    heads, size = config.num_attention_heads * head_size(config), head_size(config)
    kv = config.num_key_value_heads * size
    layer = config.hidden_size * (2 * heads + 2 * kv + 3 * config.intermediate_size)
    tokens, scored = int(rows.pattern.valid.sum()), len(rows.targets)
    length = rows.input_ids.shape[1]
    strips = range(0, length, STRIP)
    pairs = sum(int(rows.pattern.dense(start, start + STRIP).sum()) for start in strips)
    pairs -= rows.input_ids.numel() - tokens  # pads see themselves
    body = 2 * tokens * layer + 4 * pairs * heads
    return config.num_hidden_layers * body + 2 * scored * config.hidden_size * config.vocab_size

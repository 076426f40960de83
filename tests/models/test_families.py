"""Public checkpoint folders, written here in their own layout with random weights.

What is imported is held against a forward pass written from the published equations, which knows
neither transformers nor our tables: it reads the public files, under their public names.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common.errors import UserError
from models.checkpoint import import_checkpoint, load_checkpoint, load_spec
from models.public import ImportOptions
from models.spec import DiffusionSpec

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 28, 16, 24, 3, 4, 2
STOCK = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.2",
    "use_cache": False,
    "eos_token_id": 1,
}
QWEN2 = {
    **STOCK,
    "attention_dropout": 0.1,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": LAYERS,
}
DREAM = {
    **QWEN2,
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "auto_map": {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    },
    "mask_token_id": 2,
    "use_mrope": False,
}
SDAR = {
    **QWEN2,
    "model_type": "sdar",
    "architectures": ["SDARForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
    "attention_bias": False,
    "head_dim": 8,  # not hidden_size / heads
    "fuse_cross_entropy": True,
    "block_size": 4,
    "mask_token_id": 2,
}
DIFFCODER = {
    **STOCK,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_seed_diffcoder.SeedDiffcoderForCausalLM"},
    "attention_bias": False,
    "attention_dropout": 0.1,
    "mlp_bias": False,
    "resid_pdrop": 0.1,
}
LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": WIDTH,
    "embedding_size": VOCABULARY,
    "eos_token_id": 1,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": 2,
    "max_sequence_length": 64,
    "mlp_hidden_size": INNER,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "n_layers": LAYERS,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500.0,
    "scale_logits": False,
    "vocab_size": 26,
    "weight_tying": False,
}
AR = {
    kind: {**base, "model_type": kind, "architectures": [f"{name}ForCausalLM"]}
    for kind, name, base in (
        ("qwen2", "Qwen2", QWEN2),
        ("qwen3", "Qwen3", {**QWEN2, "head_dim": 8, "attention_bias": False}),
        ("llama", "Llama", STOCK),
    )
}
CONFIGS = {"dream": DREAM, "sdar": SDAR, "stable-diffcoder": DIFFCODER, "llada": LLADA, **AR}
DIFFUSION = ("dream", "sdar", "stable-diffcoder", "llada")
SPECS = {
    "dream": ("bidirectional", None, True),
    "sdar": ("block_causal", 4, False),
    "stable-diffcoder": ("block_causal", 4, False),
    "llada": ("bidirectional", None, False),
    "qwen2": ("causal", 1, True),
    "qwen3": ("causal", 1, True),
    "llama": ("causal", 1, True),
}
QK_NORM, QKV_BIAS = {"sdar", "qwen3"}, {"dream", "qwen2"}

# Public names by role, independent of the tables under test.
PLAIN_NAMES = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "norm1": "model.layers.{}.input_layernorm", "norm2": "model.layers.{}.post_attention_layernorm",
    "q": "model.layers.{}.self_attn.q_proj", "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj", "o": "model.layers.{}.self_attn.o_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm", "k_norm": "model.layers.{}.self_attn.k_norm",
    "gate": "model.layers.{}.mlp.gate_proj", "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
}  # fmt: skip
LLADA_NAMES = {
    "embed": "model.transformer.wte", "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "norm1": "model.transformer.blocks.{}.attn_norm",
    "norm2": "model.transformer.blocks.{}.ff_norm",
    "q": "model.transformer.blocks.{}.q_proj", "k": "model.transformer.blocks.{}.k_proj",
    "v": "model.transformer.blocks.{}.v_proj", "o": "model.transformer.blocks.{}.attn_out",
    "gate": "model.transformer.blocks.{}.ff_proj", "up": "model.transformer.blocks.{}.up_proj",
    "down": "model.transformer.blocks.{}.ff_out",
}  # fmt: skip


def names(kind: str) -> dict[str, str]:
    return LLADA_NAMES if kind == "llada" else PLAIN_NAMES


def head_dim(kind: str) -> int:
    return 8 if kind in QK_NORM else WIDTH // HEADS


def random_weights(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries, keys = HEADS * head_dim(kind), KV_HEADS * head_dim(kind)
    matrices = {
        "q": (queries, WIDTH), "k": (keys, WIDTH), "v": (keys, WIDTH), "o": (WIDTH, queries),
        "gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER),
    }  # fmt: skip

    def draw(*shape: int, around: float = 0.0) -> Tensor:
        return around + 0.4 * torch.randn(shape, generator=generator)

    called = names(kind)
    state = {
        f"{called['embed']}.weight": draw(VOCABULARY, WIDTH),
        f"{called['norm']}.weight": draw(WIDTH, around=1.0),
        f"{called['head']}.weight": draw(VOCABULARY, WIDTH),
    }
    for layer in range(LAYERS):
        here = {role: name.format(layer) for role, name in called.items()}
        state |= {f"{here[role]}.weight": draw(*shape) for role, shape in matrices.items()}
        state |= {f"{here[n]}.weight": draw(WIDTH, around=1.0) for n in ("norm1", "norm2")}
        if kind in QKV_BIAS:
            sizes = {"q": queries, "k": keys, "v": keys}
            state |= {f"{here[role]}.bias": draw(size) for role, size in sizes.items()}
        if kind in QK_NORM:
            per_head = {n: draw(head_dim(kind), around=1.0) for n in ("q_norm", "k_norm")}
            state |= {f"{here[n]}.weight": value for n, value in per_head.items()}
    return state


def reference_logits(kind: str, state: dict[str, Tensor], ids: Tensor, allowed: Tensor) -> Tensor:
    """Logits [S, V] of tokens [S], who may see whom as bool [S, S]; one head at a time.

    RMSNorm (Zhang 2019), RoPE on rotated halves (Su 2021), grouped queries (Ainslie 2023), SwiGLU
    (Shazeer 2020), pre-norm residuals; biases on q, k, v (Qwen2), per-head q/k norms (Qwen3).
    """
    called, size = names(kind), head_dim(kind)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(1))

    def rotate(x: Tensor) -> Tensor:
        half = size // 2
        frequency = torch.tensor([500.0 ** (-2 * i / size) for i in range(half)])
        angle = torch.arange(len(x))[:, None] * frequency
        a, b = x[:, :half], x[:, half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    x = state[f"{called['embed']}.weight"][ids]
    for layer in range(LAYERS):
        here = {role: name.format(layer) for role, name in called.items()}
        y = norm(x, here["norm1"])
        q, k, v = (linear(y, here[role]) for role in ("q", "k", "v"))
        heads = []
        for head in range(HEADS):
            group = head * KV_HEADS // HEADS
            query = q[:, head * size : (head + 1) * size]
            key, value = (t[:, group * size : (group + 1) * size] for t in (k, v))
            if kind in QK_NORM:
                query, key = norm(query, here["q_norm"]), norm(key, here["k_norm"])
            score = rotate(query) @ rotate(key).T / size**0.5
            heads.append(score.masked_fill(~allowed, float("-inf")).softmax(-1) @ value)
        x = x + linear(torch.cat(heads, dim=-1), here["o"])
        y = norm(x, here["norm2"])
        gate = linear(y, here["gate"])
        x = x + linear(gate * gate.sigmoid() * linear(y, here["up"]), here["down"])
    return norm(x, called["norm"]) @ state[f"{called['head']}.weight"].T


def visible(attention: str, block: int | None, length: int) -> Tensor:
    """Who sees whom, straight from the definitions."""
    rows = [[True] * length for _ in range(length)]
    if attention != "bidirectional":
        rows = [[j // block <= i // block for j in range(length)] for i in range(length)]  # type: ignore[operator]
    return torch.tensor(rows)


WritePublic = Callable[..., Path]


@pytest.fixture
def write_public(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast) -> WritePublic:
    """`write_public("llada", drop=..., add=..., **config)`: two shards and their index."""

    def write(kind: str, state: dict[str, Tensor] | None = None, **change: Any) -> Path:
        folder = tmp_path / f"public-{kind}"
        folder.mkdir()
        config = {key: v for key, v in (CONFIGS[kind] | change).items() if v != "absent"}
        (folder / "config.json").write_text(json.dumps(config))
        state = random_weights(kind) if state is None else state
        keys = list(state)
        parts = [keys[::2], keys[1::2]]  # a layer's tensors lie in different files
        where = {}
        for number, part in enumerate(parts, start=1):
            file = f"model-{number:05}-of-00002.safetensors"
            save_file({key: state[key].clone() for key in part}, folder / file)
            where |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        word_tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.mark.parametrize("kind", CONFIGS)
def test_imported_model_computes_the_published_equations(
    write_public: WritePublic, tmp_path: Path, kind: str
) -> None:
    source, out = write_public(kind), tmp_path / "out"
    import_checkpoint(source, out, ImportOptions())
    attention, block, shift = SPECS[kind]
    assert DiffusionSpec.load(out) == DiffusionSpec(
        mask_token_id=2, logit_shift=shift, attention=attention, block_size=block
    )
    ids = torch.tensor([5, 9, 3, 17, 2, 2, 11, 2, 2, 23])
    allowed = visible(attention, block, len(ids))
    expected = reference_logits(kind, random_weights(kind), ids, allowed)
    stock = AutoModelForCausalLM.from_pretrained(out, local_files_only=True, dtype=torch.float32)
    with torch.no_grad():
        found = stock.eval()(ids[None], attention_mask=allowed[None, None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert stock.config.attention_dropout == 0.0
    assert not list(out.glob("*.py")) and "auto_map" not in (out / "config.json").read_text()


@pytest.mark.parametrize("kind", DIFFUSION)
def test_loaded_on_the_fly_as_imported(
    write_public: WritePublic, tmp_path: Path, kind: str
) -> None:
    source = write_public(kind)
    import_checkpoint(source, tmp_path / "out", ImportOptions())
    direct, imported = load_checkpoint(source), load_checkpoint(tmp_path / "out")
    assert direct.spec == imported.spec == load_spec(source)
    pairs = zip(
        direct.denoiser.model.state_dict().items(),
        imported.denoiser.model.state_dict().items(),
        strict=True,
    )
    for (name, one), (other_name, other) in pairs:
        assert name == other_name and torch.equal(one, other)
    ids = torch.tensor([[5, 9, 3, 17]])
    with torch.no_grad():  # the buffers too
        assert torch.equal(direct.denoiser.model(ids).logits, imported.denoiser.model(ids).logits)


@pytest.mark.parametrize("kind", AR)
def test_an_ar_folder_is_not_taken_for_a_denoiser(write_public: WritePublic, kind: str) -> None:
    with pytest.raises(UserError, match=r"diffusion\.json: missing.*unmask import"):
        load_checkpoint(write_public(kind))


def test_stored_dtype_is_kept(write_public: WritePublic, tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in random_weights("llada").items()}
    import_checkpoint(write_public("llada", state), tmp_path / "out", ImportOptions())
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.bfloat16}
    gate = "model.transformer.blocks.2.ff_proj.weight"
    assert torch.equal(kept["model.layers.2.mlp.gate_proj.weight"], state[gate])


def test_llada_with_tied_weights(write_public: WritePublic) -> None:
    state = random_weights("llada")
    state["model.transformer.ff_out.weight"] = state["model.transformer.wte.weight"]
    ids = torch.tensor([5, 9, 2, 2])
    allowed = visible("bidirectional", None, 4)
    expected = reference_logits("llada", state, ids, allowed)
    del state["model.transformer.ff_out.weight"]
    model = load_checkpoint(write_public("llada", state, weight_tying=True)).denoiser.model
    with torch.no_grad():
        found = model(ids[None], attention_mask=allowed[None, None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_stored_must_be_the_embedding(
    write_public: WritePublic, same: bool
) -> None:
    state = random_weights("dream")
    if same:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    source = write_public("dream", state, tie_word_embeddings=True)
    if same:
        model = load_checkpoint(source).denoiser.model
        assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
        return
    with pytest.raises(UserError, match=r"unexpected tensor lm_head\.weight.*ties it"):
        load_checkpoint(source)

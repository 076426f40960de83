"""Public checkpoint folders, written here in their own layout with random weights.

What is imported is held against a forward pass written from the published equations, which knows
neither transformers nor our tables: it reads the public files, under their public names.
"""

import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Tokenizer
from typer.testing import CliRunner

from common.errors import UserError
from models import checkpoint, public
from models.cache import slot_bytes
from models.checkpoint import import_checkpoint, load_checkpoint
from models.decoding import Decoder, DecodingConfig, Request
from models.families import find_family, stock_config
from models.outline import load_outline
from models.public import ImportOptions, load_public, plan_import
from models.spec import DiffusionSpec
from models.tokenizer import train_tokenizer
from rl.cli import app

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
        mask_token_id=2,
        logit_shift=shift,
        attention=attention,
        block_size=block,
        block_origin="sequence" if attention == "block_causal" else "prompt",
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
    outline = load_outline(source)
    assert direct.spec == imported.spec == outline.spec
    real = direct.denoiser.model.config
    assert slot_bytes(outline.config, 9, 4) == slot_bytes(real, 9, 4)
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
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert stock.dtype == torch.bfloat16
    assert load_checkpoint(tmp_path / "public-llada").denoiser.model.dtype == torch.float32
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


@pytest.mark.parametrize("kind", DIFFUSION)
def test_decoding_reads_the_logits_where_the_family_puts_them(
    write_public: WritePublic, kind: str
) -> None:
    """One greedy pass over four masks: with the shift, token i is read at position i - 1."""
    loaded = load_checkpoint(write_public(kind))
    prompt = (5, 9, 3, 17)
    attention, block, shift = SPECS[kind]
    ids = torch.tensor([*prompt, 2, 2, 2, 2])
    logits = reference_logits(kind, random_weights(kind), ids, visible(attention, block, 8))
    logits[:, 2] = float("-inf")  # the mask is never sampled
    expected = logits[3:7] if shift else logits[4:8]
    config = DecodingConfig(gen_length=4, steps_per_block=1, temperature=0.0)
    (found,) = Decoder(loaded.denoiser, loaded.tokenizer).decode([Request(prompt, 0)], config)
    wanted = expected.argmax(-1).tolist()
    assert list(found.token_ids) == wanted[: len(found.token_ids)] and found.token_ids


def forget_mask(folder: Path, vocabulary: int = 24, **extra: int) -> None:
    """Give the folder a tokenizer of `vocabulary` words without a mask token, and `extra` ones."""
    words = {"<|pad|>": 0, "<|endoftext|>": 1} | {f"w{n}": n for n in range(2, vocabulary)}
    taken = set(extra.values())
    words = {word: n for word, n in words.items() if n not in taken}
    tokenizer = Tokenizer(WordLevel(words | extra))
    tokenizer.add_special_tokens(list(extra))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)


@pytest.mark.parametrize(
    "reserved",
    ["<[MASK_never_used_51bce0c785ca2f68081bfa7d91973934]>", "<|reserved_special_token_0|>"],
)
def test_a_reserved_token_becomes_the_mask(
    write_public: WritePublic, tmp_path: Path, reserved: str
) -> None:
    source = write_public("llama")
    forget_mask(source, **{reserved: 5})
    plan = import_checkpoint(source, tmp_path / "out", ImportOptions())
    loaded = load_checkpoint(tmp_path / "out")
    assert plan.spec.mask_token_id == loaded.spec.mask_token_id == 5
    assert loaded.tokenizer.mask_token == reserved and "reused" in plan.mask_origin


def test_a_named_token_becomes_the_mask(write_public: WritePublic, tmp_path: Path) -> None:
    source = write_public("qwen2")
    forget_mask(source)
    import_checkpoint(source, tmp_path / "out", ImportOptions(mask_token="w7"))
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.spec.mask_token_id == loaded.tokenizer.mask_token_id == 7


def test_an_unused_row_becomes_the_mask(write_public: WritePublic, tmp_path: Path) -> None:
    """Qwen2.5 embeds 152064 rows for 151665 tokens."""
    source = write_public("qwen2")
    forget_mask(source, vocabulary=24)
    import_checkpoint(source, tmp_path / "out", ImportOptions())
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.spec.mask_token_id == 24 and loaded.tokenizer.encode("<|mask|>") == [24]
    weights = loaded.denoiser.model.model.embed_tokens.weight
    assert torch.equal(weights, random_weights("qwen2")["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_embedding_grows_by_the_mean_row(
    write_public: WritePublic, tmp_path: Path, tied: bool
) -> None:
    state = random_weights("qwen3")
    if tied:
        del state["lm_head.weight"]
    source = write_public("qwen3", state, tie_word_embeddings=tied)
    forget_mask(source, vocabulary=VOCABULARY)
    plan = import_checkpoint(source, tmp_path / "out", ImportOptions())
    loaded = load_checkpoint(tmp_path / "out")
    assert plan.grown and loaded.spec.mask_token_id == VOCABULARY
    assert loaded.tokenizer.mask_token_id == VOCABULARY
    model = loaded.denoiser.model
    assert model.config.vocab_size == VOCABULARY + 1
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown = model.state_dict()[name]
        before = state.get(name, state["model.embed_tokens.weight"])
        assert torch.equal(grown[:-1], before)
        torch.testing.assert_close(grown[-1], before.sum(0) / VOCABULARY)


def test_sdar_as_published(write_public: WritePublic, tmp_path: Path) -> None:
    """JetLM/SDAR-4B-Chat: neither the mask nor the block size is in config.json."""
    source = write_public("sdar", block_size="absent", mask_token_id="absent")
    forget_mask(source, **{"<|MASK|>": 6})
    with pytest.raises(UserError, match="no block_size in it; give `unmask import --block-size N`"):
        load_checkpoint(source)
    import_checkpoint(source, tmp_path / "out", ImportOptions(block_size=16))
    assert load_outline(tmp_path / "out").spec == DiffusionSpec(
        mask_token_id=6,
        logit_shift=False,
        attention="block_causal",
        block_size=16,
        block_origin="sequence",
    )


@pytest.mark.parametrize("kind", ["sdar", "llama"])
def test_all_stop_tokens_are_carried(write_public: WritePublic, tmp_path: Path, kind: str) -> None:
    """From generation_config.json (its sampling settings are not), else from config.json."""
    source, out = write_public(kind, eos_token_id=[1, 4]), tmp_path / "out"
    for listed in ([5, 7], None):
        if listed:
            stop_at(source, listed)
        else:
            (source / "generation_config.json").unlink()
        plan = import_checkpoint(source, out / str(listed), ImportOptions())
        loaded = load_checkpoint(out / str(listed))
        expected = (1, 5, 7) if listed else (1, 4)
        assert Decoder(loaded.denoiser, loaded.tokenizer).stops == plan.stops == expected
        if plan.family.adapted:  # also without an import
            loaded = load_checkpoint(source)
            assert Decoder(loaded.denoiser, loaded.tokenizer).stops == expected


def test_family_by_name_where_config_does_not_tell(
    write_public: WritePublic, tmp_path: Path
) -> None:
    source = write_public("llama")
    import_checkpoint(source, tmp_path / "out", ImportOptions(family="stable-diffcoder"))
    assert load_outline(tmp_path / "out").spec.block_size == 4


def test_one_tensor_at_a_time(write_public: WritePublic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a second copy: when a tensor is read, the one before is gone; each is read once."""
    read: list[tuple[str, weakref.ref[Tensor]]] = []

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs).__enter__()

        def __enter__(self) -> "Watched":
            return self

        def __exit__(self, *error: object) -> None:
            self.file = None

        def get_tensor(self, name: str) -> Tensor:
            # One may still hold the tensor that this one replaces.
            assert not any(tensor() is not None for _, tensor in read[:-1])
            value = self.file.get_tensor(name)
            read.append((name, weakref.ref(value)))
            return value

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    plan = plan_import(write_public("dream"))
    monkeypatch.setattr(public, "safe_open", Watched)
    load_public(plan)
    assert sorted(name for name, _ in read) == sorted(random_weights("dream"))


def test_large_models_are_written_in_shards(
    write_public: WritePublic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD", "4KB")
    source, out = write_public("stable-diffcoder"), tmp_path / "out"
    import_checkpoint(source, out, ImportOptions())
    assert len(list(out.glob("*.safetensors"))) > 2 and (out / public.INDEX).is_file()
    state = load_checkpoint(out).denoiser.model.state_dict()
    assert all(torch.equal(state[n], v) for n, v in random_weights("stable-diffcoder").items())


TEXTS = ["def f(xs):\n    return [x for x in xs if x % 2 == 0]\n", "# don't stop 20240\n\n  y = 1"]


def as_dream_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    """Vocabulary, merges and a class of its own, as in apple/DiffuCoder-7B-cpGRPO."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    special = {i: text for text, i in tokenizer.get_added_vocab().items()}
    vocabulary = {text: i for text, i in model["vocab"].items() if i not in special}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    config = {
        "tokenizer_class": kind,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {
            str(i): {"content": text, "special": True, **flags} for i, text in special.items()
        },
        "eos_token": "<|endoftext|>",
        "pad_token": {"content": "<|endoftext|>", **flags},
        "mask_token": "<|mask|>",
        "chat_template": "{{ messages[0].content }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """As Qwen2's: the special tokens behind the vocabulary."""
    trained = train_tokenizer(TEXTS, 280)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    words = [w for w in model["vocab"] if w not in trained.get_added_vocab()]
    found = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[tuple(pair) for pair in model["merges"]],
    )
    found.add_special_tokens({"mask_token": "<|mask|>"})
    return found


def test_dream_tokenizer_without_its_code(
    write_public: WritePublic, tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = len(bytes_tokenizer)
    state = random_weights("dream")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.ones(rows, WIDTH)
    mask = bytes_tokenizer.mask_token_id
    source = write_public("dream", state, vocab_size=rows, mask_token_id=mask)
    (source / "tokenizer.json").unlink()
    as_dream_tokenizer(source, bytes_tokenizer, "DreamTokenizer")
    import_checkpoint(source, tmp_path / "out", ImportOptions())
    for folder in (source, tmp_path / "out"):
        found = load_checkpoint(folder).tokenizer
        for text in (*TEXTS, "<|mask|> x<|endoftext|>"):
            assert found.encode(text) == bytes_tokenizer.encode(text)
        assert (found.mask_token_id, found.eos_token) == (mask, "<|endoftext|>")
        assert found.chat_template == "{{ messages[0].content }}"


def test_unknown_tokenizer_code_is_not_run(
    write_public: WritePublic, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_public("dream")
    (source / "tokenizer.json").unlink()
    as_dream_tokenizer(source, bytes_tokenizer, "NovelTokenizer")
    with pytest.raises(UserError, match="NovelTokenizer needs code .* never run"):
        load_checkpoint(source)


def without(kind: str, name: str) -> dict[str, Tensor]:
    return {key: value for key, value in random_weights(kind).items() if key != name}


def cut(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"cut")


def lose_shard(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").unlink()


def lose_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def stop_at(folder: Path, listed: object) -> None:
    text = json.dumps({"do_sample": True, "top_k": 20, "eos_token_id": listed})
    (folder / "generation_config.json").write_text(text)


ONES = torch.ones(4)
GATE = "model.transformer.blocks.1.ff_proj.weight"
# case: (family, tensors, config, damage to the folder, options, message)
BAD: dict[str, tuple[Any, ...]] = {
    "unknown family": ("dream", None, {"model_type": "mistral"}, None, [], "'mistral' is none of"),
    "other family": (
        "dream", None, {}, None, ["--family", "qwen3"], "--family qwen3: .* choose from dream",
    ),
    "no mask": (
        "dream", None, {"mask_token_id": "absent"}, forget_mask, [],
        "no mask token: .*--mask-token",
    ),
    "no such token": ("dream", None, {}, None, ["--mask-token", "<m>"], "has no such token"),
    "other mask": (
        "dream", None, {}, None, ["--mask-token", "w5"], "--mask-token w5 has id 5, but .* is 2",
    ),
    "mask outside": ("dream", None, {"mask_token_id": 99}, forget_mask, [], "99 is outside"),
    "other block": (
        "sdar", None, {}, None, ["--block-size", "8"], "--block-size 8: .* was trained with 4",
    ),
    "other block, by family": (
        "stable-diffcoder", None, {}, None, ["--block-size", "8"], "was trained with 4",
    ),
    "no block": ("sdar", None, {"block_size": "absent"}, None, [], "no block_size in it"),
    "no blocks": ("dream", None, {}, None, ["--block-size", "4"], "is bidirectional"),
    "lacking tensor": ("llada", without("llada", GATE), {}, None, [], f"lack {GATE} .1 missing"),
    "lacking bias": (
        "dream", without("dream", "model.layers.0.self_attn.q_proj.bias"), {}, None, [],
        r"lack model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "extra tensor": (
        "llada", random_weights("llada") | {"model.transformer.blocks.0.q_norm.weight": ONES},
        {}, None, [], r"unexpected tensor model\.transformer\.blocks\.0\.q_norm\.weight",
    ),
    "more layers": ("sdar", None, {"num_hidden_layers": 2}, None, [], r"unexpected .*layers\.2\."),
    "other shape": (
        "llada", random_weights("llada") | {GATE: torch.ones(INNER, WIDTH + 1)}, {}, None, [],
        rf"{GATE} has shape \[24, 17\], config.json asks for \[24, 16\]",
    ),
    "biased": ("llada", None, {"include_bias": True}, None, [], "include_bias is true; llada is"),
    "window": ("dream", None, {"use_sliding_window": True}, None, [], "use_sliding_window is true"),
    "no size": ("llada", None, {"n_kv_heads": "absent"}, None, [], "no n_kv_heads in it"),
    "bad size": ("dream", None, {"hidden_size": "16"}, None, [], "config.json: .*hidden_size"),
    "quantised": ("dream", None, {"quantization_config": {}}, None, [], "weights are quantised"),
    "lost shard": ("dream", None, {}, lose_shard, [], "00001-of-00002.safetensors: missing"),
    "cut shard": ("dream", None, {}, cut, [], "cannot read the weights"),
    "no weights": ("dream", None, {}, lose_weights, [], "no model.safetensors"),
    "no tokenizer": (
        "dream", None, {}, lambda f: (f / "tokenizer.json").unlink(), [], "no tokenizer there",
    ),
    "cut config": (
        "dream", None, {}, lambda f: (f / "config.json").write_text("{"), [], "cannot be read",
    ),
    "too many tokens": (
        "qwen2", None, {}, lambda f: forget_mask(f, 30), [], "ids up to 29 .* embeds 28",
    ),
    "stop token by name": (
        "sdar", None, {}, lambda f: stop_at(f, "<|im_end|>"), [],
        "eos_token_id '<.im_end.>' in generation_config.json, .* is neither a token id nor a list",
    ),
    "stop token outside": (
        "sdar", None, {}, lambda f: stop_at(f, [1, 99]), [], "eos_token_id 99 .* is no token of",
    ),
    "stop at the mask": (
        "sdar", None, {}, lambda f: stop_at(f, 2), [], "eos_token_id 2 .* is the mask token",
    ),
    "cut stop tokens": (
        "sdar", None, {}, lambda f: (f / "generation_config.json").write_text("{"), [],
        "generation_config.json: cannot be read",
    ),
    "ours already": (
        "dream", None, {}, lambda f: (f / "diffusion.json").write_text("{}"), [], "use it as it is",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_and_writes_nothing(
    write_public: WritePublic, tmp_path: Path, case: str
) -> None:
    kind, state, config, damage, options, message = BAD[case]
    source = write_public(kind, state, **config)
    if damage:
        damage(source)
    found = CliRunner().invoke(app, ["import", str(source), str(tmp_path / "out"), *options])
    assert found.exit_code == 2, found.output
    assert re.search(message, found.stderr) and found.stderr.count("\n") == 1, found.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_command_says_what_it_understood(write_public: WritePublic, tmp_path: Path) -> None:
    source, out = write_public("sdar"), tmp_path / "out"
    found = CliRunner().invoke(app, ["import", str(source), str(out)])
    assert found.exit_code == 0, found.output
    told = "sdar, stock qwen3, block_causal, block_size 4 from the sequence's start"
    assert told in found.stdout
    assert "ends at <|endoftext|>\n" in found.stdout
    assert "<|mask|> (2), the checkpoint's own" in found.stdout
    again = CliRunner().invoke(app, ["import", str(source), str(out)])
    assert again.exit_code == 2 and "exists already" in again.stderr
    assert load_outline(out).spec.block_size == 4  # what was there still is


def test_an_interrupted_import_leaves_nothing(
    write_public: WritePublic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(DiffusionSpec, "save", full)  # the last file
    source = write_public("dream")
    with pytest.raises(OSError, match="No space left"):
        import_checkpoint(source, tmp_path / "out", ImportOptions())
    assert list(tmp_path.iterdir()) == [source]


# From the config.json of the released models. The tensors are counted from the length of the
# index.json (LLaDA, Stable-DiffCoder; SDAR: of a fine-tuned copy) or of the layers (DiffuCoder).
PUBLISHED: dict[str, tuple[dict[str, Any], int, float]] = {
    "apple/DiffuCoder-7B-Instruct": (
        {
            **DREAM,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "mask_token_id": 151666,
            "max_position_embeddings": 131072,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "vocab_size": 152064,
        },
        28 * 12 + 3,
        7.62e9,
    ),
    "JetLM/SDAR-4B-Chat": (
        {
            **SDAR,
            "head_dim": 128,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rope_theta": 1000000,
            "vocab_size": 151936,
        },
        399,
        4.41e9,
    ),
    "GSAI-ML/LLaDA-8B-Instruct": (
        {
            **LLADA,
            "d_model": 4096,
            "embedding_size": 126464,
            "mlp_hidden_size": 12288,
            "n_heads": 32,
            "n_kv_heads": 32,
            "n_layers": 32,
            "rope_theta": 500000.0,
            "vocab_size": 126464,
        },
        291,
        8.02e9,
    ),
    "ByteDance-Seed/Stable-DiffCoder-8B-Instruct": (
        {
            **DIFFCODER,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rope_theta": 500000.0,
            "vocab_size": 155136,
        },
        291,
        8.25e9,
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_sizes(model: str) -> None:
    """Shapes only: nothing is allocated on the meta device."""
    values, tensors, parameters = PUBLISHED[model]
    family = find_family(values, Path(model))
    config = stock_config(family, values, Path(model))
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) == pytest.approx(parameters, rel=2e-3)
    assert config.rope_parameters["rope_theta"] == values["rope_theta"]

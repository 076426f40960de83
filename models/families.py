"""The public checkpoint families, as tables: how each names its config keys and its weights.

Not a reader of files (`models.public` is). A family says which stock transformers class has its
architecture, what its keys and weights are called there, and what its logits mean. A new family is
an entry in `FAMILIES`. What each entry was taken from stands beside it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

from common.errors import UserError
from diffusion.attention import BlockOrigin
from models.spec import Attention
from models.tokenizer import MASK

# Bookkeeping of the library that wrote the file; the stock class writes its own.
BOOKKEEPING = {
    "architectures", "auto_map", "attn_implementation", "dtype", "model_type", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip

# Without these the stock class would put its own default in their place.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps",
)  # fmt: skip

# Known to the stock classes, which keep them as one attribute of another name.
ROPE = {"rope_theta", "rope_scaling"}

# Windows would be overruled by the explicit 4-D masks: such a model would not be the same.
NO_WINDOW: Mapping[str, tuple[object, ...]] = {"use_sliding_window": (None, False)}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of public checkpoint.

    model_type: in the public config.json. stock: the transformers model_type of its architecture.
    mark: a word in `architectures` or `auto_map` that tells it from a stock model, if any does.
    keys: public config key -> stock key, later ones first; None: they are the same.
    required: values (any of) that a key must have if it is there: the stock class has no other.
    weights: public weight name -> stock name without `.weight`, N for the layer; empty: the same.
    block_size: known of the whole family; None: config.json says it, or the user must.
    block_origin: where its published loop counts blocks from (`models.spec`).
    mask_tokens: patterns of the mask token's text, where no config names it.
    adapted: False for an AR model, whose mask token may have to be made.
    """

    name: str
    model_type: str
    stock: str
    attention: Attention
    logit_shift: bool
    mark: str = ""
    keys: Mapping[str, str] | None = None
    required: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    block_size: int | None = None
    block_origin: BlockOrigin = "prompt"
    mask_tokens: tuple[str, ...] = ()
    adapted: bool = True

    def stock_name(self, name: str) -> str | None:
        """The stock name of a public tensor; None if the family has no such tensor."""
        if not self.weights:
            return name
        stem, _, leaf = name.rpartition(".")
        layer = re.search(r"\.(\d+)\.", stem)
        known = self.weights.get(re.sub(r"\.\d+\.", ".N.", stem, count=1))
        if known is None or leaf != "weight":
            return None
        return f"{known.replace('.N.', f'.{layer[1]}.') if layer else known}.{leaf}"


# huggingface.co/GSAI-ML/LLaDA-8B-Instruct: config.json, configuration_llada.py, modeling_llada.py
# (LLaDALlamaBlock: `ff_proj` is the gate; `transformer.ff_out` the output head).
LLADA_KEYS = {
    "vocab_size": "vocab_size",
    "embedding_size": "vocab_size",  # rows that there are; the tokenizer uses fewer
    "d_model": "hidden_size",
    "mlp_hidden_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "weight_tying": "tie_word_embeddings",
    "init_std": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
LLADA_REQUIRED: Mapping[str, tuple[object, ...]] = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    "block_group_size": (1,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (None, False),
    "bias_for_layer_norm": (None, False),
    "input_emb_norm": (False,),
    "multi_query_attention": (None, False),
    "scale_logits": (False,),
    "clip_qkv": (None,),
}
LLADA_WEIGHTS = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
    "model.transformer.blocks.N.attn_norm": "model.layers.N.input_layernorm",
    "model.transformer.blocks.N.q_proj": "model.layers.N.self_attn.q_proj",
    "model.transformer.blocks.N.k_proj": "model.layers.N.self_attn.k_proj",
    "model.transformer.blocks.N.v_proj": "model.layers.N.self_attn.v_proj",
    "model.transformer.blocks.N.attn_out": "model.layers.N.self_attn.o_proj",
    "model.transformer.blocks.N.ff_norm": "model.layers.N.post_attention_layernorm",
    "model.transformer.blocks.N.ff_proj": "model.layers.N.mlp.gate_proj",
    "model.transformer.blocks.N.up_proj": "model.layers.N.mlp.up_proj",
    "model.transformer.blocks.N.ff_out": "model.layers.N.mlp.down_proj",
}

# Seed-Coder left it unused (tokenizer_config.json, id 5); Stable-DiffCoder made it the mask.
SEED_MASK = r"<\[MASK_never_used_\w+\]>"

# An AR model predicts token i from position i - 1, seeing nothing later: the same facts as those
# of the AR stage of `unmask pretrain`.
_AR: dict[str, Any] = {
    "attention": "causal", "logit_shift": True, "block_size": 1, "adapted": False,
    # Our own, from an earlier import; then what the makers left unused: Seed-Coder, Llama 3.
    "mask_tokens": (re.escape(MASK), SEED_MASK, r"<\|reserved_special_token_0\|>"),
}  # fmt: skip

FAMILIES = (
    # huggingface.co/Dream-org/Dream-v0-Instruct-7B, apple/DiffuCoder-7B-{Base,Instruct,cpGRPO}:
    # config.json and configuration_dream.py (Qwen2's keys, `mask_token_id` 151666).
    Family(
        name="dream", model_type="Dream", stock="qwen2", attention="bidirectional",
        logit_shift=True, required=NO_WINDOW,
    ),
    # huggingface.co/JetLM/SDAR-4B-Chat: its config.json has neither mask nor block size, which
    # fine-tuned copies do have; `<|MASK|>` is an added token (151669). Qwen3, seen through blocks.
    # No shift: github.com/JetAstra/SDAR generate.py. Its blocks are cut from the start of the
    # sequence, and so are those of its training (modeling_sdar.py, `block_diff_mask`).
    Family(
        name="sdar", model_type="sdar", stock="qwen3", attention="block_causal",
        logit_shift=False, required=NO_WINDOW, mask_tokens=(r"<\|MASK\|>",),
        block_origin="sequence",
    ),
    Family(
        name="llada", model_type="llada", stock="llama", attention="bidirectional",
        logit_shift=False, keys=LLADA_KEYS, required=LLADA_REQUIRED, weights=LLADA_WEIGHTS,
    ),
    # huggingface.co/ByteDance-Seed/Stable-DiffCoder-8B-{Base,Instruct}: config.json is Llama's,
    # marked in `architectures`/`auto_map` only; block 4 (arXiv 2601.15892). Its modeling file
    # (`generate_block`, `_make_block_causal_mask`) cuts blocks from the start of the sequence.
    Family(
        name="stable-diffcoder", model_type="llama", stock="llama", attention="block_causal",
        logit_shift=False, mark="diffcoder", block_size=4, mask_tokens=(SEED_MASK,),
        block_origin="sequence",
    ),
    # Plain AR checkpoints (Qwen2.5-Coder, Qwen3, Llama, Seed-Coder): where adaptation starts.
    Family(name="qwen2", model_type="qwen2", stock="qwen2", required=NO_WINDOW, **_AR),
    Family(name="qwen3", model_type="qwen3", stock="qwen3", required=NO_WINDOW, **_AR),
    Family(name="llama", model_type="llama", stock="llama", **_AR),
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError names the file if there is none in it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found


def find_family(config: Mapping[str, Any], folder: Path, name: str | None = None) -> Family:
    """The family of a public config.json, or the one called `name`.

    Raises:
        UserError: no family has this model_type, or `name` is of another.
    """
    model_type = config.get("model_type")
    words = json.dumps([config.get("architectures"), config.get("auto_map")]).lower()
    kin = [family for family in FAMILIES if family.model_type == model_type]
    if not kin:
        known = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
        raise UserError(f"{folder}/config.json: model_type {model_type!r} is none of {known}")
    if name is None:
        return next(family for family in kin if family.mark in words)
    for family in kin:
        if family.name == name:
            return family
    names = ", ".join(family.name for family in kin)
    raise UserError(f"--family {name}: {folder} has model_type {model_type}: choose from {names}")


def stock_config(family: Family, config: Mapping[str, Any], folder: Path) -> PretrainedConfig:
    """The config of the stock class.

    Dropout is switched off: it belonged to another training, and under it the policy that made a
    completion would not be the policy that is trained.

    Raises:
        UserError: a key is missing, or has a value that the stock class cannot have.
    """
    for key, allowed in family.required.items():
        if key in config and config[key] not in allowed:
            wanted = " or ".join(json.dumps(value) for value in allowed)
            raise UserError(
                f"{folder}/config.json: {key} is {json.dumps(config[key])}; "
                f"{family.name} is supported with {wanted} only"
            )
    if "quantization_config" in config:
        raise UserError(f"{folder}/config.json: the weights are quantised; take the original ones")
    known = AutoConfig.for_model(family.stock)
    keys = family.keys or {key: key for key in (*SIZES, *config)}
    values = {
        name: config[key]
        for key, name in keys.items()
        if config.get(key) is not None
        and name not in BOOKKEEPING
        and (name in ROPE or hasattr(known, name))
    }
    for key, name in keys.items():
        if name in SIZES and name not in values:
            raise UserError(f"{folder}/config.json: no {key} in it; {family.name} needs it")
    values["attention_dropout"] = 0.0
    try:
        # A token that the model does not have is said to be none, else the class has a default.
        tokens = {f"{kind}_token_id": None for kind in ("bos", "eos", "pad")}
        return AutoConfig.for_model(family.stock, **tokens | values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{folder}/config.json: {' '.join(str(error).split())[:200]}") from error


def block_size(
    family: Family, config: Mapping[str, Any], asked: int | None, folder: Path
) -> int | None:
    """Tokens per block: what config.json or the family says, else what the user `asked` for.

    Raises:
        UserError: the two contradict each other, or neither says.
    """
    if family.attention == "bidirectional":
        if asked is not None:
            raise UserError(f"--block-size {asked}: {family.name} is bidirectional, without blocks")
        return None
    known = family.block_size or config.get("block_size")
    if known is None and asked is None:
        raise UserError(
            f"{folder}/config.json: no block_size in it; give `unmask import --block-size N` "
            "(the model card says it; SDAR: 4, or N of a name that ends in -bN)"
        )
    if known is not None and asked not in (None, known):
        raise UserError(
            f"--block-size {asked}: {folder} ({family.name}) was trained with {known}; leave it out"
        )
    return asked if known is None else int(known)


def named_mask(
    family: Family,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    asked: str | None,
    folder: Path,
) -> int | None:
    """Id of the mask token that the checkpoint has; None if it has none.

    In this order: config.json, the tokenizer's mask token, `asked` (the text of a token), the
    family's patterns.

    Raises:
        UserError: `asked` is no token, or not the one that the checkpoint was trained with.
    """
    vocabulary = tokenizer.get_vocab()
    if asked is not None and asked not in vocabulary:
        raise UserError(f"--mask-token {asked}: the tokenizer of {folder} has no such token")
    known = config.get("mask_token_id")
    if known is None:
        known = tokenizer.mask_token_id
    if known is not None:
        if asked is not None and vocabulary[asked] != known:
            raise UserError(
                f"--mask-token {asked} has id {vocabulary[asked]}, but the mask token of {folder} "
                f"is {known}; leave it out"
            )
        return int(known)
    if asked is not None:
        return int(vocabulary[asked])
    added = tokenizer.get_added_vocab()
    for pattern in family.mask_tokens:
        for text in sorted(added):
            if re.fullmatch(pattern, text):
                return int(added[text])
    return None

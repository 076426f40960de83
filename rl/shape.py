"""A model in a dozen numbers, from `config.json` alone: sizes, parameters, FLOPs. No weights.

Arithmetic for `rl.plan`; not a loader (`models.checkpoint`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from common.errors import UserError
from models.attention import head_size
from models.checkpoint import REFUSALS
from models.families import block_size, find_family, read_json, stock_config
from models.lora import LoraConfig
from models.spec import SPEC_FILE, DiffusionSpec

# The public config.json of models that a shipped configuration names but does not bring.
KNOWN = Path(__file__).resolve().parents[1] / "configs" / "models"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Qwen2, Qwen3 or Llama; `config` is that of the stock class.

    extras: parameters of a layer beside its seven matrices and two norms (biases, norms of heads).
    """

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool
    extras: int
    spec: DiffusionSpec
    config: Any

    @property
    def queries(self) -> int:
        """Numbers of a token's queries, all heads together."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """Numbers of a token's keys; its values are as many."""
        return self.kv_heads * self.head

    @property
    def layer_weights(self) -> int:
        """Parameters of a layer's matrices: q and o, k and v, gate, up and down."""
        return self.width * (2 * self.queries + 2 * self.keys + 3 * self.inner)

    @property
    def parameters(self) -> int:
        """All of them; tied embeddings once."""
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        layer = self.layer_weights + 2 * self.width + self.extras
        return embeddings + self.layers * layer + self.width

    def adapters(self, lora: LoraConfig | None) -> int:
        """Parameters of the adapters in all layers: the rank times both ends of each target."""
        if lora is None:
            return 0
        mlp = self.width + self.inner
        ends = {
            "q_proj": self.width + self.queries,
            "k_proj": self.width + self.keys,
            "v_proj": self.width + self.keys,
            "o_proj": self.width + self.queries,
            "gate_proj": mlp,
            "up_proj": mlp,
            "down_proj": mlp,
        }
        return self.layers * lora.rank * sum(ends[name] for name in lora.targets)

    def forward_flops(self, tokens: float, pairs: float, scored: float) -> float:
        """FLOPs of a forward pass: `pairs` of tokens see each other, `scored` go through the head.

        Two per weight and token; per pair and layer, two products of a head's numbers.
        """
        body = 2 * tokens * self.layer_weights + 4 * pairs * self.queries
        return self.layers * body + 2 * scored * self.width * self.vocabulary


def find_shape(model: Path) -> tuple[Shape, Path]:
    """The shape of a checkpoint folder, of a config.json, or of a known model not on this disk.

    Returns:
        The shape, and the file that it was read from.

    Raises:
        UserError: nothing there and nothing known under this name, or no diffusion model.
    """
    path = model / "config.json" if model.is_dir() else model
    if not path.is_file():
        path = KNOWN / f"{model.name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in KNOWN.glob("*.yaml")))
        raise UserError(
            f"model.path={model}: not on this disk, and none of the known shapes ({known}); give "
            "its config.json: unmask plan --model path/to/config.json"
        )
    return _shape(path), path


def _shape(path: Path) -> Shape:
    if (path.parent / SPEC_FILE).is_file():
        spec = DiffusionSpec.load(path.parent)
        try:
            return shape_of(AutoConfig.from_pretrained(path.parent, local_files_only=True), spec)
        except REFUSALS as error:
            raise UserError(f"{path}: {' '.join(str(error).split())[:200]}") from error
    values = read_json(path) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    family = find_family(values, path.parent)
    if not family.adapted:
        raise UserError(f"{path}: {family.name} is an AR model; `unmask import` and adapt it first")
    spec = DiffusionSpec(
        mask_token_id=0,  # memory and time do not depend on it
        logit_shift=family.logit_shift,
        attention=family.attention,
        block_size=block_size(family, values, None, path.parent),
        block_origin=family.block_origin if family.attention == "block_causal" else "prompt",
    )
    return shape_of(stock_config(family, values, path.parent), spec)


def shape_of(config: Any, spec: DiffusionSpec) -> Shape:
    """The shape of a stock transformers config (qwen2, qwen3, llama)."""
    head = head_size(config)
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    width, inner = config.hidden_size, config.intermediate_size
    biased = bool(getattr(config, "attention_bias", False))
    bias = queries + 2 * keys + width if biased else 0
    extras = {
        "qwen2": queries + 2 * keys,
        "qwen3": 2 * head + bias,
        "llama": bias,
    }
    if config.model_type not in extras:
        known = ", ".join(extras)
        raise UserError(f"config.json: model_type {config.model_type}: plan knows {known} only")
    more = 2 * inner + width if getattr(config, "mlp_bias", False) else 0
    return Shape(
        layers=config.num_hidden_layers,
        width=width,
        inner=inner,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head=head,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        extras=extras[config.model_type] + more,
        spec=spec,
        config=config,
    )

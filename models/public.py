"""Reading a public checkpoint folder into a stock model: no remote code, no tensor left over.

Not the tables (`models.families`). Names and shapes are compared before a weight is read; then the
shards are read one tensor at a time, straight into the model, so there is never a second copy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from common.errors import UserError
from models.families import (
    Family,
    block_size,
    find_family,
    named_mask,
    read_json,
    stock_config,
)
from models.spec import SPEC_FILE, DiffusionSpec
from models.stops import check_stop_ids, public_stop_ids, set_stop_ids
from models.tokenizer import MASK, check_tokenizer, load_tokenizer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DERIVED = "rotary_emb.inv_freq"  # written by old libraries; follows from rope_theta


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What a public folder may leave open: see `unmask import --help`."""

    family: str | None = None
    block_size: int | None = None
    mask_token: str | None = None


@dataclass(frozen=True)
class Plan:
    """A public folder, understood: everything but the weights.

    stops: tokens that end a completion. mask_origin: for people.
    """

    folder: Path
    family: Family
    config: PretrainedConfig
    spec: DiffusionSpec
    tokenizer: PreTrainedTokenizerFast
    stops: tuple[int, ...]
    grown: bool
    mask_origin: str


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: its public name, its file and its shape."""

    name: str
    shard: Path
    shape: tuple[int, ...]


def public_plan(folder: Path) -> Plan | None:
    """How to load a folder on the fly; None if it has a `diffusion.json`, or needs one.

    Only what is surely a diffusion model of a public family is loaded so. A plain AR checkpoint is
    not: one of ours that lost its `diffusion.json` looks the same, and would be decoded as
    something that it is not. It takes an explicit `unmask import`.

    Raises:
        UserError: as `plan_import`.
    """
    if (folder / SPEC_FILE).exists():
        return None
    try:
        family = find_family(read_json(folder / "config.json"), folder)
    except UserError as error:
        raise UserError(f"{error}; for any other model {SPEC_FILE} must stand beside it") from error
    return plan_import(folder) if family.adapted else None


def plan_import(folder: Path, options: ImportOptions | None = None) -> Plan:
    """Understand a public folder; reads no weights.

    Raises:
        UserError: unknown family, no mask token, a block size that contradicts the checkpoint, a
            config, tokenizer or stop token that does not fit.
    """
    options = options or ImportOptions()
    values = read_json(folder / "config.json")
    family = find_family(values, folder, options.family)
    config = stock_config(family, values, folder)
    size = block_size(family, values, options.block_size, folder)
    tokenizer = load_tokenizer(folder)
    mask = named_mask(family, values, tokenizer, options.mask_token, folder)
    grown, origin = False, "the checkpoint's own"
    if mask is not None and not family.adapted:
        origin = "a token of the tokenizer, reused"
    if mask is None:
        mask, grown = _new_mask(family, config, tokenizer, folder)
        origin = "a new row of the embedding" if grown else "an unused row of the embedding"
    config.vocab_size += int(grown)
    if tokenizer.mask_token_id is None:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask)
    check_tokenizer(tokenizer, config.vocab_size, mask, folder)
    stops = public_stop_ids(folder, values, tokenizer)
    check_stop_ids(stops, config.vocab_size, mask, folder)
    spec = DiffusionSpec(
        mask_token_id=mask,
        logit_shift=family.logit_shift,
        attention=family.attention,
        block_size=size,
        block_origin=family.block_origin,
    )
    return Plan(folder, family, config, spec, tokenizer, stops, grown, origin)


def _new_mask(
    family: Family, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> tuple[int, bool]:
    """Give an AR model a mask token: (its id, whether the embedding must grow by a row for it)."""
    if family.adapted:
        raise UserError(
            f"{folder}: no mask token: config.json has no mask_token_id and the tokenizer no "
            "mask_token; give `unmask import --mask-token TEXT`"
        )
    free = max(tokenizer.get_vocab().values()) + 1
    tokenizer.add_special_tokens({"mask_token": MASK})
    mask = int(tokenizer.mask_token_id)
    if mask != free or free > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {free - 1} (a new one gets {mask}), the model "
            f"embeds {config.vocab_size}; choose a token with `unmask import --mask-token TEXT`"
        )
    return mask, mask == config.vocab_size


def load_public(plan: Plan, dtype: torch.dtype | None = None) -> nn.Module:
    """The stock model with the folder's weights, on the CPU; dtype None keeps the stored one.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape; a file cannot be read.
    """
    try:
        stored = _stored(plan.folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plan.config, attn_implementation="sdpa")
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        sources = _account(plan, wanted, stored)
        model = model.to(dtype or _dtype(sources[EMBEDDING])).to_empty(device="cpu")
        model.tie_weights()
        # A buffer that no file holds: made again, where `to_empty` left arbitrary numbers.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
        _fill(model, sources, plan.grown)
        set_stop_ids(model, plan.stops)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{plan.folder}: cannot read the weights: {reason}") from error
    return model.eval()


def _stored(folder: Path) -> list[Stored]:
    """Every tensor of the folder, from the headers of its files."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: no weight_map in it")
        shards = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        shards = [SINGLE]
    else:
        raise UserError(f"{folder}: no {SINGLE} and no {INDEX} there; other formats are not read")
    found: list[Stored] = []
    for shard in shards:
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard}: missing, but {INDEX} names it; fetch it")
        with safe_open(folder / shard, framework="pt") as file:
            found += [
                Stored(name, folder / shard, tuple(file.get_slice(name).get_shape()))
                for name in file.keys()  # noqa: SIM118 - a handle, not a dict
            ]
    return found


def _account(
    plan: Plan, wanted: Mapping[str, tuple[int, ...]], stored: list[Stored]
) -> dict[str, Stored]:
    """Stock name -> where it is stored, for exactly the tensors that the model wants."""
    sources: dict[str, Stored] = {}
    tied = bool(plan.config.tie_word_embeddings)
    for tensor in stored:
        if tensor.name.endswith(DERIVED):
            continue
        name = plan.family.stock_name(tensor.name)
        if name is None or name not in wanted or name in sources:
            why = "twice" if name in sources else "no place in the model of config.json"
            raise UserError(f"{tensor.shard}: unexpected tensor {tensor.name}: {why}")
        rows = int(plan.grown and name in (EMBEDDING, HEAD))
        shape = (wanted[name][0] - rows, *wanted[name][1:])
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.shard}: {tensor.name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(shape)}"
            )
        sources[name] = tensor
    missing = sorted(set(wanted) - set(sources) - ({HEAD} if tied else set()))
    if missing:
        raise UserError(
            f"{plan.folder}: the weights lack {_public_name(plan.family, missing[0])} "
            f"({len(missing)} missing); they do not belong to this config.json"
        )
    if tied and HEAD in sources:
        if not torch.equal(_read(sources[HEAD]), _read(sources[EMBEDDING])):
            raise UserError(
                f"{plan.folder}: unexpected tensor {sources[HEAD].name}: config.json ties it to "
                "the embedding, but it is another"
            )
        del sources[HEAD]
    return sources


def _public_name(family: Family, stock: str) -> str:
    """The name under which a missing tensor was looked for."""
    parts = stock.split(".")
    layer = next((part for part in parts if part.isdigit()), "")
    for public, own in family.weights.items():
        if own.replace(".N.", f".{layer}.") == stock.removesuffix(".weight"):
            return public.replace(".N.", f".{layer}.") + ".weight"
    return stock


def _fill(model: nn.Module, sources: Mapping[str, Stored], grown: bool) -> None:
    """Read shard by shard into the parameters.

    A grown row is the mean of the rows there are, in the embedding and in the output head: the new
    token then starts as the average token, in the range of what the layers have seen, and (Hewitt
    2021, "Initializing New Word Embeddings for Pretrained Language Models") hardly changes the
    distribution over the others. No random numbers: an import is a function of its files.
    """
    parameters = model.state_dict()
    shards = sorted({tensor.shard for tensor in sources.values()})
    for shard in shards:
        with safe_open(shard, framework="pt") as file, torch.no_grad():
            for name, tensor in sources.items():
                if tensor.shard != shard:
                    continue
                target, value = parameters[name], file.get_tensor(tensor.name)
                target[: len(value)].copy_(value)
                if grown and name in (EMBEDDING, HEAD):
                    target[-1].copy_(value.mean(0, dtype=torch.float32))


def _read(tensor: Stored) -> Tensor:
    with safe_open(tensor.shard, framework="pt") as file:
        return file.get_tensor(tensor.name)


def _dtype(tensor: Stored) -> torch.dtype:
    with safe_open(tensor.shard, framework="pt") as file:
        return file.get_slice(tensor.name)[:1].dtype

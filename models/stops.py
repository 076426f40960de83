"""Which tokens end a completion: the one place that knows. Not the decoding that stops there.

A checkpoint may list several (`eos_token_id` of generation_config.json is a number or a list: chat
models end turns and documents with different ones). The list travels with the model's weights, as
stock transformers carries it; the tokenizer's EOS, which our stages teach, always belongs to it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from models.families import read_json

GENERATION_FILE = "generation_config.json"


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The stop tokens of a loaded model, the tokenizer's EOS first."""
    config: Any = model.generation_config
    return _with_eos(config.eos_token_id, tokenizer)


def set_stop_ids(model: nn.Module, stops: Iterable[int]) -> None:
    """Let a model carry its stop tokens: `save_checkpoint` writes them."""
    config: Any = model.generation_config
    config.eos_token_id = list(stops)


def public_stop_ids(
    folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast
) -> tuple[int, ...]:
    """The stop tokens of a public folder: of generation_config.json, else of its `config`.

    Raises:
        UserError: generation_config.json is no JSON object, or `eos_token_id` no number or list of
            numbers.
    """
    listed = config.get("eos_token_id")
    if (folder / GENERATION_FILE).is_file():
        listed = read_json(folder / GENERATION_FILE).get("eos_token_id", listed)
    values = listed if isinstance(listed, list) else [listed]
    if listed is not None and any(type(value) is not int for value in values):
        raise UserError(
            f"{folder}: eos_token_id {listed!r} in {GENERATION_FILE}, or else in config.json, is "
            "neither a token id nor a list of them; correct it"
        )
    return _with_eos(listed, tokenizer)


def check_stop_ids(stops: Iterable[int], vocab_size: int, mask_token_id: int, folder: Path) -> None:
    """UserError if a model of `vocab_size` embeddings could not stop at all of `stops`."""
    for token in stops:
        if not 0 <= token < vocab_size or token == mask_token_id:
            why = "the mask token" if token == mask_token_id else f"no token of {vocab_size}"
            raise UserError(
                f"{folder}: eos_token_id {token} in {GENERATION_FILE}, or else in config.json, "
                f"is {why}; take it out"
            )


def _with_eos(
    listed: int | list[int] | None, tokenizer: PreTrainedTokenizerFast
) -> tuple[int, ...]:
    values = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return tuple(dict.fromkeys([int(tokenizer.eos_token_id), *values]))

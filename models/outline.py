"""What a checkpoint is, all but its weights, and whether it can be decoded as asked.

Not the loading of weights (`models.checkpoint`). Bad input is found here, in a second, before a
model of many gigabytes is read or a worker is started.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

from common.errors import UserError
from models.cache import affordable_slots, needs_cache
from models.checkpoint import REFUSALS, check_checkpoint
from models.public import public_plan
from models.request import DecodingConfig
from models.spec import DiffusionSpec
from models.tokenizer import check_tokenizer, load_tokenizer


@dataclass(frozen=True)
class Outline:
    """A checkpoint without its weights; `config` is that of the stock model."""

    folder: Path
    spec: DiffusionSpec
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast

    def check_decoding(
        self,
        decoding: DecodingConfig,
        prompts: Sequence[Sequence[int]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """See that requests can be decoded so, with weights of `dtype`.

        Raises:
            UserError: sizes that do not fit the checkpoint, or too little memory for the longest
                of `prompts`.
        """
        decoding.resolve(self.spec)
        if prompts and needs_cache(self.spec, decoding):
            places = max(decoding.span(self.spec, len(prompt))[1] for prompt in prompts)
            affordable_slots(self.config, places, 1, decoding.cache_mib, dtype.itemsize)


def load_outline(folder: Path) -> Outline:
    """Read `config.json`, `diffusion.json` and the tokenizer; public folders as they are.

    Raises:
        UserError: one of them is missing, is not known, or does not fit the others.
    """
    check_checkpoint(folder)
    plan = public_plan(folder)
    if plan is not None:
        return Outline(folder, plan.spec, plan.config, plan.tokenizer)
    spec = DiffusionSpec.load(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except REFUSALS as error:
        reason = " ".join(str(error).split()).split(". ")[0]  # advice on versions follows
        raise UserError(
            f"{folder}/config.json: {reason[:200]}; `unmask import` brings in the families it knows"
        ) from error
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, config.vocab_size, spec.mask_token_id, folder)
    return Outline(folder, spec, config, tokenizer)

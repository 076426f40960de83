"""What a checkpoint's logits mean: the contents of `diffusion.json`. Not the architecture.

The architecture is a stock transformers class (`config.json`); these five facts are what turns it
into a denoiser, and they travel with the weights because decoding with the wrong one is silent.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from common.errors import UserError
from diffusion.attention import BlockOrigin

Attention = Literal["causal", "bidirectional", "block_causal"]
SPEC_FILE = "diffusion.json"


@dataclass(frozen=True, kw_only=True)
class DiffusionSpec:
    """How to denoise with a checkpoint.

    mask_token_id: the token that stands for "not decided yet"; never sampled.
    logit_shift: True if position i is predicted from the hidden state of i - 1 (Dream, DiffuCoder).
    attention: what a position may see (ALGORITHMS section 1).
    block_size: tokens per block, for `block_causal`; 1 for `causal`; None for full canvas.
    block_origin: where the blocks of a `block_causal` model are counted from. `prompt`: its end, so
        that every block of a completion is whole (our own stages). `sequence`: its start, so that
        the first block also holds the prompt's last tokens (SDAR, Stable-DiffCoder).
    """

    mask_token_id: int
    logit_shift: bool
    attention: Attention
    block_size: int | None
    block_origin: BlockOrigin = "prompt"

    def __post_init__(self) -> None:
        if type(self.mask_token_id) is not int or type(self.logit_shift) is not bool:
            raise UserError(
                f"{SPEC_FILE}: mask_token_id must be a number, logit_shift true or false"
            )
        if self.attention not in get_args(Attention):
            kinds = ", ".join(get_args(Attention))
            raise UserError(f"{SPEC_FILE}: attention {self.attention!r} is none of {kinds}")
        # The layout of a likelihood follows from the block size, so the two must agree.
        if self.attention == "block_causal" and (self.block_size or 0) < 1:
            raise UserError(f"{SPEC_FILE}: attention block_causal needs a block_size of at least 1")
        whole = {"causal": 1, "bidirectional": None}
        if self.attention in whole and self.block_size != whole[self.attention]:
            wanted = json.dumps(whole[self.attention])
            raise UserError(f"{SPEC_FILE}: attention {self.attention} needs block_size {wanted}")
        if self.block_origin not in get_args(BlockOrigin):
            kinds = ", ".join(get_args(BlockOrigin))
            raise UserError(f"{SPEC_FILE}: block_origin {self.block_origin!r} is none of {kinds}")
        if self.attention != "block_causal" and self.block_origin != "prompt":
            raise UserError(
                f'{SPEC_FILE}: block_origin "{self.block_origin}" is for attention block_causal; '
                f'{self.attention} needs "prompt", or leave it out'
            )

    def save(self, folder: Path) -> None:
        """Write `diffusion.json` beside `config.json`."""
        (folder / SPEC_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> "DiffusionSpec":
        """Read `diffusion.json`; UserError if it is missing or does not fit."""
        path = folder / SPEC_FILE
        try:
            return DiffusionSpec(**json.loads(path.read_text()))
        except FileNotFoundError:
            raise UserError(
                f"{path}: missing; a stage of `unmask pretrain` writes it; bring a checkpoint from "
                f"elsewhere in with `unmask import {folder} OUT`"
            ) from None
        except (json.JSONDecodeError, TypeError) as error:
            reason = str(error).removeprefix("DiffusionSpec.__init__() ")
            raise UserError(f"{path}: {reason}") from error
        except UserError as error:
            raise UserError(f"{folder}/{error}") from error

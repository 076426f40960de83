"""Which attention kernel a model computes with, and where it may. Not the kernels.

- `sdpa`: a dense boolean mask, on any machine. The decoder's windows always use it: their queries
  are few.
- `flex`: FlexAttention with a block mask; the rule runs inside the kernel. No dense mask exists.
- `flash_attention_2`: flash-attn's varlen kernel, where every token sees its whole document.
"""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from common.errors import UserError
from diffusion.attention import Pattern
from models.spec import Attention

Backend = Literal["sdpa", "flex", "flash_attention_2"]
AttentionChoice = Literal["auto", "sdpa", "flex", "flash_attention_2"]

# Side of a block mask's tiles. Rows are padded to whole tiles: shorter ones would take flex's
# decoding kernel, and lengths that are no multiple are compiled for apart.
TILE = 128
SMALLEST_FLEX_HEAD = 16
# What stock layers call our kernels.
NAME = "unmask"


def check_attention(
    choice: AttentionChoice, visible: Attention, precision: str, here: bool = True
) -> None:
    """Can `engine.attention=choice` work for a model in which tokens see what `visible` says?

    Args:
        precision: `engine.precision`.
        here: this machine will compute, so it must have what the choice needs.

    Raises:
        UserError: names the remedy.
    """
    key = f"engine.attention={choice}"
    if choice == "flash_attention_2":
        if visible != "bidirectional":
            raise UserError(
                f"{key} computes bidirectional attention only, and this model's is {visible}; "
                "set engine.attention=flex or auto"
            )
        if precision != "bf16":
            raise UserError(f"{key} needs 16-bit numbers; set engine.precision=bf16 or use auto")
        if here and find_spec("flash_attn") is None:
            raise UserError(
                f"{key}: flash-attn is not installed; run `pip install '.[flash-attn]'`, "
                "or set engine.attention=auto"
            )
    if here and choice in ("flex", "flash_attention_2") and not torch.cuda.is_available():
        raise UserError(f"{key} cannot train without a GPU; set engine.attention=sdpa or auto")


def choose_attention(
    choice: AttentionChoice, visible: Attention, precision: str, config: Any
) -> Backend:
    """The back-end that `choice` means on this machine for a model of this transformers config.

    auto: without a GPU `sdpa`; with one flash-attn where it fits and is installed, else `flex`.

    Raises:
        UserError: as `check_attention`, or heads too small for `flex`.
    """
    check_attention(choice, visible, precision)
    small = head_size(config) < SMALLEST_FLEX_HEAD
    if choice == "flex" and small:
        raise UserError(
            f"engine.attention=flex needs heads of {SMALLEST_FLEX_HEAD} numbers or more, this "
            f"model's have {head_size(config)}; set engine.attention=sdpa"
        )
    if choice != "auto":
        return choice
    if not torch.cuda.is_available():
        return "sdpa"
    if visible == "bidirectional" and precision == "bf16" and find_spec("flash_attn") is not None:
        return "flash_attention_2"
    return "sdpa" if small else "flex"


def head_size(config: Any) -> int:
    """Numbers per attention head. Not every class has head_dim, and it may be None where it is."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def install(model: nn.Module, backend: Backend) -> None:
    """Make the stock layers of `model` compute with `backend`; saved config files do not say it."""
    if backend != "sdpa":
        import models.kernels  # noqa: F401  # registers NAME
    model.config._attn_implementation = "sdpa" if backend == "sdpa" else NAME  # type: ignore[union-attr]


def mask_arguments(backend: Backend, pattern: Pattern) -> dict[str, Any]:
    """What to pass to the stock model beside the tokens, on the pattern's device.

    Rows are whole tiles long for `flex` (`TokenRows.padded`).
    """
    if backend == "sdpa":
        return {"attention_mask": pattern.dense()[:, None]}
    from models.kernels import block_mask, segments

    if backend == "flex":
        return {"attention_mask": block_mask(pattern)}
    return {"attention_mask": None, "segments": segments(pattern)}

"""What the decoder is asked: one request, and how to decode it. Not the decoding.

A completion is a function of (weights, request, seed).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from common.errors import UserError
from diffusion.attention import first_place
from diffusion.unmasking import Remasking
from models.spec import DiffusionSpec


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How to decode.

    gen_length: most tokens of a completion, a multiple of block_size.
    block_size: tokens per block; None takes the checkpoint's (the whole canvas if it has none).
    steps_per_block: denoising passes per block; None is one token a step.
    temperature: 0 is greedy. top_p, top_k: nucleus and top-k filters (1.0 and 0 are off).
    remasking: which positions are fixed first.
    order_temperature: 0 takes them strictly in that order; above, by chance (Dream's alg_temp).
    threshold: fix every position surer than this; steps_per_block is not used then.
    cache: for bidirectional models, where only `exact` (no cache) is exact. `prefix` and `dual`
        are Fast-dLLM's approximations (arXiv 2505.22618, section 3.2): a full pass at the start of
        a block, then passes over the block and all behind it (prefix) or the block alone (dual).
    early_exit: for bidirectional models: a row is done when everything up to its first EOS is
        decided. The text is exactly the same; what would have followed the EOS is not recorded,
        though it is context of the likelihood: not for training.

    The rest belongs to a call, not to a request:
    max_rows: most requests decoded side by side.
    cache_mib: most memory for keys and values, in MiB.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    gen_length: int
    block_size: int | None = None
    steps_per_block: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    remasking: Remasking = "low_confidence"
    order_temperature: float = 0.0
    threshold: float | None = None
    cache: Literal["exact", "prefix", "dual"] = "exact"
    early_exit: bool = False
    max_rows: int = 256
    cache_mib: int = 8192

    def __post_init__(self) -> None:
        sizes = (self.gen_length, self.block_size, self.steps_per_block, self.max_rows)
        if any(size is not None and size < 1 for size in (*sizes, self.cache_mib)):
            raise ValueError(
                "gen_length, block_size, steps_per_block, max_rows and cache_mib must be at least 1"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError("temperature and top_k must not be negative, 0 < top_p <= 1")
        if self.order_temperature < 0:
            raise ValueError("order_temperature must not be negative")
        if self.remasking == "left_to_right" and self.threshold is not None:
            raise ValueError(
                "threshold fixes positions by confidence, remasking left_to_right by place; "
                "give one of the two"
            )

    @property
    def needs_noise(self) -> bool:
        """Whether chance has any say."""
        return self.temperature > 0 or self.order_temperature > 0 or self.remasking == "random"

    def resolve(self, spec: DiffusionSpec) -> tuple[int, int]:
        """(block_size, passes per block) for a checkpoint; UserError if they do not fit it."""
        block = self.block_size or spec.block_size or self.gen_length
        if spec.attention != "bidirectional" and block != spec.block_size:
            raise UserError(
                f"decoding.block_size {block}: the checkpoint was trained with "
                f"{spec.block_size} and its attention is {spec.attention}; leave it null"
            )
        if spec.attention != "bidirectional" and (self.cache != "exact" or self.early_exit):
            key = "early_exit true" if self.early_exit else f"cache {self.cache}"
            raise UserError(
                f"decoding.{key} is for bidirectional checkpoints; this one is {spec.attention} "
                "and loses nothing by its exact cache: leave it out"
            )
        if self.gen_length % block:
            raise UserError(
                f"decoding.gen_length {self.gen_length} is not a multiple of block_size {block}"
            )
        steps = self.steps_per_block or block
        if steps > block:
            raise UserError(
                f"decoding.steps_per_block {steps} exceeds block_size {block}: "
                "a step fixes at least one token"
            )
        # With a threshold a block takes as many passes as it needs, each for one token or more.
        return block, block if self.threshold is not None else steps

    def span(self, spec: DiffusionSpec, prompt_length: int) -> tuple[int, int]:
        """Places [first, end) of the blocks that a request decodes: always whole ones.

        With blocks counted from the sequence's start, `first` may lie before the prompt's end
        (those tokens are given), and `end` behind prompt_length + gen_length: the last block is
        decoded whole, as by SDAR's loop, and what it has beyond gen_length is the tail.
        """
        block = self.resolve(spec)[0]
        first = first_place(prompt_length, block, spec.block_origin)
        blocks = -(-(prompt_length + self.gen_length - first) // block)
        return first, first + blocks * block


@dataclass(frozen=True)
class Request:
    """One completion to make; `seed` is its only source of randomness.

    decoding: how to decode this one; None is as the call says. Requests of all kinds share a
            call; those of one block size and cache share a batch.
    mask_seeds: seeds of coupled masks (made of names) under which the decoding weights score what
        they have made (`Completion.behaviour_logps`).
    """

    prompt_ids: tuple[int, ...]
    seed: int
    decoding: DecodingConfig | None = None
    mask_seeds: tuple[int, ...] = ()

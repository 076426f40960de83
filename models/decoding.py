"""The decoder: prompts in, completions out. One public call for rollout, evaluation, `generate`.

Not the maths of a step (`diffusion.sampling`, `diffusion.unmasking`). A completion is a function
of (weights, request, seed): its random numbers belong to the request, never to the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from common.records import Completion
from diffusion.masking import generator
from diffusion.sampling import draw, target_distribution
from diffusion.unmasking import Remasking, choose, confidence
from models.denoiser import Denoiser
from models.spec import DiffusionSpec
from models.windows import BlockWindow, CanvasWindow, Window


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How to decode.

    gen_length: tokens of the canvas, a multiple of block_size.
    block_size: tokens per block; None takes the checkpoint's (the whole canvas if it has none).
    steps_per_block: denoising passes per block; None is one token a step.
    temperature: 0 is greedy. top_p, top_k: nucleus and top-k filters (1.0 and 0 are off).
    remasking: which positions are fixed first.
    threshold: fix every position surer than this; steps_per_block is not used then.
    max_rows: requests decoded side by side; bounds the memory of the key/value cache.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    gen_length: int
    block_size: int | None = None
    steps_per_block: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    max_rows: int = 256

    def __post_init__(self) -> None:
        sizes = (self.gen_length, self.block_size, self.steps_per_block, self.max_rows)
        if any(size is not None and size < 1 for size in sizes):
            raise ValueError(
                "gen_length, block_size, steps_per_block and max_rows must be at least 1"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError("temperature and top_k must not be negative, 0 < top_p <= 1")

    def resolve(self, spec: DiffusionSpec) -> tuple[int, int]:
        """(block_size, passes per block) for a checkpoint; UserError if they do not fit it."""
        block = self.block_size or spec.block_size or self.gen_length
        if spec.attention != "bidirectional" and block != spec.block_size:
            raise UserError(
                f"decoding.block_size {block}: the checkpoint was trained with "
                f"{spec.block_size} and its attention is {spec.attention}; leave it null"
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


@dataclass(frozen=True)
class Request:
    """One completion to make; `seed` is its only source of randomness."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass
class _Batch:
    """The rows under work: [R, gen_length] each; `index` are the callers' request numbers."""

    index: Tensor
    tokens: Tensor
    step_map: Tensor
    confidences: Tensor
    draw_noise: Tensor
    order_noise: Tensor

    def keep(self, rows: Tensor) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name)[rows])


class Decoder:
    """Decodes batches of requests with one model."""

    def __init__(self, denoiser: Denoiser, tokenizer: PreTrainedTokenizerFast) -> None:
        self.denoiser = denoiser
        self.tokenizer = tokenizer
        self.eos_token_id = int(tokenizer.eos_token_id)

    @torch.no_grad()
    def decode(
        self,
        requests: Sequence[Request],
        config: DecodingConfig,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Completions in the order of `requests`.

        Rows of like prompt length share a batch of at most `config.max_rows`. `on_progress` is
        told how many completions have just been finished.

        Raises:
            UserError: sizes that do not fit the checkpoint, or an empty prompt.
        """
        config.resolve(self.denoiser.spec)
        if any(not request.prompt_ids for request in requests):
            raise UserError("empty prompt: a completion needs at least one prompt token")
        self.denoiser.eval()
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
        done: dict[int, Completion] = {}
        for start in range(0, len(order), config.max_rows):
            part = order[start : start + config.max_rows]
            done |= self._decode_batch(part, [requests[i] for i in part], config)
            if on_progress:
                on_progress(len(part))
        return [done[i] for i in range(len(requests))]

    def _decode_batch(
        self, index: list[int], requests: Sequence[Request], config: DecodingConfig
    ) -> dict[int, Completion]:
        block_size, steps = config.resolve(self.denoiser.spec)
        device = next(self.denoiser.parameters()).device
        batch = _new_batch(index, requests, config, steps, self.denoiser.spec.mask_token_id, device)
        window = self._window(requests, config, block_size)
        done: dict[int, Completion] = {}
        for block in range(0, config.gen_length, block_size):
            self._decode_block(batch, window, block, block_size, steps, config)
            here = batch.tokens[:, block : block + block_size]
            ended = (here == self.eos_token_id).any(-1)
            last = block + block_size == config.gen_length
            retiring = torch.ones_like(ended) if last else ended
            for row in retiring.nonzero()[:, 0].tolist():
                done[int(batch.index[row])] = self._completion(batch, row, block + block_size)
            kept = (~retiring).nonzero()[:, 0]
            if not len(kept):
                break
            if len(kept) < len(retiring):
                batch.keep(kept)
                window.keep_rows(kept)
            window.finish_block(batch.tokens, block)
        return done

    def _window(
        self, requests: Sequence[Request], config: DecodingConfig, block_size: int
    ) -> Window:
        prompts = [request.prompt_ids for request in requests]
        if self.denoiser.spec.attention == "bidirectional":
            return CanvasWindow(self.denoiser, prompts, config.gen_length, block_size)
        return BlockWindow(self.denoiser, prompts, config.gen_length, block_size)

    def _decode_block(
        self,
        batch: _Batch,
        window: Window,
        block: int,
        block_size: int,
        steps: int,
        config: DecodingConfig,
    ) -> None:
        """Denoise columns [block, block + block_size) of every row until none is masked."""
        columns = slice(block, block + block_size)
        masked = torch.ones_like(batch.tokens[:, columns], dtype=torch.bool)
        first_step = block // block_size * steps
        for step in range(steps):
            if not masked.any():
                break
            hidden = window.hidden(batch.tokens, block)
            token, sure = self._candidates(
                hidden[masked],
                batch.draw_noise[:, columns, step][masked],
                batch.order_noise[:, columns, step][masked],
                config,
            )
            score = torch.zeros(masked.shape, device=masked.device).masked_scatter(masked, sure)
            fixed = choose(score, masked, steps - step, config.threshold)
            new = torch.zeros_like(batch.tokens[:, columns]).masked_scatter(masked, token)
            batch.tokens[:, columns] = torch.where(fixed, new, batch.tokens[:, columns])
            batch.step_map[:, columns] = torch.where(
                fixed, first_step + step, batch.step_map[:, columns]
            )
            batch.confidences[:, columns] = torch.where(fixed, score, batch.confidences[:, columns])
            masked &= ~fixed

    def _candidates(
        self, hidden: Tensor, draw_noise: Tensor, order_noise: Tensor, config: DecodingConfig
    ) -> tuple[Tensor, Tensor]:
        """A token and its confidence for each masked position, [N] each, from hidden [N, D]."""
        probs = target_distribution(
            self.denoiser.logits(hidden),
            config.temperature,
            config.top_p,
            config.top_k,
            self.denoiser.spec.mask_token_id,
        )
        token = draw(probs, draw_noise, config.temperature)
        return token, confidence(probs, token, config.remasking, order_noise)

    def _completion(self, batch: _Batch, row: int, end: int) -> Completion:
        ids = batch.tokens[row, :end].tolist()
        ended = self.eos_token_id in ids
        length = ids.index(self.eos_token_id) + 1 if ended else end
        text_ids = ids[: length - 1] if ended else ids
        # Numbered without gaps: with a threshold, blocks leave some of their steps unused.
        used = batch.step_map[row, :end].unique(return_inverse=True)[1]
        return Completion(
            token_ids=tuple(ids[:length]),
            tail_ids=tuple(ids[length:]),
            text=str(self.tokenizer.decode(text_ids, skip_special_tokens=True)),
            finish_reason="eos" if ended else "length",
            step_map=tuple(used.tolist()),
            confidences=tuple(batch.confidences[row, :end].tolist()),
        )


def _new_batch(
    index: list[int],
    requests: Sequence[Request],
    config: DecodingConfig,
    steps: int,
    mask_token_id: int,
    device: torch.device,
) -> _Batch:
    """All random numbers of a request are drawn here, from its own seed, before any decoding."""
    shape = (len(requests), config.gen_length)
    noise = torch.stack(
        [
            torch.rand(2, config.gen_length, steps, generator=generator(request.seed))
            for request in requests
        ]
    ).to(device)
    return _Batch(
        index=torch.tensor(index, device=device),
        tokens=torch.full(shape, mask_token_id, device=device),
        step_map=torch.zeros(shape, dtype=torch.int64, device=device),
        confidences=torch.zeros(shape, device=device),
        draw_noise=noise[:, 0],
        order_noise=noise[:, 1],
    )

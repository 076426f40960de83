"""The rows under work: one slot per request, every slot at its own block, step and settings.

Bookkeeping only: not what the network is shown (`models.windows`) and not which tokens are drawn
(`models.decoding`). A row lies at the left of its slot, so a place is a position id and no padding
stands before anything; the last place of a slot belongs to nobody.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from diffusion.masking import generator
from diffusion.unmasking import ORDERS
from models.request import DecodingConfig, Request

COUNTS = ("number", "prompt", "end", "start", "step", "clock", "clean", "order", "steps", "top_k")
SETTINGS = ("temperature", "top_p", "order_temperature", "threshold")


@dataclass(kw_only=True)
class Slots:
    """Tensors of S slots with P places each; the first `active` slots hold a request.

    ids, step_map, sure: [S, P + 1] tokens (mask token: undecided), the pass that fixed each, and
        its confidence then.
    noise: [S, 2, canvas, steps] uniforms for the draw and for the order.
    number: the caller's number of the request. prompt, end: places [0, prompt) and [prompt, end),
        the canvas.
    start: place of the block under work; blocks begin at every block_size places from there, both
        ways. It may hold prompt tokens. step: its passes so far; clock: the request's.
    clean: places [0, clean) are final in the cache (windows keep it).
    The rest: the request's settings, `threshold` NaN for none.
    """

    ids: Tensor
    step_map: Tensor
    sure: Tensor
    noise: Tensor
    number: Tensor
    prompt: Tensor
    end: Tensor
    start: Tensor
    step: Tensor
    clock: Tensor
    clean: Tensor
    order: Tensor
    steps: Tensor
    top_k: Tensor
    temperature: Tensor
    top_p: Tensor
    order_temperature: Tensor
    threshold: Tensor
    block_size: int
    mask_token_id: int
    active: int = 0

    @staticmethod
    def make(
        slots: int,
        places: int,
        noise: tuple[int, int],
        block_size: int,
        mask_token_id: int,
        device: torch.device,
    ) -> "Slots":
        """Empty slots; `noise` is (canvas, steps) of the largest request, (0, 0) without."""

        def whole(*shape: int) -> Tensor:
            return torch.zeros(slots, *shape, dtype=torch.int64, device=device)

        def real(*shape: int) -> Tensor:
            return torch.zeros(slots, *shape, device=device)

        row = places + 1
        tensors: dict[str, Any] = {"ids": whole(row), "step_map": whole(row), "sure": real(row)}
        tensors["noise"] = real(2, *noise)
        tensors |= {name: whole() for name in COUNTS} | {name: real() for name in SETTINGS}
        return Slots(**tensors, block_size=block_size, mask_token_id=mask_token_id)

    @property
    def places(self) -> int:
        """P: the longest prompt and completion together; also the index of the spare place."""
        return self.ids.shape[1] - 1

    def admit(
        self,
        slot: int,
        number: int,
        request: Request,
        config: DecodingConfig,
        steps: int,
        span: tuple[int, int],
    ) -> None:
        """Put a request into a slot, over whatever was there; `span` as `DecodingConfig.span`.

        All its random numbers are drawn here, from its own seed: what comes of it cannot depend
        on when it was admitted, or beside whom.
        """
        prompt = len(request.prompt_ids)
        start, end = span
        self.ids[slot, :prompt] = torch.tensor(request.prompt_ids)
        self.ids[slot, prompt:end] = self.mask_token_id
        self.ids[slot, end:] = 0
        if config.needs_noise:
            drawn = torch.rand(2, end - prompt, steps, generator=generator(request.seed))
            self.noise[slot, :, : end - prompt, :steps] = drawn
        values = {
            "number": number, "prompt": prompt, "end": end, "start": start,
            "step": 0, "clock": 0, "clean": 0, "order": ORDERS.index(config.remasking),
            "steps": steps, "top_k": config.top_k, "temperature": config.temperature,
            "top_p": config.top_p, "order_temperature": config.order_temperature,
            "threshold": float("nan") if config.threshold is None else config.threshold,
        }  # fmt: skip
        for name, value in values.items():
            getattr(self, name)[slot] = value

    def block(self) -> Tensor:
        """Places [A, block_size] of the blocks under work."""
        return self.start[: self.active, None] + torch.arange(
            self.block_size, device=self.start.device
        )

    def masked(self, block: Tensor) -> Tensor:
        """Which places of `block` [A, B] are to be decided: prompt tokens in it never are."""
        ids = self.ids[: self.active].gather(1, block)
        return (ids == self.mask_token_id) & (block >= self.prompt[: self.active, None])

    def uniforms(self, block: Tensor) -> Tensor:
        """The random numbers of this pass for `block` [A, B]: [2, A, B], for draw and order."""
        if not self.noise.numel():  # chance has no say in any of the requests
            return self.noise.new_zeros(2, *block.shape)
        rows = torch.arange(self.active, device=block.device)[:, None]
        column = (block - self.prompt[: self.active, None]).clamp(min=0)  # prompt tokens: unused
        step = self.step[: self.active, None].expand_as(column)
        return torch.stack([self.noise[rows, kind, column, step] for kind in (0, 1)])

    def fix(self, block: Tensor, fixed: Tensor, token: Tensor, sure: Tensor) -> None:
        """Decide the places of `block` where `fixed` [A, B]; one pass has gone by."""
        rows, which = fixed.nonzero(as_tuple=True)
        place = block[rows, which]
        self.ids[rows, place] = token[rows, which]
        self.sure[rows, place] = sure[rows, which]
        self.step_map[rows, place] = self.clock[rows]
        self.step[: self.active] += 1
        self.clock[: self.active] += 1

    def next_block(self, rows: Tensor) -> None:
        """The blocks of `rows` are final; work on the ones behind them."""
        self.start[rows] += self.block_size
        self.step[rows] = 0

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots over slots."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value[target] = value[source]

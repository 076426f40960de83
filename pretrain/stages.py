"""One pretraining stage on one engine: batches, objective, optimizer steps.

Not the order of stages and not files: both are in `pretrain.train`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from pydantic import Field, model_validator

from common.config import Section
from common.seeding import derive_seed
from diffusion.attention import BlockOrigin
from diffusion.masking import generator
from diffusion.objective import (
    Noise,
    Objective,
    Packing,
    TrainingRows,
    block_diffusion_rows,
    canvas_rows,
    next_token_rows,
)
from diffusion.schedule import warmup_u_max
from models.engine import Engine, OptimConfig
from models.spec import Attention, DiffusionSpec
from pretrain.data import PackedRows, RowStream

OnStep = Callable[[int, Mapping[str, float]], None]
ATTENTION: dict[Objective, Attention] = {
    "ar": "causal",
    "causal_diffusion": "causal",
    "block": "block_causal",
    "bidirectional": "bidirectional",
}


class WarmupSection(Section):
    """Corruption warm-up (Stable-DiffCoder 3.2). steps 0 turns it off."""

    steps: int = Field(default=0, ge=0)
    u_init: float = Field(default=1e-3, gt=0, le=1)


class StageSection(Section):
    """One stage; it starts from the checkpoint of the stage before.

    objective: `ar`, `block` (Stable-DiffCoder), `bidirectional` (DiffuCoder's adaptation) or
        `causal_diffusion` (ARDLLM).
    data: `embedded:pretrain`, `embedded:sft`, or a JSONL/Parquet file with the column `text`, or
        `prompt` and `completion`: then only completions are hidden and learned.
    count: examples taken from an embedded split. row_length: tokens of a packed row.
    block_origin: for `block`: what prompted examples count blocks from (`models.spec`): `prompt`,
        or `sequence` to go on as SDAR and Stable-DiffCoder were trained.
    rows_per_step: rows of the global batch. rows_per_micro_batch: rows in one forward pass.
    canvas: of a `bidirectional` stage with prompts: completions are filled with EOS up to so many
        tokens, the gen_length that the model will be decoded with.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    objective: Objective
    data: str
    count: int = Field(default=4096, ge=1)
    steps: int = Field(ge=1)
    rows_per_step: int = Field(ge=1)
    rows_per_micro_batch: int = Field(ge=1)
    row_length: int = Field(ge=8)
    block_size: int = Field(default=4, ge=1)
    canvas: int | None = Field(default=None, ge=1)
    block_origin: BlockOrigin = "prompt"
    logit_shift: bool = False
    packing: Packing = "per_document"
    warmup: WarmupSection = WarmupSection()
    optim: OptimConfig

    @model_validator(mode="after")
    def _fits(self) -> "StageSection":
        if self.rows_per_step % self.rows_per_micro_batch:
            raise ValueError("rows_per_step must be a multiple of rows_per_micro_batch")
        if self.row_length % self.block_size:
            raise ValueError("row_length must be a multiple of block_size")
        if self.canvas is not None and self.objective != "bidirectional":
            raise ValueError(
                f"canvas is for objective bidirectional; {self.objective} sees nothing behind"
            )
        if self.block_origin != "prompt" and self.objective != "block":
            raise ValueError(
                f"block_origin {self.block_origin} is for objective block; leave it out"
            )
        return self

    def spec(self, mask_token_id: int) -> DiffusionSpec:
        """What the logits of this stage's checkpoint mean."""
        attention = ATTENTION[self.objective]
        block = {"causal": 1, "block_causal": self.block_size, "bidirectional": None}[attention]
        shift = self.objective == "ar" or self.logit_shift
        return DiffusionSpec(
            mask_token_id=mask_token_id,
            logit_shift=shift,
            attention=attention,
            block_size=block,
            block_origin=self.block_origin,
        )


@dataclass(frozen=True)
class StageResult:
    """What a stage did: optimizer steps, wall seconds, mean loss of the last tenth, tokens seen."""

    steps: int
    seconds: float
    loss: float
    tokens: int


def run_stage(
    stage: StageSection,
    engine: Engine,
    stream: RowStream,
    mask_token_id: int,
    seed: int,
    on_step: OnStep,
) -> StageResult:
    """Train for `stage.steps` optimizer steps; `on_step(step, metrics)` after each.

    The same batches and the same noise whatever the number of ranks: noise is named by the
    micro-batch's place in the global batch.
    """
    start = perf_counter()
    losses: list[float] = []
    tokens = 0
    for step, batch in enumerate(stream.batches(stage.steps)):
        began = perf_counter()
        metrics = _train_step(stage, engine, batch, mask_token_id, seed, step)
        seen = int(batch.valid.sum())
        tokens += seen
        metrics["perf/tokens_per_s"] = seen / (perf_counter() - began)
        losses.append(metrics["pretrain/loss"])
        on_step(step, metrics)
    tail = losses[-max(1, len(losses) // 10) :]
    return StageResult(len(losses), perf_counter() - start, sum(tail) / len(tail), tokens)


def _train_step(
    stage: StageSection,
    engine: Engine,
    batch: PackedRows,
    mask_token_id: int,
    seed: int,
    step: int,
) -> dict[str, float]:
    # Counted over the global batch, before it is split over ranks and micro-batches.
    wanted = batch.supervised
    if stage.objective == "ar" or (stage.logit_shift and stage.objective != "block"):
        wanted = wanted & (batch.position > 0)  # nothing predicts a document's first token
    normaliser = max(1, int(wanted.sum()))
    u_max = warmup_u_max(step, stage.warmup.steps, stage.warmup.u_init)
    places = range(0, stage.rows_per_step, stage.rows_per_micro_batch)
    mine = places[engine.rank :: engine.world_size]
    sums = {"loss": 0.0, "fallback": 0.0, "nll": 0.0, "scored": 0.0}
    for number, place in enumerate(mine):
        rows = batch.rows(place, place + stage.rows_per_micro_batch)
        gen = generator(derive_seed(seed, "noise", step, place // stage.rows_per_micro_batch))
        training = objective_rows(stage, rows, mask_token_id, gen, u_max)
        logps = engine.score(training.rows)
        loss = -(training.weight.to(logps.device) * logps).sum() / normaliser
        engine.backward(loss, last=number == len(mine) - 1)
        sums["loss"] += float(loss.detach())
        sums["nll"] -= float(logps.detach().sum())
        sums["scored"] += len(logps)
        sums["fallback"] += training.fallback_rate / len(places)
    info = engine.step()
    total = engine.sum_over_ranks(sums) if engine.world_size > 1 else sums
    return {
        "pretrain/loss": total["loss"],
        "pretrain/nll_per_masked_token": total["nll"] / max(1.0, total["scored"]),
        "pretrain/grad_norm": info.grad_norm,
        "pretrain/lr": info.lr,
        "pretrain/u_max": u_max,
        "pretrain/fallback_rate": total["fallback"],
    }


def objective_rows(
    stage: StageSection, rows: PackedRows, mask_token_id: int, gen: torch.Generator, u_max: float
) -> TrainingRows:
    """The forward pass of the stage's objective for one micro-batch."""
    if stage.objective == "ar":
        return next_token_rows(rows, stage.packing)
    noise = Noise(
        generator=gen,
        block_size=stage.block_size,
        mask_token_id=mask_token_id,
        logit_shift=stage.logit_shift,
        u_max=u_max,
        # During warm-up the weight is dropped (Stable-DiffCoder 3.2): at tiny u it explodes.
        weighted=u_max >= 1.0,
        packing=stage.packing,
    )
    if stage.objective == "block":
        return block_diffusion_rows(rows, noise)
    return canvas_rows(rows, noise, causal=stage.objective == "causal_diffusion")

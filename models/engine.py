"""The training engine: sums gradients over micro-batches and ranks, clips, steps. Not a loop.

Two twins behind one protocol: `TorchEngine` (one process, plain PyTorch, readable in a minute) and
`models.deepspeed_engine.DeepSpeedEngine` (ZeRO 0-3, any number of ranks). Tests hold them equal.

Conventions both keep:
- the caller divides the loss by the *global* token count, so gradients are summed, never averaged;
- dropout is never active: the log-probability of a completion must not depend on a die;
- weight decay reaches matrices only, not biases and norms;
- a step whose gradient norm is not finite is skipped: no parameter, moment or schedule moves.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from common.errors import UserError
from diffusion.layout import TokenRows
from models.attention import AttentionChoice
from models.buckets import export_name, export_tensor, split_buckets
from models.engine_meta import META_FILE, read_meta
from models.lora import Adapters, LoraConfig, stock_parameters
from models.state_files import StateFiles

T = TypeVar("T")
BUCKET_BYTES = 64 * 2**20
TORCH_FILE = "torch_engine.pt"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule (defaults: ALGORITHMS section 4, published settings).

    grad_clip: largest global L2 norm of the gradient; 0 turns clipping off.
    total_steps: optimizer steps of the whole schedule, warm-up included; 0 is the length of the
        run (`for_steps` fills it in).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    grad_clip: float = 0.2
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    total_steps: int = 0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.grad_clip < 0 or self.weight_decay < 0:
            raise ValueError("lr must be positive, grad_clip and weight_decay must not be negative")
        if self.warmup_steps < 0 or 0 < self.total_steps < self.warmup_steps:
            raise ValueError("warmup_steps must lie between 0 and total_steps")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError("min_lr_ratio must lie between 0 and 1")

    def for_steps(self, steps: int) -> "OptimConfig":
        """The same with `total_steps` known: `steps`, unless the configuration gave a number.

        A warm-up that is longer than the run (a short trial of a long recipe) is cut to it.
        """
        if self.total_steps:
            return self
        return replace(self, total_steps=steps, warmup_steps=min(self.warmup_steps, steps))


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which twin, and how it spreads its state.

    zero_stage: 0 replicates; 1 shards optimizer state, 2 gradients too, 3 parameters too.
    precision: `bf16` computes in bfloat16 and keeps float32 masters in the optimizer.
    attention: the kernel of the learner's passes; `auto` chooses (`models.attention`).
    offload_optimizer: moments, masters and their step on the host (ZeRO-3 only).
    offload_reference: the reference policy on the host, on the device only while it scores.
    lora: train adapters only; None trains all weights. The reference is the model without them.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    kind: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    attention: AttentionChoice = "auto"
    offload_optimizer: bool = False
    offload_reference: bool = False
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        # Below stage 3 in bf16 DeepSpeed keeps a gradient that was not finite: it skips for ever.
        if self.offload_optimizer and self.zero_stage != 3:
            raise ValueError("offload_optimizer needs kind deepspeed and zero_stage 3")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError("zero_stage must be 0, 1, 2 or 3")
        if self.kind == "torch" and self.zero_stage:
            raise ValueError("kind torch has no zero_stage; set it to 0 or use kind deepspeed")
        if self.lora is not None and self.offload_reference:
            raise ValueError("offload_reference: with lora there is no second model to offload")

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers in the forward pass: rollout workers and the reference use the same."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def adapters(self) -> dict[str, Any] | None:
        """Of `engine.json`: which adapters were saved, if any."""
        return None if self.lora is None else self.lora.identity


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What one optimizer step did. `grad_norm` is the global L2 norm before clipping."""

    grad_norm: float
    lr: float
    skipped: bool


class Engine(Protocol):
    """What the algorithms ask of an engine. Every rank calls every method, in the same order.

    adapted: whether adapters are trained, so that `score_base` can tell what was without them.
    """

    rank: int
    world_size: int
    device: torch.device
    adapted: bool

    def score(self, rows: TokenRows) -> Tensor:
        """Differentiable log-probabilities float32 [N] (a `TokenScorer`)."""
        ...

    def score_base(self, rows: TokenRows) -> Tensor:
        """`score` of the model that training started from, without gradients. Needs `adapted`."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss` (scalar); `last` marks the final micro-batch of the step.

        Ranks must make the same number of calls: pad with losses of weight 0.
        """
        ...

    def step(self) -> StepInfo:
        """Clip, step, clear gradients, advance the schedule. Call after `backward(last=True)`."""
        ...

    def sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over all ranks; the keys must agree."""
        ...

    def gather(self, mine: T) -> list[T]:
        """What every rank gave, in their order, on every rank. CPU tensors and plain objects."""
        ...

    def state_buckets(self, max_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
        """The whole parameters as CPU tensors under HF names, in buckets of about `max_bytes`.

        dtype: float32 under `fp32`; under `bf16` the bfloat16 numbers the forward pass uses (the
        float32 masters are only in `save`). Adapters are merged into them. Tied weights appear
        once. Ranks other than 0 get empty dicts. Exhaust the iterator: every rank takes part in
        every bucket.
        """
        ...

    def snapshot(self, folder: Path, files: StateFiles) -> None:
        """Copy parameters, optimizer state and schedule step into `files`, to lie in `folder`.

        Touches no file system, so it cannot fail on one rank only.
        """
        ...

    def load(self, folder: Path) -> None:
        """Continue exactly where `snapshot` left off, on any number of ranks.

        Call it on a fresh engine. Exact to the bit on as many ranks as saved; on another number
        sums over ranks are rounded in another order.

        Raises:
            UserError: it was another engine's.
        """
        ...

    def close(self) -> None:
        """Leave the other ranks, so that no process dies of a peer that ended before it."""
        ...


def learning_rate(config: OptimConfig, step: int) -> float:
    """The learning rate of optimizer step `step` (counted from 0).

    Linear warm-up that reaches `lr` on its last step, then constant, or a half cosine that ends
    at `min_lr_ratio * lr` on step `total_steps` and stays there.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


def make_engine(
    denoiser: nn.Module,
    engine_config: EngineConfig,
    optim_config: OptimConfig,
    rank: int = 0,
    world_size: int = 1,
) -> Engine:
    """Build the engine around `denoiser`, which it takes over (moves, casts, partitions).

    With `world_size` > 1 the launcher has set MASTER_ADDR and MASTER_PORT in the environment.

    Raises:
        UserError: kind `torch` with more than one rank; DeepSpeed or peft not installed.
    """
    if engine_config.kind == "torch":
        if world_size != 1:
            raise UserError(
                f"engine.kind: torch runs on 1 rank, not {world_size}; set engine.kind=deepspeed"
            )
        return TorchEngine(denoiser, engine_config, optim_config)
    try:
        from models.deepspeed_engine import DeepSpeedEngine
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise UserError(
            "engine.kind: deepspeed is not installed; run `make setup` or set engine.kind=torch"
        ) from error
    return DeepSpeedEngine(denoiser, engine_config, optim_config, rank, world_size)


class TorchEngine:
    """One process, plain PyTorch: the twin to read and to compare with.

    `bf16` is autocast over float32 parameters here: close to DeepSpeed's bf16, not equal to it.
    """

    rank = 0
    world_size = 1

    def __init__(
        self, denoiser: nn.Module, engine_config: EngineConfig, optim_config: OptimConfig
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._bf16 = engine_config.precision == "bf16"
        self._config = optim_config
        self._adapters = Adapters(denoiser, engine_config.lora)
        self.adapted = bool(self._adapters)
        self._lora = engine_config.adapters
        self._module = prepare_module(denoiser, engine_config).to(self.device)
        self._optimizer = make_optimizer(self._module, optim_config)
        self._schedule_step = 0

    def score(self, rows: TokenRows) -> Tensor:
        """See `Engine`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            scores: Tensor = self._module(rows.to(self.device))
        return scores

    def score_base(self, rows: TokenRows) -> Tensor:
        """See `Engine`."""
        with torch.no_grad(), self._adapters.off():
            return self.score(rows)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`; one process needs no boundary, so `last` changes nothing."""
        loss.backward()

    def step(self) -> StepInfo:
        """See `Engine`."""
        lr = set_learning_rate(self._optimizer, self._config, self._schedule_step)
        limit = self._config.grad_clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(self._module.parameters(), limit))
        skipped = not math.isfinite(norm)
        if not skipped:
            self._optimizer.step()
            self._schedule_step += 1
        self._optimizer.zero_grad(set_to_none=True)
        return StepInfo(norm, lr, skipped)

    def sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """See `Engine`."""
        return dict(values)

    def gather(self, mine: T) -> list[T]:
        """See `Engine`."""
        return [mine]

    def state_buckets(self, max_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
        """See `Engine`."""
        dtype = torch.bfloat16 if self._bf16 else None
        for bucket in split_buckets(stock_parameters(self._module), max_bytes):
            yield {
                export_name(name): export_tensor(self._adapters.merged(name, value, dtype), dtype)
                for name, value in bucket
            }

    def snapshot(self, folder: Path, files: StateFiles) -> None:
        """See `Engine`."""
        state = {"module": self._module.state_dict(), "optimizer": self._optimizer.state_dict()}
        files.add(folder / TORCH_FILE, state)
        files.add_json(folder / META_FILE, self._meta)

    @property
    def _meta(self) -> dict[str, Any]:
        precision = "bf16" if self._bf16 else "fp32"
        return {
            "kind": "torch",
            "precision": precision,
            "lora": self._lora,
            "schedule_step": self._schedule_step,
        }

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        self._schedule_step = read_meta(folder, self._meta)["schedule_step"]
        state = torch.load(folder / TORCH_FILE, map_location=self.device, weights_only=True)
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        """See `Engine`."""


# Shared by both twins, so that they cannot drift apart.


def prepare_module(module: nn.Module, config: EngineConfig) -> nn.Module:
    """Switch dropout off and, if asked, gradient checkpointing on (stock HF, train mode only)."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0  # type: ignore[assignment]
    module.train(config.gradient_checkpointing)
    if config.gradient_checkpointing:
        module.model.gradient_checkpointing_enable(  # type: ignore[union-attr, operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return module


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; decay on those with two or more dimensions."""
    trainable = [value for value in module.parameters() if value.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def set_learning_rate(optimizer: Any, config: OptimConfig, schedule_step: int) -> float:
    """Write the schedule's value into every parameter group and return it."""
    lr = learning_rate(config, schedule_step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def save_engine(engine: Engine, folder: Path) -> None:
    """Take a snapshot and write it at once: for callers that have nothing else to do."""
    files = StateFiles()
    engine.snapshot(folder, files)
    files.write()

"""The DeepSpeed twin of `models.engine.TorchEngine`: the only file that imports DeepSpeed.

Not a configuration layer over DeepSpeed: a few fixed choices (client AdamW, no accumulation inside
DeepSpeed, no scheduler, no printing) that make it compute what the plain twin computes, on any
number of ranks. What each choice works around is said beside it (DeepSpeed 0.19.8).
"""

import datetime
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Without this DeepSpeed announces its choice on stdout.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import GatheredParameters  # noqa: E402

from common.errors import UserError  # noqa: E402
from diffusion.layout import TokenRows  # noqa: E402
from models.buckets import export_name, export_tensor, split_buckets  # noqa: E402
from models.data_only import data_only  # noqa: E402
from models.engine import (  # noqa: E402
    BUCKET_BYTES,
    EngineConfig,
    OptimConfig,
    StepInfo,
    make_optimizer,
    prepare_module,
    set_learning_rate,
)
from models.engine_meta import META_FILE, read_meta  # noqa: E402
from models.lora import Adapters, stock_parameters  # noqa: E402
from models.reshard import TAG, is_replicated, resharded  # noqa: E402
from models.state_files import StateFiles  # noqa: E402

T = TypeVar("T")
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


class DeepSpeedEngine:
    """ZeRO 0-3 over `world_size` ranks; gloo on CPUs, nccl on GPUs."""

    def __init__(
        self,
        denoiser: nn.Module,
        engine_config: EngineConfig,
        optim_config: OptimConfig,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = _join_ranks(rank, world_size)
        self._config = optim_config
        self._stage = engine_config.zero_stage
        self._precision = engine_config.precision
        self._schedule_step = 0
        self._adapters = Adapters(denoiser, engine_config.lora)
        self.adapted = bool(self._adapters)
        self._lora = engine_config.adapters
        module = prepare_module(denoiser, engine_config).to(self.device)
        # DeepSpeed casts buffers too, and rotary frequencies in bfloat16 lose the position.
        buffers = {name: value.clone() for name, value in module.named_buffers()}
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(module, optim_config),
            config=_deepspeed_config(module, engine_config, optim_config),
            dist_init_required=False,
        )
        for name, value in self._engine.module.named_buffers():
            value.data = buffers[name].to(self.device)
        # It would put its recovery scripts into every checkpoint; `unmask export` does their work.
        self._engine._copy_recovery_script = _nothing

    def score(self, rows: TokenRows) -> Tensor:
        """See `models.engine.Engine`."""
        scores: Tensor = self._engine(rows.to(self.device))
        return scores

    def score_base(self, rows: TokenRows) -> Tensor:
        """See `models.engine.Engine`."""
        with torch.no_grad(), self._adapters.off():
            return self.score(rows)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `models.engine.Engine`."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks and we sum.
        self._engine.backward(loss * self.world_size)

    def step(self) -> StepInfo:
        """See `models.engine.Engine`."""
        lr = set_learning_rate(self._engine.optimizer, self._config, self._schedule_step)
        plain = self._stage == 0 and self._precision == "fp32"
        norm = self._plain_grad_norm() if plain else math.nan
        if plain and not math.isfinite(norm):
            self._engine.zero_grad()
            return StepInfo(norm, lr, skipped=True)
        self._engine.step()
        if not plain:
            norm = float(self._engine.get_global_grad_norm())
        skipped = not self._engine.was_step_applied()
        self._schedule_step += not skipped
        return StepInfo(norm, lr, skipped)

    def _plain_grad_norm(self) -> float:
        # In fp32 at stage 0 DeepSpeed neither reports the norm nor refuses one that is NaN.
        # The gradients are already reduced, so every rank computes the same number.
        grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return float(nn.utils.get_total_norm(grads))

    def sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """See `models.engine.Engine`."""
        names = sorted(values)
        total = torch.tensor([values[name] for name in names], dtype=torch.float64)
        total = total.to(self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))

    def gather(self, mine: T) -> list[T]:
        """See `models.engine.Engine`."""
        if self.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def state_buckets(self, max_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
        """See `models.engine.Engine`. Gathers one bucket at a time, so no rank holds two models."""
        adapters = self._adapters
        for bucket in split_buckets(stock_parameters(self._engine.module), max_bytes):
            exported: dict[str, Tensor] = {}
            wanted = [part for name, value in bucket for part in (value, *adapters.factors(name))]
            # Closed before the yield: a reader that stops must not leave parameters gathered.
            with GatheredParameters(wanted, enabled=self._stage == 3):
                if self.rank == 0:
                    exported = {
                        export_name(name): export_tensor(adapters.merged(name, value))
                        for name, value in bucket
                    }
            yield exported

    def snapshot(self, folder: Path, files: StateFiles) -> None:
        """See `models.engine.Engine`. Every rank copies its own shard."""
        writer = self._engine.checkpoint_engine
        self._engine.checkpoint_engine = _Collector(files)
        try:
            self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        finally:
            self._engine.checkpoint_engine = writer
        if self.rank == 0:
            files.add_json(folder / META_FILE, self._meta)

    def load(self, folder: Path) -> None:
        """See `models.engine.Engine`. A shard of its own per rank, or one conversion for all."""
        meta = read_meta(folder, self._meta)
        if meta["ranks"] == self.world_size or is_replicated(folder / TAG):
            with data_only():
                loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        else:
            loaded = self._load_resharded(folder, meta["schedule_step"])
        if loaded is None:
            raise UserError(f"{folder / TAG}: incomplete; resume from an earlier checkpoint")
        self._schedule_step = meta["schedule_step"]

    def _load_resharded(self, folder: Path, steps: int) -> str | None:
        """Shards of another number of ranks: rank 0 makes them whole, every rank takes its part."""
        optimizer = self._engine.optimizer
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        with resharded(folder / TAG, self.rank) as whole:
            # Private (pinned by a test): the public switch is read once, when the engine is built.
            self._engine._config.load_universal_checkpoint = True
            try:
                with data_only():
                    loaded, _ = self._engine.load_checkpoint(str(whole.parent), tag=whole.name)
            finally:
                self._engine._config.load_universal_checkpoint = False
        # At ZeRO-3 DeepSpeed gives all groups one step count, which each of them then advances, and
        # the first group's weight decay. Every applied step is one of the schedule.
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(torch.as_tensor(state["step"]), steps)
        for group, ours in zip(optimizer.param_groups, settings, strict=True):
            group.update(ours)
        return loaded

    def close(self) -> None:
        """See `models.engine.Engine`. A lone rank keeps its group: the next engine reuses it."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def _meta(self) -> dict[str, Any]:
        return {
            "kind": "deepspeed",
            "zero_stage": self._stage,
            "precision": self._precision,
            "lora": self._lora,
            "ranks": self.world_size,
            "schedule_step": self._schedule_step,
        }


class _Collector(CheckpointEngine):
    """Takes the place of DeepSpeed's file writer and keeps what it is given."""

    def __init__(self, files: StateFiles) -> None:
        super().__init__()
        self._files = files

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Not yet: no file system may fail one rank while the others wait for it."""

    def save(self, state_dict: Any, path: str) -> None:
        """Copy one file's content."""
        self._files.add(Path(path), state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("it only collects")

    def commit(self, info: Any) -> bool:
        """Nothing to publish."""
        return True


def _nothing(save_path: str) -> None:
    """Instead of something that DeepSpeed does."""


def _join_ranks(rank: int, world_size: int) -> torch.device:
    """Initialise torch.distributed under DeepSpeed, quietly; return this rank's device."""
    _quieten()
    # A private name (pinned by a test): else the first start on a CPU compiles for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(
            backend,
            # One rank needs no port, so it cannot collide with another run's.
            store=dist.HashStore() if world_size == 1 else None,
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    deepspeed.init_distributed(verbose=False)
    if dist.get_world_size() != world_size:
        raise UserError(
            f"this process already belongs to {dist.get_world_size()} ranks, not {world_size}"
        )
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def _quieten() -> None:
    """Send DeepSpeed's warnings to stderr and its chatter nowhere: stdout is for people."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:  # DeepSpeed's own, not a test runner's
            handler.setStream(sys.stderr)
    # DeepSpeed calls collectives by names that torch renames, once per bucket and step.
    renamed = r"`torch\.distributed\..*` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)


def _deepspeed_config(
    module: nn.Module, engine_config: EngineConfig, optim_config: OptimConfig
) -> dict[str, Any]:
    elements = sum(value.numel() for value in module.parameters() if value.requires_grad)
    # DeepSpeed's default buckets of 5e8 elements would cost a small model gigabytes.
    bucket = max(1, min(elements, 200_000_000))
    config: dict[str, Any] = {
        # Placeholders: micro-batches vary in size and number, the caller marks the last one.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim_config.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": engine_config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if engine_config.offload_optimizer:
        pinned = torch.cuda.is_available()
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        # Its own CPU Adam is compiled at first use; torch's computes the same.
        config["zero_force_ds_cpu_optimizer"] = False
    if engine_config.precision == "bf16":
        config["bf16"] = {"enabled": True}
        if engine_config.zero_stage > 0:
            # Stage 0 supports bfloat16 sums only.
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config

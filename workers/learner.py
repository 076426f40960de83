"""One rank of the learner: engine, optional reference policy, updates, publishing. Not the maths.

A plain class; `workers.cluster` wraps each rank in an actor. Building is in two steps because the
ranks must meet at an address that is known only once rank 0 has a machine.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.errors import UserError
from common.records import Group
from models.attention import choose_attention
from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.engine import Engine, EngineConfig, OptimConfig, make_engine
from models.state_files import Written
from rl.update import AlgorithmConfig, PolicyUpdater
from workers.weights import INITIAL_VERSION, WeightStore
from workers.wire import cut

if TYPE_CHECKING:
    from rl.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class LearnerPlan:
    """What every rank of the learner needs to know. `wire`: dtype of what is published."""

    checkpoint_folder: Path
    engine: EngineConfig
    optim: OptimConfig
    algorithm: AlgorithmConfig
    wire: torch.dtype = torch.float32

    @staticmethod
    def of(config: "TrainConfig") -> "LearnerPlan":
        """The learner's part of a training configuration."""
        return LearnerPlan(
            checkpoint_folder=Path(config.model.path).resolve(),
            engine=config.engine,
            optim=config.schedule,
            algorithm=config.algorithm,
            wire=wire_dtype(config),
        )


def wire_dtype(config: "TrainConfig") -> torch.dtype:
    """What weights travel in: the engine's own precision unless `cluster.wire` says bf16."""
    narrow = config.cluster.wire == "bf16" or config.engine.precision == "bf16"
    return torch.bfloat16 if narrow else torch.float32


class LearnerWorker:
    """Rank `rank` of `world_size`. Every method is called on all ranks at once."""

    _engine: Engine
    _checkpoint: Checkpoint
    _updater: PolicyUpdater
    _saving: Future[Written]

    def __init__(
        self,
        plan: LearnerPlan,
        weights: WeightStore,
        rank: int = 0,
        world_size: int = 1,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._plan = plan
        self._weights = weights
        self._rank = rank
        self._world_size = world_size
        self._version = INITIAL_VERSION

    def start(self, master: tuple[str, int] | None = None) -> int:
        """Load the checkpoint and build the engine; returns the process id.

        Args:
            master: host and free port of rank 0's machine; one rank needs none.

        Raises:
            UserError: a checkpoint or configuration that cannot work.
        """
        plan = self._plan
        if master is not None:
            os.environ.update(MASTER_ADDR=master[0], MASTER_PORT=str(master[1]))
        elif self._world_size > 1:
            raise UserError("learner.ranks: more than one rank needs cluster.kind=ray")
        self._checkpoint = load_checkpoint(plan.checkpoint_folder)
        denoiser, engine = self._checkpoint.denoiser, plan.engine
        backend = choose_attention(
            engine.attention, denoiser.spec.attention, engine.precision, denoiser.model.config
        )
        self._engine = make_engine(
            denoiser.use(backend), engine, plan.optim, self._rank, self._world_size
        )
        reference = None
        if plan.algorithm.beta > 0 and not self._engine.adapted:
            folder, device = plan.checkpoint_folder, self._engine.device
            if engine.offload_reference:
                device = torch.device("cpu")
            # In the policy's numbers: else the KL of two equal policies is not zero.
            loaded = load_checkpoint(folder, dtype=engine.dtype, device=device)
            reference = loaded.denoiser.use(backend)
        self._updater = PolicyUpdater(
            self._engine, reference, self._checkpoint.spec, plan.algorithm
        )
        return os.getpid()

    def prepare(self, groups: Sequence[Group]) -> float:
        """Do what `update` will need of these groups while it waits for others; its seconds."""
        began = time.monotonic()
        self._updater.prepare(groups)
        return time.monotonic() - began

    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """One policy update on the whole batch (each rank takes its share)."""
        return self._updater.update(groups, step, self._version)

    def publish(self, version: int) -> int:
        """Put the current policy into the store as `version`; so it is called from now on."""
        buckets = self._engine.state_buckets()
        if self._rank == 0:
            self._weights.publish(version, cut(buckets, self._plan.wire))
        for _ in buckets:  # the other ranks only take part in the gathering
            pass
        self._version = version
        return version

    def save(self, folder: Path) -> Future[Written]:
        """Copy `policy/` (and a reference that moves); a thread writes it into `folder`.

        The future holds the records of this rank's files; it ends with an InfrastructureError if
        they could not be written.
        """
        return self._updater.snapshot(folder).write_beside()

    def start_save(self, folder: Path) -> None:
        """`save` for callers in another process, who cannot hold its future: see `saved`."""
        self._saving = self.save(folder)

    def saved(self) -> Written | str | None:
        """What came of `start_save`: the records, the error in words, None if not yet over."""
        if not self._saving.done():
            return None
        error = self._saving.exception()
        return str(error) if error is not None else self._saving.result()

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
        self._updater.load(folder)

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder with its tokenizer and `diffusion.json`."""
        state = {k: v for bucket in self._engine.state_buckets() for k, v in bucket.items()}
        if self._rank == 0:
            checkpoint = self._checkpoint
            model = checkpoint.denoiser.model
            save_checkpoint(folder, model, checkpoint.tokenizer, checkpoint.spec, state)

    def close(self) -> None:
        """Leave the gang."""
        if hasattr(self, "_engine"):
            self._engine.close()

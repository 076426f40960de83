"""The configuration of `unmask train`: every room's section under one roof. Not their defaults.

Each section is declared by the module that needs it; what is left here is what two rooms share
(run, data, cluster) and the combinations that no single section can see are impossible.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from common.config import Section, load_config
from common.errors import UserError
from common.metrics import MetricsConfig
from models.decoding import DecodingConfig
from models.engine import EngineConfig, OptimConfig
from rewards.compose import RewardConfig
from rl.update import AlgorithmConfig


class RunConfig(Section):
    """Which run.

    folder: where checkpoints, logs and metrics go; None is runs/<name>.
    resume: auto (go on if there is a checkpoint), never, or a path.
    """

    name: str
    folder: str | None = None
    seed: int = 0
    resume: str = "auto"

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path("runs") / self.name if self.folder is None else Path(self.folder)


class ModelConfig(Section):
    """The checkpoint to start from: a Hugging Face folder with `diffusion.json`."""

    path: str


class DataConfig(Section):
    """Sources of problems (`rl.data.load_problems`): embedded splits, files, or Hub names.

    train_count, test_count: take the first so many; None takes all there are, of an embedded split
    as many as `rl.data.EMBEDDED_COUNTS` says. prompt_limit: longest prompt in tokens; a longer one
    is an error. seed: of embedded splits and of the order.
    """

    train: str
    test: str
    train_count: int | None = Field(default=None, ge=1)
    test_count: int | None = Field(default=None, ge=1)
    prompt_limit: int = Field(default=200, ge=1)
    seed: int = 0


class RolloutConfig(Section):
    """`prompts_per_step` groups of `group_size` completions make one batch."""

    group_size: int = Field(ge=1)
    prompts_per_step: int = Field(ge=1)
    decoding: DecodingConfig


class WorkerConfig(Section):
    """What each worker of a role is given.

    resources: of Ray's custom ones, by name. labels: that its node must have. Both are whatever
        `ray start --resources, --labels` said of the nodes.
    threads: of torch.
    """

    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    threads: int = Field(default=1, ge=1)


class PoolConfig(WorkerConfig):
    """A pool of like workers, anywhere in the cluster. It starts with `min` of them.

    max: how far autoscaling may go; an operator's `unmask scale` may go further.
    piece: groups that are handed to a worker at once, at least; larger pieces keep its batch full,
        smaller ones let others help a slow one.
    """

    min: int = Field(default=1, ge=1)
    max: int = Field(default=1, ge=1)
    piece: int = Field(default=1, ge=1)


class LearnerConfig(WorkerConfig):
    """The gang of learner ranks.

    placement: pack (as few nodes as possible), spread, or strict_spread (each on its own node).
    """

    ranks: int = Field(default=1, ge=1)
    placement: Literal["pack", "spread", "strict_spread"] = "pack"


class ClusterConfig(Section):
    """Where the workers live. `local`: all in this process; `ray`: actors.

    address: of a running Ray cluster; None uses RAY_ADDRESS, or starts one here.
    autoscale: add and remove rollout workers between their `min` and `max`, as the learner waits
        for them or they for it.
    timeout_s: longest wait for any one answer of a worker.
    heartbeat_s: how often every worker is asked for a sign of life.
    dead_after_s: who is silent for so long is replaced; a dead process is noticed at once.
    max_failures, failure_window_s: so many failures of one worker, or over one piece of work,
        within so many seconds and without a finished step between stop the run.
    weights: `object_store`: rollout workers pull new weights when they next work; `broadcast`: idle
        ones also receive them while they are published (NCCL between GPUs, else gloo). A busy one
        is waited for some seconds and then pulls: for max_staleness 0.
    wire: `engine`: weights travel as the learner's forward pass has them, so that rollouts come
        from the very policy that is trained; `bf16` halves the bytes of an fp32 engine, and
        rollouts come from its rounding.
    """

    kind: Literal["local", "ray"] = "local"
    address: str | None = None
    rollout: PoolConfig = PoolConfig()
    reward: PoolConfig = PoolConfig()
    learner: LearnerConfig = LearnerConfig()
    autoscale: bool = False
    timeout_s: float = Field(default=600.0, gt=0)
    heartbeat_s: float = Field(default=2.0, gt=0)
    dead_after_s: float = Field(default=30.0, gt=0)
    max_failures: int = Field(default=4, ge=1)
    failure_window_s: float = Field(default=900.0, gt=0)
    weights: Literal["object_store", "broadcast"] = "object_store"
    wire: Literal["engine", "bf16"] = "engine"


class ScheduleConfig(Section):
    """How long, and what in between. `save_every` 0: at the end only; `eval_every` 0: never."""

    steps: int = Field(ge=1)
    save_every: int = Field(default=50, ge=0)
    eval_every: int = Field(default=0, ge=0)
    eval_at_start: bool = False
    keep_last_n: int = Field(default=2, ge=1)


class TrainConfig(Section):
    """All of `unmask train`.

    What the file leaves out and the run knows: `optim.total_steps`, which is train.steps *
    algorithm.num_iterations (`schedule`), and the longest completion for rewards (`scoring`).
    """

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    reward: RewardConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optim: OptimConfig
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    train: ScheduleConfig
    metrics: MetricsConfig = MetricsConfig()

    @property
    def schedule(self) -> OptimConfig:
        """`optim` with the length of its schedule filled in."""
        return self.optim.for_steps(self.train.steps * self.algorithm.num_iterations)

    @property
    def scoring(self) -> RewardConfig:
        """`reward` with the length of the longest completion filled in."""
        return self.reward.for_length(self.rollout.decoding.gen_length)

    @model_validator(mode="after")
    def _possible(self) -> "TrainConfig":
        for impossible, text in _impossible(self):
            if impossible:
                # Not a ValueError: pydantic would wrap it and print the whole configuration.
                raise UserError(text)
        return self


def _impossible(config: TrainConfig) -> list[tuple[bool, str]]:
    """Combinations that cannot work, each with the line that says so."""
    decoding, algorithm = config.rollout.decoding, config.algorithm
    estimator, cluster = algorithm.estimator, config.cluster
    block = decoding.block_size
    return [
        (
            config.rollout.group_size < 2,
            f"rollout.group_size={config.rollout.group_size}: an advantage compares completions of "
            "one prompt; use at least 2",
        ),
        (
            decoding.temperature <= 0,
            f"rollout.decoding.temperature={decoding.temperature:g} makes the completions of a "
            "group equal, so nothing is learned; use a temperature above 0",
        ),
        (
            decoding.gen_length % (block or 1) != 0,
            f"rollout.decoding.gen_length={decoding.gen_length} is not a multiple of "
            f"rollout.decoding.block_size={block}",
        ),
        (
            block is not None and (decoding.steps_per_block or 1) > block,
            f"rollout.decoding.steps_per_block={decoding.steps_per_block} exceeds "
            f"rollout.decoding.block_size={block}: a step fixes at least one token",
        ),
        (
            estimator.kind == "coupled" and estimator.num_pairs == 0 and estimator.mode == "parity",
            "algorithm.estimator.mode=parity weighs coupled pairs, but "
            "algorithm.estimator.num_pairs=0 has none; use num_pairs=1 or mode=normalised",
        ),
        (
            algorithm.reference_refresh_steps > 0 and algorithm.beta == 0,
            f"algorithm.reference_refresh_steps={algorithm.reference_refresh_steps} has no "
            "reference to refresh while algorithm.beta=0; set it to 0",
        ),
        (
            algorithm.reference_refresh_steps > 0 and config.engine.lora is not None,
            f"algorithm.reference_refresh_steps={algorithm.reference_refresh_steps}: with "
            "engine.lora the reference is the model without adapters, for ever; set it to 0",
        ),
        (
            cluster.kind == "local" and cluster.learner.ranks > 1,
            f"cluster.learner.ranks={cluster.learner.ranks} needs processes of its own; set "
            "cluster.kind=ray",
        ),
        (
            cluster.kind == "local" and cluster.address is not None,
            f"cluster.address={cluster.address} names a Ray cluster, but cluster.kind=local; set "
            "cluster.kind=ray",
        ),
        (
            config.engine.kind == "torch" and cluster.learner.ranks > 1,
            f"engine.kind=torch runs on 1 rank, not cluster.learner.ranks={cluster.learner.ranks}; "
            "set engine.kind=deepspeed",
        ),
        (
            cluster.dead_after_s < 2 * cluster.heartbeat_s,
            f"cluster.dead_after_s={cluster.dead_after_s:g} is less than two heartbeats; raise it, "
            f"or lower cluster.heartbeat_s={cluster.heartbeat_s:g}",
        ),
        (
            cluster.autoscale and cluster.rollout.min == cluster.rollout.max,
            f"cluster.autoscale has nothing to choose: cluster.rollout.min and max are both "
            f"{cluster.rollout.max}",
        ),
        (
            cluster.kind == "local" and cluster.weights == "broadcast",
            "cluster.weights=broadcast sends between processes, but cluster.kind=local has one; "
            "set cluster.kind=ray",
        ),
        *_impossible_pools(cluster),
    ]


def _impossible_pools(cluster: ClusterConfig) -> list[tuple[bool, str]]:
    pools = {"rollout": cluster.rollout, "reward": cluster.reward}
    return [
        (
            pool.min > pool.max,
            f"cluster.{name}.min={pool.min} exceeds cluster.{name}.max={pool.max}",
        )
        for name, pool in pools.items()
    ]


def load_train_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read, complete and check a training configuration.

    Raises:
        UserError: one line that names the file and the key.
    """
    try:
        return load_config(TrainConfig, path, overrides)
    except UserError as error:
        known = str(error).startswith((str(path), "override"))
        raise error if known else UserError(f"{path}: {error}") from error

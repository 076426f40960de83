"""The workers as Ray actors, behind the same protocol as `workers.local`. Not the loop.

Rollout and reward workers restart when they die, pull the newest weights, and repeat what they
were doing with the same seeds. The ranks of the learner are one gang: if one dies, the run ends and
resumes from its checkpoint. Weights go through the object store, never through the driver.
"""

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from common.errors import InfrastructureError
from common.futures import in_thread
from common.records import Group, Problem, Scored
from models.decoding import DecodingConfig
from rl.config import LearnerConfig, PoolConfig, TrainConfig
from workers.learner import LearnerPlan, LearnerWorker
from workers.placement import Actor, Pending, check_fits, connect, find, launch, ray, wait
from workers.reward import RewardWorker, join
from workers.rollout import RolloutWorker, rollout_dtype
from workers.shelf import WeightShelf
from workers.weights import (
    INITIAL_VERSION,
    KEEP_VERSIONS,
    checksum,
)

T = TypeVar("T")
WEIGHTS = "weights"
CLOSE_TIMEOUT_S = 3.0


class RayWeightStore:
    """A `WeightStore` whose tensors lie in Ray's object store: shared memory within a node."""

    def __init__(self, run: str, log: Path, timeout_s: float) -> None:
        self._run = run
        self._log = log
        self._timeout_s = timeout_s

    @property
    def _shelf(self) -> Actor:
        return find(self._run, WEIGHTS, self._log)

    def publish(self, version: int, buckets: Iterable[Mapping[str, Tensor]]) -> None:
        """See `WeightStore`. The bytes belong to the publisher's process and go when it does."""
        refs, total = [], 0
        for bucket in buckets:
            total = checksum(bucket, total)
            refs.append(ray.put(dict(bucket)))
        self._ask("publish", version, refs, total)

    def newest(self) -> int:
        """See `WeightStore`."""
        version: int = self._ask("newest")
        return version

    def fetch(self, version: int | None = None) -> tuple[int, dict[str, Tensor]]:
        """See `WeightStore`."""
        found, refs, total = self._ask("fetch", version)
        shelf = self._shelf
        buckets = wait([Pending(shelf, "fetch", ref) for ref in refs], self._timeout_s)
        check = 0
        for bucket in buckets:
            check = checksum(bucket, check)
        if check != total:
            raise InfrastructureError(f"weights: version {found} arrived damaged (checksum)")
        return found, {name: value for bucket in buckets for name, value in bucket.items()}

    def _ask(self, method: str, *args: Any) -> Any:
        return wait([self._shelf.call(method, *args)], self._timeout_s)[0]


class RayCluster:
    """A `rl.protocol.Cluster` of Ray actors.

    Args:
        config: the run. Logs go to `<run>/logs/<role>-<i>.log`; `pids` maps `<role>-<i>` to the
            process that started under this name.
        with_learner: False starts no learner; only `generate`, `score` and `evaluate` work.

    Raises:
        UserError: no cluster at the address, too few resources, or a worker's bad input.
        InfrastructureError: a worker did not start.
    """

    def __init__(self, config: TrainConfig, with_learner: bool = True) -> None:
        self._config = config
        self._timeout_s = config.cluster.timeout_s
        self._version = INITIAL_VERSION
        self._name = f"unmask-{config.run.name}-{uuid.uuid4().hex[:8]}"
        self._actors: list[Actor] = []
        self._learners: list[Actor] = []
        self._rollouts: list[Actor] = []
        self._rewards: list[Actor] = []
        self.pids: dict[str, int] = {}
        self._owns_ray = False
        try:
            self._launch(with_learner)
        except BaseException:
            self.close()
            raise

    def _launch(self, with_learner: bool) -> None:
        wanted = _resources(self._config, with_learner)
        folder = Path(self._config.model.path).resolve()
        weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        cpus = sum(pool["CPU"] for pool in wanted.values())
        self._owns_ray = connect(self._config.cluster.address, cpus, weight_bytes)
        check_fits(wanted)
        shelf = self._start_one(WEIGHTS, partial(WeightShelf, KEEP_VERSIONS, INITIAL_VERSION))
        self._weights = RayWeightStore(self._name, shelf.log, self._timeout_s)
        # All start at once: most of a start is importing torch.
        self._learners = self._start_learners() if with_learner else []
        self._rollouts = self._start_rollouts()
        self._rewards = self._start_rewards()
        if with_learner:
            self._start_gang()
        pids = wait([actor.ask("ready") for actor in self._actors], self._timeout_s)
        self.pids = {actor.name: pid for actor, pid in zip(self._actors, pids, strict=True)}

    def _start_one(
        self,
        name: str,
        build: Callable[[], Any],
        pool: PoolConfig | LearnerConfig | None = None,
        **options: Any,
    ) -> Actor:
        log = self._config.run.path.resolve() / "logs" / f"{name}.log"
        if pool is not None:
            options |= {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus}
            options["threads"] = pool.threads
        options.setdefault("num_cpus", 0.0)
        actor = launch(name, log, build, run=self._name, local=self._owns_ray, **options)
        self._actors.append(actor)
        return actor

    def _start_rollouts(self) -> list[Actor]:
        pool = self._config.cluster.rollout
        build = partial(
            RolloutWorker,
            Path(self._config.model.path).resolve(),
            self._config.rollout.decoding,
            self._weights,
            pool.threads,
            rollout_dtype(self._config.engine),
        )
        return [
            self._start_one(f"rollout-{i}", build, pool, restarts=True, tensors=True)
            for i in range(pool.min)
        ]

    def _start_rewards(self) -> list[Actor]:
        pool = self._config.cluster.reward
        build = partial(RewardWorker, self._config.scoring)
        return [
            self._start_one(f"reward-{i}", build, pool, restarts=True, secrets=False)
            for i in range(pool.min)
        ]

    def _start_learners(self) -> list[Actor]:
        pool = self._config.cluster.learner
        build = partial(LearnerWorker, LearnerPlan.of(self._config), self._weights)
        return [
            self._start_one(
                f"learner-{rank}",
                partial(build, rank, pool.ranks, pool.threads),
                pool,
                tensors=True,
            )
            for rank in range(pool.ranks)
        ]

    def _start_gang(self) -> None:
        master = None
        if len(self._learners) > 1:
            master = wait([self._learners[0].ask("meeting_point")], self._timeout_s)[0]
        self._on_learners("start", master)

    def generate(self, problems: Sequence[Problem], seed: int) -> Future[list[Group]]:
        """See `rl.protocol.Cluster`."""
        group_size = self._config.rollout.group_size
        return in_thread(lambda: self._generate(problems, seed, group_size), "generate")

    def score(self, groups: Sequence[Group]) -> Future[Scored]:
        """See `rl.protocol.Cluster`."""
        return in_thread(lambda: self._score(groups), "score")

    def evaluate(
        self, problems: Sequence[Problem], decoding: DecodingConfig, group_size: int, seed: int
    ) -> Future[list[Group]]:
        """See `rl.protocol.Cluster`."""
        return in_thread(
            lambda: self._score(self._generate(problems, seed, group_size, decoding)).groups,
            "evaluate",
        )

    def _generate(
        self,
        problems: Sequence[Problem],
        seed: int,
        group_size: int,
        decoding: DecodingConfig | None = None,
    ) -> list[Group]:
        rest = (seed, group_size, decoding, self._version)
        parts = self._spread(self._rollouts, "generate", problems, *rest)
        return [group for part in parts for group in part]

    def _score(self, groups: Sequence[Group]) -> Scored:
        return join(self._spread(self._rewards, "score", groups))

    def _spread(
        self, pool: list[Actor], method: str, items: Sequence[Any], *rest: Any
    ) -> list[Any]:
        shares = split_evenly(items, len(pool))
        calls = [
            actor.call(method, share, *rest)
            for actor, share in zip(pool, shares, strict=True)
            if share
        ]
        return wait(calls, self._timeout_s)

    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """See `rl.protocol.Cluster`."""
        metrics: dict[str, float] = self._on_learners("update", ray.put(list(groups)), step)[0]
        return metrics

    def sync_weights(self) -> int:
        """See `rl.protocol.Cluster`."""
        self._version = self._on_learners("publish", self._version + 1)[0]
        return self._version

    def save(self, folder: Path) -> None:
        """See `rl.protocol.Cluster`. With several nodes, to a file system that they share."""
        self._on_learners("save", folder.resolve())

    def load(self, folder: Path) -> None:
        """See `rl.protocol.Cluster`. Call `sync_weights` before the next rollout."""
        self._on_learners("load", folder.resolve())

    def recover(self, folder: Path | None) -> None:
        """See `rl.protocol.Cluster`."""
        for rank in self._learners:
            ray.kill(rank.handle, no_restart=True)
        self._learners = self._start_learners()
        self._start_gang()
        if folder is not None:
            self.load(folder)

    def export(self, folder: Path) -> None:
        """See `rl.protocol.Cluster`."""
        self._on_learners("export", folder.resolve())

    def _on_learners(self, method: str, *args: Any) -> list[Any]:
        """Every rank at once, as the engine's collectives need."""
        if not self._learners:
            raise ValueError(f"{method}: this cluster was made with_learner=False")
        return wait([rank.call(method, *args) for rank in self._learners], self._timeout_s)

    def close(self) -> None:
        """End the actors, and Ray itself if this object started it. May be called twice.

        Reward workers are asked first: they have sandboxes with processes of their own.
        """
        actors, self._actors = self._actors, []
        if not ray.is_initialized():
            return
        closing = [actor.call("close").ref for actor in actors if actor in self._rewards]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for actor in actors:
            ray.kill(actor.handle, no_restart=True)
        if self._owns_ray:
            ray.shutdown()


def _resources(config: TrainConfig, with_learner: bool) -> dict[str, dict[str, float]]:
    cluster = config.cluster

    def pool(one: PoolConfig, count: int) -> dict[str, float]:
        return {"CPU": one.num_cpus * count, "GPU": one.num_gpus * count}

    wanted = {
        "rollout": pool(cluster.rollout, cluster.rollout.min),
        "reward": pool(cluster.reward, cluster.reward.min),
    }
    if with_learner:
        ranks = cluster.learner.ranks
        wanted["learner"] = {
            "CPU": cluster.learner.num_cpus * ranks,
            "GPU": cluster.learner.num_gpus * ranks,
        }
    return wanted


def split_evenly(items: Sequence[T], parts: int) -> list[list[T]]:
    """`parts` consecutive slices whose lengths differ by one at most."""
    size, longer = divmod(len(items), parts)
    ends = [(i + 1) * size + min(i + 1, longer) for i in range(parts)]
    return [list(items[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

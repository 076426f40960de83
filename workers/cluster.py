"""The workers as Ray actors, behind the same protocol as `workers.local`. Not the loop.

Rollout and reward workers restart when they die, pull the newest weights, and repeat what they
were doing with the same seeds. The ranks of the learner are one gang: if one dies, the run ends and
resumes from its checkpoint. Weights go through the object store, never through the driver.
"""

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from common.errors import InfrastructureError
from common.records import Group, Problem, Scored
from models.decoding import DecodingConfig
from models.state_files import Written
from rl.config import LearnerConfig, PoolConfig, TrainConfig
from workers.broadcast import BroadcastWeightStore, Patience
from workers.learner import LearnerPlan, LearnerWorker, wire_dtype
from workers.placement import Actor, check_fits, connect, launch, ray, wait
from workers.ray_weights import WEIGHTS, Line, RayWeightStore, node_address
from workers.reward import RewardWorker, join
from workers.rollout import RolloutWorker, rollout_dtype
from workers.roster import Roster
from workers.shelf import WeightShelf
from workers.weights import INITIAL_VERSION, KEEP_VERSIONS, WeightStore
from workers.wire import version_bytes

T = TypeVar("T")
ROSTER = "roster"
CLOSE_TIMEOUT_S = 3.0
# Files of a checkpoint may take longer than any one answer.
SAVE_TIMEOUTS, SAVE_POLL_S = 6.0, 0.1


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
        weight_bytes = version_bytes(folder, wire_dtype(self._config))
        cpus = sum(pool["CPU"] for pool in wanted.values())
        self._owns_ray = connect(self._config.cluster.address, cpus, weight_bytes)
        check_fits(wanted)
        self._weights = self._start_store()
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

    def _start_store(self) -> WeightStore:
        shelf = self._start_one(WEIGHTS, partial(WeightShelf, KEEP_VERSIONS, INITIAL_VERSION))
        pull = RayWeightStore(self._name, shelf.log, self._timeout_s)
        if not self._broadcasts:
            return pull
        roster = self._start_one(ROSTER, Roster)
        line = Line(self._name, ROSTER, roster.log, self._timeout_s)
        patience = Patience(whole_s=self._timeout_s)
        return BroadcastWeightStore(pull, line.ask, patience, node_address)

    @property
    def _broadcasts(self) -> bool:
        return self._config.cluster.weights == "broadcast"

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
            self._start_one(f"rollout-{i}", build, pool, restarts=True) for i in range(pool.min)
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
        return _in_thread(lambda: self._generate(problems, seed, group_size), "generate")

    def score(self, groups: Sequence[Group]) -> Future[Scored]:
        """See `rl.protocol.Cluster`."""
        return _in_thread(lambda: self._score(groups), "score")

    def evaluate(
        self, problems: Sequence[Problem], decoding: DecodingConfig, group_size: int, seed: int
    ) -> Future[list[Group]]:
        """See `rl.protocol.Cluster`."""
        return _in_thread(
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
        version = self._version + 1
        if self._broadcasts:
            # Nobody waits for them: one that is busy or dead pulls before it serves.
            for rollout in self._rollouts:
                rollout.call("receive", version)
        self._version = self._on_learners("publish", version)[0]
        return self._version

    def save(self, folder: Path) -> Future[Written]:
        """See `rl.protocol.Cluster`. With several nodes, to a file system that they share."""
        ranks = list(self._learners)
        self._on_learners("start_save", folder.resolve())
        return _in_thread(partial(self._saved, ranks), "save")

    def _saved(self, ranks: Sequence[Actor]) -> Written:
        """Wait until every rank has written its files: a failed save is cleared away whole."""
        deadline = time.monotonic() + SAVE_TIMEOUTS * self._timeout_s
        reports: list[Written | str | None] = [None]
        while None in reports:
            if time.monotonic() > deadline:
                text = f"{SAVE_TIMEOUTS:g} times cluster.timeout_s={self._timeout_s:g}"
                raise InfrastructureError(f"save: the learner's files were not written in {text}")
            time.sleep(SAVE_POLL_S)
            reports = wait([rank.call("saved") for rank in ranks], self._timeout_s)
        written: Written = {}
        for report in reports:
            if isinstance(report, str):
                raise InfrastructureError(report)
            written |= report or {}
        return written

    def load(self, folder: Path, version: int | None = None) -> None:
        """See `rl.protocol.Cluster`. Call `sync_weights` before the next rollout."""
        self._on_learners("load", folder.resolve())
        if version is not None:
            self._version = version - 1

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


def _in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Run `work` beside the caller, in a thread that no exit waits for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # handed to whoever asks the future
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future

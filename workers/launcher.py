"""How the worker of each role is built, and with what it is started. Not when, nor what it does."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rl.config import TrainConfig, WorkerConfig
from workers.broadcast import BroadcastWeightStore, Patience
from workers.fitting import Want
from workers.learner import LearnerPlan, LearnerWorker
from workers.nodes import Reservation
from workers.placement import Actor, Remote, launch
from workers.ray_weights import WEIGHTS, Line, RayWeightStore, node_address
from workers.reward import RewardWorker
from workers.rollout import RolloutWorker, rollout_dtype
from workers.roster import Roster
from workers.shelf import WeightShelf
from workers.weights import INITIAL_VERSION, KEEP_VERSIONS, WeightStore

ROSTER = "roster"


class Launcher:
    """Starts the actors of one run; all return at once.

    Args:
        name: first part of every actor's name.
        local: this process started Ray itself.
        make_room: asks the other roles to leave what the learner needs.
    """

    def __init__(
        self, config: TrainConfig, name: str, local: bool, make_room: Callable[[], None]
    ) -> None:
        self._config = config
        self.name = name
        self._local = local
        self._make_room = make_room
        self._weights = self._store()
        self._room: Reservation | None = None

    def _log(self, name: str) -> Path:
        return self._config.run.path.resolve() / "logs" / f"{name}.log"

    def _store(self) -> WeightStore:
        """The way to weights that rollout workers and ranks are given."""
        timeout_s = self._config.cluster.timeout_s
        pull = RayWeightStore(self.name, self._log(WEIGHTS), timeout_s)
        if ROSTER not in self.catalogues:
            return pull
        line = Line(self.name, ROSTER, self._log(ROSTER), timeout_s)
        return BroadcastWeightStore(pull, line.ask, Patience(whole_s=timeout_s), node_address)

    @property
    def catalogues(self) -> list[str]:
        """Names of the actors that the store needs."""
        return [WEIGHTS, ROSTER] if self._config.cluster.weights == "broadcast" else [WEIGHTS]

    def catalogue(self, name: str) -> Remote:
        """One of them. ValueError: its name is still taken."""
        shelf = partial(WeightShelf, KEEP_VERSIONS, INITIAL_VERSION)
        return Remote(self.actor(name, Roster if name == ROSTER else shelf, here=True))

    def actor(
        self,
        name: str,
        build: Callable[[], Any],
        pool: WorkerConfig | None = None,
        **options: Any,
    ) -> Actor:
        """Any actor, with a log of its name."""
        if pool is not None:
            options |= pool.model_dump(include=set(WorkerConfig.model_fields))
        options.setdefault("num_cpus", 0.0)
        return launch(name, self._log(name), build, run=self.name, local=self._local, **options)

    def rollout(self, name: str, incarnation: int) -> Remote:
        """A rollout worker; it pulls the newest weights while it is built."""
        pool = self._config.cluster.rollout
        build = partial(
            RolloutWorker,
            Path(self._config.model.path).resolve(),
            self._config.rollout.decoding,
            self._weights,
            pool.threads,
            rollout_dtype(self._config.engine),
            self._config.algorithm.behaviour,
        )
        return Remote(self.actor(name, build, pool, incarnation=incarnation))

    def reward(self, name: str, incarnation: int) -> Remote:
        """A reward worker, without tokens or keys in its environment."""
        pool = self._config.cluster.reward
        build = partial(RewardWorker, self._config.scoring)
        return Remote(self.actor(name, build, pool, secrets=False, incarnation=incarnation))

    def ranks(self, incarnation: int) -> list[Remote]:
        """All ranks of the learner, in a placement group of their own."""
        pool = self._config.cluster.learner
        if self._room is not None:  # where it was may be gone with its node
            self._room.release()
        want = next(want for want in wants(self._config, True) if want.role == "learner")
        name = f"{self.name}-learner.{incarnation}"
        timeout_s = self._config.cluster.timeout_s
        self._room = Reservation(name, want, pool.placement, timeout_s, self._make_room)
        build = partial(LearnerWorker, LearnerPlan.of(self._config), self._weights)
        return [
            Remote(
                self.actor(
                    f"learner-{rank}",
                    partial(build, rank, pool.ranks, pool.threads),
                    pool,
                    incarnation=incarnation,
                    place=self._room.place(rank),
                )
            )
            for rank in range(pool.ranks)
        ]

    def release(self) -> None:
        """Give the learner's room back."""
        if self._room is not None:
            self._room.release()


def wants(
    config: TrainConfig, with_learner: bool, counts: Mapping[str, int] | None = None
) -> list[Want]:
    """What each role asks for; `counts` of workers, if not as many as at the start."""
    cluster = config.cluster
    pools: dict[str, tuple[WorkerConfig, int]] = {
        "rollout": (cluster.rollout, cluster.rollout.min),
        "reward": (cluster.reward, cluster.reward.min),
    }
    if with_learner:
        pools["learner"] = (cluster.learner, cluster.learner.ranks)
    apart = cluster.learner.placement == "strict_spread"
    return [
        Want(
            role,
            (counts or {}).get(role, count),
            {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources},
            pool.labels,
            apart and role == "learner",
        )
        for role, (pool, count) in pools.items()
    ]

"""All workers in this process: the shipped fake of `workers.cluster`, and enough for a laptop.

Not a simulation: the same worker classes do the same work. Equal seeds give the results of
`RayCluster`.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from common.futures import in_thread
from common.records import Group, Problem, Scored
from models.decoding import DecodingConfig
from models.state_files import Written
from rewards.compose import check_failures
from rl.config import TrainConfig
from rl.protocol import Hear, nobody
from workers.learner import LearnerPlan, LearnerWorker
from workers.reward import RewardWorker
from workers.rollout import RolloutWorker, rollout_dtype
from workers.weights import INITIAL_VERSION, LocalWeightStore

T = TypeVar("T")


class LocalCluster:
    """A `rl.protocol.Cluster` of one process.

    Args:
        config: the run.
        with_learner: False serves only `roll_out` and `evaluate`, and costs less.
    """

    def __init__(self, config: TrainConfig, with_learner: bool = True) -> None:
        self._config = config
        self._weights = LocalWeightStore()
        self._version = INITIAL_VERSION
        # Rollouts may come from another thread than evaluations; weights change in between only.
        self._decoding = threading.Lock()
        self._reward = RewardWorker(config.scoring)
        self._rollout = RolloutWorker(
            Path(config.model.path),
            config.rollout.decoding,
            self._weights,
            dtype=rollout_dtype(config.engine),
            behaviour=config.algorithm.behaviour,
        )
        self._learner = self._new_learner()
        if with_learner:
            self._learner.start()

    def _new_learner(self) -> LearnerWorker:
        return LearnerWorker(LearnerPlan.of(self._config), self._weights)

    def roll_out(
        self, problems: Sequence[Problem], seed: int, hear: Hear = nobody
    ) -> Future[Scored]:
        """See `rl.protocol.Cluster`."""

        def work() -> Scored:
            groups = self._generate(problems, seed, self._config.rollout.group_size)
            hear("generated", groups)
            scored = self._score(groups)
            hear("scored", scored.groups)
            return scored

        return in_thread(work, "rollouts")

    def evaluate(
        self, problems: Sequence[Problem], decoding: DecodingConfig, group_size: int, seed: int
    ) -> Future[list[Group]]:
        """See `rl.protocol.Cluster`."""
        return _done(
            lambda: self._score(self._generate(problems, seed, group_size, decoding)).groups
        )

    def _generate(
        self,
        problems: Sequence[Problem],
        seed: int,
        group_size: int,
        decoding: DecodingConfig | None = None,
    ) -> list[Group]:
        with self._decoding:
            return self._rollout.generate(problems, seed, group_size, decoding, self._version)

    def _score(self, groups: Sequence[Group]) -> Scored:
        scored = self._reward.score(groups)
        check_failures(scored.groups, self._config.reward.max_failed_share)
        return scored

    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """See `rl.protocol.Cluster`."""
        return self._learner.update(groups, step)

    def sync_weights(self, step: int) -> int:
        """See `rl.protocol.Cluster`."""
        self._version = self._learner.publish(self._version + 1)
        return self._version

    def save(self, folder: Path) -> Future[Written]:
        """See `rl.protocol.Cluster`."""
        return self._learner.save(folder)

    def load(self, folder: Path, version: int | None = None) -> None:
        """See `rl.protocol.Cluster`. Call `sync_weights` before the next rollout."""
        self._learner.load(folder)
        if version is not None:
            self._version = version - 1

    def recover(self, folder: Path | None) -> None:
        """See `rl.protocol.Cluster`."""
        self._learner.close()
        self._learner = self._new_learner()
        self._learner.start()
        if folder is not None:
            self._learner.load(folder)

    def export(self, folder: Path) -> None:
        """See `rl.protocol.Cluster`."""
        self._learner.export(folder)

    def close(self) -> None:
        """See `rl.protocol.Cluster`."""
        self._reward.close()
        self._learner.close()


def _done(work: Callable[[], T]) -> Future[T]:
    """A future that has its result, or its exception, already. Ctrl-C is nobody's result."""
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future

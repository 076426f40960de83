"""Workers that sleep where real ones decode, score and train. The driver around them is real.

What they return is as large as the real thing (tokens, order, confidences, text), for the driver
carries it. No torch: a hundred of these processes fit on a small machine.
"""

import random
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.records import Completion, Group, Problem, Rollout, Score, Scored
from common.seeding import derive_seed
from workers.health import Beat

VOCABULARY = 150_000
BLOCK = 4
SPREAD = 0.2  # a piece takes up to so much longer or shorter than its rollouts' mean


@dataclass(frozen=True)
class Simulated:
    """rollout_s, reward_s: of one rollout in one worker. update_s: of one step. tokens: each."""

    rollout_s: float
    reward_s: float
    update_s: float
    tokens: int

    def decoding_s(self, group: Group) -> float:
        """How long the worker slept for this group: a pure function of the rollouts' seeds."""
        generator = random.Random(derive_seed(group.rollouts[0].seed, "duration"))
        return self.rollout_s * len(group.rollouts) * generator.uniform(1 - SPREAD, 1 + SPREAD)


class SleepingRollout:
    """In the place of `workers.rollout.RolloutWorker`."""

    def __init__(self, simulated: Simulated) -> None:
        self._simulated = simulated
        self.policy_version = 0

    def generate(
        self, problems: Sequence[Problem], seed: int, group_size: int, _: object, version: int
    ) -> list[Group]:
        """Groups of random completions, after the time that they would have taken."""
        began, self.policy_version = time.monotonic(), version
        groups = [
            Group(
                problem, tuple(self._rollout(problem, seed, index) for index in range(group_size))
            )
            for problem in problems
        ]
        slept = sum(map(self._simulated.decoding_s, groups))
        time.sleep(max(0.0, slept - (time.monotonic() - began)))
        return groups

    def _rollout(self, problem: Problem, seed: int, index: int) -> Rollout:
        one = derive_seed(seed, problem.problem_id, index)
        generator, tokens = random.Random(one), self._simulated.tokens
        ids = tuple(generator.choices(range(VOCABULARY), k=tokens))
        steps = [start + i for start in range(0, tokens, BLOCK) for i in shuffled(generator)]
        sure = tuple(generator.random() for _ in ids)
        text = "".join(f"{number % 997:3} " for number in ids)
        logps = (tuple(-value for value in sure),)
        completion = Completion(ids, (), text, "eos", tuple(steps[:tokens]), sure, logps)
        prompt = tuple(range(tokens // 2))
        return Rollout(problem.problem_id, index, prompt, completion, self.policy_version, one)


def shuffled(generator: random.Random) -> list[int]:
    """The order of one block."""
    return generator.sample(range(BLOCK), BLOCK)


class SleepingReward:
    """In the place of `workers.reward.RewardWorker`; says how long the rollouts were slept for."""

    def __init__(self, simulated: Simulated) -> None:
        self._simulated = simulated

    def score(self, groups: Sequence[Group]) -> Scored:
        """Scores that differ within a group."""
        time.sleep(self._simulated.reward_s * sum(len(group.rollouts) for group in groups))
        slept = sum(map(self._simulated.decoding_s, groups))
        scored = [replace(g, rollouts=tuple(map(self._scored, g.rollouts))) for g in groups]
        return Scored(scored, {"simulated/slept_s": slept})

    def _scored(self, rollout: Rollout) -> Rollout:
        passed = float(rollout.sample_index % 2)
        parts = {"code": passed, "code_format": 1.0}
        return replace(rollout, score=Score(2 * passed, parts, {}, ("pass",) * 5))

    def close(self) -> None:
        """There are no sandboxes."""


class SleepingLearner:
    """In the place of a rank of the learner. It publishes no weights: `benchmarks/weights.py`."""

    def __init__(self, simulated: Simulated) -> None:
        self._simulated = simulated

    def start(self, _: object) -> None:
        """Nobody to meet."""

    def prepare(self, _: Sequence[Group]) -> float:
        """At once: what it costs is to bring the groups here."""
        return 0.0

    def update(self, groups: Sequence[Group], _: int) -> dict[str, float]:
        """One step."""
        time.sleep(self._simulated.update_s)
        return {"batch/groups": float(len(groups))}

    def publish(self, version: int) -> int:
        """As promised."""
        return version

    def start_save(self, _: object) -> None:
        """There is no state."""

    def saved(self) -> dict[str, object]:
        """No files."""
        return {}


class CatalogueReader:
    """What a rollout worker does before it copies weights; `store` is a `WeightStore`."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def read(self) -> int:
        """Learn where the newest version lies; its number."""
        version: int = self._store.fetch(None)[0]
        return version


@dataclass
class HandWorker:
    """A `workers.slot.Worker` without a process: finishes its work when `answer` is called."""

    log: Path = Path("none.log")
    pending: list[Future[Any]] = field(default_factory=list)

    def call(self, *_: object) -> Future[Any]:
        """Under way until `answer`."""
        self.pending.append(Future())
        return self.pending[-1]

    def beat(self) -> Future[Beat]:
        """At once."""
        future: Future[Beat] = Future()
        future.set_result(Beat(1, "here"))
        return future

    def kill(self) -> None:
        """No process."""

    def answer(self) -> None:
        """Finish the oldest piece."""
        self.pending.pop(0).set_result([])

"""The main loop of RL training, on one page. It knows no Ray, no tensors and no files.

A deque of batches in flight; how far it runs ahead is the staleness bound: 0 is synchronous
(generate, score, update, sync), k >= 1 rolls k batches out while the learner works.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from common.errors import InfrastructureError
from common.records import Group, Problem, Scored
from common.seeding import derive_seed
from models.decoding import DecodingConfig
from rl.batch import drop_stale, rollout_metrics
from rl.checkpoint import Checkpoints, RunState, interrupt_deferred
from rl.estimates import evaluation_metrics


class Cluster(Protocol):
    """The processes that do the work (`workers.local`, `workers.cluster`)."""

    def generate(self, problems: Sequence[Problem], seed: int) -> Future[list[Group]]: ...
    def score(self, groups: Sequence[Group]) -> Future[Scored]: ...
    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]: ...
    def sync_weights(self) -> int: ...
    def evaluate(
        self, problems: Sequence[Problem], decoding: DecodingConfig, group_size: int, seed: int
    ) -> Future[list[Group]]: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...
    def export(self, folder: Path) -> None: ...
    def close(self) -> None: ...


class Monitor(Protocol):
    """Who is told what happens; the loop itself prints and writes nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LoopPlan:
    """Numbers of one run. `save_every` 0 saves at the end only, `eval_every` 0 never evaluates."""

    steps: int
    eval_decoding: DecodingConfig
    run_seed: int = 0
    save_every: int = 0
    eval_every: int = 0
    eval_at_start: bool = False
    max_staleness: int = 0
    timeout_s: float = 600.0


@dataclass
class Loop:
    """One run. `state` says how far it is; `run` goes on from there to `plan.steps`."""

    cluster: Cluster
    batch: Callable[[int], Sequence[Problem]]  # of a step: a pure function (`rl.data`)
    test: Sequence[Problem]
    plan: LoopPlan
    checkpoints: Checkpoints
    monitor: Monitor
    state: RunState

    def run(self) -> RunState:
        """Train to the last step. Ctrl-C saves what is finished before it is passed on."""
        plan, self.updating, self.saved = self.plan, False, self.state.step
        self.in_flight: deque[tuple[Sequence[Problem], Future[Scored]]] = deque()
        self.state = replace(self.state, policy_version=self.cluster.sync_weights())
        try:
            if plan.eval_at_start and self.state.step == 0:
                self._evaluate()
            while (done := self.state.step) < plan.steps:
                ahead = min(done + 1 + plan.max_staleness, plan.steps)
                for step in range(done + len(self.in_flight), ahead):
                    self._submit(step)
                self._train_step()
                last = self.state.step == plan.steps
                if plan.eval_every and (last or self.state.step % plan.eval_every == 0):
                    self._evaluate()
                if last or (plan.save_every and self.state.step % plan.save_every == 0):
                    self._save()
            return self.state
        except KeyboardInterrupt:
            if not self.updating and self.saved != self.state.step:
                self._save()
            raise

    def _submit(self, step: int) -> None:
        """Generate, then score at once: beside the learner, in a thread that no exit waits for."""
        problems, future = self.batch(step), Future[Scored]()
        seed = derive_seed(self.plan.run_seed, "rollout", step)

        def roll() -> None:
            try:
                groups = self._wait(self.cluster.generate(problems, seed), "generate", step)
                future.set_result(self._wait(self.cluster.score(groups), "score", step))
            except BaseException as error:  # handed to the main thread, which raises it
                future.set_exception(error)

        self.in_flight.append((problems, future))
        Thread(target=roll, name=f"rollouts-{step}", daemon=True).start()

    def _train_step(self) -> None:
        step, clock = self.state.step, [time.monotonic()]
        # The thread behind this future waits twice, and says itself which wait was too long.
        new = self.in_flight[0][1].result(6 * self.plan.timeout_s)
        clock.append(time.monotonic())
        fresh, ages = drop_stale(new.groups, self.state.policy_version, self.plan.max_staleness)
        with interrupt_deferred():
            self.updating = True
            metrics = rollout_metrics(new.groups) | ages | self.cluster.update(fresh, step)
            clock.append(time.monotonic())
            self.state = RunState(step + 1, self.cluster.sync_weights(), self.plan.run_seed)
            clock.append(time.monotonic())
            self.in_flight.popleft()
            self.updating = False
            spans = zip(("rollouts", "update", "sync"), pairwise(clock), strict=True)
            metrics |= {f"timing_s/{name}": after - before for name, (before, after) in spans}
            self.monitor.log(step + 1, metrics | new.sums | {"timing_s/step": clock[-1] - clock[0]})

    def _evaluate(self) -> None:
        plan, step, started = self.plan, self.state.step, time.monotonic()
        seed = derive_seed(plan.run_seed, "evaluate")
        future = self.cluster.evaluate(self.test, plan.eval_decoding, 1, seed)
        metrics = evaluation_metrics(self._wait(future, "evaluate", step))
        self.monitor.log(step, metrics | {"timing_s/evaluate": time.monotonic() - started})

    def _save(self) -> None:
        pending = tuple(tuple(p.problem_id for p in batch) for batch, _ in self.in_flight)
        with interrupt_deferred():
            self.checkpoints.save(replace(self.state, pending=pending), self.cluster.save)
            self.saved = self.state.step

    def _wait(self, future: Future[Any], what: str, step: int) -> Any:
        try:  # later than the cluster's own limit, which can name the actor and its log
            return future.result(2.5 * self.plan.timeout_s)
        except TimeoutError as error:
            text = f"{what} of step {step}: nothing in cluster.timeout_s={self.plan.timeout_s:g}"
            raise InfrastructureError(f"{text}; see the logs under the run's logs/") from error

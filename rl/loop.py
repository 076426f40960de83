"""The main loop of RL training, on one page. It knows no Ray, no tensors and no files.

A deque of batches in flight; how far it runs ahead is the staleness bound: 0 is synchronous
(generate, score, update, sync), k >= 1 rolls k batches out while the learner works.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import pairwise
from threading import Thread
from typing import Any

from common.errors import InfrastructureError
from common.records import Problem, Scored
from common.seeding import derive_seed
from rl.batch import drop_stale, rollout_metrics
from rl.checkpoint import RunState, interrupt_deferred
from rl.estimates import evaluation_metrics
from rl.inflight import Batches, Flight, taken_up
from rl.protocol import Cluster, LoopPlan, Monitor
from rl.saving import Saver


@dataclass
class Loop:
    """One run. `state` says how far it is; `run` goes on from there to `plan.steps`."""

    cluster: Cluster
    batch: Callable[[int], Sequence[Problem]]  # of a step: a pure function (`rl.data`)
    test: Sequence[Problem]
    plan: LoopPlan
    saver: Saver
    monitor: Monitor
    state: RunState
    scored: Batches = field(default_factory=dict)  # batches of a checkpoint that need no rollout

    def run(self) -> RunState:
        """Train to the last step. Ctrl-C saves what is finished before it is passed on."""
        plan, self.updating, self.saved = self.plan, False, self.state.step
        self.in_flight: deque[Flight] = deque()
        self.state = replace(self.state, policy_version=self.cluster.sync_weights())
        steps = range(self.state.step, plan.steps)
        self.in_flight.extend(taken_up(self.scored, self.batch, steps))
        try:
            if plan.eval_at_start and self.state.step == 0:
                self._evaluate()
            while (done := self.state.step) < plan.steps:
                ahead = min(done + 1 + plan.max_staleness, plan.steps)
                for step in range(done + len(self.in_flight), ahead):
                    self._submit(step)
                self._train_step()
                self.saver.poll()
                last = self.state.step == plan.steps
                if plan.eval_every and (last or self.state.step % plan.eval_every == 0):
                    self._evaluate()
                if last or (plan.save_every and self.state.step % plan.save_every == 0):
                    self._save()
            self.saver.finish(must=True)
            return self.state
        except KeyboardInterrupt:
            if not self.updating and self.saved != self.state.step:
                self._save()
            self.saver.finish(must=True)
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
        self.saver.save(self.state, self.in_flight)
        self.saved = self.state.step

    def _wait(self, future: Future[Any], what: str, step: int) -> Any:
        try:  # later than the cluster's own limit, which can name the actor and its log
            return future.result(2.5 * self.plan.timeout_s)
        except TimeoutError as error:
            text = f"{what} of step {step}: nothing in cluster.timeout_s={self.plan.timeout_s:g}"
            raise InfrastructureError(f"{text}; see the logs under the run's logs/") from error

"""The main loop of RL training, on one page. It knows no Ray, no tensors and no files.

A deque of batches in flight; how far it runs ahead is the staleness bound: 0 is synchronous
(roll out, update, sync), k >= 1 rolls k batches out while the learner works.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from common.errors import LearnerLost
from common.futures import result_of
from common.records import Problem, Scored
from common.seeding import derive_seed
from rl.batch import rollout_metrics, settle_stale
from rl.checkpoint import RunState, interrupt_deferred, read_state
from rl.estimates import evaluation_metrics
from rl.inflight import Flight, read_batches, taken_up
from rl.ledger import Ledger
from rl.protocol import Cluster, Hear, LoopPlan, Monitor, nobody
from rl.saving import Saver


@dataclass
class Loop:
    """One run. `run` goes on from the saver's newest checkpoint, or from nothing."""

    cluster: Cluster
    batch: Callable[[int], Sequence[Problem]]  # of a step: a pure function (`rl.data`)
    test: Sequence[Problem]
    plan: LoopPlan
    saver: Saver
    ledger: Ledger
    monitor: Monitor
    finish: Callable[[int], None]  # called once with the last step, while the workers live

    def run(self) -> RunState:
        """Train to the last step, learners may die. Ctrl-C saves before it is passed on."""
        loss: LearnerLost | None = None
        while True:
            try:
                return self._run(loss)
            except LearnerLost as error:
                loss = error

    def _run(self, loss: LearnerLost | None) -> RunState:
        plan, self.updating = self.plan, False
        self.in_flight: deque[Flight] = deque()
        self._start(loss)
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
                    self.saver.save(self.state, self.in_flight)
            self.saver.finish(must=True)
            self.finish(self.state.step)
            return self.state
        except KeyboardInterrupt:
            try:
                if not self.updating and self.saver.step != self.state.step:
                    self.saver.save(self.state, self.in_flight)
            except LearnerLost as error:  # the stop is not forgotten for it
                self.monitor.say(f"{error}; step {self.state.step} was not saved")
            self.saver.finish(must=True)
            raise

    def _start(self, loss: LearnerLost | None) -> None:
        """Where the newest checkpoint stopped, with its weights served."""
        checkpoint, seed = self.saver.go_on(loss is not None), self.plan.run_seed
        self.state = read_state(checkpoint, seed) if checkpoint else RunState(0, 0, seed)
        self.saver.step = step = self.state.step
        scored, cause = {}, "resume" if checkpoint else "start"
        if loss is not None:  # versions go on counting, so what was in flight is too old
            cause = f"learner lost: {loss}"
            self.monitor.say(f"{loss}; the learner starts anew and goes on from step {step}")
            self.cluster.recover(checkpoint)
        elif checkpoint is not None:
            scored = read_batches(checkpoint, self.batch) if self.plan.take_up else {}
            self.cluster.load(checkpoint, self.state.policy_version)
        self.life = self.ledger.begin(step, cause)
        self.state = replace(self.state, policy_version=self.cluster.sync_weights(step))
        self.in_flight.extend(taken_up(scored, self.batch, range(step, self.plan.steps)))
        for number, (problems, future) in enumerate(self.in_flight, start=step):
            self.life.taken_up(number, problems, future.result().groups)

    def _submit(self, step: int) -> None:
        """Roll out beside the learner."""
        problems, hear = self.batch(step), partial(self.life.came, step)
        self.life.planned(step, problems)
        self.in_flight.append((problems, self._roll_out(step, problems, hear)))

    def _roll_out(self, step: int, problems: Sequence[Problem], hear: Hear) -> Future[Scored]:
        return self.cluster.roll_out(
            problems, derive_seed(self.plan.run_seed, "rollout", step), hear
        )

    def _again(self, step: int, problems: Sequence[Problem]) -> Scored:
        """Once more what was too old: the same seeds, the newest weights."""
        new: Scored = self._wait(self._roll_out(step, problems, nobody), "rollouts", step)
        self.life.came(step, "recomputed", new.groups)
        return new

    def _train_step(self) -> None:
        plan, step, clock = self.plan, self.state.step, [time.monotonic()]
        new = self._wait(self.in_flight[0][1], "rollouts", step)
        again = partial(self._again, step) if plan.stale == "recompute" else None
        new, fresh, ages = settle_stale(new, self.state.policy_version, plan.max_staleness, again)
        clock.append(time.monotonic())
        with interrupt_deferred():
            self.updating = True
            metrics = rollout_metrics(new.groups) | ages | self.cluster.update(fresh, step)
            clock.append(time.monotonic())
            version = self.cluster.sync_weights(step + 1)
            self.state = RunState(step + 1, version, self.plan.run_seed)
            clock.append(time.monotonic())
            self.in_flight.popleft()
            self.updating = False
            applied = metrics.get("update/optimizer_steps", 1) > 0
            self.life.settled(step, new.groups, fresh, applied)
            spans = zip(("rollouts", "update", "sync"), pairwise(clock), strict=True)
            metrics |= {f"timing_s/{name}": after - before for name, (before, after) in spans}
            self.monitor.log(step + 1, metrics | new.sums | {"timing_s/step": clock[-1] - clock[0]})

    def _evaluate(self) -> None:
        plan, step, started = self.plan, self.state.step, time.monotonic()
        seed = derive_seed(plan.run_seed, "evaluate")
        future = self.cluster.evaluate(self.test, plan.eval_decoding, 1, seed)
        metrics = evaluation_metrics(self._wait(future, "evaluate", step))
        self.monitor.log(step, metrics | {"timing_s/evaluate": time.monotonic() - started})

    def _wait(self, future: Future[Any], what: str, step: int) -> Any:
        # Later than the cluster's own limits (of decoding, then of scoring), which can name actors.
        limit, name = self.plan.timeout_s, f"{what} of step {step}"
        return result_of(future, name, 5 * limit, f"cluster.timeout_s={limit:g}")

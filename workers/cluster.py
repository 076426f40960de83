"""The workers as Ray actors, behind the same protocol as `workers.local`. Not the loop.

Rollout and reward workers are two crews: who dies or hangs is replaced, its work is done by another
with the same seeds. The ranks of the learner are a gang: one lost rank takes all of them back to
the last checkpoint. Weights go through the object store, never through the driver.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import InfrastructureError
from common.futures import in_thread, result_of, then
from common.records import Group, Problem, Scored
from models.decoding import DecodingConfig
from models.state_files import Written
from rl.config import TrainConfig
from rl.protocol import Arrival, Hear, nobody
from workers.autoscale import Autoscaler
from workers.catalogue import Catalogues
from workers.control import CONTROL, ControlDesk, Idle, Pace, Reporter
from workers.crew import Crew
from workers.flow import Flow
from workers.gang import Gang
from workers.health import CrashWatch, Limits
from workers.launcher import Launcher, wants
from workers.learner import wire_dtype
from workers.nodes import alive, check_fits, connect
from workers.operator import forget_place, write_place
from workers.placement import Remote, ray
from workers.sizes import Sizes
from workers.slot import Worker
from workers.weights import INITIAL_VERSION
from workers.wire import version_bytes

FAILURES_FILE = "failures.log"
# A batch goes on to the learner in so many parts: a call to every rank costs the driver time.
POSTS = 8
# Files of a checkpoint may take longer than any one answer.
SAVE_TIMEOUTS, SAVE_POLL_S = 6.0, 0.1


class RayCluster:
    """A `rl.protocol.Cluster` of Ray actors.

    Args:
        config: the run. Logs go to `<run>/logs/<role>-<i>.log`.
        with_learner: False starts no learner; only `roll_out` and `evaluate` work.
        say: hears who died and what is done about it, one line each.
        launcher: makes the workers; `benchmarks/scaling.py` has some that only sleep.

    Raises:
        UserError: no cluster at the address, too few resources, or a worker's bad input.
        InfrastructureError: a worker did not start.
    """

    def __init__(
        self,
        config: TrainConfig,
        with_learner: bool = True,
        say: Callable[[str], None] = lambda text: None,
        launcher: Callable[..., Launcher] = Launcher,
    ) -> None:
        self._config = config
        self._make_launcher = launcher
        cluster = config.cluster
        self._timeout_s = cluster.timeout_s
        self._limits = Limits(cluster.heartbeat_s, cluster.dead_after_s, cluster.timeout_s)
        failures = config.run.path.resolve() / "logs" / FAILURES_FILE
        self._watch = CrashWatch(cluster.max_failures, cluster.failure_window_s, failures)
        self._say = say
        self._version = INITIAL_VERSION
        self._updated = False
        self._name = f"unmask-{config.run.name}-{uuid.uuid4().hex[:8]}"
        self._catalogues: Catalogues | None = None
        self._gang: Gang | None = None
        self._reporter: Reporter | None = None
        self._pace = Pace()
        self._idle: dict[str, Idle] = {}
        # Of the last step: idle shares, and that in which the learner waited for a batch.
        self._shares: dict[str, float] = {}
        self._learner_waited = 1.0
        self._step: int | None = None
        self._crews: list[Crew] = []
        # Only the reference is asked before the batch is whole. One on the host would travel for
        # every part; adapters of several ranks are switched off together, for what all deal out.
        engine, ranks = config.engine, cluster.learner.ranks
        self._streams = config.algorithm.beta > 0 and not engine.offload_reference
        self._streams &= engine.lora is None or ranks == 1
        self._owns_ray = False
        self._launcher: Launcher | None = None
        try:
            self._launch(with_learner)
        except BaseException:
            self.close()
            raise

    def _launch(self, with_learner: bool) -> None:
        wanted = wants(self._config, with_learner)
        folder = Path(self._config.model.path).resolve()
        weight_bytes = version_bytes(folder, wire_dtype(self._config))
        cpus = sum(want.count * want.each["CPU"] for want in wanted)
        self._owns_ray = connect(self._config.cluster.address, cpus, weight_bytes)
        check_fits(wanted)
        start = self._launcher = self._make_launcher(
            self._config, self._name, self._owns_ray, self._make_room
        )
        patience = self._limits.dead_after_s
        self._catalogues = Catalogues(
            start.catalogue, start.catalogues, self._watch, patience, self._say
        )
        # All start at once: most of a start is importing torch.
        if with_learner:
            self._gang = Gang(start.ranks, self._meet, self._limits, self._watch)
        pools = self._config.cluster
        self._rollouts = self._crew("rollout", start.rollout, pools.rollout.min)
        self._rewards = self._crew("reward", start.reward, pools.reward.min, closes=True)
        smallest = pools.rollout.piece, pools.reward.piece
        share = self._config.reward.max_failed_share
        self._sizes = self._make_sizes()
        self._flow = Flow(self._rollouts, self._rewards, smallest, share)
        ready = [crew.open() for crew in self._crews]
        if self._gang is not None:
            self._gang.meet()
        # Longer than the crews themselves wait for a worker: they can say which.
        for crew, future in zip(self._crews, ready, strict=True):
            limit = f"four times cluster.timeout_s={self._timeout_s:g}"
            result_of(future, f"starting {crew.role} workers", 4 * self._timeout_s, limit)
        self._idle = {role: Idle(worked_s) for role, (worked_s, _) in self._worked().items()}
        self._waiting = Idle(self._gang.busy_s if self._gang is not None else 0.0)
        self._open_reporter(start)

    def _watch_catalogues(self) -> None:
        """Without them no rollout worker finds weights: as if the learner were lost."""
        lost = self._catalogues.look() if self._catalogues is not None else None
        if lost is None:
            return
        self._rollouts.hold(True)
        for crew in self._crews:
            crew.drop(lost)

    def _open_reporter(self, start: Launcher) -> None:
        limits = self._limits
        self._reporter = Reporter(
            lambda number: Remote(start.actor(CONTROL, ControlDesk, incarnation=number, here=True)),
            self.status,
            self._sizes.scale,
            self._say,
            limits.heartbeat_s,
            limits.dead_after_s,
        )
        self._reporter.open()
        write_place(self._config.run.path, self._name)

    def status(self) -> dict[str, Any]:
        """The run as `unmask status` shows it."""
        self._watch_catalogues()
        self._sizes.look()
        crews = {crew.role: crew.status for crew in self._crews}
        actors = [actor for status in crews.values() for actor in status.actors]
        if self._gang is not None:
            self._gang.listen()
            actors = self._gang.describe(self._version) + actors
        steps, step = self._config.train.steps, self._step
        eta = None if step is None else self._pace.eta_s(steps - step)
        return {
            "run": self._config.run.name,
            "folder": str(self._config.run.path.resolve()),
            "step": step,
            "steps": steps,
            "policy_version": self._version,
            "eta_s": None if eta is None else round(eta, 1),
            "idle": {r: round(self._idle[r].recent(*w), 4) for r, w in self._worked().items()},
            "queues": {
                role: {"waiting": status.waiting, "under_way": status.under_way}
                for role, status in crews.items()
            },
            "reissued": sum(status.reissued for status in crews.values()),
            "failures": self._watch.total,
            "actors": actors,
        }

    def _worked(self) -> dict[str, tuple[float, int]]:
        """Seconds that each role has worked, added up over its workers, and how many these are."""
        worked = {crew.role: (crew.worked_s, crew.size) for crew in self._crews}
        if self._gang is not None:
            worked["learner"] = (self._gang.busy_s + self._gang.posted_s, 1)
        return worked

    def _make_sizes(self) -> Sizes:
        pool, take_turns = self._config.cluster.rollout, self._config.algorithm.max_staleness == 0
        autoscaler = Autoscaler(pool.min, pool.max, take_turns)
        return Sizes(
            self._crews,
            partial(wants, self._config, self._gang is not None),
            alive,
            autoscaler if self._config.cluster.autoscale else None,
            self._say,
        )

    def _crew(
        self, role: str, start: Callable[[str, int], Remote], size: int, closes: bool = False
    ) -> Crew:
        crew = Crew(role, start, size, self._limits, self._watch, self._say, closes)
        self._crews.append(crew)
        return crew

    def _meet(self, gang: Gang) -> None:
        master = gang.ask(0, "meeting_point") if len(gang.ranks) > 1 else None
        gang.call("start", master)

    @property
    def pids(self) -> dict[str, int]:
        """`<role>-<i>` -> the process that works under this name now."""
        found = {name: pid for crew in self._crews for name, pid in crew.pids.items()}
        facts = self._gang.facts if self._gang is not None else []
        return found | {f"learner-{i}": fact.pid for i, fact in enumerate(facts) if fact}

    def roll_out(
        self, problems: Sequence[Problem], seed: int, hear: Hear = nobody
    ) -> Future[Scored]:
        """See `rl.protocol.Cluster`. What is scored goes on to the learner, if it is not busy."""
        several, scored = -(-len(problems) // POSTS), list[Group]()

        def pass_on(event: Arrival, groups: Sequence[Group]) -> None:  # `scored` by one thread
            hear(event, groups)
            if event == "scored" and self._gang is not None and self._streams:
                scored.extend(groups)
                if len(scored) >= several and not self._gang.busy:
                    self._gang.post("prepare", ray.put(scored))
                    scored.clear()

        return self._roll_out(problems, seed, self._config.rollout.group_size, None, pass_on)

    def evaluate(
        self, problems: Sequence[Problem], decoding: DecodingConfig, group_size: int, seed: int
    ) -> Future[list[Group]]:
        """See `rl.protocol.Cluster`."""
        scored = self._roll_out(problems, seed, group_size, decoding, nobody)
        return then(scored, lambda done: done.groups)

    def _roll_out(
        self,
        problems: Sequence[Problem],
        seed: int,
        group_size: int,
        decoding: DecodingConfig | None,
        hear: Hear,
    ) -> Future[Scored]:
        done = self._flow.roll_out(problems, (seed, group_size, decoding, self._version), hear)
        if self._catalogues is not None and self._catalogues.lost is not None:
            self._rollouts.drop(self._catalogues.lost)  # nobody would ever do this work
        return done

    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """See `rl.protocol.Cluster`."""
        metrics: dict[str, float] = self._on_learners("update", ray.put(list(groups)), step)[0]
        self._updated = True
        if self._gang is not None:  # what it does with single groups meanwhile is waiting too
            self._learner_waited = self._waiting.step(self._gang.busy_s)
        self._shares = {role: self._idle[role].step(*w) for role, w in self._worked().items()}
        return metrics | {f"idle/{role}": share for role, share in self._shares.items()}

    def sync_weights(self, step: int) -> int:
        """See `rl.protocol.Cluster`."""
        version = self._version + 1
        if self._config.cluster.weights == "broadcast":
            # Nobody waits for them: one that is busy or dead pulls before it serves.
            self._rollouts.tell("receive", version)
        self._version = self._on_learners("publish", version)[0]
        self._step = step
        for crew in self._crews:
            crew.hold(False)
        if self._updated:
            self._finished_step()
        return self._version

    def _finished_step(self) -> None:
        self._updated = False
        self._watch.progress()
        self._pace.step()
        self._sizes.after_step(self._learner_waited, self._shares["rollout"])

    def save(self, folder: Path) -> Future[Written]:
        """See `rl.protocol.Cluster`. With several nodes, to a file system that they share."""
        self._on_learners("start_save", folder.resolve())
        ranks = list(self._gang.ranks) if self._gang is not None else []
        return in_thread(partial(self._saved, ranks), "save")

    def _saved(self, ranks: Sequence[Worker]) -> Written:
        """Wait until every rank has written its files: a failed save is cleared away whole."""
        deadline = time.monotonic() + SAVE_TIMEOUTS * self._timeout_s
        reports: list[Written | str | None] = [None]
        while None in reports:
            if time.monotonic() > deadline:
                text = f"{SAVE_TIMEOUTS:g} times cluster.timeout_s={self._timeout_s:g}"
                raise InfrastructureError(f"save: the learner's files were not written in {text}")
            time.sleep(SAVE_POLL_S)
            answers = [rank.call("saved") for rank in ranks]
            reports = [answer.result(self._timeout_s) for answer in answers]
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

    def recover(self, folder: Path | None) -> None:
        """See `rl.protocol.Cluster`."""
        # The weights went with the process that had published them; and whoever starts now takes
        # the room that the learner needs.
        for crew in self._crews:
            crew.hold(True)
        self._drop()
        self._sizes.look()
        if self._catalogues is not None:
            self._catalogues.mend()
        self._updated = False
        self._version += 1  # the lost one may have published what nobody heard of
        if self._gang is not None:
            self._gang.rebuild()
        if folder is not None:
            self.load(folder)
        self._drop()  # what had been decoded has asked for its rewards meanwhile

    def _drop(self) -> None:
        for crew in self._crews:
            crew.drop(InfrastructureError("the work was dropped: its step is repeated"))

    def _make_room(self) -> None:
        if self._crews:
            self._say("the other workers make room for the learner and start again after it")
        for crew in self._crews:
            crew.make_room()

    def export(self, folder: Path) -> None:
        """See `rl.protocol.Cluster`."""
        self._on_learners("export", folder.resolve())

    def _on_learners(self, method: str, *args: Any) -> list[Any]:
        """Every rank at once, as the engine's collectives need."""
        if self._gang is None:
            raise ValueError(f"{method}: this cluster was made with_learner=False")
        return self._gang.call(method, *args)

    def close(self) -> None:
        """End the actors, and Ray itself if this object started it. May be called twice.

        Reward workers are asked first: they have sandboxes with processes of their own.
        """
        crews, self._crews = self._crews, []
        if not ray.is_initialized():
            return
        if self._reporter is not None:
            self._reporter.close()
            forget_place(self._config.run.path)
        for crew in crews:
            crew.close()
        if self._gang is not None:
            self._gang.kill()
        if self._launcher is not None:
            self._launcher.release()
        if self._catalogues is not None:
            self._catalogues.kill()
        if self._owns_ray:
            ray.shutdown()

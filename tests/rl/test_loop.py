"""The main loop against a cluster that only writes down what it is asked."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from common.errors import InfrastructureError, LearnerLost
from common.metrics import METRICS_FILE, JsonlSink
from common.records import Completion, Group, Problem, Rollout, Score, Scored
from common.seeding import derive_seed
from models.decoding import DecodingConfig
from rl.audit import audit
from rl.checkpoint import Checkpoints, RunState, read_state
from rl.inflight import read_batches
from rl.ledger import LEDGER_FILE, Ledger
from rl.loop import Loop
from rl.protocol import Hear, LoopPlan
from rl.saving import Saver

GREEDY = DecodingConfig(gen_length=8, temperature=0.0)


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@dataclass
class FakeCluster:
    """Weights are one number: how many updates it has had."""

    interrupt_at: int | None = None
    hangs: bool = False
    lag: int = 0
    lose: list[str] = field(default_factory=list)  # calls at which the learner dies, each once
    calls: list[str] = field(default_factory=list)
    weights: int = 0
    version: int = 0
    seeds: dict[int, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, text: str) -> None:
        with self.lock:
            self.calls.append(text)
            if text in self.lose:
                self.lose.remove(text)
                self.weights = -1000  # whoever goes on without recovering will be found out
                raise LearnerLost(f"learner-0 died in {text}")

    def roll_out(self, problems: Sequence[Problem], seed: int, hear: Hear) -> Future[Scored]:
        step = problems[0].problem_id.split("/")[0]
        self.say(f"roll out {step}")
        self.seeds[seed] = step
        if self.hangs:
            return Future()
        groups = [self.group(problem) for problem in problems]
        for group in groups:
            hear("generated", [group])
        made = [Group(g.problem, tuple(scored(r) for r in g.rollouts)) for g in groups]
        for group in reversed(made):  # in any order
            hear("scored", [group])
        return done(Scored(made, {"sandbox/programs": float(len(made))}))

    def group(self, problem: Problem) -> Group:
        completion = Completion((4, 1), (), "x", "eos", (0, 1), (1.0, 1.0))
        version = self.version - self.lag
        name = problem.problem_id
        return Group(
            problem, tuple(Rollout(name, i, (3,), completion, version, 0) for i in range(2))
        )

    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        if self.interrupt_at == step:
            raise KeyboardInterrupt
        self.say(f"update {step}")
        self.weights += 1
        return {"policy/loss": 0.1, "trained": float(sum(len(g.rollouts) for g in groups))}

    def sync_weights(self, step: int) -> int:
        self.version += 1
        self.say(f"sync {step}")
        return self.version

    def evaluate(
        self, problems: Sequence[Problem], decoding: DecodingConfig, group_size: int, seed: int
    ) -> Future[list[Group]]:
        assert decoding.temperature == 0.0
        assert group_size == 1
        self.say("evaluate")
        return done([Group(p, (scored(self.group(p).rollouts[0]),)) for p in problems])

    def save(self, folder: Path) -> Future[Any]:
        self.say("save")
        (folder / "policy").write_text(str(self.weights))
        return done({})

    def load(self, folder: Path, version: int | None = None) -> None:
        self.say("load")
        self.weights = int((folder / "policy").read_text())

    def recover(self, folder: Path | None) -> None:
        self.say(f"recover {folder.name if folder else None}")
        self.weights = 0 if folder is None else int((folder / "policy").read_text())

    def export(self, folder: Path) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def scored(rollout: Rollout) -> Rollout:
    return Rollout(
        rollout.problem_id,
        rollout.sample_index,
        rollout.prompt_ids,
        rollout.completion,
        rollout.policy_version,
        rollout.seed,
        Score(1.0, {"code": 1.0}, verdicts=("pass",)),
    )


@dataclass
class Notebook:
    records: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    saves: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    interrupt_at: int | None = None
    sink: JsonlSink | None = None

    def say(self, text: str) -> None:
        self.said.append(text)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if any(name in metrics for name in ("timing_s/save", "checkpoint/failed")):
            self.saves.append((step, dict(metrics)))
            return
        self.records.append((step, dict(metrics)))
        if self.sink is not None:
            self.sink.log(metrics, step=step, stage="rl")
        if self.interrupt_at == step:
            raise KeyboardInterrupt


def batch(step: int) -> list[Problem]:
    return [Problem(f"{step}/{i}", "do") for i in range(2)]


def make_loop(
    tmp_path: Path, cluster: FakeCluster, checkpoint: Path | None = None, **changes: Any
) -> tuple[Loop, Notebook]:
    values: dict[str, Any] = {"steps": 3, "eval_decoding": GREEDY, "run_seed": 7}
    plan = LoopPlan(**(values | changes))
    monitor = Notebook(sink=JsonlSink(tmp_path / METRICS_FILE))
    saver = Saver(Checkpoints(tmp_path, keep_last_n=5), cluster.save, monitor, checkpoint, 60.0)
    loop = Loop(
        cluster,
        batch,
        [Problem("t", "do")],
        plan,
        saver,
        Ledger(tmp_path / LEDGER_FILE, group_size=2),
        monitor,
        finish=lambda step: cluster.say(f"finish {step}"),
    )
    return loop, monitor


def test_synchronous_order_of_calls(tmp_path: Path) -> None:
    cluster = FakeCluster()
    loop, monitor = make_loop(tmp_path, cluster, steps=3, eval_every=2, save_every=2)
    state = loop.run()
    assert cluster.calls == [
        *["sync 0", "roll out 0", "update 0", "sync 1"],
        *["roll out 1", "update 1", "sync 2", "evaluate", "save"],
        *["roll out 2", "update 2", "sync 3", "evaluate", "save"],
        "finish 3",
    ]
    assert (state.step, state.policy_version) == (3, 4)
    assert cluster.seeds == {derive_seed(7, "rollout", s): str(s) for s in range(3)}
    steps = [step for step, metrics in monitor.records if "policy/loss" in metrics]
    assert steps == [1, 2, 3]
    first = monitor.records[0][1]
    assert first["async/staleness_max"] == 0.0
    assert first["reward/mean"] == 1.0
    assert first["sandbox/programs"] == 2.0  # what the reward workers counted
    assert {"timing_s/rollouts", "timing_s/update", "timing_s/sync", "timing_s/step"} <= set(first)
    evaluated = [metrics for _, metrics in monitor.records if "eval/pass@1" in metrics]
    assert [m["eval/pass@1"] for m in evaluated] == [1.0, 1.0]


def test_evaluation_before_the_first_step(tmp_path: Path) -> None:
    cluster = FakeCluster()
    loop, monitor = make_loop(tmp_path, cluster, steps=1, eval_at_start=True)
    loop.run()
    assert cluster.calls[:2] == ["sync 0", "evaluate"]
    assert monitor.records[0][0] == 0


@pytest.mark.parametrize("bound", [1, 2])
def test_batches_in_flight_never_exceed_the_bound(tmp_path: Path, bound: int) -> None:
    cluster = FakeCluster()
    loop, monitor = make_loop(tmp_path, cluster, steps=6, max_staleness=bound)
    loop.run()
    asked = 0
    for call in cluster.calls:
        asked += call.startswith("roll out")
        if call.startswith("update"):
            # generated and not yet used while the learner works: the batches ahead
            assert asked - int(call.split()[1]) - 1 <= bound
    assert asked == 6  # nothing is rolled out past the last step
    ages = [metrics["async/staleness_max"] for _, metrics in monitor.records]
    assert max(ages) <= bound
    assert all(metrics["trained"] == 4 for _, metrics in monitor.records)


def test_every_sample_is_checked_for_its_own_staleness(tmp_path: Path) -> None:
    """A worker that answered with old weights: its samples are dropped whatever the deque says."""
    loop, monitor = make_loop(tmp_path, FakeCluster(lag=2), steps=1, max_staleness=1)
    loop.run()
    metrics = monitor.records[0][1]
    assert metrics["async/dropped_stale"] == 4.0
    assert metrics["async/staleness_max"] == 2.0
    assert metrics["trained"] == 0.0


def test_too_old_samples_can_be_rolled_out_again_with_their_seeds(tmp_path: Path) -> None:
    """A batch that was asked for long ago: its step's seeds again, and the weights of now."""

    class Slow(FakeCluster):
        def roll_out(self, problems: Sequence[Problem], seed: int, hear: Hear) -> Future[Scored]:
            self.lag = 0 if seed in self.seeds else 2
            return super().roll_out(problems, seed, hear)

    cluster = Slow()
    loop, monitor = make_loop(tmp_path, cluster, steps=1, max_staleness=1, stale="recompute")
    loop.run()
    assert cluster.calls[:5] == ["sync 0", "roll out 0", "roll out 0", "update 0", "sync 1"]
    assert cluster.seeds == {derive_seed(7, "rollout", 0): "0"}
    metrics = monitor.records[0][1]
    assert metrics["trained"] == metrics["async/recomputed_stale"] == 4.0
    assert metrics["async/dropped_stale"] == metrics["async/staleness_max"] == 0.0
    assert metrics["sandbox/programs"] == 4.0  # both times
    found = audit(tmp_path)
    assert (found.violations, found.dropped, found.recomputed) == ([], {"no_spread": 4}, 4)


def test_resume_goes_on_where_the_checkpoint_stopped(tmp_path: Path) -> None:
    cluster = FakeCluster()
    make_loop(tmp_path, cluster, steps=2)[0].run()
    saved = Checkpoints(tmp_path).resume_from("auto")
    assert saved is not None
    again = FakeCluster()
    loop, monitor = make_loop(tmp_path, again, checkpoint=saved, steps=4)
    loop.run()
    assert again.calls[:2] == ["load", "sync 2"]
    assert again.weights == 4
    assert [c for c in again.calls if c.startswith("roll out")] == ["roll out 2", "roll out 3"]
    assert [step for step, _ in monitor.records] == [3, 4]


def test_scored_batches_are_not_rolled_out_again(tmp_path: Path) -> None:
    """At staleness 2 two batches are ahead; the resumed run uses them as they were."""
    cluster = FakeCluster()
    loop, _ = make_loop(tmp_path, cluster, steps=9, save_every=3, max_staleness=2)
    original = loop.saver.save

    def save(state: RunState, in_flight: Any) -> None:
        for _, future in in_flight:  # scored in their threads, at some time
            future.result(60)
        original(state, in_flight)
        if state.step == 3:
            raise KeyboardInterrupt

    loop.saver.save = save  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    saved = tmp_path / "rl" / "global_step_3"
    again = FakeCluster()
    loop, monitor = make_loop(tmp_path, again, checkpoint=saved, steps=9, max_staleness=2)
    assert list(read_batches(saved, batch)) == [3, 4]
    loop.run()
    assert [call for call in again.calls if call.startswith("roll out")] == [
        f"roll out {step}" for step in range(5, 9)
    ]
    assert [call for call in again.calls if call.startswith("update")] == [
        f"update {step}" for step in range(3, 9)
    ]
    assert [metrics["trained"] for _, metrics in monitor.records] == [4.0] * 6


def test_a_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    class Full(FakeCluster):
        full_at = 2

        def save(self, folder: Path) -> Future[Any]:
            if folder.name == f".global_step_{self.full_at}.tmp":
                (folder / "half").write_text("written")
                refused: Future[Any] = Future()
                refused.set_exception(InfrastructureError("cannot write policy: No space left"))
                return refused
            return super().save(folder)

    cluster = Full()
    loop, monitor = make_loop(tmp_path, cluster, steps=3, save_every=1)
    assert loop.run().step == 3
    failures = {s: m["checkpoint/failed"] for s, m in monitor.saves if "checkpoint/failed" in m}
    assert failures == {1: 0.0, 2: 1.0, 3: 0.0}
    assert {step for step, metrics in monitor.saves if "timing_s/save" in metrics} == {1, 2, 3}
    written = [metrics for _, metrics in monitor.saves if "timing_s/save_written" in metrics]
    assert all(metrics["checkpoint/bytes"] > 0 for metrics in written)
    (said,) = monitor.said
    assert "step 2 was not saved" in said
    assert "No space left" in said
    assert f"training goes on, {tmp_path / 'rl' / 'global_step_1'} stays the last" in said
    names = sorted(path.name for path in (tmp_path / "rl").iterdir())
    assert names == ["global_step_1", "global_step_3", "latest"]


def test_a_full_disk_at_the_last_step_is_an_error(tmp_path: Path) -> None:
    """Nobody will try again: what was learned since the last save would be lost in silence."""

    class Full(FakeCluster):
        def save(self, folder: Path) -> Future[Any]:
            raise OSError(28, "No space left on device")

    loop, _ = make_loop(tmp_path, Full(), steps=1)
    with pytest.raises(InfrastructureError, match=r"step 1 was not saved.*No space.*make room"):
        loop.run()


def test_training_goes_on_while_files_are_written(tmp_path: Path) -> None:
    """The files of step 1 are done only after step 3 has begun; then they are reported once."""
    files: Future[Any] = Future()

    class Slow(FakeCluster):
        def save(self, folder: Path) -> Future[Any]:
            super().save(folder)
            return files if "step_2" in folder.name else done({})

        def update(self, groups: Sequence[Group], step: int) -> dict[str, float]:
            if step == 3:
                assert Checkpoints(tmp_path).latest() is None
                files.set_result({})
            return super().update(groups, step)

    cluster = Slow()
    loop, monitor = make_loop(tmp_path, cluster, steps=4, save_every=2)
    loop.run()
    assert [call for call in cluster.calls if call == "save"] == ["save", "save"]
    assert [s for s, m in monitor.saves if "timing_s/save_written" in m] == [2, 4]
    assert Checkpoints(tmp_path).latest() == tmp_path / "rl" / "global_step_4"


def test_interrupt_while_waiting_saves_at_once(tmp_path: Path) -> None:
    cluster = FakeCluster()
    loop, monitor = make_loop(tmp_path, cluster, steps=9, eval_every=2, max_staleness=1)
    monitor.interrupt_at = 2  # while the evaluation after step 2 is being logged
    original = monitor.log

    def log(step: int, metrics: Mapping[str, float]) -> None:
        if "eval/pass@1" in metrics:
            original(step, metrics)

    monitor.log = log  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert "save" in cluster.calls
    state = read_state(tmp_path / "rl" / "global_step_2", 7)
    assert state.step == 2
    assert state.pending == (("2/0", "2/1"),)  # one batch was in flight


def test_interrupt_inside_an_update_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    cluster = FakeCluster(interrupt_at=3)
    loop, _ = make_loop(tmp_path, cluster, steps=9, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert [p.name for p in Checkpoints(tmp_path).saved()] == ["global_step_2"]


def test_a_learner_that_dies_in_the_last_save_does_not_undo_the_interrupt(tmp_path: Path) -> None:
    cluster = FakeCluster(lose=["save"])
    loop, monitor = make_loop(tmp_path, cluster, steps=9, eval_every=2)
    monitor.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert cluster.calls[-1] == "save" and "update 2" not in cluster.calls
    assert "step 2 was not saved" in monitor.said[-1]


def test_every_wait_has_an_end(tmp_path: Path) -> None:
    loop, _ = make_loop(tmp_path, FakeCluster(hangs=True), timeout_s=0.05)
    with pytest.raises(InfrastructureError, match=r"rollouts of step 0.*timeout_s=0\.05"):
        loop.run()


def test_errors_of_workers_reach_the_caller(tmp_path: Path) -> None:
    class Broken(FakeCluster):
        def roll_out(self, problems: Sequence[Problem], seed: int, hear: Hear) -> Future[Scored]:
            future: Future[Scored] = Future()
            future.set_exception(InfrastructureError("reward-0 died"))
            return future

    with pytest.raises(InfrastructureError, match="reward-0 died"):
        make_loop(tmp_path, Broken())[0].run()


@pytest.mark.parametrize("bound", [0, 1, 2])
@pytest.mark.parametrize(
    "lose",
    [
        ["update 3"],
        ["update 0"],  # before any checkpoint
        ["update 3", "update 4", "update 2"],
        ["save"],
        ["update 4", "recover global_step_4", "finish 5"],  # while recovering, and at the very end
    ],
    ids=lambda calls: "+".join(calls),
)
def test_a_lost_learner_costs_steps_but_no_sample(
    tmp_path: Path, lose: list[str], bound: int
) -> None:
    cluster = FakeCluster(lose=list(lose))
    loop, monitor = make_loop(tmp_path, cluster, steps=5, save_every=2, max_staleness=bound)
    state = loop.run()
    assert state.step == 5
    assert cluster.weights == 5  # every update once, on top of the right checkpoint
    assert not cluster.lose
    last_of = {step: metrics for step, metrics in monitor.records}
    assert sorted(last_of) == [1, 2, 3, 4, 5]
    # The same seeds whenever a step is repeated.
    assert cluster.seeds == {derive_seed(7, "rollout", s): str(s) for s in range(5)}
    assert len(monitor.said) >= 1
    assert "the learner starts anew and goes on from step" in monitor.said[0]
    found = audit(tmp_path)
    assert found.violations == []
    assert (found.steps, found.planned, found.trained + sum(found.dropped.values())) == (5, 20, 20)
    assert len(found.lives) == len(lose) + 1 - ("recover global_step_4" in lose)


def test_the_loop_fits_on_a_page() -> None:
    assert len((Path(__file__).parents[2] / "rl" / "loop.py").read_text().splitlines()) < 150

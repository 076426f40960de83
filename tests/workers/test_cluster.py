"""Local = Ray, 1 worker = 2 workers, 1 rank = 2 ranks; deaths; what is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from common.config import dump_config
from common.errors import InfrastructureError, LearnerLost, UserError
from common.records import Completion, Group, Problem, Rollout, Scored
from models.decoding import DecodingConfig
from rl.config import TrainConfig
from workers.cluster import RayCluster
from workers.local import LocalCluster
from workers.pool import cut
from workers.reward import RewardWorker, join

ROOT = Path(__file__).resolve().parents[2]
MakeConfig = Callable[..., TrainConfig]
SMALL = {"num_cpus": 0.1}
FAST = {"heartbeat_s": 0.5, "dead_after_s": 8.0, "max_failures": 2}
GREEDY = DecodingConfig(gen_length=8, temperature=0.0)


@pytest.fixture
def ray_config(make_config: MakeConfig) -> MakeConfig:
    def make(rollouts: int = 1, ranks: int = 1, **sections: Any) -> TrainConfig:
        health = {key: sections.pop(key) for key in FAST if key in sections}
        cluster = {
            **health,
            "kind": "ray",
            "rollout": SMALL | {"min": rollouts, "max": rollouts},
            "learner": SMALL | {"ranks": ranks},
        }
        return make_config(**{"cluster": cluster, **sections})

    return make


@pytest.fixture
def open_cluster(ray_started: None) -> Iterator[Callable[..., RayCluster]]:
    opened: list[RayCluster] = []

    def make(config: TrainConfig, **options: Any) -> RayCluster:
        opened.append(RayCluster(config, **options))
        return opened[-1]

    yield make
    for cluster in opened:
        cluster.close()


def a_run(cluster: Any, problems: list[Problem], folder: Path) -> dict[str, Any]:
    """Two steps of RL, an evaluation, an export: all that a cluster can do."""
    versions, rollouts, metrics = [], [], []
    for step in range(2):
        versions.append(cluster.sync_weights(step))
        groups = cluster.roll_out(problems, seed=step).result(250).groups
        rollouts.append(groups)
        values = cluster.update(groups, step)
        idle = {name: share for name, share in values.items() if name.startswith("idle/")}
        assert all(0 <= share <= 1 for share in idle.values())
        assert idle.keys() in ({f"idle/{r}" for r in ("rollout", "reward", "learner")}, set())
        metrics.append({name: v for name, v in values.items() if name not in idle})
    versions.append(cluster.sync_weights(2))
    evaluated = cluster.evaluate(problems, GREEDY, 1, seed=7).result(250)
    cluster.export(folder / "hf")
    return {
        "versions": versions,
        "rollouts": rollouts,
        "metrics": metrics,
        "evaluated": evaluated,
        "weights": load_file(folder / "hf" / "model.safetensors"),
    }


def assert_equal_runs(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["versions"] == theirs["versions"] == [1, 2, 3]
    for name in ("rollouts", "evaluated"):
        assert _facts(ours[name]) == _facts(theirs[name]), name
    for found, expected in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for name, value in ours["weights"].items():
        torch.testing.assert_close(value, theirs["weights"][name], rtol=1e-3, atol=1e-4)


def _facts(groups: Any) -> Any:
    """Everything but confidences, which are floats and differ in their last bits."""
    if isinstance(groups, list):
        return [_facts(group) for group in groups]
    assert isinstance(groups, Group)
    return [replace(r, completion=replace(r.completion, confidences=())) for r in groups.rollouts]


@pytest.fixture(scope="module")
def local_run() -> dict[str, Any]:
    return {}


@pytest.fixture
def expected(
    local_run: dict[str, Any], make_config: MakeConfig, problems: list[Problem], tmp_path: Path
) -> dict[str, Any]:
    """The local cluster's run, worked out once."""
    if not local_run:
        cluster = LocalCluster(make_config())
        local_run.update(a_run(cluster, problems, tmp_path / "local"))
        cluster.close()
    return local_run


def test_local_run_learns_and_syncs(expected: dict[str, Any]) -> None:
    assert [r.policy_version for r in expected["rollouts"][1][0].rollouts] == [2] * 4
    assert expected["rollouts"][0][0].rollouts[0].score.total is not None
    assert expected["metrics"][0]["update/optimizer_steps"] == 2.0


def test_local_errors_are_in_the_future(make_config: MakeConfig, problems: list[Problem]) -> None:
    cluster = LocalCluster(make_config(), with_learner=False)
    bad = DecodingConfig(gen_length=7)
    with pytest.raises(UserError, match="gen_length"):
        cluster.evaluate(problems, bad, 1, seed=0).result()


@pytest.mark.ray
def test_ray_equals_local(
    expected: dict[str, Any],
    ray_config: MakeConfig,
    open_cluster: Callable[..., RayCluster],
    problems: list[Problem],
    tmp_path: Path,
) -> None:
    cluster = open_cluster(ray_config())
    assert_equal_runs(a_run(cluster, problems, tmp_path / "ray"), expected)
    logs = sorted(path.name for path in (tmp_path / "logs").iterdir())
    of_work = ["learner-0.log", "reward-0.log", "rollout-0.log", "weights.log"]
    assert [name for name in logs if name != "control.log"] == of_work  # that one may come later


@pytest.mark.ray
def test_broadcast_equals_pulling_and_survives_a_death(
    expected: dict[str, Any],
    ray_config: MakeConfig,
    open_cluster: Callable[..., RayCluster],
    problems: list[Problem],
    tmp_path: Path,
) -> None:
    config = ray_config(rollouts=2)
    chosen = config.cluster.model_copy(update={"weights": "broadcast"})
    cluster = open_cluster(config.model_copy(update={"cluster": chosen}))
    assert_equal_runs(a_run(cluster, problems, tmp_path / "ray"), expected)
    assert cluster._launcher is not None
    roster = cluster._launcher._weights._ask  # type: ignore[attr-defined]
    first = roster("plan", 3)
    assert len(first.members) == 2 and first == roster("plan", 2)  # one group for all versions
    killed = cluster.pids["rollout-0"]
    os.kill(killed, signal.SIGKILL)
    assert cluster.sync_weights(3) == 4
    groups = cluster.roll_out(problems, seed=1).result(250).groups
    assert {r.policy_version for group in groups for r in group.rollouts} == {4}
    # The one that took its place is a member like any other.
    in_state(cluster, "rollout-0", "HEALTHY", not_pid=killed)
    assert cluster.sync_weights(4) == 5
    assert len(roster("plan", 5).members) == 2
    assert roster("plan", 5).generation > first.generation


CODES = ["def f(x):\n    return x + 1", "def f(x):\n    return 2", "def f(x:", "while True: pass"]
TESTED = {
    "functions": [{"name": "code", "weight": 2.0}, {"name": "code_format", "weight": 0.5}],
    "sandbox": {"workers": 1, "seconds": 1.0},
    "max_failed_share": 1.0,
}


def programs() -> list[Group]:
    """Three problems, the last without tests, with a good, a half right, a broken and a stuck
    program each; the good one twice.
    """
    groups = []
    for number in range(3):
        tests = (f"assert f({number}) == {number + 1}", "assert f(5) == 6") if number < 2 else ()
        problem = Problem(f"p{number}", "add one", tests=tests, entry_point="f")
        rollouts = (
            Rollout(f"p{number}", i, (3,), Completion((4, 1), (), text, "eos", (), ()), 1, i)
            for i, text in enumerate(f"```python\n{code}\n```" for code in [*CODES, CODES[0]])
        )
        groups.append(Group(problem, tuple(rollouts)))
    return groups


def counts(scored: Scored) -> dict[str, float]:
    return {name: value for name, value in scored.sums.items() if not name.endswith("seconds")}


def test_what_scoring_took_adds_up_over_workers() -> None:
    one, other = programs()[:1], programs()[1:]
    parts = [Scored(one, {"a": 1.0, "b": 2.5}), Scored(other, {"a": 3.0, "c": 1.0}), Scored([])]
    joined = join(parts)
    assert joined == Scored(one + other, {"a": 4.0, "b": 2.5, "c": 1.0})
    assert join([]) == Scored([], {})


@pytest.mark.ray
def test_two_reward_workers_count_and_score_as_one(
    ray_config: MakeConfig, open_cluster: Callable[..., RayCluster]
) -> None:
    worker = RewardWorker(ray_config(reward=TESTED).scoring)
    expected = worker.score(programs())
    worker.close()
    # By hand: of each problem's five, one does not parse and two are one; the third problem's
    # three programs have no tests.
    assert counts(expected) == {
        "sandbox/programs": 9.0,
        "sandbox/shared": 3.0,
        "sandbox/tests": 12.0,
        "sandbox/weak_tests": 0.0,
        "sandbox/not_judged": 3.0,
    }
    config = ray_config(reward=TESTED)
    pool = config.cluster.reward.model_copy(update={"min": 2, "max": 2})
    cluster_config = config.cluster.model_copy(update={"reward": pool})
    cluster = open_cluster(
        config.model_copy(update={"cluster": cluster_config}), with_learner=False
    )
    pieces = [("score", (piece,)) for piece in cut(programs(), 2, 1)]
    found = join(cluster._rewards.submit(pieces).result(250))
    assert found.groups == expected.groups
    assert counts(found) == counts(expected)
    assert found.sums.keys() == expected.sums.keys()
    assert found.sums["sandbox/seconds"] > 0


@pytest.mark.ray
def test_two_rollout_workers_and_two_ranks_equal_one(
    expected: dict[str, Any],
    ray_config: MakeConfig,
    open_cluster: Callable[..., RayCluster],
    problems: list[Problem],
    tmp_path: Path,
) -> None:
    cluster = open_cluster(ray_config(rollouts=2, ranks=2, engine={"zero_stage": 3}))
    assert_equal_runs(a_run(cluster, problems, tmp_path / "ray"), expected)


def in_state(cluster: RayCluster, name: str, *states: str, not_pid: int = 0) -> None:
    """Wait until a worker is in one of the states, and another process than `not_pid`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        actors = [actor for crew in cluster._crews for actor in crew.status.actors]
        [found] = [actor for actor in actors if actor["id"] == name]
        if found["state"] in states and found["pid"] != not_pid:
            return
        time.sleep(0.1)
    raise AssertionError(f"{name} never was {states}: {actors}")


@pytest.mark.ray
def test_killed_and_stopped_workers_cost_nothing_but_time(
    ray_config: MakeConfig,
    open_cluster: Callable[..., RayCluster],
    scored_groups: list[Group],
    problems: list[Problem],
) -> None:
    """The same groups whoever dies, and the replacements hold the newest weights."""
    said: list[str] = []
    cluster = open_cluster(ray_config(rollouts=2, **FAST), say=said.append)
    cluster.update(scored_groups, 0)
    version = cluster.sync_weights(1)
    before = cluster.roll_out(problems, seed=1).result(250).groups
    assert {r.policy_version for group in before for r in group.rollouts} == {version}
    # Killed: noticed at once. Stopped: after its deadline; nobody sends it a signal to go on.
    for number, name in ((signal.SIGKILL, "rollout-0"), (signal.SIGSTOP, "rollout-1")):
        pid = cluster.pids[name]
        os.kill(pid, number)
        assert cluster.roll_out(problems, seed=1).result(250).groups == before
        in_state(cluster, name, "DEAD", "STALE")
        in_state(cluster, name, "HEALTHY")
        assert cluster.pids[name] != pid
        gone_processes([pid])
    # And the reward worker likewise, although there is only one.
    os.kill(cluster.pids["reward-0"], signal.SIGKILL)
    assert cluster.roll_out(problems, seed=1).result(250).groups == before
    assert any(text.startswith("rollout-0 failed in") for text in said)
    assert any(text.startswith("rollout-1 did not answer within 8 s") for text in said)


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_learner_starts_anew_from_its_checkpoint(
    ray_config: MakeConfig,
    open_cluster: Callable[..., RayCluster],
    scored_groups: list[Group],
    problems: list[Problem],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    cluster = open_cluster(ray_config(ranks=2, **FAST))
    cluster.update(scored_groups, 0)
    cluster.save(tmp_path / "saved")
    cluster.sync_weights(1)
    expected = cluster.roll_out(problems, seed=1).result(250).groups
    cluster.update(scored_groups, 1)
    pids = [cluster.pids["learner-0"], cluster.pids["learner-1"]]
    os.kill(pids[1], number)
    with pytest.raises(LearnerLost, match=r"learner-1 .*in `update`.*learner-1\.log"):
        cluster.update(scored_groups, 2)
    under_way = cluster.roll_out(problems, seed=2)
    cluster.recover(tmp_path / "saved")
    with pytest.raises(InfrastructureError, match="dropped"):
        under_way.result(250)
    version = cluster.sync_weights(1)
    assert cluster.status()["step"] == 1
    again = cluster.roll_out(problems, seed=1).result(250).groups
    assert _texts(again) == _texts(expected)
    assert {r.policy_version for group in again for r in group.rollouts} == {version}
    gone_processes(pids)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:The given NumPy array")
def test_weights_that_die_before_anybody_has_pulled_them(
    ray_config: MakeConfig,
    open_cluster: Callable[..., RayCluster],
    scored_groups: list[Group],
    problems: list[Problem],
    tmp_path: Path,
) -> None:
    """As when a node dies: rollout workers find out before anybody calls the learner again."""
    cluster = open_cluster(ray_config(rollouts=2, **FAST))
    cluster.update(scored_groups, 0)
    cluster.save(tmp_path / "saved").result(250)
    cluster.sync_weights(1)
    before = cluster.pids
    os.kill(before["learner-0"], signal.SIGKILL)
    assert cluster._launcher is not None
    with pytest.raises(LearnerLost):  # once Ray knows
        for _ in range(300):
            list(cluster._launcher._weights.fetch()[1])
            time.sleep(0.1)
    with pytest.raises(LearnerLost, match="weights: bucket 0 of version 1 is gone with the"):
        cluster.roll_out(problems, seed=1).result(250)
    cluster.recover(tmp_path / "saved")
    version = cluster.sync_weights(1)
    groups = cluster.roll_out(problems, seed=1).result(250).groups
    assert {r.policy_version for group in groups for r in group.rollouts} == {version}
    assert {**cluster.pids, "learner-0": 0} == {**before, "learner-0": 0}


def _texts(groups: list[Group]) -> list[list[str]]:
    return [[rollout.completion.text for rollout in group.rollouts] for group in groups]


def gone_processes(pids: list[int]) -> None:
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(alive, timeout=60)
    assert not alive


DEADLY = """
import os

def deadly(prompts, completions, **columns):
    print("about to die of a bug", flush=True)
    os._exit(3)
"""


@pytest.mark.ray
def test_a_worker_that_always_dies_ends_the_run_with_its_own_words(
    ray_config: MakeConfig,
    open_cluster: Callable[..., RayCluster],
    problems: list[Problem],
    tmp_path: Path,
) -> None:
    reward = tmp_path / "deadly.py"
    reward.write_text(DEADLY)
    section = {"functions": [{"path": f"{reward}:deadly", "weight": 1.0}]}
    cluster = open_cluster(ray_config(reward=section, **FAST), with_learner=False)
    with pytest.raises(InfrastructureError) as caught:
        cluster.roll_out(problems[:1], seed=1).result(250)
    lines = str(caught.value).splitlines()
    assert "failed 2 times without a finished step between" in lines[0]
    assert "about to die of a bug" in lines
    assert lines[-2].startswith("reward-0 (pid ")
    assert lines[-1] == f"log file: {tmp_path / 'logs' / 'reward-0.log'}"


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_ends_with_the_root_cause_and_exit_code_3(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    reward = tmp_path / "deadly.py"
    reward.write_text(DEADLY)
    section = {"functions": [{"path": f"{reward}:deadly", "weight": 1.0}]}
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(make_config(reward=section, cluster={"kind": "ray", **FAST})))
    found = subprocess.run(
        [sys.executable, "-m", "rl.cli", "train", "--config", str(file)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert found.returncode == 3, found.stderr
    lines = found.stderr.strip().splitlines()
    assert any(line.startswith("unmask: ") and "failed 2 times" in line for line in lines)
    assert lines[-3] == "about to die of a bug"
    assert lines[-2].startswith("reward-0 (pid ")
    assert lines[-1] == f"log file: {tmp_path / 'logs' / 'reward-0.log'}"


@pytest.mark.ray
def test_bad_input_of_a_worker_ends_the_start(
    ray_config: MakeConfig, ray_started: None, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no config\.json there"):
        RayCluster(ray_config(model={"path": str(tmp_path / "empty")}))


SCRIPT = """
import os, signal, sys, psutil
from pydantic import TypeAdapter
from common.records import Problem
from rl.config import TrainConfig
from workers.cluster import RayCluster

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
config = TypeAdapter(TrainConfig).validate_json(sys.argv[1])
cluster = RayCluster(config, with_learner=False)
problems = [Problem(problem_id="p", prompt="x")]
try:
    os.killpg(0, signal.SIGINT)  # what a terminal's Ctrl-C does
    raise SystemExit("no interrupt")
except KeyboardInterrupt:
    pass  # workers live on: the loop wants to save before it ends
[group] = cluster.roll_out(problems, 0).result(60).groups
assert len(group.rollouts) == 4
family = psutil.Process().children(recursive=True)
assert set(cluster.pids.values()) <= {process.pid for process in family}
cluster.close()
cluster.close()
_, alive = psutil.wait_procs(family, timeout=60)  # a busy machine takes its time
assert not alive, alive
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_of_its_own_is_silent_and_leaves_nothing(
    ray_config: MakeConfig, run_script: Callable[..., Any]
) -> None:
    found = run_script(SCRIPT, ray_config().model_dump_json())
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")

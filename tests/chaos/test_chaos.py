"""Everything dies, and the run ends as planned: every step, a clean ledger, nothing left behind.

`UNMASK_CHAOS=full` kills more than twenty times in thirty steps, with two learner ranks; the small
size is for every day.
"""

import json
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.metrics import read_metrics
from common.seeding import derive_seed
from rl.audit import audit

ROOT = Path(__file__).resolve().parents[2]
FULL = os.environ.get("UNMASK_CHAOS") == "full"
MARK = "UNMASK_CHAOS_MARK"
SMALL_PLAN = [
    [1, "rollout", "SIGKILL"],
    [2, "program", "SIGKILL"],
    [2, "reward", "SIGKILL"],
    [3, "learner", "SIGKILL"],
    [4, "control", "SIGKILL"],
    [5, "weights", "SIGKILL"],
    [6, "rollout", "SIGSTOP"],
    [7, "driver", "SIGKILL"],
]
# One rank's death takes seconds, a stopped one's deadline more: not in every step.
FULL_ROLES = [
    *[("rollout", "SIGKILL")] * 5,
    *[("rollout", "SIGSTOP")] * 2,
    *[("reward", "SIGKILL")] * 4,
    ("reward", "SIGSTOP"),
    *[("learner", "SIGKILL")] * 3,
    ("learner", "SIGSTOP"),
    *[("control", "SIGKILL")] * 2,
    *[("program", "SIGKILL")] * 4,
    ("weights", "SIGKILL"),
    *[("driver", "SIGKILL")] * 2,
]
FULL_RANKS = {
    "cluster.learner": {"ranks": 2, "num_cpus": 0.5},
    "engine.kind": "deepspeed",
    "train.steps": 30,
}

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def folder(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> Path:
    """With the model in it."""
    write_checkpoint(tmp_path / "model")
    return tmp_path


def full_plan(seed: int, steps: int) -> list[list[Any]]:
    """Every role of the list once, at steps drawn from the seed's name."""
    draw = random.Random(derive_seed(seed, "chaos plan"))
    roles = list(FULL_ROLES)
    draw.shuffle(roles)
    times = sorted(draw.randint(1, steps - 4) for _ in roles)
    return [[step, role, name] for step, (role, name) in zip(times, roles, strict=True)]


def drive(folder: Path, plan: list[list[Any]], two_nodes: bool = False, **more: Any) -> int:
    """Start the driver as often as the plan kills it; how often that was."""
    mark = uuid.uuid4().hex
    order = {
        "folder": str(folder),
        "plan": plan,
        "seed": 5,
        "two_nodes": two_nodes,
        "overrides": more,
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: mark, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    deaths = sum(role == "driver" for _, role, _ in plan)
    for life in range(deaths + 1):
        with (folder / f"driver-{life}.txt").open("w") as output:
            done = subprocess.run(
                [sys.executable, str(ROOT / "tests/chaos/driver.py"), json.dumps(order)],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=3000 if FULL else 280,
            )
        text = (folder / f"driver-{life}.txt").read_text()[-4000:]
        assert done.returncode == (-9 if life < deaths else 0), text
        nothing_runs(mark)
    return deaths


def nothing_runs(mark: str) -> None:
    """No process of the run is left: all of them inherited the mark."""
    deadline = time.monotonic() + 60
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left, [process.cmdline() for process in left]


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def shared_memory() -> set[str]:
    """Files that nobody has open: on a busy machine others come and go."""
    files = {path.name for path in Path("/dev/shm").iterdir()}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:
            continue
        files = {name for name in files if f"/dev/shm/{name}" not in text}
    return files


def check(folder: Path, steps: int, plan: list[list[Any]]) -> None:
    run = folder / "run"
    killed = [json.loads(line) for line in (folder / "kills.jsonl").read_text().splitlines()]
    assert [role for _, role, _, _ in killed] == [role for _, role, _ in plan]
    assert (run / "rl" / "latest").read_text() == f"global_step_{steps}\n"
    assert (run / "rl" / "hf" / "model.safetensors").is_file()
    found = audit(run)
    assert found.violations == []
    assert (found.steps, found.in_flight) == (steps, [])
    assert found.planned == found.trained + sum(found.dropped.values()) == steps * 12
    begun = [life["cause"] for life in found.lives]
    assert sum(cause == "resume" for cause in begun) <= sum(role == "driver" for _, role, _ in plan)
    same_again(read_metrics(run / "metrics.jsonl"), steps)


def same_again(records: list[dict[str, Any]], steps: int) -> None:
    """A step that was repeated, after whatever death, logs what it logged before."""
    names = ("rewards/chance/mean", "completions/length_mean", "batch/samples")
    seen: dict[int, tuple[Any, ...]] = {}
    for record in records:
        if "timing_s/update" in record:
            values = tuple(record[name] for name in names)
            assert seen.setdefault(record["step"], values) == values, record["step"]
    assert sorted(seen) == list(range(1, steps + 1))


@pytest.mark.timeout(6000 if FULL else 600)
def test_a_run_outlives_the_death_of_everybody(folder: Path) -> None:
    before = shared_memory()
    steps = 30 if FULL else 10
    plan = full_plan(5, steps) if FULL else SMALL_PLAN
    assert len(plan) > 20 or not FULL
    drive(folder, plan, **(FULL_RANKS if FULL else {}))
    check(folder, steps, plan)
    assert shared_memory() <= before


@pytest.mark.timeout(600)
def test_a_run_outlives_a_node(folder: Path) -> None:
    """On the first node alone there is no room for three rollout workers and the learner.

    Wherever the learner was, it has to start anew beside two of them.
    """
    plan = [[2, "raylet", "SIGKILL"], [3, "learner", "SIGKILL"]]
    more = {
        "cluster.rollout": {"min": 3, "max": 3, "num_cpus": 1.0},
        "cluster.reward": {"min": 1, "max": 1, "num_cpus": 0.0},
        "cluster.learner": {"num_cpus": 1.0},
        "train.steps": 6,
    }
    drive(folder, plan, two_nodes=True, **more)
    check(folder, 6, plan)
    assert "rollout workers 3 -> 2: no more fit" in (folder / "said.txt").read_text()

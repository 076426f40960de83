"""A tiny run with a monkey in it: `python tests/chaos/driver.py '<json>'`. Not a test by itself.

The monkey kills what its plan names, when the plan says; `test_chaos.py` starts this and looks at
what is left. The driver may be on the list: then it is started again and goes on.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter

from common.metrics import open_metrics
from common.progress import SilentProgress
from common.records import Problem
from common.seeding import derive_seed
from rl.config import TrainConfig
from rl.train import make_cluster, prepare

PATIENCE_S = 120.0
# Pure, so that a step that is repeated must log the same; the programs run beside it.
REWARD = """
def chance(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 3) for text in completions]
"""


def make_inputs(folder: Path) -> dict[str, Any]:
    """Data, a reward, and the configuration that names them and the `model` that is there."""
    if not (folder / "data.jsonl").exists():
        (folder / "reward.py").write_text(REWARD)
        rows = [{"prompt": f"Add {n}.", "tests": ["assert f(1)"]} for n in range(12)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(folder / "data.jsonl")
    functions = [
        {"path": f"{folder / 'reward.py'}:chance", "weight": 1.0},
        {"name": "code", "weight": 0.0},
    ]
    return {
        "run": {"name": "chaos", "folder": str(folder / "run"), "seed": 1},
        "model": {"path": str(folder / "model")},
        "data": {"train": data, "test": data, "test_count": 2},
        "rollout": {
            "group_size": 3,
            "prompts_per_step": 4,
            "decoding": {"gen_length": 16, "steps_per_block": 2},
        },
        "reward": {
            "functions": functions,
            "code_needs_format": False,
            "code_block": "whole",
            "sandbox": {"workers": 1, "seconds": 2.0},
        },
        "algorithm": {"num_iterations": 1, "beta": 0.0},
        "optim": {"lr": 1e-3},
        "engine": {"kind": "torch"},
        "cluster": {
            "kind": "ray",
            "rollout": {"min": 2, "max": 2, "num_cpus": 0.5},
            "reward": {"min": 1, "max": 1, "num_cpus": 0.5},
            "learner": {"num_cpus": 0.5},
            "heartbeat_s": 0.5,
            "dead_after_s": 10.0,
            "timeout_s": 120.0,
        },
        "train": {"steps": 10, "save_every": 2},
    }


class Monkey:
    """Works through a plan of [step, role, signal name]; notes what it did in `kills.jsonl`."""

    def __init__(self, plan: list[list[Any]], seed: int, notes: Path) -> None:
        self._plan = plan
        self._notes = notes
        self._random = random.Random(derive_seed(seed, "chaos"))
        self.done = len(notes.read_text().splitlines()) if notes.exists() else 0
        self._killed: set[int] = set()
        self.cluster: Any = None
        self.kill_raylet: Callable[[], int] = lambda: 0

    def gate(self, step: int) -> None:
        """Hold the run back before a step until all kills of the steps before are done."""
        deadline = time.monotonic() + PATIENCE_S
        while self.done < len(self._plan) and self._plan[self.done][0] < step - 1:
            assert time.monotonic() < deadline, f"no victim for {self._plan[self.done]}"
            time.sleep(0.05)

    def run(self) -> None:
        for step, role, name in self._plan[self.done :]:
            while (self.cluster._step or 0) < step:
                time.sleep(0.05)
            time.sleep(self._random.uniform(0.0, 0.6))
            self._kill(role, getattr(signal, name), [step, role, name])
            self.done += 1

    def _kill(self, role: str, number: int, what: list[Any]) -> None:
        if role == "raylet":
            self._note(what, self.kill_raylet())
            return
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            victims = [pid for pid in self._victims(role) if pid not in self._killed]
            if victims:
                victim = self._random.choice(victims)
                self._killed.add(victim)
                if role == "driver":  # nothing can be noted afterwards
                    self._note(what, victim)
                try:
                    os.kill(victim, number)
                except ProcessLookupError:
                    continue
                self._note(what, victim)
                return
            time.sleep(0.02)

    def _victims(self, role: str) -> list[int]:
        if role == "driver":
            return [os.getpid()]
        if role == "weights":
            return [self.cluster._catalogues.workers["weights"].beat().result(60).pid]
        if role == "control":
            return [self.cluster._reporter._desk.beat().result(60).pid]
        pids = self.cluster.pids
        if role == "program":
            rewards = [pid for name, pid in pids.items() if name.startswith("reward")]
            found = [p for pid in rewards if psutil.pid_exists(pid) for p in _family(pid)]
            return [process.pid for process in found]
        return [pid for name, pid in pids.items() if name.startswith(role)]

    def _note(self, what: list[Any], pid: int) -> None:
        with self._notes.open("a") as file:
            file.write(json.dumps([*what, pid]) + "\n")


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


class Gated:
    """The problems of a step, once the monkey lets it begin."""

    def __init__(self, stream: Any, monkey: Monkey) -> None:
        self._stream, self._monkey = stream, monkey

    def batch(self, step: int) -> list[Problem]:
        self._monkey.gate(step)
        return list(self._stream.batch(step))


class Said(SilentProgress):
    """What people would have read, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def say(self, text: str) -> None:
        with self._path.open("a") as file:
            file.write(text + "\n")


def two_nodes() -> tuple[str, Callable[[], int], Callable[[], None]]:
    """A cluster of two raylets on this machine: address, how to kill the second, how to end."""
    from ray.cluster_utils import Cluster

    fast = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "_system_config": fast, "object_store_memory": 150_000_000},
    )
    second = made.add_node(num_cpus=3, object_store_memory=150_000_000)

    def kill() -> int:
        [info] = second.all_processes["raylet"]
        os.kill(info.process.pid, signal.SIGKILL)
        return int(info.process.pid)

    def end() -> None:
        import ray

        ray.shutdown()
        made.shutdown()

    return made.address, kill, end


def main() -> None:
    """Run to the end, or to the driver's own death."""
    order = json.loads(sys.argv[1])
    folder = Path(order["folder"])
    values = make_inputs(folder)
    for key, value in order["overrides"].items():
        section, _, name = key.partition(".")
        values[section][name] = value
    monkey = Monkey(order["plan"], order["seed"], folder / "kills.jsonl")
    end: Callable[[], None] = lambda: None  # noqa: E731
    if order["two_nodes"]:
        address, monkey.kill_raylet, end = two_nodes()
        values["cluster"]["address"] = address
    config = TypeAdapter(TrainConfig).validate_json(json.dumps(values))
    job = prepare(config)
    said = Said(folder / "said.txt")
    try:
        with closing(make_cluster(config, said.say)) as cluster:
            monkey.cluster = cluster
            threading.Thread(target=monkey.run, daemon=True).start()
            with open_metrics(config.run.path, config.metrics, said.say) as sink:
                replace(job, stream=Gated(job.stream, monkey)).run_on(cluster, sink, said)
        assert monkey.done == len(order["plan"]), "some kills were never done"
        if order["two_nodes"]:
            _no_groups_left()
    finally:
        end()


def _no_groups_left() -> None:
    from workers.placement import ray

    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states <= {"REMOVED"}, states


if __name__ == "__main__":
    main()

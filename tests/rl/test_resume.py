"""Exact resume: a run that was killed and taken up again is the run that was never interrupted."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.metrics import METRICS_FILE, JsonlSink, read_metrics
from common.progress import SilentProgress
from models.checkpoint import load_checkpoint
from rl.checkpoint import Checkpoints, read_state
from rl.config import load_train_config
from rl.train import prepare

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVED, KILLED = 10, 5, 7
# Kills its own process, the whole run, while batch KILLED is being scored.
REWARD = """
import os, pathlib, signal, time

HERE = pathlib.Path(__file__).parent

def chance(prompts, completions, **columns):
    calls = HERE / "calls"
    count = int(calls.read_text()) + 1 if calls.exists() else 1
    calls.write_text(str(count))
    if count == int(os.environ.get("KILL_AT", "0")):
        latest = pathlib.Path(os.environ["LATEST"])
        for _ in range(600):  # the save runs beside the steps: wait for its end, a minute at most
            if latest.exists():
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(sum(map(ord, text)) % 3) for text in completions]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    """A folder with a model of 2 layers and a config of 10 steps."""
    folder = tmp_path_factory.mktemp("exact")
    write_checkpoint(folder / "sft", tie_word_embeddings=True, max_position_embeddings=256)
    rows = [
        {"prompt": f"Add {n}.", "tests": [f"assert f(1) == {n + 1}"], "problem_id": f"p{n}"}
        for n in range(6)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    values = {
        "run": {"name": "tiny", "folder": "none", "seed": 1},
        "model": {"path": str(folder / "sft")},
        "data": {"train": str(folder / "data.jsonl"), "test": str(folder / "data.jsonl")},
        "rollout": {
            "group_size": 3,
            "prompts_per_step": 2,
            "decoding": {"gen_length": 8, "steps_per_block": 2},
        },
        "reward": {"functions": [{"path": f"{folder / 'reward.py'}:chance", "weight": 1.0}]},
        "algorithm": {"num_iterations": 2, "beta": 0.01, "reference_refresh_steps": 3},
        "optim": {"lr": 1e-3, "warmup_steps": 3},
        "engine": {"kind": "torch"},
        "cluster": {"kind": "local"},
        "train": {"steps": STEPS, "save_every": SAVED},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def overrides(run: Path, engine: Mapping[str, Any]) -> list[str]:
    return [f"run.folder={run}", *(f"engine.{key}={value}" for key, value in engine.items())]


def train_here(base: Path, run: Path, engine: Mapping[str, Any]) -> None:
    config = load_train_config(base / "config.yaml", overrides(run, engine))
    sink = JsonlSink(run / METRICS_FILE)
    prepare(config).run(sink, SilentProgress())
    sink.close()


def train_and_kill(base: Path, run: Path, engine: Mapping[str, Any]) -> None:
    """The same command in a process of its own, which dies of SIGKILL."""
    (base / "calls").unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "KILL_AT": str(KILLED),
        "LATEST": str(run / "rl" / "latest"),
    }
    command = [sys.executable, "-m", "rl.train", "--config", str(base / "config.yaml")]
    done = subprocess.run(
        [*command, *overrides(run, engine)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def learned(run: Path) -> list[dict[str, Any]]:
    """What was computed in each step, the last time it was; without what was timed."""
    steps = {}
    for record in read_metrics(run / METRICS_FILE):
        if "policy/loss" in record:
            timed = ("timing_s", "perf", "time")
            steps[record["step"]] = {
                name: value
                for name, value in record.items()
                if not name.startswith(timed) and not name.endswith("seconds")
            }
    return [steps[step] for step in sorted(steps)]


def tensors(value: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a nested state by its path."""
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    return {k: v for name, item in items for k, v in tensors(item, f"{prefix}/{name}").items()}


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: parameters, masters, moments, reference."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.rglob("*.pt")):
        content = torch.load(path, map_location="cpu", weights_only=False)
        found |= tensors(content, path.relative_to(checkpoint).as_posix())
    return found


@pytest.mark.parametrize(
    "engine",
    [{"kind": "torch"}] + [{"kind": "deepspeed", "zero_stage": stage} for stage in (0, 1, 3)],
    ids=lambda engine: "-".join(str(value) for value in engine.values()),
)
def test_ten_steps_are_five_and_a_kill_and_five(
    base: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    """Bit for bit: metrics, exported weights, optimizer state, the reference that moves."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train_here(base, straight, engine)
    train_and_kill(base, killed, engine)
    assert Checkpoints(killed).latest() == killed / "rl" / f"global_step_{SAVED}"
    assert [record["step"] for record in learned(killed)] == [*range(1, KILLED)]
    train_here(base, killed, engine)
    assert learned(killed) == learned(straight)
    assert len(learned(straight)) == STEPS
    ours, theirs = (run / "rl" / f"global_step_{STEPS}" for run in (killed, straight))
    assert read_state(ours, 1) == read_state(theirs, 1)
    found, expected = state_of(ours), state_of(theirs)
    assert found.keys() == expected.keys()
    assert len(found) > 60
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    exported = [
        dict(load_checkpoint(run / "rl" / "hf").denoiser.named_parameters())
        for run in (killed, straight)
    ]
    assert all(torch.equal(exported[0][name], value) for name, value in exported[1].items())

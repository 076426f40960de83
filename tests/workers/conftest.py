"""A tiny checkpoint, a run's configuration, and one Ray for all tests of this folder."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from common.records import Completion, Group, Problem, Rollout, Score
from rl.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"def f{i}(a, b):\n    return a + b * {i}\n" for i in range(20)]


@pytest.fixture(scope="session")
def checkpoint_folder(
    tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]
) -> Path:
    """A 2-layer Qwen2 of width 32 with random weights: it decodes noise, deterministically."""
    return write_checkpoint(
        tmp_path_factory.mktemp("checkpoint"),
        logit_shift=True,
        words=WORDS,
        vocab_size=300,
        seed=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )


@pytest.fixture
def make_config(checkpoint_folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """`make_config(cluster={...}, ...)`: a small run whose reward is the completion's length."""
    reward = tmp_path / "length_reward.py"
    reward.write_text(
        "def length(prompts, completions, **columns):\n"
        "    return [float(len(text)) for text in completions]\n"
    )

    def make(**sections: dict[str, Any]) -> TrainConfig:
        values: dict[str, Any] = {
            "run": {"name": "test", "folder": str(tmp_path), "seed": 3},
            "model": {"path": str(checkpoint_folder)},
            "data": {"train": "embedded:rl", "test": "embedded:test"},
            "rollout": {
                "group_size": 4,
                "prompts_per_step": 3,
                "decoding": {"gen_length": 16, "temperature": 1.0},
            },
            "reward": {"functions": [{"path": f"{reward}:length", "weight": 0.1}]},
            "algorithm": {"num_iterations": 2, "beta": 0.01, "tokens_per_micro_batch": 256},
            "optim": {"lr": 1e-3, "total_steps": 10},
            "engine": {"kind": "deepspeed", "zero_stage": 0},
            "cluster": {
                "rollout": {"num_cpus": 0.1},
                "reward": {"num_cpus": 0.1},
                "learner": {"num_cpus": 0.1},
                "timeout_s": 200.0,
            },
            "train": {"steps": 4},
        }
        for name, section in sections.items():
            values[name] = values[name] | section
        return TypeAdapter(TrainConfig).validate_python(values, strict=False)

    return make


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    """Prompts of different lengths; nothing is run, so they need no tests."""
    texts = ["add a and b", "return the larger of two numbers", "f", "sum of the even numbers", "g"]
    return [Problem(problem_id=f"p{i}", prompt=text) for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def scored_groups() -> list[Group]:
    """Two groups with spread, of different lengths, as a reward worker returns them."""

    def rollout(problem: str, index: int, length: int) -> Rollout:
        ids = tuple((7 * index + 3 * k) % 40 + 10 for k in range(length))
        completion = Completion(ids, (), "x" * length, "length", (0,) * length, (1.0,) * length)
        score = Score(total=float(index % 3), parts={"length": float(index % 3)})
        return Rollout(problem, index, (11, 12, 13 + index), completion, 0, index, score)

    return [
        Group(
            Problem(problem_id=name, prompt="say"),
            tuple(rollout(name, index, 5 + (index + offset) % 4) for index in range(4)),
        )
        for offset, name in enumerate(["a", "b"])
    ]


@pytest.fixture(scope="session")
def ray_started() -> Iterator[None]:
    """One local Ray for the session: clusters made while it runs use it and leave it alone."""
    from workers import nodes, placement

    # Ray's workers must find the checkout, as those of a cluster that ships it would.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    assert nodes.connect(None, logical_cpus=2, weight_bytes=0)
    yield
    placement.ray.shutdown()


@pytest.fixture
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_script(text, *arguments)`: a Python program in a session of its own."""

    def run(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", text, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=250,
            start_new_session=True,
        )

    return run

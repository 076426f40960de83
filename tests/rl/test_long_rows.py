"""A row of 8192 tokens goes through a whole update, in the memory that the plan names.

Run as a script it is the process that is measured.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.memory import PeakMemory, tree_bytes
from common.records import Completion, Group, Problem, Rollout, Score
from models.checkpoint import new_model
from models.denoiser import Denoiser
from models.engine import EngineConfig, OptimConfig, make_engine
from models.spec import DiffusionSpec
from rl.plan import activation_bytes
from rl.shape import Shape, shape_of
from rl.update import AlgorithmConfig, PolicyUpdater

ROOT = Path(__file__).resolve().parents[2]
SPEC = DiffusionSpec(mask_token_id=2, logit_shift=False, attention="block_causal", block_size=4)
ARCHITECTURE: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}  # fmt: skip
# Prompt and completion, clean without its last block: 4 + 2044. Three views of the completion.
PROMPT, COMPLETION, LENGTH = 4, 2048, 8192
ENGINE = EngineConfig(kind="torch", gradient_checkpointing=True)
MIB = 2**20


def groups(length: int) -> list[Group]:
    """One group of two completions: one is better."""
    done = Completion(
        (5,) * (length - 1) + (1,), (), "", "eos", tuple(range(length)), (1.0,) * length
    )
    rollouts = (
        Rollout("p", index, (3,) * PROMPT, done, 0, 0, Score(float(index))) for index in (0, 1)
    )
    return [Group(Problem("p", "do"), tuple(rollouts))]


def shape() -> Shape:
    return shape_of(new_model(ARCHITECTURE, 0).config, SPEC)


@pytest.mark.slow
def test_a_row_of_8192_tokens_stays_within_its_memory() -> None:
    """With `sdpa` on a CPU: a dense mask of 64 MiB, and of 256 MiB as one layer's numbers.

    Scores of [L, L] for each head would be 8 times as much again; a GPU's `flex` has neither.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == 1
    planned = activation_bytes(shape(), ENGINE, 1, LENGTH, dense=True)
    assert planned < 600 * MIB
    assert found["peak"] == pytest.approx(planned, rel=0.25)


def main() -> None:
    optim = OptimConfig(lr=1e-4, total_steps=9)
    engine = make_engine(Denoiser(new_model(ARCHITECTURE, 0), SPEC), ENGINE, optim)
    # A budget below one sample: each travels alone.
    algorithm = AlgorithmConfig(num_iterations=1, beta=0, tokens_per_micro_batch=4096)
    updater = PolicyUpdater(engine, None, SPEC, algorithm)
    updater.update(groups(8), step=0)  # what libraries need once
    before = tree_bytes(psutil.Process())
    with PeakMemory(interval_s=0.02) as peak:
        metrics = updater.update(groups(COMPLETION), step=1)
    steps = metrics["update/optimizer_steps"]
    print(json.dumps({"steps": steps, "peak": int(peak.gib * 2**30) - before}))


if __name__ == "__main__":
    main()

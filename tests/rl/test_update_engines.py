"""One update is one update: engines, ZeRO stages, ranks and accumulation, through `rl.update`.

`tests/models/test_engine.py` compares the engines on a loss of its own. Run as a script this is one
rank of the two-rank runs.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.records import Completion, Group, Problem, Rollout, Score
from models.checkpoint import new_model
from models.denoiser import Denoiser
from models.engine import EngineConfig, OptimConfig, make_engine
from models.lora import LoraConfig
from models.spec import DiffusionSpec
from rl.update import AlgorithmConfig, PolicyUpdater

ROOT = Path(__file__).resolve().parents[2]
SPEC = DiffusionSpec(mask_token_id=2, logit_shift=False, attention="block_causal", block_size=4)
ARCHITECTURE: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 24, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
    # Adam divides noise by noise where a gradient is nearly zero; larger weights have few.
    "initializer_range": 0.2,
}  # fmt: skip
OPTIM = OptimConfig(lr=1e-3, grad_clip=0.5, schedule="constant", total_steps=10)
STEPS, WHOLE, SMALL = 2, 10**6, 60
# Absolute: 2 % of one step of the learning rate, for gradients that are next to nothing.
CLOSE = {"rtol": 1e-3, "atol": 2e-5}


def groups() -> list[Group]:
    """Three groups of three completions of different lengths: an odd number for two ranks."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 24, (count,), generator=draw).tolist())

    found = []
    for number in range(3):
        prompt, rollouts = tokens(2 + number), []
        for index in range(3):
            length = 3 + (2 * number + 3 * index) % 6
            tail = -length % 4
            done = Completion(
                (*tokens(length - 1), 1), tokens(tail), "", "eos",
                tuple(range(length + tail)), (1.0,) * (length + tail),
            )  # fmt: skip
            score = Score(float(index == number) + 0.1 * index)
            rollouts.append(Rollout(f"p{number}", index, prompt, done, 0, 3, score))
        found.append(Group(Problem(f"p{number}", "do"), tuple(rollouts)))
    return found


def updated(config: EngineConfig, budget: int, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Metrics of each of a few updates, and the parameters after the last."""
    engine = make_engine(Denoiser(new_model(ARCHITECTURE, 0), SPEC), config, OPTIM, rank, ranks)
    reference = None if engine.adapted else Denoiser(new_model(ARCHITECTURE, 0), SPEC)
    algorithm = AlgorithmConfig(num_iterations=2, beta=0.1, tokens_per_micro_batch=budget)
    updater = PolicyUpdater(engine, reference, SPEC, algorithm)
    metrics = []
    for step in range(STEPS):
        if ranks > 1:  # two of the three groups stream in before
            for group in groups()[:2]:
                updater.prepare([group])
        metrics.append(updater.update(groups(), step))
    state = {name: value for bucket in engine.state_buckets() for name, value in bucket.items()}
    return {"metrics": metrics, "state": state}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for ours, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-5)
    assert found["state"].keys() == expected["state"].keys()
    for name, value in found["state"].items():
        torch.testing.assert_close(value, expected["state"][name], **CLOSE, msg=name)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """One rank, plain PyTorch, the whole batch in one pass."""
    found = updated(EngineConfig(kind="torch"), WHOLE)
    start = dict(new_model(ARCHITECTURE, 0).named_parameters())
    moved = max(
        float((value - start[n].detach()).abs().max()) for n, value in found["state"].items()
    )
    assert moved > 50 * CLOSE["atol"]  # so that equality means something
    return found


def test_accumulation(plain: dict[str, Any]) -> None:
    assert_equal(updated(EngineConfig(kind="torch"), SMALL), plain)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_of_zero(plain: dict[str, Any], stage: int) -> None:
    assert_equal(updated(EngineConfig(zero_stage=stage), SMALL), plain)


def test_an_offloaded_optimizer(plain: dict[str, Any]) -> None:
    """On the host, gradients of micro-batches are summed elsewhere: none may be lost."""
    config = EngineConfig(zero_stage=3, offload_optimizer=True)
    assert_equal(updated(config, SMALL), plain)


LORA = LoraConfig(rank=4, targets=("q_proj", "down_proj"))
ADAPTED = [
    EngineConfig(kind="torch", lora=LORA),
    *(EngineConfig(zero_stage=stage, lora=LORA) for stage in range(4)),
    EngineConfig(zero_stage=3, lora=LORA, offload_optimizer=True),
    EngineConfig(zero_stage=3, lora=LORA, gradient_checkpointing=True),
]


@pytest.fixture(scope="module")
def adapted(plain: dict[str, Any]) -> dict[str, Any]:
    """As `plain`, with adapters, whose reference is the engine's own model."""
    found = updated(ADAPTED[0], WHOLE)
    assert [step["policy/kl"] > 0 for step in found["metrics"]] == [True, True]
    start = dict(new_model(ARCHITECTURE, 0).named_parameters())
    moved = {name for name, value in found["state"].items() if not torch.equal(value, start[name])}
    ends = tuple(f"{target}.weight" for target in LORA.targets)
    assert moved == {name for name in start if name.endswith(ends)}
    return found


@pytest.mark.peft
@pytest.mark.parametrize("config", ADAPTED, ids=range(len(ADAPTED)))
def test_adapters(adapted: dict[str, Any], config: EngineConfig) -> None:
    assert_equal(updated(config, SMALL), adapted)


@pytest.mark.peft
def test_what_adapters_are_compared_with_never_moves() -> None:
    engine = make_engine(Denoiser(new_model(ARCHITECTURE, 0), SPEC), ADAPTED[0], OPTIM)
    updater = PolicyUpdater(
        engine, None, SPEC, AlgorithmConfig(beta=0.1, reference_refresh_steps=1)
    )
    updater.update(groups(), 0)
    with pytest.raises(ValueError, match="never moves"):
        updater.update(groups(), 1)


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory, run_two_ranks: Callable[..., list[str]]
) -> Path:
    """A folder with what both ranks found at every stage: one pair of processes for all."""
    folder = tmp_path_factory.mktemp("ranks")
    assert run_two_ranks(__file__, folder) == ["", ""]  # nor does DeepSpeed speak
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_at_every_stage(plain: dict[str, Any], stage: int, two_ranks: Path) -> None:
    first, second = (torch.load(two_ranks / f"{stage}-{rank}.pt") for rank in range(2))
    assert second["metrics"] == first["metrics"]
    assert_equal(first, plain)


@pytest.mark.peft
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adapters_on_two_ranks(adapted: dict[str, Any], stage: int, two_ranks: Path) -> None:
    """At ZeRO-3 scoring ahead gathers parameters too: ranks must stay in step."""
    first, second = (torch.load(two_ranks / f"lora-{stage}-{rank}.pt") for rank in range(2))
    assert second["metrics"] == first["metrics"]
    assert_equal(first, adapted)


def main(rank: int, folder: Path) -> None:
    for stage in range(4):
        found = updated(EngineConfig(zero_stage=stage), SMALL, rank, ranks=2)
        torch.save(found, folder / f"{stage}-{rank}.pt")
    if importlib.util.find_spec("peft") is None:
        return
    for stage in range(4):
        config = EngineConfig(zero_stage=stage, lora=LORA)
        torch.save(updated(config, SMALL, rank, ranks=2), folder / f"lora-{stage}-{rank}.pt")


if __name__ == "__main__":
    main(int(os.environ["RANK"]), Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as in tests/models/test_engine.py: gloo's threads may die at the very end

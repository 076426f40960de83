"""`unmask export`: equal to what the learner itself would export, from any kind of shards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from common.errors import UserError
from common.progress import SilentProgress
from common.records import Completion, Group, Problem, Rollout, Score
from models.checkpoint import load_checkpoint
from models.engine import EngineConfig, OptimConfig
from models.lora import LoraConfig
from models.outline import load_outline
from models.spec import DiffusionSpec
from rl.checkpoint import Checkpoints, RunState
from rl.cli import app
from rl.export import export_step, exported_step
from rl.origin import Origin
from rl.update import AlgorithmConfig
from workers.learner import LearnerPlan, LearnerWorker
from workers.weights import LocalWeightStore


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def sft(
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    write_checkpoint: Callable[..., Path],
) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    return write_checkpoint(folder, logit_shift=True, tie_word_embeddings=request.param)


def groups() -> list[Group]:
    def rollout(index: int) -> Rollout:
        ids = tuple(10 + (3 * k + index) % 40 for k in range(8))
        completion = Completion(ids, (), "x", "length", (0,) * 8, (1.0,) * 8)
        return Rollout("a", index, (11, 12), completion, 0, index, Score(float(index % 2)))

    return [Group(Problem("a", "say"), tuple(rollout(index) for index in range(4)))]


def saved_run(sft: Path, run: Path, engine: dict[str, Any]) -> LearnerWorker:
    """A run folder with step 3, and the learner that saved it."""
    plan = LearnerPlan(
        checkpoint_folder=sft,
        engine=EngineConfig(**engine),
        optim=OptimConfig(lr=1e-2, total_steps=10),
        algorithm=AlgorithmConfig(beta=0.0),
    )
    learner = LearnerWorker(plan, LocalWeightStore())
    learner.start()
    learner.update(groups(), 0)
    origin = Origin.of({}, load_outline(sft), [])
    Checkpoints(run, origin=origin).save(RunState(3, 4, 0), learner.save)
    return learner


LORA = LoraConfig(rank=2, targets=("k_proj", "up_proj"))
ENGINES: list[Any] = [
    {"kind": "torch"},
    {"kind": "torch", "precision": "bf16"},
    *({"zero_stage": stage} for stage in range(4)),
    *({"zero_stage": stage, "precision": "bf16"} for stage in range(4)),
    *(
        pytest.param(engine | {"lora": LORA}, marks=pytest.mark.peft, id=f"lora-{name}")
        for name, engine in {
            "torch": {"kind": "torch"},
            "1-bf16": {"zero_stage": 1, "precision": "bf16"},
            "3": {"zero_stage": 3},
        }.items()
    ),
]


@pytest.mark.parametrize(
    "engine", ENGINES, ids=lambda engine: "-".join(str(value) for value in engine.values())
)
def test_the_exported_step_is_the_learners_own(
    sft: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    learner = saved_run(sft, tmp_path / "run", engine)
    learner.export(tmp_path / "own")
    export_step(tmp_path / "run", 3, tmp_path / "out", SilentProgress())
    own, out = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "out"))
    assert own.keys() == out.keys()
    for name, value in out.items():
        assert torch.equal(value, own[name]), name
        assert value.dtype == own[name].dtype
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(stock.state_dict()[name], value) for name, value in out.items())
    start = load_file(sft / "model.safetensors")
    assert any(not torch.equal(start[name], value.float()) for name, value in out.items())
    files = [{p.name for p in (tmp_path / name).iterdir()} for name in ("own", "out")]
    assert files[1] - files[0] == {"training_step.json"}
    assert load_checkpoint(tmp_path / "out").spec == DiffusionSpec.load(sft)
    assert exported_step(tmp_path / "out") == 3


def test_errors_are_one_line_and_leave_nothing(sft: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    with pytest.raises(UserError, match="no checkpoint; nothing is saved there"):
        export_step(run, None, out, SilentProgress())
    saved_run(sft, run, {"kind": "torch"})
    with pytest.raises(UserError, match=r"no checkpoint of step 7; saved steps: 3"):
        export_step(run, 7, out, SilentProgress())
    damaged = run / "rl" / "global_step_3" / "policy" / "torch_engine.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    result = CliRunner().invoke(app, ["export", "--run", str(run), str(out)])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"unmask: {run}/rl/global_step_3 is damaged (policy/torch_engine.pt: its checksum differs);"
        " export another step"
    ]
    out.mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_step(run, 3, out, SilentProgress())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_the_command_starts_no_ray(sft: Path, tmp_path: Path) -> None:
    import sys

    saved_run(sft, tmp_path / "run", {"kind": "torch"})
    had_ray = "ray" in sys.modules
    result = CliRunner().invoke(
        app, ["export", "--run", str(tmp_path / "run"), "--step", "3", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert "global_step_3" in result.stdout
    assert ("ray" in sys.modules) == had_ray

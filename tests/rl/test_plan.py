"""`unmask plan`: sizes computed by hand, and compared with what torch really keeps.

Run as a script it is one process whose memory is measured (see `measured`).
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from common.errors import UserError
from common.memory import tree_bytes
from diffusion.attention import Pattern
from diffusion.layout import TokenRows
from models.checkpoint import new_model
from models.denoiser import Denoiser
from models.engine import EngineConfig, OptimConfig, make_engine, prepare_module
from models.lora import LoraConfig
from models.spec import DiffusionSpec
from rl.cli import app
from rl.config import TrainConfig, load_train_config
from rl.plan import (
    PLAIN,
    STATE,
    activation_bytes,
    head_bytes,
    layer_bytes,
    learner,
    longest_sample,
    misfits,
    rollout,
    rows_at_once,
    state_bytes,
    store_bytes,
)
from rl.plan_page import Machine, remedy
from rl.plan_time import GPUS, estimate_speed, rollout_seconds, update_flops
from rl.shape import Shape, find_shape, shape_of

ROOT = Path(__file__).resolve().parents[2]
RL = ROOT / "configs" / "rl"
CANVAS = DiffusionSpec(
    mask_token_id=0, logit_shift=False, attention="bidirectional", block_size=None
)
TINY = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
# Large enough for its 20 MB to 200 MB to stand out of an interpreter's.
MEASURED = TINY | {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024}
ROWS, LENGTH, WEIGHT, RANK = 2, 192, 4, 8
HOST = ("engine.offload_optimizer=true", "engine.offload_reference=true")
NO_REFERENCE = ("algorithm.beta=0", "algorithm.reference_refresh_steps=0")


def shipped(name: str, *overrides: str) -> tuple[TrainConfig, Shape]:
    config = load_train_config(RL / f"{name}.yaml", overrides)
    return config, find_shape(Path(config.model.path))[0]


def part(role: Any, name: str) -> int:
    return sum(p.bytes for p in (*role.together, *role.phases) if p.name == name)


def rows_of(rows: int, length: int, vocabulary: int = 256) -> TokenRows:
    position = torch.arange(length).expand(rows, length)
    nothing = torch.zeros_like(position)
    ids = (position * 7 + 3) % vocabulary
    seen = Pattern(nothing, nothing, None, position >= 0)
    return TokenRows(ids, position, seen, torch.arange(rows * length), ids.flatten())


# By hand


def test_parameters_of_the_released_models() -> None:
    """152064 * 3584 * 2 + 28 * (3584 * 65024 + 7168 + 4608) + 3584, and Llama without biases."""
    assert shipped("diffucoder_7b")[1].parameters == 7_615_616_512
    assert shipped("stable_diffcoder_8b")[1].parameters == 8_250_462_208


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "kind", [{"model_type": "qwen2"}, {"model_type": "qwen3", "head_dim": 48}]
    + [{"model_type": "llama"}, {"model_type": "llama", "attention_bias": True, "mlp_bias": True}],
)  # fmt: skip
def test_parameters_are_those_of_the_stock_class(kind: dict[str, Any], tied: bool) -> None:
    with torch.device("meta"):
        model = new_model(TINY | kind | {"tie_word_embeddings": tied}, 0)
    counted = sum(value.numel() for value in model.parameters())
    assert shape_of(model.config, CANVAS).parameters == counted


def test_the_learners_state_by_hand() -> None:
    """8.25 B parameters, bf16, ZeRO-2 on 4 ranks: 2 + 4 / 4 + 12 / 4 bytes, and the reference."""
    config, shape = shipped("stable_diffcoder_8b")
    role = learner(config, shape, gpu=True)
    count = 8_250_462_208
    assert part(role, "parameters") == part(role, "reference") == 2 * count
    assert part(role, "gradients") == count
    assert part(role, "optimizer") == 3 * count
    assert part(role, "reading the checkpoint") == 4 * count
    assert store_bytes(config, shape) == 3 * 2 * count
    wire = ("engine.precision=fp32", "cluster.wire=bf16")
    assert store_bytes(*shipped("stable_diffcoder_8b", *wire)) == 3 * 2 * count
    config, _ = shipped("stable_diffcoder_8b", "engine.zero_stage=3", *NO_REFERENCE)
    role = learner(config, shape, gpu=True)
    assert part(role, "parameters") == count // 2
    assert part(role, "reference") == 0


def test_what_is_offloaded_lies_on_the_host() -> None:
    """The optimizer's 12 / 4 bytes a parameter; the reference's 2, which visits before training."""
    here = ("engine.zero_stage=3", "engine.offload_reference=false")
    config, shape = shipped("stable_diffcoder_8b", *here)
    kept = learner(config, shape, gpu=True)
    config, _ = shipped("stable_diffcoder_8b", "engine.zero_stage=3", *HOST)
    moved = learner(config, shape, gpu=True)
    count = 8_250_462_208
    static = sum(p.bytes for p in moved.together if p.where == "device")
    assert sum(p.bytes for p in kept.together) - static == (3 + 2) * count
    assert part(moved, "reference visiting") > 2 * count
    assert moved.host_bytes >= (3 + 2 + 4) * count


LORA = ("engine.lora.rank=16", "engine.offload_reference=false", NO_REFERENCE[1])


def test_adapters_by_hand() -> None:
    """16 * (2 * 8192 + 2 * 5120 + 3 * 18432) of 32 layers; no reference, no gradient of the head"""
    config, shape = shipped("stable_diffcoder_8b", *LORA)
    count, adapters = 8_250_462_208, 32 * 16 * 81_920
    assert shape.adapters(config.engine.lora) == adapters == 41_943_040
    assert shape.adapters(LoraConfig(rank=1, targets=("k_proj",))) == 32 * 5120
    assert config.algorithm.beta > 0
    role = learner(config, shape, gpu=True)
    assert part(role, "parameters") == 2 * (count + adapters)
    assert part(role, "gradients") == adapters
    assert part(role, "optimizer") == 3 * adapters
    assert part(role, "optimizer step") == 9 * adapters // 4
    assert part(role, "reference") == part(role, "reference visiting") == 0
    assert part(role, "reading the checkpoint") == 4 * count
    whole = learner(*shipped("stable_diffcoder_8b", *LORA[1:]), gpu=True)
    head = part(whole, "activations and logits") - part(role, "activations and logits")
    assert head == 2 * shape.vocabulary * shape.width
    assert store_bytes(config, shape) == 3 * 2 * count  # merged


@pytest.mark.peft
@pytest.mark.parametrize("kind", [{"model_type": "qwen2"}, {"model_type": "qwen3", "head_dim": 48}])
def test_adapters_are_those_that_are_trained(kind: dict[str, Any]) -> None:
    model, lora = new_model(TINY | kind, 0), LoraConfig(rank=3)
    make_engine(Denoiser(model, CANVAS), EngineConfig(kind="torch", lora=lora), OptimConfig(lr=1.0))
    counted = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert shape_of(model.config, CANVAS).adapters(lora) == counted


def test_a_plan_with_adapters_proposes_no_second_model() -> None:
    """They fit where all weights do not; and what does not fit is not mended by an offload."""
    assert misfits(*shipped("stable_diffcoder_8b", *LORA), 8, 40) == []
    assert misfits(*shipped("stable_diffcoder_8b", *LORA[1:]), 8, 40) != []
    config, shape = shipped("stable_diffcoder_8b", *LORA)
    change = remedy(config, shape, Machine(8, 22, "h100"))
    assert "engine.offload_reference=true" not in change


def test_the_longest_sample_by_hand() -> None:
    """Canvas: three views of 200 + 256. Blocks of 4: 452 clean tokens and 3 x 256 noisy ones."""
    assert longest_sample(*shipped("diffucoder_7b")).tokens == 3 * 456
    sample = longest_sample(*shipped("stable_diffcoder_8b"))
    assert (sample.tokens, sample.rows, sample.length) == (452 + 3 * 256, 1, 1220)
    assert sample.scored == 2 * 256


def test_keys_and_values_by_hand() -> None:
    """2 * 32 layers * 8 heads * 128 numbers of 2 bytes: 128 KiB a token; 64 rows of 457 places."""
    config, shape = shipped("stable_diffcoder_8b")
    assert rows_at_once(config, shape) == 64
    assert part(rollout(config, shape, gpu=True), "keys and values") == 64 * 457 * 2**17
    config, shape = shipped("stable_diffcoder_8b", "rollout.decoding.cache_mib=571")
    assert rows_at_once(config, shape) == 9  # 57.125 MiB each
    config, shape = shipped("diffucoder_7b")
    assert part(rollout(config, shape, gpu=True), "keys and values") == 0


def test_activations_with_checkpointing_by_hand() -> None:
    """One state a layer, one whole layer, and what a layer's backward works with; no dense mask."""
    _, shape = shipped("stable_diffcoder_8b")
    config = EngineConfig(precision="bf16", gradient_checkpointing=True)
    layer = 2 * 8 * 4096 + 2 * (2 * 4096 + 2 * 1024 + 4 * 14336)
    working, ends = 2 * (3 * 14336 + 4 * 4096), 8 * 4096
    expected = 1000 * (32 * 2 * 4096 + layer + working + ends)
    assert activation_bytes(shape, config, 1, 1000, dense=False) == expected


# Against torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_the_plan_says(dtype: torch.dtype) -> None:
    """Bytes that autograd saves, of two layers less those of one; weights are not among them."""

    def saved(layers: int) -> tuple[int, Shape]:
        model = new_model(TINY | {"model_type": "qwen2", "num_hidden_layers": layers}, 0).to(dtype)
        denoiser = Denoiser(model, CANVAS)
        prepare_module(denoiser, EngineConfig(kind="torch"))
        own = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
        kept: dict[int, Tensor] = {}

        def pack(value: Tensor) -> Tensor:
            kept[value.untyped_storage().data_ptr()] = value  # alive: no address is used twice
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            denoiser(rows_of(2, 64))
        total = sum(v.untyped_storage().nbytes() for at, v in kept.items() if at not in own)
        return total, shape_of(model.config, CANVAS)

    (two, shape), (one, _) = saved(2), saved(1)
    assert two - one == pytest.approx(layer_bytes(shape, dtype.itemsize, 2, 64, True), rel=0.01)


def measured(kind: str, stage: int, rank: int = 0) -> dict[str, int]:
    """Bytes of a process with a model of 10 M parameters: at rest, and at the peak of a step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # Freed memory goes back at once: else the heap's holes would be counted too.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, kind, str(stage), str(rank)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), [("torch", 0), ("deepspeed", 2)])
def test_a_process_needs_what_the_plan_says(kind: str, stage: int) -> None:
    found = measured(kind, stage)
    shape = measured_shape()
    state = PLAIN if kind == "torch" else STATE["fp32", stage]
    kept, step = (
        shape.parameters * sum(map(sum, pairs))
        for pairs in ((state.parameters, state.gradients, state.optimizer), (state.step,))
    )
    assert found["kept"] == pytest.approx(kept, rel=0.15)
    engine = EngineConfig()
    passes = activation_bytes(shape, engine, ROWS, LENGTH, dense=True)
    passes += head_bytes(shape, WEIGHT, ROWS * LENGTH, gpu=False)
    assert found["peak"] == pytest.approx(kept + max(passes, step), rel=0.25)


@pytest.mark.slow
@pytest.mark.peft
@pytest.mark.parametrize(("kind", "stage"), [("torch", 0), ("deepspeed", 2)])
def test_adapters_need_what_the_plan_says(kind: str, stage: int) -> None:
    """The model once, and gradients and moments of adapters only: a quarter of all weights'."""
    # On a busy machine a thread's heap or a late import can add to one of the runs, or to what it
    # is compared with: each bound is held by the run that is furthest on its side.
    runs = [measured(kind, stage, RANK) for _ in range(3)]
    kept_bytes = min(one["kept"] for one in runs)
    peaks = [one["peak"] for one in runs]
    shape = measured_shape()
    adapters = shape.adapters(LoraConfig(rank=RANK))
    engine = EngineConfig(kind=kind, zero_stage=stage)  # type: ignore[arg-type]
    parts, stepping = state_bytes(engine, shape.parameters + adapters, adapters, 1)
    kept = sum(part.bytes for part in parts)
    assert kept < 0.4 * 16 * shape.parameters
    weights = WEIGHT * shape.parameters  # of one model: what a wrong plan would miss at least
    assert kept_bytes == pytest.approx(kept, abs=0.4 * weights)
    passes = activation_bytes(shape, EngineConfig(), ROWS, LENGTH, dense=True)
    passes += head_bytes(shape, WEIGHT, ROWS * LENGTH, gpu=False, frozen=True)
    promised = kept + max(passes, stepping.bytes)
    assert promised - weights < max(peaks) and min(peaks) < promised


def measured_shape() -> Shape:
    with torch.device("meta"):
        model = new_model(MEASURED | {"model_type": "qwen2", "tie_word_embeddings": False}, 0)
    return shape_of(model.config, CANVAS)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_allocator_agrees(checkpointing: bool) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    config = EngineConfig(kind="torch", gradient_checkpointing=checkpointing)
    model = new_model(MEASURED | {"model_type": "qwen2", "tie_word_embeddings": False}, 0)
    engine = make_engine(Denoiser(model, CANVAS), config, OptimConfig(lr=1e-4, total_steps=9))
    rows = rows_of(8, 512, 4096)
    for _ in range(2):
        for last in (False, True):
            engine.backward(engine.score(rows).sum(), last=last)
        engine.step()
    shape = measured_shape()
    kept = 16 * shape.parameters + activation_bytes(shape, config, 8, 512, dense=True)
    expected = kept + head_bytes(shape, 4, 8 * 512, gpu=True)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(expected, rel=0.25)


# Speed: an estimate, but of the right things


def test_flops_by_hand() -> None:
    """Canvas of 456 tokens in 3 views: 2 per weight, pairs, the head; mu 2 with checkpointing."""
    config, shape = shipped("diffucoder_7b")
    body = 28 * (2 * 1368 * 233_046_016 + 4 * 3 * 456**2 * 3584)
    one = body + 2 * 512 * 3584 * 152064
    assert shape.forward_flops(1368, 3 * 456**2, 512) == one
    assert update_flops(config, shape) == one * (2 * 4 + 1 + 2)


def test_decoding_is_bound_by_arithmetic_or_by_reading() -> None:
    config, shape = shipped("diffucoder_7b")
    tokens = 256 * 456  # the whole canvas in each of 256 passes
    flops = shape.forward_flops(tokens, tokens * 456, 256 * 256)
    gpu = GPUS["h100"]
    assert rollout_seconds(config, shape, gpu) == pytest.approx(120 * flops / (gpu.flops * 0.3))
    config, shape = shipped("stable_diffcoder_8b", "rollout.decoding.max_rows=1")
    reading = 256 * (2 * shape.parameters + 457 * 2**17)  # one row: weights for every pass
    seconds = 120 * reading / (gpu.bytes_per_s * 0.6)
    assert rollout_seconds(config, shape, gpu) == pytest.approx(seconds)


def test_asynchronous_roles_overlap() -> None:
    config, shape = shipped("diffucoder_7b")
    turns = estimate_speed(config, shape, GPUS["h100"])
    assert turns.samples_per_s == pytest.approx(480 / (turns.rollout_s + turns.update_s))
    config, _ = shipped("diffucoder_7b", "algorithm.max_staleness=1")
    both = estimate_speed(config, shape, GPUS["h100"])
    assert both.samples_per_s == pytest.approx(480 / max(turns.rollout_s, turns.update_s))


# What fits


@pytest.mark.parametrize("name", ["diffucoder_7b", "stable_diffcoder_8b"])
def test_shipped_settings_fit_the_gpus_they_name(name: str) -> None:
    assert misfits(*shipped(name), 8, 80) == []
    crowded = misfits(*shipped(name, "engine.offload_reference=false"), 8, 80)
    assert any("learner: needs" in line for line in crowded)


def test_what_does_not_fit_and_what_to_change() -> None:
    config, shape = shipped("diffucoder_7b", "engine.gradient_checkpointing=false")
    assert any("learner: needs" in line for line in misfits(config, shape, 8, 80))
    change = remedy(config, shape, Machine(8, 80, "h100"))
    assert change
    mended, _ = shipped("diffucoder_7b", "engine.gradient_checkpointing=false", *change)
    assert misfits(mended, shape, 8, 80) == []
    assert remedy(config, shape, Machine(8, 1, "h100")) == []
    assert misfits(config, shape, 4, 1000) == ["cluster asks for 8 GPUs, there are 4"]


def test_one_process_shares_one_gpu() -> None:
    alone = ("cluster.kind=local", "cluster.learner.ranks=1")
    config, shape = shipped("diffucoder_7b", *alone)
    assert "in one process" in misfits(config, shape, 1, 80)[0]
    assert misfits(config, shape, 1, 1000) == []


def invoke(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "120"})
    return found.exit_code, found.stdout


def test_the_command() -> None:
    config = ("--config", str(RL / "diffucoder_7b.yaml"), "--gpus", "8")
    code, out = invoke(*config, "--gpu-mem", "141", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["fits"] and found["speed"]["samples_per_s"] > 0
    assert [role["count"] for role in found["roles"]] == [4, 4]
    code, out = invoke(*config, "--gpu-mem", "141")
    assert code == 0
    assert "an estimate" in out and "peak" in out
    code, out = invoke(*config, "--gpu-mem", "24")
    assert code == 1
    assert "does not fit: learner" in out


def test_a_model_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the known shapes"):
        find_shape(tmp_path / "nowhere")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="AR model"):
        find_shape(path)


def main(kind: str, stage: int, rank: int) -> None:
    lora = LoraConfig(rank=rank) if rank else None

    def build(values: dict[str, Any]) -> Any:
        model = new_model(values | {"model_type": "qwen2", "tie_word_embeddings": False}, 0)
        config = EngineConfig(kind=kind, zero_stage=stage, lora=lora)  # type: ignore[arg-type]
        return make_engine(Denoiser(model, CANVAS), config, OptimConfig(lr=1e-4, total_steps=9))

    def step(engine: Any, rows: TokenRows, watch: Any = None) -> None:
        for last in (False, True):  # the second pass stands beside the first one's gradients
            engine.backward(engine.score(rows).sum() / 1000, last=last)
        if watch:
            watch()
        engine.step()

    import psutil

    from common.memory import PeakMemory

    step(build(TINY), rows_of(1, 8))  # what libraries need once
    gc.collect()
    before = tree_bytes(psutil.Process())
    engine, kept = build(MEASURED), []
    with PeakMemory(interval_s=0.01) as peak:
        step(engine, rows_of(ROWS, LENGTH, 4096))
        step(
            engine, rows_of(ROWS, LENGTH, 4096),
            lambda: kept.append(tree_bytes(psutil.Process()) - before),
        )  # fmt: skip
    print(json.dumps({"kept": kept[0], "peak": int(peak.gib * 2**30) - before}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

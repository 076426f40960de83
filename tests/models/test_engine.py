"""The engines against each other: kinds, ZeRO stages, ranks, accumulation, save and load.

Run as a script it is one rank of the two-rank tests (see `run_ranks`).
"""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import models.head
from common.config import load_config
from common.errors import UserError
from diffusion.attention import Pattern
from diffusion.layout import TokenRows
from models.buckets import split_buckets
from models.checkpoint import new_model
from models.denoiser import Denoiser
from models.engine import (
    Engine,
    EngineConfig,
    OptimConfig,
    StepInfo,
    learning_rate,
    make_engine,
    save_engine,
)
from models.reshard import read_policy
from models.spec import DiffusionSpec

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, LENGTH, MICRO_BATCHES = 64, 12, 8
OPTIM = OptimConfig(lr=1e-2, total_steps=10, warmup_steps=2, grad_clip=0.5)
# Absolute: 0.5 % of one step of the learning rate. ZeRO-3 sums a bias gradient in another order.
CLOSE = {"rtol": 2e-4, "atol": 5e-5}

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_dropout": 0.3,
    # Adam divides noise by noise where a gradient is nearly zero; larger weights have few.
    "initializer_range": 0.2,
}


class TinyDenoiser(nn.Module):
    """What an engine sees of `models.denoiser.Denoiser`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Qwen2ForCausalLM(Qwen2Config(**ARCHITECTURE, tie_word_embeddings=True))

    def forward(self, rows: TokenRows) -> Tensor:
        logits = self.model(
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            attention_mask=rows.attention_mask,
            use_cache=False,
        ).logits
        logps = logits.float().log_softmax(-1).flatten(0, 1)
        return logps[rows.select].gather(1, rows.targets[:, None])[:, 0]


def real_denoiser(tied: bool) -> Denoiser:
    """The same model behind the lean output layer, which walks 64 tokens in nine slices."""
    models.head.LOGIT_BUDGET, models.head.MIN_SLICE = 1, 7
    spec = DiffusionSpec(mask_token_id=0, logit_shift=False, attention="causal", block_size=1)
    architecture = {"model_type": "qwen2", **ARCHITECTURE, "tie_word_embeddings": tied}
    return Denoiser(new_model(architecture, 0), spec)


def micro_batch(number: int, rows: int = 1) -> TokenRows:
    """Micro-batch `number` of a fixed list; with `rows` > 1, that many consecutive ones in one."""
    generator = torch.Generator()
    ids = []
    for row in range(number, number + rows):
        ids.append(torch.randint(VOCABULARY, (LENGTH,), generator=generator.manual_seed(row)))
    input_ids = torch.stack(ids)
    position = torch.arange(LENGTH).expand(rows, LENGTH)
    causal = Pattern(torch.zeros_like(position), position, None, position >= 0)
    select = torch.arange(rows * LENGTH).view(rows, LENGTH)[:, :-1].flatten()
    return TokenRows(input_ids, position, causal, select, input_ids[:, 1:].flatten())


def loss_of(engine: Engine, rows: TokenRows) -> Tensor:
    # Divided by the global token count: the convention of `Engine`. The square makes it no mere
    # mean; the second call in one graph and the call without one are what the algorithms do.
    with torch.no_grad():
        engine.score(rows)
    first, second = engine.score(rows), engine.score(rows)
    return (first * second).sum() / (MICRO_BATCHES * (LENGTH - 1))


def one_step(engine: Engine, micro_batches: list[TokenRows]) -> tuple[float, StepInfo]:
    total = 0.0
    for number, rows in enumerate(micro_batches):
        loss = loss_of(engine, rows)
        engine.backward(loss, last=number == len(micro_batches) - 1)
        total += loss.item()
    return engine.sum_over_ranks({"loss": total})["loss"], engine.step()


def train(engine: Engine, steps: int = 3) -> dict[str, Any]:
    """A few steps over the same 8 micro-batches, this rank's share of them; what happened."""
    share = [micro_batch(n) for n in range(engine.rank, MICRO_BATCHES, engine.world_size)]
    results = [one_step(engine, share) for _ in range(steps)]
    state = {k: v for bucket in engine.state_buckets(max_bytes=8192) for k, v in bucket.items()}
    return {
        "loss": [loss for loss, _ in results],
        "grad_norm": [info.grad_norm for _, info in results],
        "lr": [info.lr for _, info in results],
        "skipped": [info.skipped for _, info in results],
        "state": state,
    }


def engine_of(kind: str, stage: int = 0, **options: Any) -> Engine:
    return make_engine(TinyDenoiser(), EngineConfig(kind=kind, zero_stage=stage, **options), OPTIM)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], **tolerance: float) -> None:
    for key in ("loss", "grad_norm", "lr"):
        assert ours[key] == pytest.approx(theirs[key], rel=tolerance["rtol"]), key
    assert ours["skipped"] == theirs["skipped"]
    assert list(ours["state"]) == list(theirs["state"])
    for name, value in ours["state"].items():
        torch.testing.assert_close(value, theirs["state"][name], **tolerance, msg=name)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return train(engine_of("torch"))


# The schedule


def test_learning_rate_by_hand() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2, total_steps=10, min_lr_ratio=0.1)
    assert [learning_rate(config, step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert learning_rate(config, 6) == pytest.approx(0.55)  # half way down the cosine
    assert learning_rate(config, 10) == pytest.approx(0.1)
    assert learning_rate(config, 99) == pytest.approx(0.1)


def test_constant_learning_rate() -> None:
    config = OptimConfig(lr=3.0, warmup_steps=3, total_steps=5, schedule="constant")
    assert [learning_rate(config, s) for s in range(6)] == [1.0, 2.0, 3.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    "bad", [{"lr": 0.0}, {"warmup_steps": 11}, {"min_lr_ratio": 2.0}, {"grad_clip": -1.0}]
)
def test_impossible_schedule(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimConfig(**{"lr": 1.0, "total_steps": 10, **bad})


def test_impossible_engine_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("kind: torch\nzero_stage: 2\n")
    with pytest.raises(UserError, match=r"engine\.yaml.*zero_stage"):
        load_config(EngineConfig, path)


def test_an_optimizer_that_cannot_be_offloaded() -> None:
    with pytest.raises(ValueError, match="zero_stage"):
        EngineConfig(zero_stage=2, offload_optimizer=True)


# One rank


def test_plain_engine_moves_and_reports(plain: dict[str, Any]) -> None:
    assert plain["lr"] == pytest.approx([learning_rate(OPTIM, step) for step in range(3)])
    assert plain["skipped"] == [False] * 3
    assert plain["loss"][2] < plain["loss"][0]
    start = dict(TinyDenoiser().model.named_parameters())
    assert list(plain["state"]) == list(start)  # HF names, tied weights once
    assert not any(torch.equal(value, start[name]) for name, value in plain["state"].items())


def test_first_update_by_hand() -> None:
    """Adam's first step is lr * sign(g) whatever was clipped; matrices decay, vectors do not."""
    start = {name: p.detach().clone() for name, p in TinyDenoiser().model.named_parameters()}
    state = train(engine_of("torch"), steps=1)["state"]
    lr = learning_rate(OPTIM, 0)
    vector = "model.norm.weight"
    matrix = "model.layers.0.mlp.up_proj.weight"
    moved = (state[vector] - start[vector]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-2, atol=0)
    moved = (state[matrix] - start[matrix] * (1 - lr * OPTIM.weight_decay)).abs()
    assert moved.median().item() == pytest.approx(lr, rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_equals_torch(plain: dict[str, Any], stage: int) -> None:
    assert_same(train(engine_of("deepspeed", stage)), plain, **CLOSE)


@pytest.mark.parametrize(("kind", "stage"), [("torch", 0), ("deepspeed", 0), ("deepspeed", 2)])
def test_accumulating_1x8_equals_8x1(kind: str, stage: int) -> None:
    many, one = engine_of(kind, stage), engine_of(kind, stage)
    for _ in range(2):
        loss_many, info_many = one_step(many, [micro_batch(n) for n in range(MICRO_BATCHES)])
        loss_one, info_one = one_step(one, [micro_batch(0, rows=MICRO_BATCHES)])
        assert loss_many == pytest.approx(loss_one, rel=1e-4)
        assert info_many.grad_norm == pytest.approx(info_one.grad_norm, rel=1e-4)
    for ours, theirs in zip(many.state_buckets(), one.state_buckets(), strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], **CLOSE)


@pytest.mark.parametrize(
    ("kind", "stage", "precision", "offload"),
    [("torch", 0, "fp32", False), ("deepspeed", 0, "fp32", False), ("deepspeed", 1, "fp32", False)]
    + [("deepspeed", 3, "fp32", False), ("deepspeed", 0, "bf16", False)]
    + [("deepspeed", 2, "bf16", False), ("deepspeed", 3, "bf16", True)]
    + [("deepspeed", 3, "fp32", True)],
)
def test_save_and_load_continue_identically(
    tmp_path: Path, kind: str, stage: int, precision: str, offload: bool
) -> None:
    def fresh() -> Engine:
        return engine_of(kind, stage, precision=precision, offload_optimizer=offload)

    straight = fresh()
    train(straight)
    save_engine(straight, tmp_path / "policy")
    resumed = fresh()
    train(resumed, steps=1)  # moments and weights that must be overwritten
    if stage == 3:  # DeepSpeed loads ZeRO-3 into a fresh engine only
        resumed = fresh()
    resumed.load(tmp_path / "policy")
    expected, found = train(straight), train(resumed)
    assert found["lr"] == expected["lr"] == [learning_rate(OPTIM, step) for step in (3, 4, 5)]
    assert found["loss"] == expected["loss"]
    for name, value in found["state"].items():
        assert torch.equal(value, expected["state"][name]), name


class _Bomb:
    """Unpickles into a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("kind", "stage", "file"),
    [
        ("torch", 0, "torch_engine.pt"),
        ("deepspeed", 0, "*_model_states.pt"),
        ("deepspeed", 1, "*_optim_states.pt"),
        ("deepspeed", 3, "*_optim_states.pt"),
    ],
)
def test_a_checkpoint_runs_no_code(tmp_path: Path, kind: str, stage: int, file: str) -> None:
    engine = engine_of(kind, stage)
    train(engine, steps=1)
    save_engine(engine, tmp_path / "policy")
    (path,) = (tmp_path / "policy").rglob(file)
    trap = tmp_path / "trap"
    state = torch.load(path, weights_only=False)
    torch.save(state | {"extra": _Bomb(trap)}, path)
    with pytest.raises(UnpicklingError):
        engine.load(tmp_path / "policy")
    if stage == 1:  # the moments' file, which nobody needs for the weights
        read_policy(tmp_path / "policy")
    else:
        with pytest.raises(UserError, match="cannot be read"):
            read_policy(tmp_path / "policy")
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # it was armed


@pytest.mark.parametrize(
    ("kind", "stage", "precision"),
    [("torch", 0, "fp32"), ("deepspeed", 0, "fp32"), ("deepspeed", 1, "fp32")]
    + [("deepspeed", 2, "fp32"), ("deepspeed", 3, "fp32"), ("deepspeed", 0, "bf16")]
    + [("deepspeed", 1, "bf16"), ("deepspeed", 2, "bf16"), ("deepspeed", 3, "bf16")],
)
@pytest.mark.parametrize("offload", [False, True])
def test_a_step_without_a_finite_gradient_is_skipped(
    kind: str, stage: int, precision: str, offload: bool
) -> None:
    if offload and stage < 3:
        pytest.skip("cannot be offloaded")
    engine = engine_of(kind, stage, precision=precision, offload_optimizer=offload)
    before = [bucket for bucket in engine.state_buckets()]
    engine.backward(loss_of(engine, micro_batch(0)) * float("nan"), last=True)
    assert engine.step().skipped
    for bucket, old in zip(engine.state_buckets(), before, strict=True):
        assert all(torch.equal(bucket[name], old[name]) for name in old)
    _, info = one_step(engine, [micro_batch(0)])
    assert not info.skipped
    assert info.lr == learning_rate(OPTIM, 0)  # the schedule waited


@pytest.mark.parametrize(("kind", "stage"), [("torch", 0)] + [("deepspeed", s) for s in range(4)])
def test_bf16_stays_near_fp32(plain: dict[str, Any], kind: str, stage: int) -> None:
    found = train(engine_of(kind, stage, precision="bf16"))
    assert found["loss"] == pytest.approx(plain["loss"], rel=0.1)
    assert found["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.2)
    assert {value.dtype for value in found["state"].values()} == {torch.bfloat16}


def test_bf16_keeps_rotary_frequencies_in_fp32() -> None:
    denoiser = TinyDenoiser()
    expected = denoiser.model.model.rotary_emb.inv_freq.clone()
    make_engine(denoiser, EngineConfig(precision="bf16"), OPTIM)
    assert torch.equal(denoiser.model.model.rotary_emb.inv_freq, expected)
    assert denoiser.model.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "stage"), [("torch", 0), ("deepspeed", 3)])
def test_gradient_checkpointing_changes_nothing(
    plain: dict[str, Any], kind: str, stage: int
) -> None:
    found = train(engine_of(kind, stage, gradient_checkpointing=True))
    assert_same(found, plain, **CLOSE)


def test_buckets_keep_order_and_bound() -> None:
    parameters = [(str(n), nn.Parameter(torch.zeros(n))) for n in (4, 4, 100, 1)]
    names = [[name for name, _ in bucket] for bucket in split_buckets(parameters, max_bytes=32)]
    assert names == [["4", "4"], ["100"], ["1"]]


def test_shm_op_is_still_switched_off_by_this_name() -> None:
    """A private name of DeepSpeed: if it goes, the first start would compile for minutes."""
    engine_of("deepspeed")
    import deepspeed

    backend = importlib.import_module("deepspeed.comm.torch")
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    assert "__compatible_ops__.get(builder.NAME" in Path(str(backend.__file__)).read_text()
    assert backend.build_shm_op() is None


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        (("torch", 0), ("deepspeed", 0), "kind=torch"),
        (("deepspeed", 0), ("deepspeed", 1), "zero_stage=0"),
    ],
)
def test_another_engines_checkpoint(
    tmp_path: Path, saved: tuple[str, int], asked: tuple[str, int], message: str
) -> None:
    save_engine(engine_of(*saved), tmp_path)
    with pytest.raises(UserError, match=message):
        engine_of(*asked).load(tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no engine checkpoint"):
        engine_of("torch").load(tmp_path)


def test_torch_engine_refuses_ranks() -> None:
    with pytest.raises(UserError, match="1 rank, not 2"):
        make_engine(TinyDenoiser(), EngineConfig(kind="torch"), OPTIM, rank=1, world_size=2)


# Two ranks

CASES: dict[str, dict[str, Any]] = {str(stage): {"zero_stage": stage} for stage in range(4)}
CASES["3-offloaded"] = {"zero_stage": 3, "offload_optimizer": True}


def alone(settings: dict[str, Any]) -> Engine:
    return make_engine(TinyDenoiser(), EngineConfig(**settings), OPTIM)


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory, run_two_ranks: Callable[..., list[str]]
) -> Path:
    """A folder with what both ranks found at every ZeRO stage: one pair of processes for all."""
    folder = tmp_path_factory.mktemp("ranks")
    for case, settings in CASES.items():
        engine = alone(settings)
        train(engine)
        save_engine(engine, folder / f"one-{case}")
        torch.save(train(engine, steps=2), folder / f"one-{case}.pt")
    assert run_two_ranks(__file__, folder) == ["", ""]  # nor does DeepSpeed speak
    return folder


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """`real_denoiser` changes these; put them back."""
    monkeypatch.setattr(models.head, "LOGIT_BUDGET", models.head.LOGIT_BUDGET)
    monkeypatch.setattr(models.head, "MIN_SLICE", models.head.MIN_SLICE)


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_of_zero_3_gather_the_lean_head(
    slices: None, tied: bool, two_ranks: Path
) -> None:
    """Its weight is in pieces on both ranks except while the head runs, forward and backward."""
    first, second = (torch.load(two_ranks / f"head-{tied}-{rank}.pt") for rank in range(2))
    assert second.pop("state") == {}
    assert second == {key: first[key] for key in second}
    alone = train(make_engine(real_denoiser(tied), EngineConfig(kind="torch"), OPTIM))
    assert_same(first, alone, **CLOSE)
    assert ("lm_head.weight" in first["state"]) is not tied


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(plain: dict[str, Any], case: str, two_ranks: Path) -> None:
    first, second = (torch.load(two_ranks / f"{case}-{rank}.pt") for rank in range(2))
    assert second.pop("state") == {}
    for key in ("loss", "grad_norm", "lr", "skipped"):
        assert second[key] == first[key]
    assert_same(first, plain, **CLOSE)
    for rank in (first, second):
        resumed, continued = rank["resumed"], rank["continued"]
        assert resumed["loss"] == continued["loss"]
        for name, value in continued["state"].items():
            assert torch.equal(resumed["state"][name], value), name
    meta = json.loads((two_ranks / f"policy-{case}" / "engine.json").read_text())
    assert meta["ranks"] == 2


@pytest.mark.parametrize("case", CASES)
def test_one_rank_goes_on_as_two(case: str, two_ranks: Path) -> None:
    """Learning rate, Adam's step count and moments carry over: the second loss shows them."""
    first, second = (torch.load(two_ranks / f"{case}-{rank}.pt")["grown"] for rank in range(2))
    assert second.pop("state") == {}
    assert second == {key: first[key] for key in second}
    assert_same(first, torch.load(two_ranks / f"one-{case}.pt"), **CLOSE)
    assert first["lr"] == [learning_rate(OPTIM, step) for step in (3, 4)]
    assert not list((two_ranks / f"one-{case}").glob(".*"))  # what was converted is gone


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_go_on_as_one(case: str, two_ranks: Path) -> None:
    engine = alone(CASES[case])
    engine.load(two_ranks / f"policy-{case}")
    found = train(engine, steps=2)
    assert_same(found, torch.load(two_ranks / f"{case}-0.pt")["continued"], **CLOSE)
    assert found["lr"] == [learning_rate(OPTIM, step) for step in (3, 4)]
    # What it saves from here on is its own again.
    save_engine(engine, two_ranks / f"again-{case}")
    again = alone(CASES[case])
    again.load(two_ranks / f"again-{case}")
    assert train(again, steps=1)["loss"] == train(engine, steps=1)["loss"]


def test_shards_of_another_number_of_ranks_that_do_not_fit(two_ranks: Path) -> None:
    broken = Path(shutil.copytree(two_ranks / "policy-1", two_ranks / "broken"))
    (broken / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot be made whole.*cluster\.learner\.ranks"):
        engine_of("deepspeed", 1).load(broken)
    assert not list(broken.glob(".*"))


def main(rank: int, folder: Path) -> None:
    def fresh(case: str) -> Engine:
        config = EngineConfig(**CASES[case])
        return make_engine(TinyDenoiser(), config, OPTIM, rank=rank, world_size=2)

    for case in CASES:
        engine = fresh(case)
        result = train(engine)
        save_engine(engine, folder / f"policy-{case}")
        engine.sum_over_ranks({"saved": 1.0})  # all files are there before anybody reads them
        result["continued"] = train(engine, steps=2)
        engine = fresh(case)
        engine.load(folder / f"policy-{case}")
        result["resumed"] = train(engine, steps=2)
        engine = fresh(case)
        engine.load(folder / f"one-{case}")
        result["grown"] = train(engine, steps=2)
        torch.save(result, folder / f"{case}-{rank}.pt")
    for tied in (False, True):
        config = EngineConfig(zero_stage=3)
        engine = make_engine(real_denoiser(tied), config, OPTIM, rank=rank, world_size=2)
        torch.save(train(engine), folder / f"head-{tied}-{rank}.pt")
    engine.close()


if __name__ == "__main__":
    main(int(os.environ["RANK"]), Path(sys.argv[1]))
    sys.stdout.flush()
    # On a busy machine a thread of gloo may ask for Python while it is being taken down, and dies
    # ("terminate called without an active exception", 3 of 17 runs) after all work was done.
    os._exit(0)

"""Adapters: what is trained, what is published, what the reference is, what is saved.

Run as a script it is one rank of the two-rank tests (see `two_ranks`).
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.config import load_config
from common.errors import UserError
from diffusion.attention import Pattern
from diffusion.layout import TokenRows
from models.checkpoint import new_model
from models.denoiser import Denoiser
from models.engine import Engine, EngineConfig, OptimConfig, make_engine, save_engine
from models.lora import MATRICES, LoraConfig, check_lora, merge
from models.reshard import check_engine, read_policy
from models.spec import DiffusionSpec

ROOT = Path(__file__).resolve().parents[2]
SPEC = DiffusionSpec(mask_token_id=0, logit_shift=False, attention="causal", block_size=1)
VOCABULARY, LENGTH, MICRO_BATCHES = 24, 8, 4
ARCHITECTURE: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": True, "initializer_range": 0.2,
}  # fmt: skip
OPTIM = OptimConfig(lr=1e-2, total_steps=10, warmup_steps=2, grad_clip=0.5)
LORA = LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))
KINDS = [("torch", 0), *(("deepspeed", stage) for stage in range(4))]
CLOSE = {"rtol": 2e-4, "atol": 5e-5}


def stock() -> Denoiser:
    return Denoiser(new_model(ARCHITECTURE, 0), SPEC)


def start() -> dict[str, Tensor]:
    return {name: value.detach() for name, value in stock().model.named_parameters()}


def engine_of(
    kind: str, stage: int = 0, lora: LoraConfig | None = LORA, rank: int = 0, ranks: int = 1,
    **options: Any,
) -> Engine:  # fmt: skip
    config = EngineConfig(kind=kind, zero_stage=stage, lora=lora, **options)  # type: ignore[arg-type]
    return make_engine(stock(), config, OPTIM, rank, ranks)


def rows_of(number: int) -> TokenRows:
    ids = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(number))
    position = torch.arange(LENGTH)[None]
    causal = Pattern(torch.zeros_like(position), position, None, position >= 0)
    return TokenRows(ids, position, causal, torch.arange(LENGTH - 1), ids[0, 1:])


def train(engine: Engine, steps: int = 3) -> dict[str, Any]:
    losses, norms = [], []
    share = range(engine.rank, MICRO_BATCHES, engine.world_size)
    for _ in range(steps):
        total = 0.0
        for number in share:
            loss = -engine.score(rows_of(number)).sum() / (MICRO_BATCHES * (LENGTH - 1))
            engine.backward(loss, last=number == share[-1])
            total += loss.item()
        losses.append(engine.sum_over_ranks({"loss": total})["loss"])
        norms.append(engine.step().grad_norm)
    return {"loss": losses, "norm": norms, "state": state_of(engine)}


def state_of(engine: Engine) -> dict[str, Tensor]:
    buckets = engine.state_buckets(max_bytes=4096)
    return {name: value for bucket in buckets for name, value in bucket.items()}


def logps(denoiser: Denoiser) -> Tensor:
    with torch.no_grad():
        return denoiser(rows_of(9))


def loaded(state: dict[str, Tensor]) -> Denoiser:
    denoiser = stock()
    assert not denoiser.model.load_state_dict(state, strict=False).unexpected_keys
    return denoiser


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return train(engine_of("torch"))


# The configuration


def test_merging_by_hand() -> None:
    base, b, a = torch.eye(2), torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    assert merge(base, b, a, 0.5).tolist() == [[2.5, 2.0], [3.0, 5.0]]
    assert LoraConfig(rank=4, alpha=2).scale == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rank: 0}", "lora.rank must be at least 1"),
        ("lora: {alpha: 0}", "lora.alpha above 0"),
        ("lora: {targets: []}", "at least one matrix"),
        ("lora: {targets: [q_proj, q_proj]}", "each once"),
        ("lora: {targets: [lm_head]}", "no lm_head; choose among q_proj"),
        ("lora: {ranks: 4}", r"lora\.ranks: unknown key"),
        ("lora: {}\noffload_reference: true", "no second model to offload"),
    ],
)
def test_impossible_adapters(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_config(EngineConfig, path)
    assert "\n" not in str(caught.value)


def test_adapters_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("lora: {rank: 8, alpha: 16, targets: [q_proj]}\n")
    lora = load_config(EngineConfig, path).lora
    assert lora == LoraConfig(rank=8, alpha=16, targets=("q_proj",))
    assert EngineConfig().lora is None


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_without_peft(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    check_lora(None)
    with pytest.raises(UserError, match=r"^engine\.lora: peft is not installed; run") as caught:
        engine_of(kind)
    assert "\n" not in str(caught.value)


# What is trained and what is published


@pytest.mark.peft
@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_before_the_first_step_it_is_the_stock_model(kind: str, stage: int) -> None:
    engine = engine_of(kind, stage)
    expected = start()
    state = state_of(engine)
    assert list(state) == list(expected)  # HF names, tied weights once
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert torch.equal(engine.score(rows_of(9)).detach(), logps(stock()))


@pytest.mark.peft
@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_merged_weights_score_as_the_adapters_do(kind: str, stage: int) -> None:
    engine = engine_of(kind, stage)
    state = train(engine)["state"]
    assert not torch.allclose(logps(loaded(state)), logps(stock()), atol=1e-2)
    torch.testing.assert_close(
        logps(loaded(state)), engine.score(rows_of(9)).detach(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.peft
@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_the_reference_is_the_stock_model(kind: str, stage: int) -> None:
    engine = engine_of(kind, stage)
    train(engine)
    assert torch.equal(engine.score_base(rows_of(9)), logps(stock()))
    # And scoring it leaves training as it was.
    before = state_of(engine)
    assert train(engine, steps=1)["loss"][0] < train(engine_of(kind, stage), steps=1)["loss"][0]
    moved = [name for name, value in state_of(engine).items() if not value.equal(before[name])]
    assert moved == [n for n in before if n.split(".")[-2] in LORA.targets and "weight" in n]


@pytest.mark.peft
@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_only_adapters_move(kind: str) -> None:
    denoiser = stock()
    engine = make_engine(denoiser, EngineConfig(kind=kind, lora=LORA), OPTIM)  # type: ignore[arg-type]
    before = {name: value.detach().clone() for name, value in denoiser.named_parameters()}
    train(engine)
    for name, value in denoiser.named_parameters():
        assert torch.equal(value, before[name]) == (".lora_" not in name), name
        assert (value.grad is None) or ".lora_" in name, name
    again = {name: value.detach().clone() for name, value in denoiser.named_parameters()}
    state_of(engine)  # merges copies only
    assert all(torch.equal(value, again[name]) for name, value in denoiser.named_parameters())


@pytest.mark.peft
@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_equals_torch(plain: dict[str, Any], stage: int) -> None:
    assert_same(train(engine_of("deepspeed", stage)), plain)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-3)
    for name, value in found["state"].items():
        torch.testing.assert_close(value, expected["state"][name], **CLOSE, msg=name)


@pytest.mark.peft
def test_every_matrix_and_checkpointing(plain: dict[str, Any]) -> None:
    """Recomputing changes nothing; the default adapts all seven matrices and nothing else."""
    assert_same(train(engine_of("torch", gradient_checkpointing=True)), plain)
    state, old = train(engine_of("torch", lora=LoraConfig()))["state"], start()
    moved = {name for name, value in state.items() if not value.equal(old[name])}
    assert moved == {
        name for name in old if name.split(".")[-2] in MATRICES and name.endswith("weight")
    }


@pytest.mark.peft
def test_the_start_is_named_and_the_global_generator_untouched() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    ours = train(engine_of("torch"), steps=1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(8)
    assert train(engine_of("torch"), steps=1)["loss"] == ours["loss"]
    assert train(engine_of("torch"), steps=1)["norm"] == ours["norm"]


@pytest.mark.peft
@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_bf16(plain: dict[str, Any], kind: str, stage: int) -> None:
    """The reference computes in the policy's numbers: equal before the first step, then at rest."""
    engine = engine_of(kind, stage, precision="bf16")
    base = engine.score_base(rows_of(9))
    assert torch.equal(engine.score(rows_of(9)).detach(), base)
    found = train(engine)
    assert torch.equal(engine.score_base(rows_of(9)), base)
    assert not torch.equal(engine.score(rows_of(9)).detach(), base)
    assert found["loss"] == pytest.approx(plain["loss"], rel=0.1)
    assert {value.dtype for value in found["state"].values()} == {torch.bfloat16}


@pytest.mark.peft
def test_a_model_without_the_targets() -> None:
    denoiser = stock()
    for layer in denoiser.model.model.layers:  # type: ignore[union-attr, attr-defined]
        layer.mlp.other_name = layer.mlp.down_proj
        del layer.mlp.down_proj
    lora = LoraConfig(targets=("down_proj",))
    with pytest.raises(UserError, match=r"^engine\.lora\.targets: ") as caught:
        make_engine(denoiser, EngineConfig(kind="torch", lora=lora), OPTIM)
    assert "\n" not in str(caught.value)


# Saving


@pytest.mark.peft
@pytest.mark.parametrize(
    ("kind", "stage", "options"),
    [(*kind, {"precision": precision}) for precision in ("fp32", "bf16") for kind in KINDS]
    + [("deepspeed", 3, {"offload_optimizer": True})],
)
def test_save_and_load_continue_identically(
    tmp_path: Path, kind: str, stage: int, options: dict[str, Any]
) -> None:
    straight = engine_of(kind, stage, **options)
    state = train(straight)["state"]
    save_engine(straight, tmp_path / "policy")
    resumed = engine_of(kind, stage, **options)
    resumed.load(tmp_path / "policy")
    assert all(torch.equal(value, state[name]) for name, value in state_of(resumed).items())
    expected, found = train(straight), train(resumed)
    assert found["loss"] == expected["loss"]
    for name, value in found["state"].items():
        assert torch.equal(value, expected["state"][name]), name
    read = read_policy(tmp_path / "policy")
    assert list(read) == list(state)
    for name, value in read.items():
        assert torch.equal(value, state[name]), name


@pytest.mark.peft
def test_other_adapters(tmp_path: Path) -> None:
    save_engine(engine_of("torch"), tmp_path)
    other = EngineConfig(kind="torch", lora=LoraConfig(rank=8))
    for config in (other, EngineConfig(kind="torch")):
        with pytest.raises(UserError, match="was saved with lora=.*'rank': 4"):
            check_engine(tmp_path, config, 1)
    same = LoraConfig(rank=4, alpha=8.0, targets=("v_proj", "q_proj", "down_proj"))
    assert check_engine(tmp_path, EngineConfig(kind="torch", lora=same), 1) is None


@pytest.mark.peft
def test_the_exported_folder_is_stock(tmp_path: Path) -> None:
    denoiser = stock()
    engine = make_engine(denoiser, EngineConfig(kind="torch", lora=LORA), OPTIM)
    state = train(engine)["state"]
    denoiser.model.save_pretrained(tmp_path, state_dict=dict(state))
    assert not list(tmp_path.glob("adapter*"))
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.to_dict() == AutoModelForCausalLM.from_pretrained(tmp_path).config.to_dict()
    found = dict(model.named_parameters())
    assert list(found) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in found.items())


# Two ranks


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory, run_two_ranks: Callable[..., list[str]]
) -> Path:
    """A folder with what two ranks found at every ZeRO stage: one pair of processes for all."""
    folder = tmp_path_factory.mktemp("ranks")
    for stage in range(4):
        engine = engine_of("deepspeed", stage)
        train(engine)
        save_engine(engine, folder / f"one-{stage}")
        torch.save(train(engine, steps=2), folder / f"one-{stage}.pt")
    assert run_two_ranks(__file__, folder) == ["", ""]  # nor does DeepSpeed speak
    return folder


@pytest.mark.peft
@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_equal_one(plain: dict[str, Any], stage: int, two_ranks: Path) -> None:
    first, second = (torch.load(two_ranks / f"{stage}-{rank}.pt") for rank in range(2))
    assert second["state"] == second["grown"]["state"] == {}
    assert_same(first, plain)
    assert torch.equal(first["base"], logps(stock()))
    assert_same(first["grown"], torch.load(two_ranks / f"one-{stage}.pt"))  # one rank's, by two


@pytest.mark.peft
@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_go_on_as_one(stage: int, two_ranks: Path) -> None:
    engine = engine_of("deepspeed", stage)
    engine.load(two_ranks / f"policy-{stage}")
    first = torch.load(two_ranks / f"{stage}-0.pt")
    read = read_policy(two_ranks / f"policy-{stage}")
    assert all(torch.equal(value, first["state"][name]) for name, value in read.items())
    assert_same(train(engine, steps=2), first["continued"])


def main(rank: int, folder: Path) -> None:
    for stage in range(4):
        engine = engine_of("deepspeed", stage, rank=rank, ranks=2)
        result = train(engine)
        save_engine(engine, folder / f"policy-{stage}")
        engine.sum_over_ranks({"saved": 1.0})  # all files are there before anybody reads them
        result["base"] = engine.score_base(rows_of(9))
        result["continued"] = train(engine, steps=2)
        engine = engine_of("deepspeed", stage, rank=rank, ranks=2)
        engine.load(folder / f"one-{stage}")
        result["grown"] = train(engine, steps=2)
        torch.save(result, folder / f"{stage}-{rank}.pt")
    engine.close()


if __name__ == "__main__":
    main(int(os.environ["RANK"]), Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # see tests/models/test_engine.py

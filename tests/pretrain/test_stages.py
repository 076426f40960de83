"""One stage on fake engines (arithmetic by hand) and on a real one (it learns)."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from diffusion.layout import TokenRows
from models.checkpoint import new_model
from models.denoiser import Denoiser
from models.engine import EngineConfig, StepInfo, TorchEngine, make_engine
from pretrain.data import Document, Example, RowStream, encode_examples
from pretrain.stages import StageResult, StageSection, run_stage

MakeStage = Callable[..., dict[str, Any]]
MASK = 2


class FakeEngine:
    """Scores every token -1 and keeps what it is given."""

    device = torch.device("cpu")

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.scored: list[TokenRows] = []
        self.losses: list[float] = []
        self.last: list[bool] = []

    def score(self, rows: TokenRows) -> Tensor:
        self.scored.append(rows)
        return -torch.ones(len(rows.select))

    def backward(self, loss: Tensor, last: bool) -> None:
        self.losses.append(float(loss))
        self.last.append(last)

    def step(self) -> StepInfo:
        return StepInfo(grad_norm=1.0, lr=0.5, skipped=False)

    def sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        return dict(values)


@pytest.fixture
def stage(make_stage: MakeStage) -> Callable[..., StageSection]:
    def make(objective: str, **change: Any) -> StageSection:
        values = make_stage("s", objective, "embedded:sft", row_length=16, **change)
        return StageSection.model_validate_json(json.dumps(values))

    return make


MakeStageSection = Callable[..., StageSection]


def stream(count: int = 12, batch: int = 4) -> RowStream:
    """Documents of 12 tokens, one a row: a prompt of 4 and two blocks of 4."""
    documents = [Document(tuple(range(10 + n, 22 + n)), 4) for n in range(count)]
    return RowStream(documents, 16, 4, batch, seed=0)


Logged = list[dict[str, float]]


def run(
    stage: StageSection, engine: Any, data: RowStream | None = None, seed: int = 1
) -> tuple[Logged, StageResult]:
    logged: Logged = []
    result = run_stage(
        stage,
        engine,
        data or stream(),
        MASK,
        seed,
        lambda step, metrics: logged.append(dict(metrics)),
    )
    return logged, result


def test_ar_loss_by_hand(stage: MakeStageSection) -> None:
    """4 rows x 8 supervised tokens, all scored -1, over 32: exactly 1."""
    engine = FakeEngine()
    logged, result = run(stage("ar"), engine)
    assert [m["pretrain/loss"] for m in logged] == [1.0, 1.0]
    assert engine.losses == [0.5] * 4  # two micro-batches a step, over the global count
    assert engine.last == [False, True] * 2
    assert result.steps == 2 and result.loss == 1.0 and result.tokens == 2 * 4 * 12


def test_ar_counts_no_token_without_a_predecessor(stage: MakeStageSection) -> None:
    """Plain documents: the first token is neither scored nor counted."""
    documents = [Document(tuple(range(10, 22)), 0)] * 4
    logged, _ = run(stage("ar"), FakeEngine(), RowStream(documents, 16, 1, 4, 0))
    assert [m["pretrain/loss"] for m in logged] == [1.0, 1.0]


@pytest.mark.parametrize("objective", ["block", "bidirectional", "causal_diffusion"])
def test_diffusion_loss_is_weight_over_count(stage: MakeStageSection, objective: str) -> None:
    """Scored -1 a token, the loss is the sum of weights over 32, and near 1 on average."""
    section = stage(objective, steps=200)
    logged, _ = run(section, FakeEngine())
    losses = [m["pretrain/loss"] for m in logged]
    assert all(m["pretrain/nll_per_masked_token"] == pytest.approx(1.0) for m in logged)
    assert sum(losses) / 200 == pytest.approx(1.06, abs=0.08)  # forced masks add a little


def test_warmup_counts_masks_without_weight(stage: MakeStageSection) -> None:
    section = stage("block", steps=4, warmup={"steps": 2, "u_init": 0.002})
    engine = FakeEngine()
    logged, _ = run(section, engine)
    assert [m["pretrain/u_max"] for m in logged] == pytest.approx([0.002, 0.501, 1.0, 1.0])
    for step in (0, 1):  # weight 1: the loss is the share of hidden tokens
        hidden = sum(len(rows.select) for rows in engine.scored[2 * step : 2 * step + 2])
        assert logged[step]["pretrain/loss"] == pytest.approx(hidden / 32)
    # At u_max 0.002 every level is clipped to 1/4: (3/4)^4 = 32 % of blocks fall back.
    assert 0 <= logged[0]["pretrain/fallback_rate"] <= 1


def test_fallback_rate_is_measured(stage: MakeStageSection) -> None:
    logged, _ = run(stage("block", steps=400), FakeEngine())
    mean = sum(m["pretrain/fallback_rate"] for m in logged) / 400
    assert mean == pytest.approx(0.1266, abs=0.025)  # 3200 blocks: sigma 0.006
    logged, _ = run(stage("ar"), FakeEngine())
    assert logged[0]["pretrain/fallback_rate"] == 0.0


def test_two_ranks_share_the_micro_batches_of_one(stage: MakeStageSection) -> None:
    section = stage("block", rows_per_micro_batch=1)
    one, ranks = FakeEngine(), [FakeEngine(rank, 2) for rank in range(2)]
    run(section, one)
    for rank in ranks:
        run(section, rank)
    assert len(one.scored) == 8 and [len(rank.scored) for rank in ranks] == [4, 4]
    for step in range(2):
        whole = one.scored[4 * step : 4 * step + 4]
        parts = [rank.scored[2 * step : 2 * step + 2] for rank in ranks]
        dealt = [rows for pair in zip(*parts, strict=True) for rows in pair]
        for ours, theirs in zip(dealt, whole, strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids)  # the same noise
    assert sum(ranks[0].losses + ranks[1].losses) == pytest.approx(sum(one.losses))


def test_noise_changes_with_step_and_seed(stage: MakeStageSection) -> None:
    documents = [Document(tuple(range(10, 26)), 0)]

    def shown(seed: int) -> list[Tensor]:
        engine = FakeEngine()
        run(stage("block", steps=3), engine, RowStream(documents, 16, 4, 4, 0), seed)
        return [rows.input_ids[row, :16] for rows in engine.scored for row in range(2)]

    ours = shown(1)
    assert all(torch.equal(a, b) for a, b in zip(ours, shown(1), strict=True))
    assert len({tuple(row.tolist()) for row in ours}) > 6  # 12 rows of the same document
    assert not all(torch.equal(a, b) for a, b in zip(ours, shown(2), strict=True))


def test_prompts_are_shown_clean(stage: MakeStageSection) -> None:
    engine = FakeEngine()
    run(stage("block", steps=20), engine)
    for rows in engine.scored:
        hidden = rows.input_ids == MASK
        assert not hidden[:, :4].any() and hidden[:, 4:12].any()
        assert not hidden[:, 12:].any()  # neither pads nor the clean half


# On a real model


def tiny_engine(section: StageSection, vocabulary: int, kind: str = "torch") -> Any:
    architecture = {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }
    denoiser = Denoiser(new_model(architecture, 0), section.spec(MASK))
    optim = section.optim.for_steps(section.steps)
    return make_engine(denoiser, EngineConfig(kind=kind), optim)  # type: ignore[arg-type]


def text_stream(tokenizer: PreTrainedTokenizerFast, prompt: str = "# sum") -> RowStream:
    examples = [Example("def f(xs):\n    return sum(xs)\n", prompt)] * 4
    documents = encode_examples(examples, tokenizer, 4, 64, seed=0)
    return RowStream(documents, 64, 4, 4, seed=0)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("ar", {}),
        ("block", {}),
        ("block", {"logit_shift": True}),
        ("block", {"packing": "mutually_visible"}),
        ("bidirectional", {}),
        ("causal_diffusion", {"logit_shift": True}),
    ],
)
def test_it_learns_one_text(
    make_stage: MakeStage,
    tokenizer: PreTrainedTokenizerFast,
    objective: str,
    options: dict[str, Any],
) -> None:
    values = make_stage(
        "s", objective, "embedded:sft", steps=40, row_length=64, optim={"lr": 1e-2}, **options
    )
    section = StageSection.model_validate_json(json.dumps(values))
    logged, _ = run(section, tiny_engine(section, len(tokenizer)), text_stream(tokenizer))
    name = "pretrain/nll_per_masked_token"
    assert logged[0][name] > 5.0  # ln 262 = 5.6
    assert sum(m[name] for m in logged[-5:]) / 5 < 3.5
    assert all(m["pretrain/grad_norm"] > 0 for m in logged)
    assert logged[0]["pretrain/lr"] > logged[-1]["pretrain/lr"]  # cosine


def test_accumulation_changes_nothing(
    make_stage: MakeStage, tokenizer: PreTrainedTokenizerFast
) -> None:
    """4 x 1 row = 1 x 4 rows, on the objective that draws no noise."""
    losses = []
    for size in (1, 4):
        values = make_stage(
            "s", "ar", "embedded:sft", steps=5, row_length=64, rows_per_micro_batch=size
        )
        section = StageSection.model_validate_json(json.dumps(values))
        engine = tiny_engine(section, len(tokenizer))
        assert isinstance(engine, TorchEngine)
        logged, _ = run(section, engine, text_stream(tokenizer))
        losses.append([m["pretrain/loss"] for m in logged])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("objective", ["ar", "block"])
def test_deepspeed_equals_torch(
    make_stage: MakeStage, tokenizer: PreTrainedTokenizerFast, objective: str
) -> None:
    values = make_stage("s", objective, "embedded:sft", steps=5, row_length=64)
    section = StageSection.model_validate_json(json.dumps(values))
    losses = []
    for kind in ("torch", "deepspeed"):
        engine = tiny_engine(section, len(tokenizer), kind)
        logged, _ = run(section, engine, text_stream(tokenizer))
        losses.append([(m["pretrain/loss"], m["pretrain/grad_norm"]) for m in logged])
        engine.close()
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)

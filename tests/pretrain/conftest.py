"""A small tokenizer, a tiny pretraining config, and sinks that remember."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from models.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Nearly one token a byte: lengths are easy to see."""
    return train_tokenizer(["def f(xs):\n    return sum(xs)\n"] * 5, 262)


class Memory:
    """A metrics sink and a progress bar in one."""

    def __init__(self) -> None:
        self.records: list[tuple[str, int, dict[str, float]]] = []
        self.said: list[str] = []

    def log(self, values: Mapping[str, float], *, step: int, stage: str) -> None:
        self.records.append((stage, step, dict(values)))

    def close(self) -> None:
        """Nothing to close."""

    def stage(self, name: str, total: int | None, done: int = 0) -> None:
        """Not remembered."""

    def update(self, done: int, **values: float) -> None:
        """Not remembered."""

    def say(self, text: str) -> None:
        self.said.append(text)

    def series(self, stage: str, name: str = "pretrain/loss") -> list[float]:
        return [values[name] for at, _, values in self.records if at == stage]


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def make_stage() -> Callable[..., dict[str, Any]]:
    """Values of one stage of a config; keywords replace."""

    def make(name: str, objective: str, data: str, **change: Any) -> dict[str, Any]:
        return {
            "name": name,
            "objective": objective,
            "data": data,
            "count": 40,
            "steps": 2,
            "rows_per_step": 4,
            "rows_per_micro_batch": 2,
            "row_length": 128,
            "optim": {"lr": 3e-3, "grad_clip": 1.0},
        } | change

    return make


@pytest.fixture
def make_values(make_stage: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A whole config as plain values: AR, block diffusion and SFT, two steps each."""

    def make(folder: Path, **change: Any) -> dict[str, Any]:
        return {
            "run": {"name": "tiny", "folder": str(folder)},
            "architecture": {
                "model_type": "qwen2",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "tie_word_embeddings": True,
            },
            "tokenizer": {"vocab_size": 300},
            "engine": {"kind": "torch"},
            "stages": [
                make_stage("ar", "ar", "embedded:pretrain"),
                make_stage("block", "block", "embedded:pretrain", warmup={"steps": 1}),
                make_stage("sft", "block", "embedded:sft"),
            ],
        } | change

    return make

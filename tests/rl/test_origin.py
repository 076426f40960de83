"""What a checkpoint says of its run, and how a run that does not fit is told."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.records import Problem
from models.outline import load_outline
from models.tokenizer import load_tokenizer
from rl.origin import Origin, read_origin

PROBLEMS = [Problem("a", "add"), Problem("b", "subtract")]
CONFIG: dict[str, Any] = {
    "run": {"name": "x", "resume": "auto"},
    "optim": {"lr": 1e-3, "betas": (0.9, 0.99)},
    "train": {"steps": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "sft")


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "global_step_3"
    folder.mkdir()
    Origin.of(CONFIG, load_outline(model), PROBLEMS).write(folder)
    return folder


def test_the_same_run_fits_without_a_word(model: Path, checkpoint: Path) -> None:
    assert Origin.of(CONFIG, load_outline(model), PROBLEMS).check(checkpoint) == []
    saved = read_origin(checkpoint)
    assert saved.model["hidden_size"] == 32
    assert saved.model["block_size"] == 4
    assert saved.config["optim"]["lr"] == 1e-3
    assert len(load_tokenizer(checkpoint / "model")) == saved.model["vocab_size"]


def test_a_moved_model_is_the_same_model(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    assert Origin.of(CONFIG, load_outline(moved), PROBLEMS).check(checkpoint) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}, "hidden_size=32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=2"),
        ({"model_type": "llama"}, "model_type=qwen2"),
        ({"block_size": 8}, "block_size=4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_model(
    checkpoint: Path,
    tmp_path: Path,
    write_checkpoint: Callable[..., Path],
    changes: dict[str, Any],
    named: str,
) -> None:
    other = write_checkpoint(tmp_path / "other", **changes)
    with pytest.raises(UserError, match="checkpoint of another model") as caught:
        Origin.of(CONFIG, load_outline(other), PROBLEMS).check(checkpoint)
    assert "\n" not in str(caught.value)
    assert str(other) in str(caught.value)
    assert named in str(caught.value)


def test_other_weights_would_be_another_reference(
    model: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][-1] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"started from other weights.*model\.path"):
        Origin.of(CONFIG, load_outline(other), PROBLEMS).check(checkpoint)


def test_other_settings_and_problems_are_said(model: Path, checkpoint: Path) -> None:
    changed = json.loads(json.dumps(CONFIG))
    changed["optim"]["lr"] = 2e-3
    changed["train"]["steps"] = 8  # going on for longer is no other run
    remarks = Origin.of(changed, load_outline(model), PROBLEMS[::-1]).check(checkpoint)
    assert remarks == [
        "settings changed since the checkpoint: optim.lr 0.001 -> 0.002",
        "the training problems changed since the checkpoint (data.train)",
    ]


@pytest.mark.parametrize(
    ("section", "values", "taken_up"),
    [
        ("optim", {"lr": 2e-3}, True),
        ("algorithm", {"max_staleness": 3}, True),  # what is too old then is found by its version
        ("algorithm", {"estimator": {"mode": "parity"}}, False),
        ("algorithm", {"num_iterations": 4}, False),
        ("rollout", {"group_size": 16}, False),
    ],
)
def test_scored_batches_are_of_the_same_run_or_not(
    model: Path, checkpoint: Path, section: str, values: dict[str, Any], taken_up: bool
) -> None:
    changed = json.loads(json.dumps(CONFIG))
    changed.setdefault(section, {}).update(values)
    assert Origin.of(changed, load_outline(model), PROBLEMS).takes_up(checkpoint) is taken_up


def test_scored_batches_are_of_the_problems_as_they_were(model: Path, checkpoint: Path) -> None:
    """The same names and settings, but somebody has edited the file of the data."""
    edited = [replace(PROBLEMS[0], prompt="another"), *PROBLEMS[1:]]
    outline = load_outline(model)
    assert Origin.of(CONFIG, outline, PROBLEMS).takes_up(checkpoint)
    assert not Origin.of(CONFIG, outline, edited).takes_up(checkpoint)


@pytest.mark.parametrize("text", [None, "{", "{}", '{"folder": "x"}', "[]"])
def test_no_or_damaged_origin(model: Path, checkpoint: Path, text: str | None) -> None:
    path = checkpoint / "origin.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=r"missing|damaged"):
        Origin.of(CONFIG, load_outline(model), PROBLEMS).check(checkpoint)

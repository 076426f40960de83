"""diffusion.json: there and back, and every way it can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from models.spec import DiffusionSpec

GOOD: dict[str, Any] = {
    "mask_token_id": 2,
    "logit_shift": False,
    "attention": "block_causal",
    "block_size": 4,
    "block_origin": "prompt",
}


def write(folder: Path, text: str) -> None:
    (folder / "diffusion.json").write_text(text)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"block_origin": "sequence"},
        {"attention": "causal", "block_size": 1, "logit_shift": True},
        {"attention": "bidirectional", "block_size": None},
    ],
)
def test_there_and_back(tmp_path: Path, change: dict[str, Any]) -> None:
    spec = DiffusionSpec(**GOOD | change)
    spec.save(tmp_path)
    assert json.loads((tmp_path / "diffusion.json").read_text()) == GOOD | change
    assert DiffusionSpec.load(tmp_path) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "blockcausal"}, "is none of causal, bidirectional, block_causal"),
        ({"block_size": None}, "needs a block_size"),
        ({"block_size": 0}, "needs a block_size"),
        # The layout of likelihoods follows the block size: these would be silently wrong.
        ({"attention": "bidirectional"}, "needs block_size null"),
        ({"attention": "causal"}, "needs block_size 1"),
        ({"mask_token_id": "2"}, "mask_token_id must be a number"),
        ({"logit_shift": "no"}, "logit_shift true or false"),
        ({"block_origin": "start"}, "'start' is none of prompt, sequence"),
        (
            {"attention": "causal", "block_size": 1, "block_origin": "sequence"},
            'is for attention block_causal; causal needs "prompt"',
        ),
        ({"blocksize": 4}, "blocksize"),
    ],
)
def test_wrong_values(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, json.dumps(GOOD | change))
    with pytest.raises(UserError, match=message) as raised:
        DiffusionSpec.load(tmp_path)
    assert str(tmp_path / "diffusion.json") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"diffusion\.json: missing"):
        DiffusionSpec.load(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"mask_token_id": 2}'])
def test_damaged_file(tmp_path: Path, text: str) -> None:
    write(tmp_path, text)
    with pytest.raises(UserError, match=r"diffusion\.json"):
        DiffusionSpec.load(tmp_path)

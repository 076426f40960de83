"""Configs of `unmask pretrain`: what fits, and what is refused with the key's name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import load_config
from common.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.stages import StageSection

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
MakeValues = Callable[..., dict[str, Any]]


def load(folder: Path, values: dict[str, Any], *overrides: str) -> PretrainConfig:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(PretrainConfig, path, overrides)


def test_a_good_config(tmp_path: Path, make_values: MakeValues) -> None:
    config = load(tmp_path, make_values(tmp_path / "run"), "run.seed=3", "stages.0.steps=7")
    assert config.run.seed == 3 and config.stages[0].steps == 7
    assert [stage.name for stage in config.stages] == ["ar", "block", "sft"]
    assert config.resume == "auto"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.sed=1", r"run\.sed: unknown key"),
        ("stages.1.block_sise=4", r"stages\.1\.block_sise: unknown key"),
        ("stages.0.optim.lr=fast", r"stages\.0\.optim\.lr"),
        ("stages.0.optim.lr=-1.0", r"stages\.0\.optim.*lr must be positive"),
        ("stages.0.steps=0", r"stages\.0\.steps"),
        ("stages.0.steps=2.5", r"stages\.0\.steps"),
        ("stages.1.objective=blok", r"stages\.1\.objective"),
        ("stages.1.packing=mutual", r"stages\.1\.packing"),
        ("stages.1.name=AR stage", r"stages\.1\.name"),
        ("stages.1.name=ar", "stages must have different names"),
        ("stages.1.rows_per_micro_batch=3", r"stages\.1: .*multiple of rows_per_micro_batch"),
        ("stages.1.block_size=5", r"stages\.1: .*row_length must be a multiple of block_size"),
        ("stages.2.canvas=64", r"stages\.2: .*canvas is for objective bidirectional; block sees"),
        ("stages.1.block_origin=start", r"stages\.1\.block_origin"),
        ("stages.0.block_origin=sequence", r"stages\.0: .*block_origin sequence is for objective"),
        ("stages.1.warmup.u_init=0.0", r"stages\.1\.warmup\.u_init"),
        ("tokenizer.vocab_size=100", r"tokenizer\.vocab_size"),
        ("engine.kind=jax", r"engine\.kind"),
        ("engine.lora.rank=4", r"engine\.lora: adapters need a trained model"),
        ("resume=sometimes", "resume"),
    ],
)
def test_mistakes_name_key_and_file(
    tmp_path: Path, make_values: MakeValues, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path, make_values(tmp_path / "run"), override)
    assert "tiny.yaml" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_good(path: Path) -> None:
    config = load_config(PretrainConfig, path)
    assert config.stages[-1].data == "embedded:sft"


def test_the_bidirectional_canvas_is_what_rl_decodes() -> None:
    sft = load_config(PretrainConfig, CONFIGS / "bidirectional_cpu.yaml").stages[-1]
    rl = yaml.safe_load((CONFIGS.parent / "rl" / "tiny_cpu.yaml").read_text())
    assert sft.canvas == rl["rollout"]["decoding"]["gen_length"]


def test_no_model_and_no_start(tmp_path: Path, make_values: MakeValues) -> None:
    with pytest.raises(UserError, match=r"architecture\.model_type is missing"):
        load(tmp_path, make_values(tmp_path, architecture={}))


def test_no_stages(tmp_path: Path, make_values: MakeValues) -> None:
    with pytest.raises(UserError, match="stages"):
        load(tmp_path, make_values(tmp_path, stages=[]))


@pytest.mark.parametrize(
    ("objective", "shift", "expected"),
    [
        ("ar", False, ("causal", True, 1)),  # next-token: position i from i - 1
        ("causal_diffusion", False, ("causal", False, 1)),
        ("causal_diffusion", True, ("causal", True, 1)),
        ("block", False, ("block_causal", False, 4)),
        ("block", True, ("block_causal", True, 4)),
        ("bidirectional", False, ("bidirectional", False, None)),
        ("bidirectional", True, ("bidirectional", True, None)),
    ],
)
def test_what_a_stage_makes(
    make_stage: MakeValues, objective: str, shift: bool, expected: tuple[Any, ...]
) -> None:
    values = make_stage("s", objective, "embedded:sft", logit_shift=shift)
    spec = StageSection.model_validate_json(json.dumps(values)).spec(2)
    assert (spec.attention, spec.logit_shift, spec.block_size) == expected
    assert spec.mask_token_id == 2


def test_a_stage_may_count_blocks_from_the_sequences_start(make_stage: MakeValues) -> None:
    values = make_stage("s", "block", "embedded:sft", block_origin="sequence")
    spec = StageSection.model_validate_json(json.dumps(values)).spec(2)
    assert (spec.block_origin, spec.block_size) == ("sequence", 4)

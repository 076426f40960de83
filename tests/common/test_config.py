"""Every bad config ends in one line that names the key and the file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from common.config import Section, dump_config, load_config
from common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Maths:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    block_size: int | None = None
    betas: tuple[float, float] = (0.9, 0.99)


class Train(Section):
    steps: int
    kind: Literal["a", "b"] = "a"


class Config(Section):
    train: Train
    maths: Maths = Maths()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  steps: 3\nmaths:\n  betas: [0.5, 0.75]\n")
    return path


def test_file_and_overrides_are_merged(file: Path) -> None:
    config = load_config(Config, file, ["train.steps=7", "maths.block_size=4"])
    assert config == Config(train=Train(steps=7), maths=Maths(block_size=4, betas=(0.5, 0.75)))


def test_a_dumped_config_loads_to_the_same(file: Path, tmp_path: Path) -> None:
    config = load_config(Config, file)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(Config, copy) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stpes=3", "train.stpes: unknown key"),
        ("maths.blocks=3", "maths.blocks: unknown key"),
        ("train.steps=three", "train.steps: "),
        ("train.steps=1.5", "train.steps: "),
        ("train.kind=c", "train.kind: "),
        ("maths.betas=[1.0]", "maths.betas"),
        ("train.steps", "write it as key=value"),
        ("--steps=3", "write it as key=value"),
        ("train.steps=${nowhere}", "nowhere"),
    ],
)
def test_bad_input_is_one_line_naming_the_key(file: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Config, file, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_missing_key_and_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_config(Config, tmp_path / "none.yaml")
    empty = tmp_path / "empty.yaml"
    empty.write_text("maths: {}\n")
    with pytest.raises(UserError, match=r"empty\.yaml: train: missing"):
        load_config(Config, empty)
    listed = tmp_path / "list.yaml"
    listed.write_text("- 1\n")
    with pytest.raises(UserError, match=r"list\.yaml"):
        load_config(Config, listed)
    torn = tmp_path / "torn.yaml"
    torn.write_text("train: {steps: 3\n")
    with pytest.raises(UserError, match=r"torn\.yaml"):
        load_config(Config, torn)


def test_a_config_reads_variables(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_STEPS", "9")
    values = ["train.steps=${oc.decode:${oc.env:UNMASK_STEPS}}"]
    assert load_config(Config, file, values).train.steps == 9
    assert load_config(Config, file, ["train.kind=${oc.env:UNMASK_NONE,b}"]).train.kind == "b"


def test_a_config_reads_no_secrets(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "b")
    with pytest.raises(UserError) as caught:
        load_config(Config, file, ["train.kind=${oc.env:HF_TOKEN}"])
    assert "oc.env:HF_TOKEN" in str(caught.value) and "\n" not in str(caught.value)

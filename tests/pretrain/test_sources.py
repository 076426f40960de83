"""Where text comes from, and every file that is not text."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from pretrain.data import Example
from pretrain.sources import load_examples


def write_lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_embedded_pretrain_is_plain_code() -> None:
    examples = load_examples("embedded:pretrain", 20, seed=0)
    assert len(examples) == 20 and all(not e.prompt and "def f(" in e.text for e in examples)
    assert examples == load_examples("embedded:pretrain", 20, seed=0)
    assert examples != load_examples("embedded:pretrain", 20, seed=1)


def test_embedded_sft_is_pairs() -> None:
    examples = load_examples("embedded:sft", 20, seed=0)
    assert all(e.prompt and "def f(" in e.text and "def f(" not in e.prompt for e in examples)


@pytest.mark.parametrize("split", ["rl", "test", "", "Pretrain"])
def test_splits_that_are_not_for_pretraining(split: str) -> None:
    with pytest.raises(UserError, match="only embedded:pretrain and embedded:sft"):
        load_examples(f"embedded:{split}", 5, seed=0)


def test_jsonl_of_texts(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "code.jsonl", {"text": "a = 1\n"}, {"text": "b"})
    assert load_examples(source, 1, 0) == [Example("a = 1\n"), Example("b")]


def test_jsonl_of_pairs(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "sft.jsonl", {"prompt": "p", "completion": "c", "id": 3})
    assert load_examples(source, 1, 0) == [Example("c", "p")]


def test_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    path = tmp_path / "code.parquet"
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(path)
    assert load_examples(str(path), 1, 0) == [Example("a"), Example("b")]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "code.jsonl"
    assert load_examples(write_lines(path, {"text": "old"}), 1, 0) == [Example("old")]
    assert load_examples(write_lines(path, {"text": "new"}), 1, 0) == [Example("new")]


BAD = {
    "missing.jsonl": (None, "no such file"),
    "code.csv": ("text\na\n", "give embedded:pretrain, embedded:sft, .jsonl or .parquet"),
    "columns.jsonl": ('{"code": "a"}\n', r"needs the column `text`.*has \['code'\]"),
    "half.jsonl": ('{"prompt": "a"}\n', r"needs the column `text`, or `prompt` and `completion`"),
    "number.jsonl": ('{"text": "a"}\n{"text": 3}\n', "row 2: text must be non-empty text"),
    "empty_text.jsonl": ('{"text": ""}\n', "row 1: text must be non-empty text"),
    "null.jsonl": ('{"text": "a"}\n{"text": null}\n', "row 2: text must be non-empty text"),
    "cut.jsonl": ('{"text": "a"}\n{"text": ', "cannot be read as json"),
    "empty.jsonl": ("", "cannot be read as json"),
    "cut.parquet": ("PAR1", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_end_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        load_examples(str(path), 1, 0)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)

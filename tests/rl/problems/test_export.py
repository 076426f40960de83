"""The public format, and the way back through the loader."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from rl.data import load_problems
from rl.problems.export import export_split
from rl.problems.splits import SplitName, build_problems, pretrain_documents, sft_pairs


@pytest.mark.parametrize("split", ["rl", "test"])
def test_problems_come_back_through_the_loader(tmp_path: Path, split: SplitName) -> None:
    path = tmp_path / "new" / "problems.jsonl"
    assert export_split(split, path, seed=1, count=20) == 20
    assert load_problems(str(path)) == build_problems(split, 1, 20)


def test_columns_of_the_public_format(tmp_path: Path) -> None:
    path = tmp_path / "rl.jsonl"
    export_split("rl", path, 0, 3)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert set(row) == {
            "problem_id", "prompt", "tests", "entry_point", "data_source", "composition",
        }  # fmt: skip


def test_corpus_and_pairs(tmp_path: Path) -> None:
    export_split("pretrain", tmp_path / "corpus.jsonl", 0, 4)
    rows = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert rows == [{"text": text} for text in pretrain_documents(0, 4)]
    export_split("sft", tmp_path / "sft.jsonl", 0, 4)
    rows = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": p, "completion": c} for p, c in sft_pairs(0, 4)]


def test_nothing_is_left_half_written(tmp_path: Path) -> None:
    export_split("sft", tmp_path / "sft.jsonl", 0, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["sft.jsonl"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export_split("sft", tmp_path / "file" / "sft.jsonl", 0, 2)
    with pytest.raises(UserError, match="the count is 0"):
        export_split("sft", tmp_path / "none.jsonl", 0, 0)
    assert not (tmp_path / "none.jsonl").exists()

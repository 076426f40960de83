"""Writes the embedded splits in the public format, one JSON object per line.

`rl` and `test`: {"problem_id", "prompt", "tests", "entry_point", "data_source", "composition"},
`pretrain`: {"text"}, `sft`: {"prompt", "completion"}. `rl.data.load_problems` reads the former
back.
"""

import json
import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from rl.problems.splits import SplitName, build_problems, pretrain_documents, sft_pairs


def split_rows(split: SplitName, seed: int, count: int) -> list[dict[str, Any]]:
    """The rows of a split as they are written."""
    if split == "pretrain":
        return [{"text": text} for text in pretrain_documents(seed, count)]
    if split == "sft":
        return [{"prompt": prompt, "completion": text} for prompt, text in sft_pairs(seed, count)]
    return [
        {
            "problem_id": problem.problem_id,
            "prompt": problem.prompt,
            "tests": list(problem.tests),
            "entry_point": problem.entry_point,
            "data_source": problem.data_source,
            **problem.columns,
        }
        for problem in build_problems(split, seed, count)
    ]


def export_split(split: SplitName, path: Path, seed: int, count: int) -> int:
    """Write `count` records of a split to `path` (folders are made). Returns the number written.

    The file appears under its name only when it is complete. Raises UserError if it cannot be
    written, or if the split has not as many distinct problems.
    """
    rows = split_rows(split, seed, count)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}), choose another") from error
    return len(rows)

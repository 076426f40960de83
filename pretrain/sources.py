"""Where training text comes from: the embedded splits, or files read through `datasets`.

Not the loader of problems with tests (`rl.data`).
"""

import tempfile
from pathlib import Path
from typing import Any

from common.errors import UserError
from pretrain.data import Example
from rl.problems.splits import pretrain_documents, sft_pairs

EMBEDDED = "embedded:"


def load_examples(source: str, count: int, seed: int) -> list[Example]:
    """Examples of `embedded:pretrain`, `embedded:sft`, or a .jsonl / .parquet file.

    Raises:
        UserError: unknown source, a file that is missing or no JSONL or Parquet, or a row
            without the needed columns.
    """
    if source.startswith(EMBEDDED):
        split = source.removeprefix(EMBEDDED)
        if split == "pretrain":
            return [Example(text) for text in pretrain_documents(seed, count)]
        if split == "sft":
            return [Example(completion, prompt) for prompt, completion in sft_pairs(seed, count)]
        raise UserError(
            f"stages.data {source!r}: only embedded:pretrain and embedded:sft are for pretraining; "
            "the other splits are kept for RL and for the test"
        )
    return _load_file(Path(source))


def _load_file(path: Path) -> list[Example]:
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if path.suffix not in kinds:
        raise UserError(
            f"stages.data {path}: give embedded:pretrain, embedded:sft, .jsonl or .parquet"
        )
    if not path.is_file():
        raise UserError(f"stages.data {path}: no such file")
    rows = _read(kinds[path.suffix], path)
    columns = set(rows.column_names)
    if {"prompt", "completion"} <= columns:
        text, prompt = "completion", "prompt"
    elif "text" in columns:
        text, prompt = "text", None
    else:
        raise UserError(
            f"{path}: needs the column `text`, or `prompt` and `completion`; has {sorted(columns)}"
        )
    examples = []
    for number, row in enumerate(rows, start=1):
        values = (row[text], row[prompt] if prompt else "")
        if not all(isinstance(value, str) for value in values) or not values[0]:
            raise UserError(f"{path}: row {number}: {text} must be non-empty text")
        examples.append(Example(*values))
    return examples


def _read(kind: str, path: Path) -> Any:
    """The rows of a file through `datasets`, in memory: a cache of it would only go stale."""
    import datasets  # slow to import, and not needed for the embedded splits

    datasets.disable_progress_bars()  # the run has its own
    try:
        with tempfile.TemporaryDirectory(prefix="unmask-data-") as cache:
            return datasets.load_dataset(
                kind, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
    except (datasets.exceptions.DatasetsError, OSError, ValueError, StopIteration) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or "it is empty"
        raise UserError(f"{path}: cannot be read as {kind}: {reason}") from error

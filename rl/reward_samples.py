"""Completions to try rewards on: from a JSONL file, or made from embedded problems. Not the trying.

A file has one problem per line with the columns of `rl.data` (`tests` may be missing) and either
`completion` (text) or `completions` (a list of texts: one group).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.records import Completion, Group, Problem, Rollout
from rl.data import json_lines, problem_of
from rl.problems.splits import Solved, solve_problems

EMBEDDED_COUNT = 3
_WORD = re.compile(r"\w+|[^\w\s]")
_REPEATED = 30
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Samples:
    """Groups to score; `labels` name their rollouts, one after the other."""

    groups: list[Group]
    labels: list[str]


def count_words(text: str) -> int:
    """Stands in for a tokenizer: names, numbers and single other characters."""
    return len(_WORD.findall(text))


def read_samples(path: Path, limit: int | None, count_tokens: CountTokens = count_words) -> Samples:
    """The completions in a JSONL file, or those of its first `limit` lines.

    Raises:
        UserError: names the line and the column.
    """
    if not path.is_file():
        raise UserError(f"--data {path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at a U+2028 inside a text
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not UTF-8 (byte {error.start})") from error
    groups: list[Group] = []
    for where, row in json_lines(str(path), lines):
        texts = _completions(where, row)
        columns = {k: v for k, v in row.items() if k not in ("completion", "completions")}
        name = f"{path.stem}/{len(groups):05d}"
        problem = problem_of(where, columns, name, str(path), needs_tests=False)
        groups.append(_group(problem, texts, count_tokens))
        if limit is not None and len(groups) == limit:
            break
    if not groups:
        raise UserError(f"--data {path}: no samples in it")
    labels = [f"{r.problem_id} #{r.sample_index}" for g in groups for r in g.rollouts]
    return Samples(groups, labels)


def _completions(where: str, row: Mapping[str, Any]) -> list[str]:
    one, several = row.get("completion"), row.get("completions")
    if (one is None) == (several is None):
        raise UserError(f"{where}: give one of the columns 'completion' and 'completions'")
    texts = [one] if several is None else several
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{where}: 'completion' must be text, 'completions' a list of texts")
    return texts


def embedded_samples(limit: int | None, count_tokens: CountTokens = count_words) -> Samples:
    """Good, wrong and malformed answers to embedded problems, `limit` problems (default 3).

    Their column `solution` holds the reference program.
    """
    groups, labels = [], []
    for solved in solve_problems("sft", 0, EMBEDDED_COUNT if limit is None else limit):
        answers = _answers(solved)
        columns = {**solved.problem.columns, "solution": solved.chain.code()}
        problem = replace(solved.problem, columns=columns)
        groups.append(_group(problem, list(answers.values()), count_tokens))
        labels += [f"{problem.problem_id} {kind}" for kind in answers]
    return Samples(groups, labels)


def _answers(solved: Solved) -> dict[str, str]:
    code, head = solved.chain.code(), solved.chain.code().splitlines()[0]
    return {
        "good": solved.completion,
        "wordy": f"Here is what I would write:\n\n{solved.completion}\n\nIt should be right.",
        "wrong": f"```python\n{head}\n    return None\n```",
        "repeats": f"```python\n{head}\n" + "    x = 1\n" * _REPEATED + "    return x\n```",
        "syntax error": f"```python\n{code.replace(':', '', 1)}\n```",
        "no fence": code,
        "cut off": f"```python\n{code}",
        "empty": "",
    }


def _group(problem: Problem, texts: Sequence[str], count_tokens: CountTokens) -> Group:
    rollouts = []
    for index, text in enumerate(texts):
        ids = tuple(range(count_tokens(text) + 1))  # their number is what matters; 1 for EOS
        completion = Completion(ids, (), text, "eos", (), ())
        rollouts.append(Rollout(problem.problem_id, index, (), completion, 0, 0))
    return Group(problem, tuple(rollouts))

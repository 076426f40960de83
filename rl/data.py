"""Problems from wherever they live, and the order in which a run meets them.

`load_problems` reads the embedded set, a JSONL or Parquet file, or a Hub data set (files and Hub
through `datasets`) and checks every row. `ProblemStream` is the data cursor: the batch of a step
is computed from the seed and the step alone, so a resumed run needs no more than its step.
Not tokenization, and not the preparation of public data sets.
"""

import json
import random
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from common.errors import UserError
from common.records import Message, Problem, StdinTest
from common.seeding import derive_seed
from rewards.languages import language_named
from rl.problems.splits import SPLITS, SplitName, build_problems
from sandbox.languages import LANGUAGES
from sandbox.records import is_tolerance

EMBEDDED = "embedded:"
EMBEDDED_COUNTS: dict[SplitName, int] = {"pretrain": 4000, "sft": 2000, "rl": 768, "test": 320}
"""How many problems `embedded:<split>` gives when no count is asked for."""

_OWN_COLUMNS = (
    "prompt", "tests", "entry_point", "data_source", "setup", "problem_id", "language",
    "float_tolerance",
)  # fmt: skip
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_Row = tuple[str, Mapping[str, Any]]
"""Where a row stands ("data.jsonl, line 3") and its columns."""


def load_problems(
    source: str,
    split: str | None = None,
    limit: int | None = None,
    *,
    seed: int = 0,
    count: int | None = None,
) -> list[Problem]:
    """All problems of `source`, or the first `limit`.

    `source` is `embedded:<split>` (`seed` and `count` choose them), a path that ends in .jsonl,
    .json or .parquet, or the name of a Hub data set. `split` is the split of a file or Hub data
    set in the notation of `datasets` (default `train`; `train[:100]` works).

    Columns: `prompt` (text, or messages with `role` and `content`), `tests` (asserts, or objects
    with `stdin` and `stdout`), optional `entry_point`, `data_source`, `setup`, `problem_id` (or
    `task_id`), and for tests with `stdin` `language` (default Python; also as fences call it) and
    `float_tolerance`; the others go to `Problem.columns`. Raises UserError naming file, row and
    column.
    """
    if limit is not None and limit < 1:
        raise UserError(f"{source}: the limit is {limit}, it must be at least 1")
    if source.startswith(EMBEDDED):
        if split is not None:
            raise UserError(f"{source}: drop split={split!r}, the split is part of this source")
        return _embedded(source, seed, count, limit)
    if count is not None:
        raise UserError(f"{source}: `count` is for embedded:<split>; use `limit` here")
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for where, row in _rows(source, split or "train"):
        problem = problem_of(where, row, f"{Path(source).stem}/{len(problems):05d}", source)
        if problem.problem_id in seen:
            raise UserError(
                f"{where}: problem_id {problem.problem_id!r} is taken by "
                f"{seen[problem.problem_id]}: make the ids unique"
            )
        seen[problem.problem_id] = where
        problems.append(problem)
        if limit is not None and len(problems) == limit:
            break
    if not problems:
        raise UserError(f"{source}: no problems in it")
    return problems


def take_problems(source: str, count: int | None, seed: int) -> list[Problem]:
    """`count` problems of `source`: drawn by `seed` if it is embedded, else the first.

    count None: as many as the source gives.

    Raises:
        UserError: see `load_problems`.
    """
    if source.startswith(EMBEDDED):
        return load_problems(source, seed=seed, count=count)
    return load_problems(source, limit=count)


def _embedded(source: str, seed: int, count: int | None, limit: int | None) -> list[Problem]:
    name = source.removeprefix(EMBEDDED)
    for split in SPLITS:
        if split == name:
            wanted = EMBEDDED_COUNTS[split] if count is None else count
            return build_problems(split, seed, wanted if limit is None else min(wanted, limit))
    raise UserError(f"{source}: no such split, use one of {', '.join(get_args(SplitName))}")


def _rows(source: str, split: str) -> Iterator[_Row]:
    path = Path(source)
    if path.is_dir():
        raise UserError(f"{source}: is a folder, name a .jsonl or .parquet file in it")
    readers = {".jsonl": "text", ".json": "json", ".parquet": "parquet"}
    if path.suffix not in readers:
        if path.exists():
            raise UserError(f"{source}: unknown file type, use .jsonl, .json or .parquet")
        if not _HUB_NAME.fullmatch(source):
            raise UserError(f"{source}: no such file, nor the name of a Hub data set")
        yield from _numbered(source, _read(source, split, source, {}))
        return
    if not path.is_file():
        raise UserError(f"{source}: no such file, check the path")
    with tempfile.TemporaryDirectory(prefix="unmask-data-") as cache:
        # A cache of a local file would only go stale; in memory, rows outlive the folder.
        options = {"data_files": str(path), "cache_dir": cache, "keep_in_memory": True}
        if path.suffix == ".jsonl":
            options["sample_by"] = "line"
        rows = _read(readers[path.suffix], split, source, options)
        if path.suffix == ".jsonl":
            yield from json_lines(source, (row["text"] for row in rows))
        else:
            yield from _numbered(source, rows)


def _read(builder: str, split: str, source: str, options: dict[str, Any]) -> Any:
    """One split through `datasets`; whatever it refuses becomes one line about `source`."""
    import datasets  # slow to import, and not needed for the embedded set

    try:
        with _quiet(datasets):
            return datasets.load_dataset(builder, split=split, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{source}: `datasets` cannot read split {split!r}: {reason}") from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars of `datasets`: the run has its own."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def json_lines(source: str, lines: Iterable[str]) -> Iterator[_Row]:
    """JSON lines parsed here, not by Arrow: exact line numbers, and no text turned into dates."""
    for number, line in enumerate(lines, start=1):
        where = f"{source}, line {number}"
        if not line.strip():
            continue
        try:
            columns = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error.msg} at {error.colno})") from error
        if not isinstance(columns, dict):
            raise UserError(f"{where}: expected a JSON object with `prompt` and `tests`")
        yield where, columns


def _numbered(source: str, rows: Any) -> Iterator[_Row]:
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row


def problem_of(
    where: str, row: Mapping[str, Any], default_id: str, source: str, needs_tests: bool = True
) -> Problem:
    """The problem in one row.

    Raises:
        UserError: a column that is missing or malformed, or a test that does not compile.
    """
    for column in ("prompt", "tests") if needs_tests else ("prompt",):
        if row.get(column) is None:
            found = ", ".join(row) or "none"
            raise UserError(f"{where}: column {column!r} is missing (found: {found}): add it")
    id_column = "problem_id" if row.get("problem_id") is not None else "task_id"
    problem_id = row.get(id_column)
    if isinstance(problem_id, int):
        problem_id = str(problem_id)
    checked = {id_column: problem_id}
    asserts, stdin_tests = ((), ()) if row.get("tests") is None else _tests(where, row["tests"])
    setup = _text(where, row, "setup") or ""
    _check_compiles(where, setup, asserts)
    return Problem(
        problem_id=_text(where, checked, id_column) or default_id,
        prompt=_prompt(where, row["prompt"]),
        tests=asserts,
        stdin_tests=stdin_tests,
        setup=setup,
        entry_point=_text(where, row, "entry_point"),
        data_source=_text(where, row, "data_source") or source,
        columns={k: v for k, v in row.items() if k not in (*_OWN_COLUMNS, id_column)},
        language=_language(where, row, asserts),
        float_tolerance=_tolerance(where, row, asserts),
    )


def _language(where: str, row: Mapping[str, Any], asserts: Sequence[str]) -> str:
    given = _text(where, row, "language")
    language = "python" if given is None else language_named(given)
    if language is None:
        raise UserError(
            f"{where}: column 'language' is {given!r}, use one of {', '.join(LANGUAGES)} "
            "(or rename the column if it says something else)"
        )
    if asserts and language != "python":
        raise UserError(
            f"{where}: column 'tests' holds asserts, which are Python: give {language} programs "
            "objects with `stdin` and `stdout`"
        )
    return language


def _tolerance(where: str, row: Mapping[str, Any], asserts: Sequence[str]) -> float | None:
    value = row.get("float_tolerance")
    if value is None:
        return None
    if not is_tolerance(value):
        raise UserError(
            f"{where}: column 'float_tolerance' must be a number above 0 and below 1, it is "
            f"{_kind(value)}"
        )
    if asserts:
        raise UserError(
            f"{where}: column 'float_tolerance' is for tests with `stdin` and `stdout`: drop it"
        )
    return float(value)


def _text(where: str, row: Mapping[str, Any], column: str) -> str | None:
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"{where}: column {column!r} must be text, it is {_kind(value)}")


def _prompt(where: str, value: Any) -> str | tuple[Message, ...]:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(_is_record(m, "role", "content") for m in value):
        return tuple(Message(m["role"], m["content"]) for m in value)
    raise UserError(
        f"{where}: column 'prompt' must be non-empty text or a list of messages with text `role` "
        f"and `content`, it is {_kind(value)}"
    )


def _tests(where: str, value: Any) -> tuple[tuple[str, ...], tuple[StdinTest, ...]]:
    if isinstance(value, list) and not value:
        raise UserError(f"{where}: column 'tests' is empty: give the problem tests or drop the row")
    if isinstance(value, list) and all(isinstance(t, str) and t.strip() for t in value):
        return tuple(value), ()
    if isinstance(value, list) and all(_is_record(t, "stdin", "stdout") for t in value):
        return (), tuple(StdinTest(t["stdin"], t["stdout"]) for t in value)
    raise UserError(
        f"{where}: column 'tests' must be a list of assert statements or a list of objects with "
        f"text `stdin` and `stdout`, it is {_kind(value)}"
    )


def _check_compiles(where: str, setup: str, tests: Sequence[str]) -> None:
    """A test that no program can pass would cost every sample of its problem, run after run."""
    named = [("column 'setup'", setup)] if tests else []
    named += [(f"column 'tests', test {i}", test) for i, test in enumerate(tests, start=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for what, text in named:
            try:
                compile(text, "<test>", "exec", dont_inherit=True)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                reason = error.msg if isinstance(error, SyntaxError) else str(error)
                line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
                raise UserError(
                    f"{where}: {what} does not compile ({reason}{line}): correct it or drop the row"
                ) from error


def _is_record(value: Any, *keys: str) -> bool:
    """Whether `value` is an object with exactly these keys, all text."""
    return (
        isinstance(value, dict)
        and set(value) == set(keys)
        and all(isinstance(item, str) for item in value.values())
    )


def _kind(value: Any) -> str:
    shown = json.dumps(value, default=str, ensure_ascii=False)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def check_prompt_lengths(
    problems: Sequence[Problem], lengths: Sequence[int], limit: int, *, source: str = "the data"
) -> None:
    """Raise UserError if a prompt has more than `limit` tokens; `lengths[i]` is problem i's."""
    over = [i for i, length in enumerate(lengths) if length > limit]
    if len(problems) != len(lengths):
        raise ValueError(f"{len(problems)} problems but {len(lengths)} lengths")
    if over:
        first = over[0]
        raise UserError(
            f"{source}, row {first + 1} ({problems[first].problem_id}): the prompt has "
            f"{lengths[first]} tokens, the limit is {limit} ({len(over)} of {len(problems)} rows "
            f"are over it, the longest has {max(lengths)}): raise the limit or drop these rows"
        )


class ProblemStream:
    """Batches of problems by step: each epoch a new shuffle, no problem twice in an epoch.

    An epoch is `len(problems) // batch_size` steps; what is left over waits for another epoch's
    shuffle. Nothing is consumed: `batch(step)` may be asked in any order, in any process.
    """

    def __init__(self, problems: Sequence[Problem], batch_size: int, seed: int) -> None:
        """Raises UserError if there are fewer problems than one batch needs."""
        if not 1 <= batch_size <= len(problems):
            raise UserError(
                f"a batch of {batch_size} problems cannot be drawn from {len(problems)}: "
                "lower the number of prompts per step or give more problems"
            )
        self._problems = tuple(problems)
        self._batch_size = batch_size
        self._seed = seed

    @property
    def steps_per_epoch(self) -> int:
        return len(self._problems) // self._batch_size

    def batch(self, step: int) -> list[Problem]:
        """The problems of `step`, counted from 0."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self._batch_size
        order = _epoch_order(len(self._problems), self._seed, epoch)
        return [self._problems[i] for i in order[start : start + self._batch_size]]


@lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(random.Random(derive_seed(seed, "epoch", epoch)).sample(range(count), count))

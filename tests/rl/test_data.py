"""The loader's contract and its one-line errors; the stream's arithmetic."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.records import Message, Problem, StdinTest
from rl.data import (
    EMBEDDED_COUNTS,
    ProblemStream,
    check_prompt_lengths,
    load_problems,
    take_problems,
)
from rl.problems.splits import build_problems

ROW: dict[str, Any] = {"prompt": "Add one.", "tests": ["assert f(1) == 2"]}


def write(path: Path, *rows: Mapping[str, Any] | str) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def one_line_error(source: str, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_problems(source, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- reading -------------------------------------------------------------------------------


def test_embedded_sources() -> None:
    assert load_problems("embedded:test", seed=4, count=9) == build_problems("test", 4, 9)
    assert load_problems("embedded:rl", seed=4, count=9, limit=2) == build_problems("rl", 4, 2)
    assert len(load_problems("embedded:test")) == EMBEDDED_COUNTS["test"] >= 300
    assert load_problems("embedded:sft", count=1)[0].problem_id == "embedded/sft/0000"


def test_a_number_of_problems_from_anywhere(tmp_path: Path) -> None:
    assert take_problems("embedded:rl", 3, 4) == build_problems("rl", 4, 3)
    assert len(take_problems("embedded:test", None, 4)) == EMBEDDED_COUNTS["test"]
    source = write(tmp_path / "mine.jsonl", ROW, ROW, ROW)
    assert take_problems(source, 2, 4) == load_problems(source)[:2]
    assert take_problems(source, None, 4) == load_problems(source)


def test_all_columns(tmp_path: Path) -> None:
    source = write(
        tmp_path / "mine.jsonl",
        {
            "problem_id": "p1", "prompt": "Add.", "tests": ["assert f() == 1"],
            "setup": "import os", "entry_point": "f", "data_source": "me",
            "level": 3, "tags": ["a", {"b": None}], "added": "2020-01-01", "task_id": 9,
        },
        "",
        {"task_id": 7, **ROW},
        {
            "prompt": [{"role": "user", "content": "Echo."}],
            "tests": [{"stdin": "1", "stdout": "2"}],
        },
    )  # fmt: skip
    assert load_problems(source) == [
        Problem(
            problem_id="p1",
            prompt="Add.",
            tests=("assert f() == 1",),
            setup="import os",
            entry_point="f",
            data_source="me",
            columns={"level": 3, "tags": ["a", {"b": None}], "added": "2020-01-01", "task_id": 9},
        ),
        Problem(problem_id="7", prompt="Add one.", tests=("assert f(1) == 2",), data_source=source),
        Problem(
            problem_id="mine/00002",
            prompt=(Message("user", "Echo."),),
            stdin_tests=(StdinTest("1", "2"),),
            data_source=source,
        ),
    ]
    assert [problem.problem_id for problem in load_problems(source, limit=2)] == ["p1", "7"]
    assert [p.problem_id for p in load_problems(source, split="train[:1]")] == ["p1"]


@pytest.mark.parametrize("tests", [["assert f(1) == 2"], [{"stdin": "a\n", "stdout": "b\n"}]])
def test_parquet_equals_jsonl(tmp_path: Path, tests: list[Any]) -> None:
    import datasets

    rows = [
        {"problem_id": f"p{i}", "prompt": f"Add {i}.", "tests": tests * (i + 1), "data_source": "x",
         "entry_point": "f", "level": i}
        for i in range(5)
    ]  # fmt: skip
    source = write(tmp_path / "rows.jsonl", *rows)
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert load_problems(str(tmp_path / "rows.parquet")) == load_problems(source)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert load_problems(str(tmp_path / "rows.json")) == load_problems(source)


def test_chat_prompts_in_parquet(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": [{"role": "user", "content": "Hi."}], "tests": ["assert True"]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "chat.parquet"))
    assert load_problems(str(tmp_path / "chat.parquet"))[0].prompt == (Message("user", "Hi."),)


def test_hub_names_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(name: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return [ROW]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    problems = load_problems("some-one/code_set.v1", split="validation")
    assert asked == [("some-one/code_set.v1", "validation")]
    assert problems[0].data_source == "some-one/code_set.v1"


def test_a_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, *, split: str) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = one_line_error("some-one/set")
    assert message.startswith("some-one/set: ") and "Couldn't reach the Hub" in message


def test_progress_bars_are_as_before(tmp_path: Path) -> None:
    import datasets

    before = datasets.is_progress_bar_enabled()
    load_problems(write(tmp_path / "a.jsonl", ROW))
    assert datasets.is_progress_bar_enabled() == before


# --- bad input: the message names file, row and column ----------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"tests": ["assert 1"]}, "column 'prompt' is missing (found: tests)"),
        (
            {"prompt": "p", "test_cases": []},
            "column 'tests' is missing (found: prompt, test_cases)",
        ),
        ({"prompt": "p", "tests": []}, "column 'tests' is empty"),
        ({"prompt": "p", "tests": "assert 1"}, "column 'tests' must be a list of assert"),
        ({"prompt": "p", "tests": [1]}, "it is list [1]"),
        ({"prompt": "p", "tests": [" "]}, "column 'tests' must be"),
        ({"prompt": "p", "tests": ["a", {"stdin": "", "stdout": ""}]}, "column 'tests' must be"),
        ({"prompt": "p", "tests": [{"stdin": "1"}]}, "column 'tests' must be"),
        ({"prompt": "p", "tests": [{"stdin": 1, "stdout": "2"}]}, "column 'tests' must be"),
        ({"prompt": 3, "tests": ["a"]}, "column 'prompt' must be non-empty text"),
        ({"prompt": " ", "tests": ["a"]}, "column 'prompt' must be non-empty text"),
        ({"prompt": [], "tests": ["a"]}, "column 'prompt' must be"),
        ({"prompt": [{"role": "user"}], "tests": ["a"]}, "column 'prompt' must be"),
        ({**ROW, "entry_point": 5}, "column 'entry_point' must be text, it is int 5"),
        ({**ROW, "setup": ["x"]}, "column 'setup' must be text"),
        ({**ROW, "problem_id": [1]}, "column 'problem_id' must be text"),
        ({**ROW, "task_id": 1.5}, "column 'task_id' must be text"),
        ({"prompt": "p", "tests": ["assert 1", "assert f("]}, "column 'tests', test 2 does not"),
        ({**ROW, "tests": ["return 1"]}, "test 1 does not compile ('return' outside function"),
        ({**ROW, "tests": ["x = '\x00'"]}, "test 1 does not compile"),
        ({**ROW, "setup": "import"}, "column 'setup' does not compile (invalid syntax, line 1)"),
        ('{"prompt": "p", ', "not valid JSON ("),
        ("[1, 2]", "expected a JSON object"),
    ],
)
def test_bad_rows(tmp_path: Path, row: Any, expected: str) -> None:
    source = write(tmp_path / "bad.jsonl", ROW, row)
    message = one_line_error(source)
    assert message.startswith(f"{source}, line 2: ")
    assert expected in message


def test_tests_with_warnings_compile(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    source = write(tmp_path / "a.jsonl", {**ROW, "tests": ["assert f() is 1", "assert '\\d'"]})
    assert len(load_problems(source)[0].tests) == 2
    assert not [w for w in recwarn if issubclass(w.category, SyntaxWarning)]


def test_bad_row_of_a_parquet_file(tmp_path: Path) -> None:
    import datasets

    path = str(tmp_path / "bad.parquet")
    datasets.Dataset.from_list([ROW, {"prompt": "p", "tests": []}]).to_parquet(path)
    assert one_line_error(path).startswith(f"{path}, row 2: column 'tests' is empty")


def test_repeated_ids(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {**ROW, "problem_id": "p"}, {**ROW, "problem_id": "p"})
    message = one_line_error(source)
    assert message.startswith(f"{source}, line 2: problem_id 'p' is taken by {source}, line 1")


def test_bad_sources(tmp_path: Path) -> None:
    assert "no such file" in one_line_error(str(tmp_path / "none.jsonl"))
    assert "no such file, nor the name" in one_line_error(str(tmp_path / "none"))
    assert "is a folder" in one_line_error(str(tmp_path))
    assert "unknown file type" in one_line_error(write(tmp_path / "a.csv", "prompt,tests"))
    assert "cannot read split 'train'" in one_line_error(write(tmp_path / "empty.jsonl"))
    assert "no problems in it" in one_line_error(write(tmp_path / "blank.jsonl", "", ""))
    good = write(tmp_path / "good.jsonl", ROW)
    assert 'Unknown split "test"' in one_line_error(good, split="test")
    assert "the limit is 0" in one_line_error(good, limit=0)
    assert "`count` is for embedded" in one_line_error(good, count=3)
    assert "cannot read" in one_line_error(write(tmp_path / "not.parquet", "hello"))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    assert "cannot read" in one_line_error(str(tmp_path / "latin.jsonl"))


def test_bad_embedded_sources() -> None:
    assert "no such split, use one of pretrain, sft, rl, test" in one_line_error("embedded:dev")
    assert "drop split='rl'" in one_line_error("embedded:rl", split="rl")
    assert "the count is 0" in one_line_error("embedded:rl", count=0)
    assert "nor the name of a Hub data set" in one_line_error("embedded")


def test_prompt_lengths() -> None:
    problems = build_problems("rl", 0, 3)
    check_prompt_lengths(problems, [4, 5, 5], 5)
    with pytest.raises(UserError) as caught:
        check_prompt_lengths(problems, [4, 6, 9], 5, source="x.jsonl")
    assert str(caught.value) == (
        "x.jsonl, row 2 (embedded/rl/0001): the prompt has 6 tokens, the limit is 5 "
        "(2 of 3 rows are over it, the longest has 9): raise the limit or drop these rows"
    )
    with pytest.raises(ValueError, match="3 problems but 1 lengths"):
        check_prompt_lengths(problems, [1], 5)


# --- the stream ------------------------------------------------------------------------------


def problems(count: int) -> list[Problem]:
    return [Problem(problem_id=str(i), prompt="p") for i in range(count)]


def ids(batch: list[Problem]) -> list[str]:
    return [problem.problem_id for problem in batch]


def test_an_epoch_meets_each_problem_once() -> None:
    stream = ProblemStream(problems(12), batch_size=4, seed=0)
    assert stream.steps_per_epoch == 3
    first = [i for step in range(3) for i in ids(stream.batch(step))]
    second = [i for step in range(3, 6) for i in ids(stream.batch(step))]
    assert sorted(first) == sorted(second) == sorted(str(i) for i in range(12))
    assert first != second


def test_a_remainder_is_left_out_but_not_always_the_same() -> None:
    stream = ProblemStream(problems(10), batch_size=4, seed=0)
    assert stream.steps_per_epoch == 2
    left_out = set()
    for epoch in range(10):
        met = [i for step in (2 * epoch, 2 * epoch + 1) for i in ids(stream.batch(step))]
        assert len(set(met)) == 8
        left_out |= {str(i) for i in range(10)} - set(met)
    assert len(left_out) > 4


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    stream = ProblemStream(problems(50), batch_size=8, seed=3)
    forwards = [ids(stream.batch(step)) for step in range(30)]
    resumed = ProblemStream(problems(50), batch_size=8, seed=3)
    assert [ids(resumed.batch(step)) for step in reversed(range(30))] == forwards[::-1]
    assert ids(pickle.loads(pickle.dumps(stream)).batch(17)) == forwards[17]
    assert ids(ProblemStream(problems(50), batch_size=8, seed=4).batch(0)) != forwards[0]


def test_stream_bounds() -> None:
    assert len(ProblemStream(problems(4), batch_size=4, seed=0).batch(9)) == 4
    for batch_size in (0, 5):
        with pytest.raises(UserError, match=f"a batch of {batch_size} problems"):
            ProblemStream(problems(4), batch_size=batch_size, seed=0)
    with pytest.raises(ValueError, match="step -1"):
        ProblemStream(problems(4), batch_size=2, seed=0).batch(-1)

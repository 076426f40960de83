"""`unmask reward check`: what it reads, what it finds, what it prints, how it ends."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rewards.builtin import BUILTIN
from rewards.compose import RewardConfig, Rewarder, RewardSection
from rewards.load import RESERVED
from rl.cli import app
from rl.reward_check import examine
from rl.reward_samples import count_words, embedded_samples, read_samples
from sandbox.records import VERDICTS

ROOT = Path(__file__).resolve().parents[2]
GOOD = "```python\ndef f(x):\n    return x + 1\n```"
ROW: dict[str, Any] = {
    "prompt": "Add one.",
    "completion": GOOD,
    "tests": ["assert f(1) == 2", "assert f(2) == 4"],
    "entry_point": "f",
}
MINE = """
import time

def length(completions, **columns):
    return [{"reward": len(text) / 100, "has_fence": "```" in text} for text in completions]

def constant(completions, **columns):
    return [0.5 for _ in completions]

def never(completions, **columns):
    return [None for _ in completions]

def large(completions, **columns):
    return [100.0 * len(text) for text in completions]

def first(completions, **columns):
    return [float(i) for i in range(len(completions))]

def picky(completions, level, **columns):
    return [level[i] / len(text) for i, text in enumerate(completions)]

def slow(completions, **columns):
    time.sleep(0.2)
    return [float(len(text)) / 100 for text in completions]

def closed(prompts, completions):
    return [1.0 for _ in completions]
"""


@pytest.fixture
def mine(tmp_path: Path) -> Callable[[str], str]:
    (tmp_path / "mine.py").write_text(MINE)
    return lambda name: f"{tmp_path / 'mine.py'}:{name}"


def write(path: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def invoke(*words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    found = CliRunner().invoke(app, ["reward", "check", *map(str, words)], env={"COLUMNS": "160"})
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stdout, found.stderr


def as_json(*words: object) -> tuple[int, dict[str, Any]]:
    code, out, err = invoke(*words, "--json")
    assert err == ""
    return code, json.loads(out)


# --- samples -------------------------------------------------------------------------------


def test_samples_from_a_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {**ROW, "level": 3, "problem_id": "p"},
        "",
        {"prompt": "Say.", "completions": ["one two", ""]},
    )
    samples = read_samples(path, None)
    assert samples.labels == ["p #0", "a/00001 #0", "a/00001 #1"]
    first, second = (group.problem for group in samples.groups)
    assert first.tests == tuple(ROW["tests"]) and first.columns == {"level": 3}
    assert (second.tests, second.columns) == ((), {})
    texts = [r.completion.text for g in samples.groups for r in g.rollouts]
    assert texts == [GOOD, "one two", ""]
    lengths = [len(r.completion.token_ids) for r in samples.groups[1].rollouts]
    assert lengths == [3, 1]  # words and EOS
    assert len(read_samples(path, 1).groups) == 1


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    row = json.dumps({**ROW, "completion": "a\u2028b"}, ensure_ascii=False)
    path = write(tmp_path / "a.jsonl", row)
    assert read_samples(path, None).groups[0].rollouts[0].completion.text == "a\u2028b"


def test_count_words() -> None:
    assert count_words("def f(x):\n    return x+1") == 10


def test_embedded_samples_are_what_they_say() -> None:
    samples = embedded_samples(None)
    assert len(samples.groups) == 3
    with Rewarder(RewardConfig()) as rewarder:
        scored = rewarder.score(samples.groups)
    totals: dict[str, set[float | None]] = {}
    rollouts = [rollout for group in scored.groups for rollout in group.rollouts]
    for label, rollout in zip(samples.labels, rollouts, strict=True):
        assert rollout.score is not None
        totals.setdefault(label.split(" ", 1)[1], set()).add(rollout.score.total)
    assert totals.pop("good") == totals.pop("wordy") == {2.5}
    assert totals.pop("syntax error") == {0.25}
    for kind in ("no fence", "cut off", "empty"):
        assert totals.pop(kind) == {0.0}
    for kind in ("wrong", "repeats"):  # formatted well; some tests may expect None or 1
        assert all(total is not None and 0.5 <= total < 2.5 for total in totals.pop(kind))
    assert totals == {}


# --- what is found -------------------------------------------------------------------------


def warnings(path: str, tmp_path: Path, *rows: Any, **options: Any) -> list[str]:
    section = RewardSection(path=path, **options)
    data = write(tmp_path / "rows.jsonl", *rows)
    settings = RewardConfig(functions=(section,), max_failed_share=1.0)
    with Rewarder(settings) as rewarder:
        return examine(rewarder, settings, read_samples(data, None), per_step=128).warnings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", ["constant: 0.5 for every sample"]),
        ("never", ["never: None for every sample"]),
        ("large", ["large: values up to 4500 drown"]),
        ("first", ["first: 1 of 2 values differ when the sample is alone"]),
        ("length", []),
    ],
)
def test_likely_mistakes(
    mine: Callable[[str], str], tmp_path: Path, name: str, expected: list[str]
) -> None:
    texts = ["x" * 45, "```\ny\n```"]
    found = warnings(mine(name), tmp_path, {"prompt": "p", "completions": texts})
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_text_behind_the_end_and_no_program(mine: Callable[[str], str], tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completions": ["x = 1", "y<|im_end|>more"]}]
    found = warnings(mine("length"), tmp_path, *rows)
    assert found[0].startswith("rows/00000 #1: the text contains <|im_end|>")
    assert found[1].startswith("no completion has a program (code_block: first)")


def test_too_slow_for_a_step(mine: Callable[[str], str], tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completions": [GOOD, GOOD + "x"]}]
    found = warnings(mine("slow"), tmp_path, *rows, timeout_s=5.0)  # 128 * 0.1 s is over it
    assert len(found) == 1 and "for the 128 samples of a step" in found[0]


# --- the command ---------------------------------------------------------------------------


def test_a_plugin_on_a_file(mine: Callable[[str], str], tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", ROW, {**ROW, "completion": "no [red]fence[/red]"})
    code, out, _ = invoke(mine("length"), "--data", data)
    assert code == 0
    assert "a/00000 #0" in out and "0.400" in out and "has_fence 1" in out
    assert "counted as words" in out
    code, record = as_json(mine("length"), "--data", data)
    assert code == 0 and record["failed_share"] == 0.0 and record["warnings"] == []
    assert record["rewards"]["length"]["mean"] == pytest.approx((0.4 + 0.19) / 2)
    assert [row["total"] for row in record["samples"]] == pytest.approx([0.4, 0.19])
    assert record["samples"][1]["extras"] == {"length/has_fence": 0.0}
    assert all(row["seconds"] >= 0 for row in record["samples"])
    code, record = as_json(mine("length"), "--data", data, "--once")
    assert [row["seconds"] for row in record["samples"]] == [None, None]


def test_a_failing_sample_is_exit_1(mine: Callable[[str], str], tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", {**ROW, "level": 2}, {**ROW, "completion": "", "level": 3})
    code, out, _ = invoke(mine("picky"), "--data", data)
    assert code == 1
    assert "1 of 2 samples failed" in out and "Traceback" in out and "ZeroDivisionError" in out
    code, record = as_json(mine("picky"), "--data", data)
    assert code == 1 and record["failed_share"] == 0.5
    assert record["rewards"]["picky"]["failed"] == 1.0
    assert record["samples"][1]["total"] is None
    assert "'a/00001' sample 0" in record["samples"][1]["error"]


def test_a_built_in_with_options(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", {"prompt": "p", "completions": ["a b a b a b", "a"]})
    words = ("repetition", "--data", data, "-o", "ngram=2", "--option", "max_penalty=-1e-1")
    code, record = as_json(*words)
    assert code == 0
    assert [row["total"] for row in record["samples"]] == pytest.approx([-0.06, 0.0])


def test_the_embedded_samples_through_the_sandbox() -> None:
    code, record = as_json("code")
    assert code == 0
    values = {row["sample"]: row["rewards"]["code"] for row in record["samples"]}
    assert values["embedded/sft/0000 good"] == 1.0 and values["embedded/sft/0000 empty"] == 0.0
    assert record["sandbox"]["sandbox/tests"] > 0
    assert set(record["samples"][0]["verdicts"]) == {"pass"}
    code, out, _ = invoke("code", "--limit", 1)
    assert code == 0 and "sandbox: " in out and "embedded/sft/0001" not in out


def test_no_tests_is_an_error_of_code_that_names_the_problem(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", {"prompt": "p", "completion": GOOD, "problem_id": "mine"})
    code, record = as_json("code", "--data", data)
    assert code == 1
    assert "problem 'mine' sample 0: has no tests" in record["samples"][0]["error"]


def test_all_rewards_of_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load((ROOT / "configs/rl/tiny_cpu.yaml").read_text())
    settings["model"]["path"] = str(tmp_path / "none")  # not what a demo may have left in runs/
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    code, record = as_json("--config", config)
    assert code == 0 and list(record["rewards"]) == ["code", "code_format"]
    assert record["samples"][0]["total"] == 2.5
    code, out, _ = invoke("--config", config, "--limit", 1)
    assert code == 0 and "total" in out
    # A reward by name, with what the config says of it; the run knows how long completions are.
    data = write(tmp_path / "a.jsonl", {"prompt": "p", "completion": "a " * 60})
    code, record = as_json("soft_overlong", "--config", config, "--data", data)
    # 60 words and EOS; gen_length 64, of which 12 are the cache: (52 - 61) / 12
    assert record["samples"][0]["total"] == pytest.approx(-0.75)


@pytest.mark.parametrize("name", ["lint", "speed"])
def test_the_examples(name: str) -> None:
    options = ["-o", "floor_s=0.001"] if name == "speed" else []
    code, record = as_json(ROOT / "examples" / "rewards" / f"{name}.py:{name}", *options)
    assert code == 0 and record["warnings"] == []
    values = {row["sample"]: row["rewards"][name] for row in record["samples"]}
    good, wrong = values["embedded/sft/0000 good"], values["embedded/sft/0000 wrong"]
    assert good is not None and good > 0
    assert wrong == (0.0 if name == "lint" else None)


def rows_of(output: str) -> list[list[str]]:
    """Sample and value of every line of the upper table."""
    cells = [line.split("│")[1:3] for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in cells if row[0].strip()[-1] in "0123456789"
            or row[0].strip().startswith("embedded")]  # fmt: skip


def test_the_walk_through_in_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = (ROOT / "docs" / "REWARDS.md").read_text().split("\n```")
    program = next(block for block in blocks if "# my_rewards.py" in block)
    (tmp_path / "my_rewards.py").write_text(program.removeprefix("python"))
    sample = next(block for block in blocks if "$ cat sample.jsonl" in block)
    lines = [line for line in sample.splitlines() if line.startswith("{")]
    (tmp_path / "sample.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        for command in re.findall(r"^\$ unmask reward check ([^\n]*)", block, re.MULTILINE):
            if "my.yaml" in command:  # needs a model
                continue
            code, out, _ = invoke(*command.split())
            assert code == 0 and rows_of(out) == rows_of(block) != [], command


def test_the_docs_name_every_reward_option_and_column() -> None:
    text = (ROOT / "docs" / "REWARDS.md").read_text()
    options = {option for kind in BUILTIN.values() for option in kind.model_fields}
    for name in {*BUILTIN, *options, *RESERVED, *VERDICTS}:
        assert f"`{name}`" in text, name


def bad_row(row: Any) -> Callable[[Path], list[object]]:
    return lambda folder: ["code", "--data", write(folder / "bad.jsonl", ROW, row)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "name a reward (file.py:function), or give --config"),
        (["cod"], "no built-in reward 'cod'; there are code,"),
        (["cod"], "your own is file.py:function"),
        (["/nowhere.py:f"], "no such file"),
        (["MINE:closed"], "end the parameters of closed with **columns"),
        (["MINE:length", "-o", "scale=2"], "options.scale"),
        (["MINE:length", "-o", "scale"], "write it as key=value"),
        (["repetition", "-o", "ngrm=2"], "options.ngrm"),
        (["soft_overlong"], "options.max_tokens: missing"),
        (["--config", "configs/rl/tiny_cpu.yaml", "-o", "a=1"], "--option: belongs to one reward"),
        (["code", "--config", "/nowhere.yaml"], "no such config file"),
        (["code", "--data", "/nowhere.jsonl"], "--data /nowhere.jsonl: no such file"),
        (bad_row({"prompt": "p"}), "line 2: give one of the columns"),
        (bad_row({**ROW, "completions": ["a"]}), "line 2: give one of the columns"),
        (bad_row({"prompt": "p", "completions": []}), "line 2: 'completion' must be text"),
        (bad_row({"prompt": "p", "completion": 3}), "line 2: 'completion' must be text"),
        (bad_row({"completion": "a"}), "line 2: column 'prompt' is missing"),
        (bad_row({**ROW, "tests": ["assert f("]}), "line 2: column 'tests', test 1 does not"),
        (bad_row("{"), "line 2: not valid JSON"),
        (lambda folder: ["code", "--data", write(folder / "x.jsonl", "")], "no samples in it"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    words: Any, expected: str, mine: Callable[[str], str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    given = words(tmp_path) if callable(words) else words
    code, out, err = invoke(*(str(w).replace("MINE:", mine("")) for w in given))
    assert code == 2 and out == ""
    assert err.startswith("unmask: ") and expected in err
    assert len(err.strip().splitlines()) == 1


def test_it_answers_without_torch(mine: Callable[[str], str]) -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from rl.cli import app\n"
        f"found = CliRunner().invoke(app, ['reward', 'check', {mine('length')!r}])\n"
        "assert found.exit_code == 0, found.output\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr

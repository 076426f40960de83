"""Rewards of problems whose answers are not Python: which block counts, and that it is run."""

import shutil

import pytest

from common.records import Completion, Group, Problem, Rollout, StdinTest
from rewards.compose import RewardConfig, Rewarder
from rewards.extract import extract_code
from rewards.languages import language_named
from sandbox.languages import LANGUAGES

DOUBLE = """#include <stdio.h>
int main(void) { double x; scanf("%lf", &x); printf("%.9f", x / 3); }
"""


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("Python", "python"), ("py", "python"), ("js", "javascript"), ("node", "javascript"),
        ("ts", "typescript"), ("sh", "bash"), ("C", "c"), ("C++", "cpp"), ("cc", "cpp"),
        ("Java", "java"), ("golang", "go"), ("php", "php"), ("C#", "csharp"), ("cs", "csharp"),
        (" rs ", "rust"), ("", None), ("en", None), ("text", None), ("javascript1", None),
    ],
)  # fmt: skip
def test_names_of_languages(name, language):
    assert language_named(name) == language


def test_every_language_goes_by_its_own_name():
    assert all(language_named(language) == language for language in LANGUAGES)


def test_the_block_in_the_problems_language_is_the_program():
    text = "```python\nx\n```\n```c++\ny\n```\n```C\nz\n```\n```\nw\n```"
    found = {language: extract_code(text, "first", language) for language in LANGUAGES}
    assert (found["python"], found["cpp"], found["c"], found["go"]) == ("x\n", "y\n", "z\n", "w\n")
    assert extract_code(text, "only", "c") is None  # the fence without a name may be C as well
    assert extract_code("```js\nx\n```", "first", "java") is None


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_programs_are_compiled_run_and_compared():
    problem = Problem(
        "p",
        "a third",
        stdin_tests=(StdinTest("1", "0.33333"), StdinTest("3", "1")),
        language="c",
        float_tolerance=1e-4,
    )
    texts = (
        f"```c\n{DOUBLE}```",
        f"```c\n{DOUBLE.replace('/ 3', '')}```",
        "```c\nint main(\n```",  # not parsed: 1.0 for its format
        f"```python\n{DOUBLE}```",
    )
    rollouts = tuple(
        Rollout("p", i, (), Completion((), (), t, "eos", (), ()), 0, 0) for i, t in enumerate(texts)
    )
    config = RewardConfig.model_validate({"sandbox": {"seconds": 60.0}})
    with Rewarder(config) as rewarder:
        scored = rewarder.score([Group(problem, rollouts)]).groups
    parts = [dict(r.score.parts) for r in scored[0].rollouts]
    assert [part["code"] for part in parts] == [1.0, 0.0, 0.0, 0.0]
    assert [part["code_format"] for part in parts] == [1.0, 1.0, 1.0, 0.0]

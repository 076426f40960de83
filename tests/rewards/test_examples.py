"""The plug-ins in examples/ as a run calls them. `unmask reward check` runs them too (tests/rl)."""

import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.records import Problem
from rewards.compose import RewardConfig, Rewarder, RewardSection
from rewards.load import check_signature, load_function
from rewards.plugin import Plugin

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "rewards"
CLEAN = "def f(x):\n    return x + 1\n"
UNUSED = "import os\n\n\ndef f(x):\n    return x + 1\n"  # F401 on 3 lines that are not blank


@pytest.fixture
def ask(sample, result):
    """Call an example with programs and their verdicts; equal CPU seconds unless given."""

    def make(name, programs, verdicts=("pass",), cpus=None, columns=None, **options):
        path = f"{EXAMPLES / name}.py:{name}"
        function = load_function(path)
        check_signature(path, function, options)
        problem = Problem("p", "", ("assert f(1) == 2",), entry_point="f", columns=columns or {})
        samples = [
            sample(code=program, index=i, problem=problem, result=result(*verdicts, cpu=cpu))
            for i, (program, cpu) in enumerate(
                zip(programs, cpus or [0.1] * len(programs), strict=True)
            )
        ]
        outcomes = Plugin(name, function, 60.0, options)(samples)
        assert all(outcome.error is None for outcome in outcomes), outcomes
        return outcomes

    return make


def test_lint_counts_complaints_per_line(ask):
    outcomes = ask("lint", [CLEAN, UNUSED, CLEAN, None])
    assert [o.value for o in outcomes] == [1.0, pytest.approx(2 / 3), 1.0, 0.0]
    assert outcomes[1].extras == {"complaints": 1.0, "unreadable": 0.0}


@pytest.mark.parametrize(
    "program",
    [
        "def f(x:\n",
        "x = " + "(" * 5_000 + ")" * 5_000,
        "x = " + "-" * 32_000 + "1",
        "x = 1\n" * 10_000,
        "x = '\ud800'\n",
        "\x00",
        "\n \n",
    ],
)
def test_what_ruff_cannot_read_earns_nothing(ask, program):
    assert ask("lint", [program])[0].value == 0.0


@pytest.mark.parametrize(
    "comment", ["  # noqa", "  # noqa: F401", "\n# ruff: noqa", "\n# flake8: noqa"]
)
def test_lint_is_not_talked_out_of_it(ask, comment):
    program = f"import os{comment}\n"
    assert ask("lint", [program], select="F")[0].extras["complaints"] == 1.0


def test_lint_rewards_only_what_passes_unless_asked(ask):
    assert ask("lint", [CLEAN], verdicts=("pass", "fail"))[0].value == 0.0
    assert ask("lint", [CLEAN], verdicts=())[0].value == 0.0
    assert ask("lint", [CLEAN], verdicts=("fail",), passing_only=False)[0].value == 1.0


def test_lint_does_not_apply_to_other_languages(sample, result):
    function = load_function(f"{EXAMPLES}/lint.py:lint")
    java = sample(code="class A {}", problem=Problem("j", "", language="java"))
    python = sample(code=CLEAN, result=result("pass"))
    outcomes = Plugin("lint", function, 60.0, {})([java, python])
    assert [outcome.value for outcome in outcomes] == [None, 1.0]


def test_lint_with_rules_that_are_none_is_an_error(sample, result):
    function = load_function(f"{EXAMPLES}/lint.py:lint")
    outcome = Plugin("lint", function, 60.0, {"select": "NOPE"})(
        [sample(code=CLEAN, result=result("pass"))]
    )[0]
    assert outcome.value is None and "select='NOPE'" in outcome.error


def test_no_ruff_is_said_before_the_run(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="pip install ruff"):
        load_function(f"{EXAMPLES}/lint.py:lint")


def test_speed_compares_with_the_median_of_the_group(ask):
    # The median of 0.1, 0.2 and 0.6 is 0.2.
    outcomes = ask("speed", ["a", "b", "c"], cpus=[0.1, 0.2, 0.6])
    assert [o.value for o in outcomes] == pytest.approx([2 / 3, 1 / 2, 1 / 4])
    assert outcomes[2].extras == {"cpu_s": 0.6}


def test_speed_does_not_tell_milliseconds_apart(ask):
    assert [o.value for o in ask("speed", ["a", "b"], cpus=[0.001, 0.04])] == [0.5, 0.5]
    fine = ask("speed", ["a", "b"], cpus=[0.01, 0.03], floor_s=0.001)
    assert [o.value for o in fine] == pytest.approx([2 / 3, 2 / 5])  # the median is 0.02


def test_speed_does_not_apply_to_what_fails_or_is_alone(ask):
    assert [o.value for o in ask("speed", ["a", "b"], verdicts=("pass", "fail"))] == [None, None]
    assert ask("speed", ["a"])[0].value is None
    assert ask("speed", ["a"], verdicts=())[0].value is None


def test_speed_prefers_the_reference_program(ask):
    """A tiny reference takes next to nothing: the floor of 1.0 s, against 3.0 s."""
    columns = {"solution": CLEAN}
    outcome = ask("speed", ["a"], cpus=[3.0], columns=columns, floor_s=1.0)[0]
    assert outcome.value == pytest.approx(1 / 4)
    wrong = {"solution": "def f(x):\n    return x\n"}  # a reference that fails is none
    assert ask("speed", ["a"], cpus=[3.0], columns=wrong)[0].value is None


def test_both_in_a_run(group):
    text = "```python\ndef f(x):\n    return x + 1\n```"
    slow = "```python\ndef f(x):\n    sum(range(3_000_000))\n    return x + 1\n```"
    sections = tuple(
        RewardSection(path=f"{EXAMPLES}/{name}.py:{name}", options=options)
        for name, options in (("lint", {}), ("speed", {"floor_s": 0.001}))
    )
    with Rewarder(RewardConfig(functions=sections)) as rewarder:
        fast_group = rewarder.score([group(text, text, slow, "no")]).groups[0]
    fast, _, slow, none = [rollout.score for rollout in fast_group.rollouts]
    assert fast.error is None and fast.parts["lint"] == slow.parts["lint"] == 1.0
    assert slow.parts["speed"] < fast.parts["speed"] == 0.5  # which is the median
    assert none.parts == {"lint": 0.0, "speed": None}

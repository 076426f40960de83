"""User functions: found by path, called by contract, their answers checked."""

import asyncio
import math
import time
from pathlib import Path

import pytest

from common.errors import UserError
from common.records import Completion, Problem, Rollout
from rewards.builtin import Sample
from rewards.plugin import Plugin, load_function

ROOT = Path(__file__).resolve().parents[2]


def samples(*texts, **columns):
    problem = Problem("p", "say", ("assert f()",), columns=columns, entry_point="f")
    return [
        Sample(problem, Rollout("p", i, (), Completion((), (), t, "eos", (), ()), 0, 0), None, 0.0)
        for i, t in enumerate(texts)
    ]


def call(function, *texts, timeout_s=20.0, options=None, **columns):
    return Plugin("mine", function, timeout_s, options or {})(samples(*texts, **columns))


def test_contract():
    seen = {}

    def reward(prompts, completions, level, tests, scale, **rest):
        seen.update(prompts=prompts, level=level, tests=tests, rest=rest)
        return [scale * len(text) for text in completions]

    outcomes = call(reward, "a", "bcd", options={"scale": 2}, level=7)
    assert [o.value for o in outcomes] == [2.0, 6.0]
    assert seen["prompts"] == ["say", "say"] and seen["level"] == [7, 7]
    assert seen["tests"] == [("assert f()",)] * 2
    assert seen["rest"]["entry_point"] == ["f", "f"]


def test_async_none_and_extras():
    async def reward(completions, **_):
        await asyncio.sleep(0)
        return [{"reward": 1, "depth": 3}, None, {"reward": None, "depth": 1}, True]

    outcomes = call(reward, *"abcd")
    assert [o.value for o in outcomes] == [1.0, None, None, 1.0]
    assert outcomes[0].extras == {"depth": 3.0}
    assert all(o.error is None for o in outcomes)


def test_an_exception_costs_its_own_sample_only():
    def reward(completions, **_):
        return [1 / len(text) for text in completions]

    good, bad, other = call(reward, "aa", "", "a")
    assert (good.value, other.value) == (0.5, 1.0)
    assert bad.value is None
    for part in ("'mine'", "'p' sample 1", "Traceback", "ZeroDivisionError"):
        assert part in bad.error


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([1.0], "1 values for 2"),
        (1.0, "not a list"),
        (None, "not a list"),
        ("ab", "str"),
        ([math.nan, math.inf], "finite"),
        ([{"score": 1}] * 2, "reward"),
        (["1", "2"], "not a number"),
    ],
)
def test_bad_answers_are_errors_not_numbers(answer, text):
    # Called with each sample alone as well, so the length must be wrong there too.
    def reward(completions, **_):
        return answer * 2 if answer == [1.0] and len(completions) == 1 else answer

    outcomes = call(reward, "a", "b")
    assert all(o.value is None and o.error for o in outcomes)
    if answer != [1.0]:
        assert text in outcomes[0].error


def test_time_limit_for_sync_and_async():
    def slow(completions, **_):
        time.sleep(30)

    async def slow_async(completions, **_):
        await asyncio.sleep(30)

    for function in (slow, slow_async):
        outcomes = call(function, "a", "b", timeout_s=0.2)
        assert all("0.2 s" in o.error for o in outcomes)


def test_load_from_file_and_module(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(**_):\n    return [1.0]\n")
    assert load_function(f"{file}:reward")() == [1.0]
    assert load_function("math:sqrt") is math.sqrt


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("mine.py", "file.py:function"),
        ("nowhere.py:f", "no such file"),
        ("no_such_module_x:f", "no_such_module_x"),
        ("math:nothing", "nothing"),
        ("math:pi", "pi"),
        ("BROKEN:f", "ZeroDivisionError"),
        ("EXITS:f", "SystemExit"),
    ],
)
def test_a_path_that_does_not_import_is_one_line(path, text, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(0)\n")
    path = path.replace("BROKEN", str(tmp_path / "broken.py"))
    path = path.replace("EXITS", str(tmp_path / "exits.py"))
    with pytest.raises(UserError, match=text) as caught:
        load_function(path)
    assert "\n" not in str(caught.value)


def test_the_example_runs():
    function = load_function(f"{ROOT}/examples/rewards/shortness.py:shortness")
    outcomes = call(function, "", "x" * 50, options={"target": 100})
    assert [o.value for o in outcomes] == [1.0, 0.5]
    assert outcomes[1].extras == {"characters": 50.0}

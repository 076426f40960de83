"""User functions: called by contract and in time, their answers checked."""

import asyncio
import math
import threading
import time

import pytest

from common.records import Problem
from rewards.load import RESERVED
from rewards.plugin import Plugin, arguments


@pytest.fixture
def call(sample):
    def make(function, *texts, timeout_s=20.0, options=None, **columns):
        problem = Problem("p", "say", ("assert f()",), columns=columns, entry_point="f")
        samples = [sample(text, index=i, problem=problem) for i, text in enumerate(texts)]
        return Plugin("mine", function, timeout_s, options or {})(samples)

    return make


def test_contract(call):
    seen = {}

    def reward(prompts, completions, level, tests, scale, **rest):
        seen.update(prompts=prompts, level=level, tests=tests, rest=rest)
        return [scale * len(text) for text in completions]

    outcomes = call(reward, "a", "bcd", options={"scale": 2}, level=7)
    assert [o.value for o in outcomes] == [2.0, 6.0]
    assert seen["prompts"] == ["say", "say"] and seen["level"] == [7, 7]
    assert seen["tests"] == [("assert f()",)] * 2
    assert seen["rest"]["entry_point"] == ["f", "f"]


def test_every_column(sample, result):
    problem = Problem("q", "say", ("t",), setup="s", data_source="d", columns={"level": 3})
    run = sample("x", tokens=4, code="c", result=result("pass", "fail", cpu=0.5), problem=problem)
    found = arguments([run, sample("y", tail=3)])
    assert set(found) == {*RESERVED, "level"}
    assert found["level"] == [3, None]  # another problem's column
    assert found["completions"] == ["x", "y"] and found["num_tokens"] == [4, 0]
    assert found["programs"] == ["c", None]
    assert found["verdicts"] == [["pass", "fail"], []]
    assert found["cpu_seconds"] == [[0.5, 0.5], []]
    assert (found["problem_id"], found["setup"]) == (["q", "p"], ["s", ""])
    assert (found["data_source"], found["stdin_tests"]) == (["d", ""], [(), ()])
    assert found["language"] == ["python", "python"]


def test_async_none_and_extras(call):
    async def reward(completions, **_):
        await asyncio.sleep(0)
        return [{"reward": 1, "depth": 3, "width": None}, None, {"reward": None, "depth": 1}, True]

    outcomes = call(reward, *"abcd")
    assert [o.value for o in outcomes] == [1.0, None, None, 1.0]
    assert outcomes[0].extras == {"depth": 3.0}
    assert all(o.error is None for o in outcomes)


def test_no_samples_no_call(call):
    def reward(**columns):
        raise AssertionError

    assert call(reward) == []


def test_an_exception_costs_its_own_sample_only(call):
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
        ([{"reward": 1, "mean": 2}] * 2, "'mean' is taken"),
        ([{"reward": 1, "why": "good"}] * 2, "why is a str"),
        (["1", "2"], "not a number"),
    ],
)
def test_bad_answers_are_errors_not_numbers(call, answer, text):
    # Called with each sample alone as well, so the length must be wrong there too.
    def reward(completions, **_):
        return answer * 2 if answer == [1.0] and len(completions) == 1 else answer

    outcomes = call(reward, "a", "b")
    assert all(o.value is None and o.error for o in outcomes)
    if answer != [1.0]:
        assert text in outcomes[0].error


def test_time_limit_for_sync_and_async(call):
    over = threading.Event()

    def slow(completions, **_):
        over.wait(60)

    async def slow_async(completions, **_):
        await asyncio.sleep(60)

    for function in (slow, slow_async):
        outcomes = call(function, "a", "b", timeout_s=0.2)
        assert all("no answer in 0.2 s (timeout_s)" in o.error for o in outcomes)
        assert "'p' sample 1" in outcomes[1].error
    over.set()


def test_a_late_async_function_is_cancelled(sample):
    ended = threading.Event()

    async def slow(completions, **_):
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    plugin = Plugin("mine", slow, 0.1, {})
    assert "0.1 s" in plugin([sample("a")])[0].error
    assert ended.wait(20)
    # Nothing is left behind, so the next call is made.
    assert "no answer" in plugin([sample("a")])[0].error


def test_a_call_that_hangs_is_the_only_one(sample):
    """Threads cannot be killed; ten late calls must not leave ten of them."""
    over, calls = threading.Event(), []

    def hangs(completions, **_):
        calls.append(completions)
        over.wait(60)
        return [1.0 for _ in completions]

    plugin = Plugin("mine", hangs, 0.1, {})
    assert "no answer in 0.1 s" in plugin([sample("a")])[0].error
    threads = threading.active_count()
    for _ in range(10):
        outcomes = plugin([sample("a"), sample("b", index=1)])
        assert all("an earlier call still runs" in o.error for o in outcomes)
    assert calls == [["a"]] and threading.active_count() == threads
    over.set()
    deadline = time.monotonic() + 60
    while (outcome := plugin([sample("a")])[0]).error and time.monotonic() < deadline:
        time.sleep(0.01)
    assert outcome.value == 1.0  # it recovered, and so does the reward


def test_single_samples_share_one_time_limit(sample):
    """A call that fails as a whole is not repeated for as long as there are samples."""
    started = []

    def fails_slowly(completions, **_):
        started.append(len(completions))
        if len(completions) == 1:
            time.sleep(0.3)
        raise OSError("no route")

    plugin = Plugin("mine", fails_slowly, 1.0, {})
    outcomes = plugin([sample("a", index=i) for i in range(20)])
    assert started[0] == 20 and 2 <= len(started) <= 5  # 1.0 s holds at most four of 0.3 s
    assert "no route" in outcomes[0].error
    assert "timeout_s=1" in outcomes[-1].error or "no answer" in outcomes[-1].error
    assert all(outcome.value is None for outcome in outcomes)


def test_the_functions_own_timeout_is_no_late_answer(call):
    def reward(completions, **_):
        if "b" in completions:
            raise TimeoutError("the judge's server")
        return [1.0 for _ in completions]

    async def reward_async(completions, **columns):
        return reward(completions, **columns)

    for function in (reward, reward_async):
        good, bad = call(function, "a", "b")
        assert good.value == 1.0
        assert "the judge's server" in bad.error and "Traceback" in bad.error

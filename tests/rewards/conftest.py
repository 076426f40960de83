"""What several tests of this folder need: samples, groups, and a sandbox that is none."""

import ast
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from common.records import Completion, Group, Problem, Rollout
from rewards.sample import Sample
from sandbox.records import Case, Result, TestResult

PROBLEM = Problem("p", "add one", tests=("assert f(1) == 2", "assert f(2) == 3"), entry_point="f")


def make_completion(text: str = "", tokens: int = 0, tail: int = 0) -> Completion:
    return Completion((7,) * tokens, (8,) * tail, text, "eos", (), ())


def make_sample(
    text: str = "",
    *,
    tokens: int = 0,
    tail: int = 0,
    code: str | None = None,
    parses: bool | None = None,
    result: Result | None = None,
    problem: Problem = PROBLEM,
    index: int = 0,
) -> Sample:
    rollout = Rollout(problem.problem_id, index, (), make_completion(text, tokens, tail), 0, 0)
    return Sample(problem, rollout, code, parses, result)


def make_group(*texts: str, problem: Problem = PROBLEM) -> Group:
    rollouts = tuple(
        Rollout(problem.problem_id, i, (), make_completion(text), 0, 0)
        for i, text in enumerate(texts)
    )
    return Group(problem, rollouts)


def make_result(*verdicts: Any, status: Any = "ran", cpu: float = 0.0) -> Result:
    tests = tuple(
        TestResult(v, 0.0, "why" if v == "infra_error" else "", cpu_seconds=cpu) for v in verdicts
    )
    return Result(id="x", status=status, tests=tests)


class FakeSandbox:
    """Answers every case with `result`; remembers what it was asked."""

    def __init__(self) -> None:
        self.result = make_result("pass")
        self.cases: list[Case] = []
        self.texts: list[str] = []

    def run(self, cases: Iterable[Case]) -> list[Result]:
        new = list(cases)
        self.cases += new
        return [self.result for _ in new]

    def parses(self, texts: Sequence[str]) -> list[bool]:
        self.texts += texts
        return [self._parses(text) for text in texts]

    def _parses(self, text: str) -> bool:
        try:
            ast.parse(text)
        except SyntaxError:
            return False
        return True

    def close(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSandbox:
    """Every Rewarder's sandbox."""
    sandbox = FakeSandbox()
    monkeypatch.setattr("rewards.compose.Sandbox", lambda *_: sandbox)
    return sandbox


@pytest.fixture
def sample() -> Callable[..., Sample]:
    return make_sample


@pytest.fixture
def group() -> Callable[..., Group]:
    return make_group


@pytest.fixture
def result() -> Callable[..., Result]:
    return make_result

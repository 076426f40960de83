"""The formulas of ALGORITHMS section 5, and a parser that cannot be brought down."""

import threading

import pytest

from common.records import Completion, Problem, Rollout
from rewards.builtin import Sample, code, code_binary, code_format, format_score, parses
from sandbox.records import Result, TestResult


def sample(result=None, score=1.0):
    completion = Completion((1,), (), "", "eos", (0,), (1.0,))
    return Sample(Problem("p", ""), Rollout("p", 3, (), completion, 0, 0), "x", score, result)


def result(*verdicts, status="ran"):
    tests = tuple(TestResult(v, 0.0, "why" if v == "infra_error" else "") for v in verdicts)
    return Result(id="x", status=status, tests=tests)


def test_code_is_the_fraction_of_all_tests():
    ran = result("pass", "fail", "timeout", "pass")
    assert code([sample(ran)])[0].value == 0.5
    assert code_binary([sample(ran)])[0].value == 0.0
    assert code_binary([sample(result("pass", "pass"))])[0].value == 1.0
    assert code([sample(None)])[0].value == 0.0


def test_an_infrastructure_error_is_no_number():
    for function in (code, code_binary):
        outcome = function([sample(result("pass", "infra_error", status="infra_error"))])[0]
        assert outcome.value is None
        assert "'p' sample 3" in outcome.error and "why" in outcome.error


def test_format():
    assert [format_score(text) for text in ("x = 1\n", "x = = 1", None, "")] == [1.0, 0.5, 0.0, 1.0]
    assert code_format([sample(score=0.5)])[0].value == 0.5


BOMBS = {
    "parentheses": "(" * 16_000 + ")" * 16_000,
    "signs": "x = " + "-" * 32_000 + "1",
    "nots": "not " * 8_000 + "x",
    "attributes": "x" + ".a" * 16_000,
    "calls": "x" + "()" * 16_000,
    "powers": "x" + "**x" * 10_000,
    "sums": "x" + "+x" * 16_000,
    "lambdas": "lambda: " * 4_000 + "x",
    "ternaries": "x if y else " * 2_600 + "x",
    "elifs": "if x: pass\n" + "elif x: pass\n" * 2_500,
    "fstrings": "f'{" * 5_000,
    "indents": "\n".join(" " * i + "if x:" for i in range(200)),
    "null": "x = 1\x00",
    "surrogate": "x = '\ud800'",
    "digits": "x = " + "9" * 30_000,
    "huge": "x = 1\n" * 100_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_parser_bombs_are_answered(name):
    """Also on a thread, whose stack is smaller."""
    answers = [parses(BOMBS[name])]
    thread = threading.Thread(target=lambda: answers.append(parses(BOMBS[name])))
    thread.start()
    thread.join()
    assert len(answers) == 2 and all(type(answer) is bool for answer in answers)
    if name in ("parentheses", "null", "huge", "fstrings"):
        assert answers == [False, False]


def test_a_warning_is_no_error(recwarn):
    assert parses("x = 1 is 1\ny = '\\d'")
    assert len(recwarn) == 0

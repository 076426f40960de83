"""The rewards that ship: `code`, `code_binary`, `code_format`. They look; the sandbox runs.

Formulas: ALGORITHMS section 5 (DiffuCoder).
"""

import ast
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.records import Problem, Rollout
from sandbox.records import Result

MAX_PARSED_CHARS = 32_768


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one reward says of one sample: a number, "does not apply" (None), or an error."""

    value: float | None
    extras: Mapping[str, float] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion with what all rewards share.

    code: the extracted program or None. result: the sandbox's, None if it was not run.
    """

    problem: Problem
    rollout: Rollout
    code: str | None
    format_score: float
    result: Result | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"problem {self.problem.problem_id!r} sample {self.rollout.sample_index}"


def format_score(code: str | None, language: str = "python") -> float:
    """1.0 for a program that parses, 0.5 for one that does not, 0.0 for none.

    Only Python has a parser here: in other languages a block in the right language is 1.0.
    """
    if code is None:
        return 0.0
    return 1.0 if language != "python" or parses(code) else 0.5


def parses(code: str) -> bool:
    """Whether `code` is syntactically Python. False for parser bombs and over-long texts."""
    if len(code) > MAX_PARSED_CHARS:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False  # ValueError: NUL bytes, lone surrogates
    return True


def code(samples: Sequence[Sample]) -> list[Outcome]:
    """Fraction of the tests passed; 0.0 for a program that was not run."""
    return [_judged(sample, lambda result: result.pass_rate) for sample in samples]


def code_binary(samples: Sequence[Sample]) -> list[Outcome]:
    """1.0 if every test passed, else 0.0."""
    return [_judged(sample, lambda r: float(r.passed == r.total)) for sample in samples]


def code_format(samples: Sequence[Sample]) -> list[Outcome]:
    """1.0 one fenced block that parses, 0.5 fenced but a syntax error, 0.0 otherwise.

    A problem in another language than Python: 1.0 for a block in that language, else 0.0.
    """
    return [Outcome(sample.format_score) for sample in samples]


def _judged(sample: Sample, value: Callable[[Result], float]) -> Outcome:
    result = sample.result
    if result is None:
        return Outcome(0.0)
    if result.status == "ran":
        return Outcome(value(result))
    reasons = [test.message for test in result.tests if test.verdict == "infra_error"]
    reason = result.message or (reasons[0] if reasons else "no reason given")
    return Outcome(None, error=f"sandbox {result.status} on {sample.name}: {reason}")


BUILTIN: dict[str, Callable[[Sequence[Sample]], list[Outcome]]] = {
    "code": code,
    "code_binary": code_binary,
    "code_format": code_format,
}
NEED_SANDBOX = frozenset({"code", "code_binary"})

"""The sandbox judges the embedded problems as plain execution does, none of them weakly."""

import pytest

from rl.problems.splits import Solved, compositions_of, solve_problems
from sandbox.records import Case, Limits
from sandbox.service import Sandbox

WRONG = "def f(x):\n    return x"


def plainly(code: str, test: str) -> bool:
    """Trusted code only."""
    scope: dict[str, object] = {}
    try:
        exec(f"{code}\n{test}", scope)
    except Exception:
        return False
    return True


@pytest.mark.slow
def test_agrees_with_plain_execution_on_every_composition() -> None:
    solved: list[Solved] = []
    for split in ("test", "rl"):
        solved += solve_problems(split, 0, len(compositions_of(split)))
    programs = [(s.chain.code(), s.problem) for s in solved]
    programs += [(WRONG, s.problem) for s in solved[::5]]
    limits = Limits(seconds=60.0)
    cases = [
        Case(id=str(n), code=code, tests=p.tests, entry_point=p.entry_point, limits=limits)
        for n, (code, p) in enumerate(programs)
    ]
    with Sandbox(workers=2) as sandbox:
        results = sandbox.run(cases)
    for (code, problem), result in zip(programs, results, strict=True):
        verdicts = [test.verdict == "pass" for test in result.tests]
        assert verdicts == [plainly(code, test) for test in problem.tests], (code, result)
        assert result.status == "ran" and not any(test.weak for test in result.tests)
    assert all(result.pass_rate == 1.0 for result in results[: len(solved)])
    assert all(result.pass_rate < 1.0 for result in results[len(solved) :])

"""A reward for fast programs: CPU seconds of the tests, measured by the sandbox, by a yardstick.

    reward:
      functions:
        - {name: code, weight: 2.0}
        - {path: examples/rewards/speed.py:speed, weight: 0.3}

Only for programs that pass every test: to the others it does not apply (None). The yardstick is the
problem's reference program if the data has a column `solution`, else the median of the passing
programs of the same problem. With tests that take milliseconds it measures noise: times below
`floor_s` count as equal.
"""

import statistics

from sandbox.records import Case, StdinTest
from sandbox.service import run_cases

_REFERENCES = {}  # CPU seconds by problem; this module lives as long as its reward worker


def speed(
    programs, verdicts, cpu_seconds, problem_id, tests, stdin_tests, setup, entry_point, language,
    solution=None, floor_s=0.05, backend="auto", **columns,
):  # fmt: skip
    """yardstick / (yardstick + own): 0.5 is as fast, 0.67 twice as fast, 0.33 half as fast."""
    passed = [bool(row) and set(row) == {"pass"} for row in verdicts]
    own = [max(floor_s, sum(row)) for row in cpu_seconds]
    problems = list(zip(tests, stdin_tests, setup, entry_point, language, strict=True))
    solutions = [None] * len(programs) if solution is None else solution
    references = _references(problems, solutions, passed, backend)
    medians = _medians(problem_id, own, passed)
    answers = []
    for i, seconds in enumerate(own):
        yardstick = references[i] if references[i] is not None else medians.get(problem_id[i])
        if not passed[i] or yardstick is None:
            answers.append(None)
            continue
        yardstick = max(floor_s, yardstick)
        answers.append({"reward": yardstick / (yardstick + seconds), "cpu_s": sum(cpu_seconds[i])})
    return answers


def _medians(problem_id, own, passed):
    """By problem; a program that is alone has nothing to be compared with."""
    times = {}
    for name, seconds, good in zip(problem_id, own, passed, strict=True):
        if good:
            times.setdefault(name, []).append(seconds)
    return {name: statistics.median(row) for name, row in times.items() if len(row) > 1}


def _references(problems, solutions, passed, backend):
    """CPU seconds of each reference program; None without one, or if it fails a test."""
    keys = [
        None if solution is None else (solution, *problem)
        for solution, problem in zip(solutions, problems, strict=True)
    ]
    asked = {key for key, good in zip(keys, passed, strict=True) if good and key is not None}
    missing = sorted(asked - _REFERENCES.keys(), key=repr)
    cases = [_case(str(number), *key) for number, key in enumerate(missing)]
    for key, result in zip(missing, run_cases(cases, backend) if cases else [], strict=True):
        if result.status == "ran":  # else: the machine's fault, to be tried again
            passes = result.passed == result.total
            _REFERENCES[key] = sum(t.cpu_seconds for t in result.tests) if passes else None
    return [_REFERENCES.get(key) for key in keys]


def _case(name, solution, tests, stdin_tests, setup, entry_point, language):
    return Case(
        id=name,
        code=solution,
        tests=tests,
        stdin_tests=tuple(StdinTest(t.stdin, t.stdout) for t in stdin_tests),
        setup=setup,
        entry_point=entry_point,
        language=language,
    )

"""The tests of problems: right expected values, and near misses fail."""

import ast
from typing import Any

import pytest

from rl.problems.cases import (
    MAX_CASES,
    MIN_CASES,
    essential_rivals,
    make_tests,
    near_rivals,
)
from rl.problems.compose import Chain, run_ops
from rl.problems.inputs import EDGES, PROBES
from rl.problems.splits import Solved, solve_problems

CHAIN = Chain(("keep_even", "multiply_each"), (0, 3), (0, 0))


def parse(test: str) -> tuple[Any, Any]:
    """`assert f(ARGUMENT) == EXPECTED` -> (argument, expected), without running it."""
    statement = ast.parse(test).body[0]
    assert isinstance(statement, ast.Assert)
    compare = statement.test
    assert isinstance(compare, ast.Compare) and isinstance(compare.left, ast.Call)
    return ast.literal_eval(compare.left.args[0]), ast.literal_eval(compare.comparators[0])


@pytest.fixture(scope="module")
def solved() -> list[Solved]:
    return [*solve_problems("test", 0, 320), *solve_problems("rl", 0, 200)]


def test_rivals_of_one_chain() -> None:
    names = [tuple((op.name, k) for op, k in rival) for rival in essential_rivals(CHAIN)]
    assert names == [
        (),
        (("keep_even", 0),),
        (("multiply_each", 3),),
        (("multiply_each", 3), ("keep_even", 0)),
    ]
    near = [tuple((op.name, k) for op, k in rival) for rival in near_rivals(CHAIN)]
    assert (("keep_odd", 0), ("multiply_each", 3)) not in near  # an op without constant gets 3
    assert (("keep_odd", 3), ("multiply_each", 3)) in near
    assert (("keep_even", 0), ("multiply_each", 4)) in near
    assert (("keep_even", 0), ("add_each", 3)) in near


def test_parts_of_another_kind_are_no_rivals() -> None:
    chain = Chain(("sum", "add"), (0, 3), (0, 0))
    names = [tuple(op.name for op, _ in rival) for rival in essential_rivals(chain)]
    assert names == [(), ("sum",)]


def test_tests_are_asserts_with_the_trusted_values() -> None:
    tests = make_tests(CHAIN, seed=3)
    assert tests[0] == "assert f([]) == []"
    for argument, expected in map(parse, tests):
        assert expected == [3 * x for x in argument if x % 2 == 0]
    assert make_tests(CHAIN, seed=3) == tests
    assert make_tests(CHAIN, seed=4) != tests


def test_number_edges_and_variety(solved: list[Solved]) -> None:
    for item in solved:
        tests = item.problem.tests
        assert MIN_CASES <= len(tests) <= MAX_CASES
        arguments = [repr(parse(test)[0]) for test in tests]
        assert len(set(arguments)) == len(arguments)
        assert len(set(arguments) & {repr(v) for v in EDGES[item.chain.takes]}) >= 2
        outputs = {repr(parse(test)[1]) for test in tests}
        assert len(outputs) >= (2 if item.chain.gives == "bool" else 3)


def test_reference_programs_pass(solved: list[Solved]) -> None:
    for item in solved:
        space: dict[str, Any] = {}
        exec(item.completion.removeprefix("```python\n").removesuffix("\n```"), space)
        for test in item.problem.tests:
            exec(test, space)


def test_obvious_wrong_programs_fail(solved: list[Solved]) -> None:
    """The identity, either op alone and the other order fail, unless they are the same function."""
    for item in solved:
        cases = [parse(test) for test in item.problem.tests]
        for rival in essential_rivals(item.chain):
            same = all(run_ops(rival, v) == item.chain.run(v) for v in PROBES[item.chain.takes])
            passes = all(run_ops(rival, value) == expected for value, expected in cases)
            assert passes <= same, (item.problem.prompt, rival)


def test_nearly_all_near_misses_fail(solved: list[Solved]) -> None:
    survivors = total = 0
    for item in solved[::4]:
        cases = [parse(test) for test in item.problem.tests]
        for rival in near_rivals(item.chain):
            if any(run_ops(rival, v) != item.chain.run(v) for v in PROBES[item.chain.takes]):
                total += 1
                survivors += all(run_ops(rival, value) == expected for value, expected in cases)
    assert total > 2000
    assert survivors <= total * 0.002

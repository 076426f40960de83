"""Controls: what an honest program passes must fail in them, and what is equal to all must not."""

import ast
import math

import pytest

from sandbox.inside.mutate import MAX_CONTROLS, OTHER, other, plan


class Liar(float):
    """Agrees to everything."""

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = lambda self, other: True
    __ne__ = lambda self, other: True  # noqa: E731
    __hash__ = float.__hash__
    __sub__ = __rsub__ = lambda self, other: 0  # noqa: E731


def honest(x):
    if x is None:
        raise ValueError("no")
    return x + 1


def lying(x):
    return Liar(7)


# test, number of controls, is a liar caught by them?
CLAIMS = {
    "equal": ("assert f(41) == 42", 1, True),
    "literal_left": ("assert 42 == f(41)", 1, True),
    "negative": ("assert f(-3) == -2", 1, True),
    "variable": ("got = f(41)\nassert got == 42", 1, True),
    "expected_variable": ("want = 42\ngot = f(41)\nassert want == got", 1, True),
    "message": ("assert f(41) == 42, 'no'", 1, True),
    "text": ("assert str(f(1.0)) == '2.0'", 1, False),
    "list": ("assert [f(1), f(2)] == [2, 3]", 1, True),
    "dict": ("assert {'a': f(1)} == {'a': 2}", 1, True),
    "empty_list": ("assert [f(x) for x in ()] == []", 1, None),
    "not_equal": ("assert f(1) != 1", 1, True),
    "not": ("assert not f(-1)", 1, None),
    "is_none": ("assert f(1) is not None", 1, False),
    "in": ("assert f(1) in (1, 2, 3)", 1, True),
    "contains": ("r = [f(1)]\nassert 2 in r", 1, True),
    "not_in": ("assert f(1) not in (5, 6)", 1, None),
    "order": ("assert f(1) < 3", 1, True),
    "between": ("assert 0 <= f(1) <= 3", 1, True),
    "difference": ("assert abs(f(0.5) - 1.5) < 1e-6", 1, True),
    "difference_mirrored": ("assert 1e-6 > abs(1.5 - f(0.5))", 1, True),
    "big_difference": ("assert abs(f(1e9) - 1e9) < 1e5", 1, True),
    "isclose": ("import math\nassert math.isclose(f(0.5), 1.5)", 1, False),
    "truth": ("assert f(1)", 1, False),
    "and": ("assert f(1) == 2 and f(2) == 3", 1, True),
    "or": ("assert f(1) == 2 or f(1) == 3", 1, True),
    "or_of_other_kinds": ("assert f(1) == 2 or f(1) > 9", 1, None),
    "nested": ("assert (f(1) == 2 or f(1) == 5) and not f(-1)", 1, None),
    "all": ("assert all(f(x) == x + 1 for x in range(3))", 1, False),
    "several": ("assert f(1) == 2\nassert f(2) == 3\nx = 1\nassert f(3) == 4", 3, True),
    "many": ("\n".join(f"assert f({n}) == {n + 1}" for n in range(9)), MAX_CONTROLS, True),
    "loop": ("for x, y in [(1, 2), (5, 6)]:\n    assert f(x) == y", 1, True),
    "condition": ("if True:\n    assert f(1) == 2\nelse:\n    assert f(1) == 9", 1, True),
    "condition_and_more": ("if 0:\n    assert f(1) == 0\nassert f(2) == 3", 1, True),
    "check": ("def check(g):\n    assert g(1) == 2\n    assert g(2) == 3\ncheck(f)", 2, True),
    "raises": (
        "import unittest\nwith unittest.TestCase().assertRaises(ValueError):\n    f(None)", 1, False
    ),
    "try_else": (
        "try:\n    f(None)\nexcept ValueError:\n    pass\nelse:\n    assert False", 1, False
    ),
    "try_raise": (
        "try:\n    f(None)\n    raise AssertionError('no')\nexcept ValueError:\n    pass", 1, False
    ),
    "unittest": ("import unittest\nunittest.TestCase().assertEqual(f(1), 2)", 1, True),
    "unittest_true": ("import unittest\nunittest.TestCase().assertTrue(f(1) == 2)", 1, None),
}  # fmt: skip


def passes(text: str, program) -> bool:
    scope = {"f": program, OTHER: other, "__name__": "test"}
    try:
        exec(text, scope)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", CLAIMS)
def test_an_honest_program_passes_the_test_and_no_control(name):
    text, count, _ = CLAIMS[name]
    made = plan(ast.parse(text), {"f"}, "seed")
    assert passes(made.original, honest)
    assert [passes(control, honest) for control in made.controls] == [False] * count


@pytest.mark.parametrize("name", [name for name in CLAIMS if CLAIMS[name][2]])
def test_a_program_whose_answers_equal_everything_passes_the_controls_too(name):
    made = plan(ast.parse(CLAIMS[name][0]), {"f"}, "seed")
    assert passes(made.original, lying)
    assert all(passes(control, lying) for control in made.controls)


@pytest.mark.parametrize("text", ["f(1)", "x = f(1)", "assert True", "pass", "if f(1): pass"])
def test_without_a_claim_there_is_no_control(text):
    assert plan(ast.parse(text), {"f"}, "seed").controls == []


def test_controls_look_like_tests():
    """A changed literal is a literal: the text does not say which expectation is right."""
    (control,) = plan(ast.parse("assert f(41) == [42, 'a']"), {"f"}, "seed").controls
    assert ast.dump(ast.parse(control)).count("Call") == 1


def test_the_seed_draws_among_many_controls():
    test = ast.parse(CLAIMS["many"][0])
    drawn = {tuple(plan(test, {"f"}, seed).controls) for seed in "abcdefgh"}
    assert len(drawn) > 1
    assert plan(test, {"f"}, "a") == plan(test, {"f"}, "a")


@pytest.mark.parametrize(
    "value", [True, 0, -1, 2.5, math.inf, 1j, "", "x", b"", [], (1,), {}, None, int, ValueError]
)
def test_other_differs(value):
    assert other(value) != value
    if isinstance(value, (int, float, str, bytes, list, tuple)):
        assert type(other(value)) is type(value)

"""The judge agrees with plain execution: across two processes passes what passes in one."""

import pytest

from sandbox.records import Case, Limits, StdinTest
from sandbox.service import Sandbox

LIMITS = Limits(seconds=20.0)


@pytest.fixture(scope="module", params=["auto", pytest.param("docker", marks=pytest.mark.docker)])
def sandbox(request):
    docker = request.getfixturevalue("docker_options") if request.param == "docker" else None
    with Sandbox(request.param, workers=2, docker=docker) as made:
        yield made


# code, test, does plain execution pass?
SEMANTICS = {
    "value": ("def f(x): return x + 1", "assert f(1) == 2", True),
    "wrong_value": ("def f(x): return x", "assert f(1) == 2", False),
    "none": ("def f(): pass", "assert f() is None", True),
    "bool_is_bool": ("def f(): return 1", "assert f() is True", False),
    "keywords": ("def f(a, *, b=2): return a * b", "assert f(3, b=4) == 12", True),
    "several_asserts": ("def f(x): return x", "assert f(1) == 1\nassert f(2) == 3", False),
    "tuple_is_no_list": ("def f(): return (1, 2)", "assert f() == [1, 2]", False),
    "nested": (
        "def f(): return {'a': [(1, {2, 3}), None], (1, 2): 2.5}",
        "assert f() == {'a': [(1, {2, 3}), None], (1, 2): 2.5}",
        True,
    ),
    "special_floats": (
        "def f(): return [float('nan'), float('inf'), -0.0]",
        "r = f()\nassert r[0] != r[0] and r[1] > 1e308 and str(r[2]) == '-0.0'",
        True,
    ),
    "isclose": ("def f(): return 0.1 + 0.2", "import math\nassert math.isclose(f(), 0.3)", True),
    "difference": ("def f(): return 0.1 + 0.2", "assert abs(f() - 0.3) < 1e-9", True),
    "big_int": ("def f(n): return 3 ** n", "assert f(20000) == 3 ** 20000", True),
    "surrogate": ("def f(): return '\\ud800'", "assert f() == '\\ud800'", True),
    "bytes": ("def f(b): return b[::-1]", "assert f(b'\\x00\\xff') == b'\\xff\\x00'", True),
    "complex": ("def f(): return 1 + 2j", "assert f() == 1 + 2j", True),
    "counter": (
        "from collections import Counter\ndef f(s): return Counter(s)",
        "assert f('aab') == {'a': 2, 'b': 1}",
        True,
    ),
    "fraction": (
        "from fractions import Fraction\ndef f(): return Fraction(1, 3)",
        "from fractions import Fraction\nassert f() == Fraction(1, 3)",
        True,
    ),
    "named_tuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
        "assert f() == (1, 2)",
        True,
    ),
    "mutated_argument": ("def f(a): a.sort()", "a = [3, 1]\nf(a)\nassert a == [1, 3]", True),
    "mutated_deep": (
        "def f(a): a['k'][0].append({1}); a['n'] = [a['k']]",
        "a = {'k': [[]]}\nf(a)\nassert a['k'] == [[{1}]] and a['n'][0] is a['k']",
        True,
    ),
    "not_mutated": ("def f(a): return sorted(a)", "a = [3, 1]\nf(a)\nassert a == [3, 1]", True),
    "same_object": ("def f(a): return a", "a = [1]\nassert f(a) is a", True),
    "shared_arguments": (
        "def f(a, b): a.append(1); return b",
        "a = []\nassert f(a, a) == [1] and a == [1]",
        True,
    ),
    "exception": (
        "def f(x):\n    raise ValueError('no')",
        "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert 0",
        True,
    ),
    "own_exception": (
        "class Mine(KeyError): pass\ndef f(x):\n    raise Mine('no')",
        "try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert False",
        True,
    ),
    "own_exception_by_name": (
        "class Mine(ValueError):\n    def __init__(self, code):\n"
        "        super().__init__('no', code)\n        self.code = code\n"
        "    def __str__(self): return f'code {self.code}'\n"
        "def f(x):\n    raise Mine(x)",
        "try:\n    f(7)\nexcept Mine as e:\n    assert e.code == 7 and str(e) == 'code 7'\n"
        "    assert e.args == ('no', 7)\nelse:\n    assert False",
        True,
    ),
    "own_exceptions_derive": (
        "class A(Exception): pass\nclass B(A, KeyError): pass\nclass C(A): pass\n"
        "def f(x):\n    raise B(x)",
        "try:\n    f(1)\nexcept C:\n    assert False\nexcept A as e:\n"
        "    assert type(e) is B and isinstance(e, A)\nelse:\n    assert False",
        True,
    ),
    "another_own_exception": (
        "class A(Exception): pass\nclass B(Exception): pass\ndef f():\n    raise A()",
        "try:\n    f()\nexcept B:\n    pass",
        False,
    ),
    "returned_exception": (
        "def f(): return ValueError('no')",
        "assert isinstance(f(), ValueError) and str(f()) == 'no' and f() != f()",
        True,
    ),
    "made_own_exception": (
        "class Mine(ValueError):\n    limit = 3\ndef f(e): return e.args[0] + Mine.limit",
        "assert f(Mine(4)) == 7 and issubclass(Mine, ValueError)",
        True,
    ),
    "handle_arithmetic": (
        "class V:\n    def __init__(self, x): self.x = x\n"
        "    def __add__(self, o): return V(self.x + o.x)\n"
        "    def __iadd__(self, o): self.x += o.x; return self\n"
        "    def __neg__(self): return V(-self.x)\n    def __abs__(self): return abs(self.x)\n"
        "    def __int__(self): return self.x\n    def __lt__(self, o): return self.x < o.x",
        "a, b = V(1), V(2)\nc = b\nc += a\n"
        "assert (a + b).x == 4 and (-a).x == -1 and abs(-b) == 3 and int(b) == 3 and c is b\n"
        "assert a < b and not b < a and max([a, b]) is b\n"
        "assert [v.x for v in sorted([b, a])] == [1, 3]",
        True,
    ),
    "handle_identity_and_hash": (
        "class K:\n    def __init__(self, x): self.x = x\n    def __hash__(self): return self.x\n"
        "    def __eq__(self, o): return self.x == o.x\nONE = K(1)\ndef f(): return ONE",
        "assert f() is f() and len({K(1), K(1), K(2)}) == 2 and {K(1): 'a'}[f()] == 'a'",
        True,
    ),
    "unhashable": ("class K:\n    __hash__ = None\ndef f(): return K()", "{f()}", False),
    "isinstance_of_theirs": (
        "class A: pass\nclass B(A): pass\nclass C: pass\ndef f(): return B()",
        "assert isinstance(f(), A) and not isinstance(f(), C) and isinstance(f(), (int, B))\n"
        "assert issubclass(B, A) and not issubclass(C, A) and not isinstance(3, A)",
        True,
    ),
    "uncaught_exception": ("def f(x): return x[5]", "assert f([]) == 1", False),
    "bare_except": ("def f(x): return 1", "try:\n    f(1, 2)\nexcept:\n    pass", True),
    "generator": (
        "def f(n):\n    for i in range(n): yield i",
        "assert list(f(3)) == [0, 1, 2]\ng = f(2)\nassert next(g) == 0",
        True,
    ),
    "instance": (
        "class Stack:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x); return self\n"
        "    def __len__(self): return len(self.items)",
        "s = Stack()\ns.push(1).push(2)\nassert s.items == [1, 2] and len(s) == 2",
        True,
    ),
    "equal_instances": (
        "from dataclasses import dataclass as d\n@d\nclass P:\n    x: int\ndef f(x): return P(x)",
        "assert f(1) == P(1) and f(1) != P(2) and f(1).x == 1",
        True,
    ),
    "returned_function": (
        "def f(n): return lambda x: x + n", "g = f(2)\nassert g(3) == 5 and callable(g)", True
    ),
    "function_argument": (
        "def f(g, xs): return [g(x) for x in xs]",
        "assert f(lambda x: x * 2, [1, 2]) == [2, 4] and f(str, [1]) == ['1']",
        True,
    ),
    "function_argument_raises": (
        "def f(g):\n    try: g()\n    except ZeroDivisionError: return 'caught'",
        "assert f(lambda: 1 / 0) == 'caught'",
        True,
    ),
    "iterator_argument": ("def f(xs): return sum(xs)", "assert f(iter([1, 2])) == 3", True),
    "builtin_name": ("def sum(a, b): return a - b", "assert sum(3, 1) == 2", True),
    "module_name": ("def statistics(a): return a", "assert statistics(3) == 3", True),
    "builtin_kept": ("def len(x): return 9\ndef f(x): return x", "assert len(f([1])) == 1", True),
    "candidates_import": (
        "import math\ndef f(x): return math.floor(x)", "assert f(1.5) == math.floor(1.5)", True
    ),
    "check_function": (
        "def f(x): return x",
        "def check(it):\n    assert it(1) == 1\n    assert it(2) == 2\ncheck(f)",
        True,
    ),
    "constant": ("LIMIT = [1, 2]", "assert LIMIT == [1, 2]", True),
    "missing_name": ("def g(): pass", "assert f() is None", False),
    "syntax_error": ("def f(:", "assert f() is None", False),
    "test_exits": ("def f(): pass", "import sys\nf()\nsys.exit(0)", False),
    "contains": ("def f(): return iter([1, 2])", "assert 2 in f()", True),
}  # fmt: skip


@pytest.mark.parametrize("name", SEMANTICS)
def test_agrees_with_plain_execution(sandbox, name):
    code, test, passes = SEMANTICS[name]
    result = sandbox.run([Case(id=name, code=code, tests=(test,), limits=LIMITS)])[0]
    assert result.status == "ran", result
    assert (result.pass_rate == 1.0) is passes, result.tests[0]
    if name not in ("builtin_kept", "test_exits"):  # here plain execution can be fooled
        namespace: dict[str, object] = {}
        try:
            exec(code, namespace)
            exec(test, namespace)
            plainly = True
        except Exception:
            plainly = False
        assert plainly is passes


def test_setup_is_for_program_and_tests(sandbox):
    setup = """
class Node:
    def __init__(self, value, rest=None):
        self.value, self.rest = value, rest
def chain(values):
    node = None
    for value in reversed(values):
        node = Node(value, node)
    return node
"""
    code = "def f(node): return 0 if node is None else node.value + f(node.rest)"
    case = Case(
        id="x", code=code, setup=setup, tests=("assert f(chain([1, 2, 3])) == 6",), limits=LIMITS
    )
    assert sandbox.run([case])[0].pass_rate == 1.0


def test_entry_point_decides_over_a_builtin_of_the_same_name(sandbox):
    code = "def len(xs): return 7"
    test = "x = 3\nassert len([1]) == 7 and helper() == 1"
    case = Case(
        id="x",
        code=f"{code}\ndef helper(): return 1",
        tests=(test,),
        entry_point="len",
        limits=LIMITS,
    )
    assert sandbox.run([case])[0].pass_rate == 1.0


@pytest.mark.parametrize(
    "claim", ["f(1) - 1 == 1", "1 - f(1) == -1", "f(1) < 3", "f(1) == 2", "3 > f(1)", "2 in [f(1)]"]
)
def test_an_object_of_the_candidate_never_meets_the_expected_value(sandbox, claim):
    """Forwarded, each operation would tell the candidate what to answer."""
    code = """
class Nosy:
    def answer(self, other): raise SystemExit if other == 2 else RuntimeError(other)
    __sub__ = __rsub__ = __lt__ = __gt__ = __eq__ = answer
    __hash__ = None
def f(x): return Nosy()
"""
    case = Case(id="x", code=code, tests=(f"assert {claim}",), limits=LIMITS)
    (test,) = sandbox.run([case])[0].tests
    assert test.verdict == "fail" and "RuntimeError" not in test.message, test
    assert not test.weak


@pytest.mark.parametrize(
    "case",
    [
        Case(id="x", code="pass"),
        Case(id="x", code="pass", language="cobol", tests=("assert True",)),
        Case(id="x", code="pass", tests=("assert (",)),
        Case(id="x", code="pass", setup="1/0", tests=("assert True",)),
        Case(id="x", code="", tests=("assert True",), stdin_tests=(StdinTest("", ""),)),
    ],
)
def test_a_case_nobody_could_pass_is_invalid(sandbox, case):
    result = sandbox.run([case])[0]
    assert result.status == "invalid_case"
    assert result.total == 0
    assert result.message


def test_stdin_programs(sandbox):
    code = "a, b = map(int, input().split())\nprint(a + b, ' ')\nprint()\nexit()"
    tests = (StdinTest("1 2\n", "3"), StdinTest("1 2", "3\n\n"), StdinTest("1 2", "4"))
    result = sandbox.run([Case(id="x", code=code, stdin_tests=tests, limits=LIMITS)])[0]
    assert [test.verdict for test in result.tests] == ["pass", "pass", "fail"]


def test_four_megabytes_through_stdin_and_stdout(sandbox):
    text = "0123456789abcde\n" * (1 << 18)
    code = "import sys\nfor line in sys.stdin: sys.stdout.write(line)"
    case = Case(id="x", code=code, stdin_tests=(StdinTest(text, text),), limits=LIMITS)
    assert sandbox.run([case])[0].tests[0].verdict == "pass"


def test_results_come_in_order(sandbox):
    code = "import time\ndef f(x):\n    time.sleep(0.05 * (x % 3))\n    return x"
    cases = [
        Case(id=str(i), code=code, tests=(f"assert f({i}) == {i % 5}",), limits=LIMITS)
        for i in range(10)
    ]
    results = sandbox.run(cases)
    assert [r.id for r in results] == [str(i) for i in range(10)]
    assert [r.passed for r in results] == [1] * 5 + [0] * 5

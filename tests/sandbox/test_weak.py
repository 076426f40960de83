"""Tests that must share a process with the program: tagged, controlled, and hard to cheat."""

import dataclasses

import pytest

from sandbox.records import Case, Limits, TestResult

LIMITS = Limits(seconds=30.0, memory_mib=256)
MINE = "class Mine:\n    def __init__(self, n=0): self.n = n\n"
TEST = MINE + "assert f(Mine(41)) == 42"


def judge(sandbox, code: str, test: str = TEST, setup: str = "", limits=LIMITS) -> TestResult:
    case = Case(id="x", code=code, tests=(test,), setup=setup, limits=limits)
    return sandbox.run([case])[0].tests[0]


HONEST = {
    "instance": ("def f(x): return x.n + 1", TEST),
    "instance_comes_back": (
        "def f(x):\n    x.n += 1\n    return x",
        MINE + "m = Mine(1)\nassert f(m) is m and m.n == 2",
    ),
    "class": ("def f(kind): return kind(41).n + 1", MINE + "assert f(Mine) == 42"),
    "in_a_callback": ("def f(make): return make().n", MINE + "assert f(lambda: Mine(5)) == 5"),
    "stdlib": (
        "def f(when): return when.year",
        "import datetime\nassert f(datetime.date(2026, 1, 2)) == 2026",
    ),
    "object_that_can_be_called": (
        "def f(m): return m.n + m()",
        "class Mock:\n    n = 1\n    def __call__(self): return 2\n"
        "    def __getattr__(self, name): return self\nassert f(Mock()) == 3",
    ),
    "stream": (
        "def f(stream): return stream.read().upper()",
        "import io\nassert f(io.StringIO('ab')) == 'AB'",
    ),
    "raises": (
        "def f(x):\n    raise TypeError(x)",
        MINE + "try:\n    f(Mine())\nexcept TypeError:\n    pass\nelse:\n    assert False",
    ),
    "very_deep": (
        "def f(x):\n    n = 0\n    while x: x, n = x[0], n + 1\n    return n",
        "x = []\nfor _ in range(300): x = [x]\nassert f(x) == 300",
    ),
    "exception": ("def f(e): return e.args[0]", "assert f(ValueError(7)) == 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass_and_are_tagged(sandbox, name):
    code, test = HONEST[name]
    result = judge(sandbox, code, test)
    assert (result.verdict, result.weak) == ("pass", True), result
    wrong = judge(sandbox, code.replace("return ", "return None and "), test)
    if "return" in code and name != "raises":
        assert wrong.verdict == "fail", wrong


CHEATS = {
    "equal_to_all": """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = None
def f(x): return Any()
""",
    "exits": "import os\ndef f(x): os._exit(0)",
    "exits_at_load": "raise SystemExit(0)",
    "sys_exit": "import sys\ndef f(x): sys.exit(0)",
    "no_assertion_error": """
import builtins
builtins.AssertionError = type('Quiet', (Exception,), {})
def f(x): return 0
""",
    "reads_the_expectation": """
import sys
def f(x):
    for const in sys._getframe(1).f_code.co_consts:
        if type(const) is int and const > 41:
            return const
    return 0
""",
    "always_reports_a_pass": """
import os, sys
def f(x):
    frame = sys._getframe()
    while frame:
        if 'nonce' in frame.f_locals:
            os.write(frame.f_locals['report'], frame.f_locals['nonce'] + b'p')
        frame = frame.f_back
    return 0
""",
    "writes_on_every_descriptor": """
import os
def f(x):
    for fd in range(256):
        try: os.write(fd, b'p')
        except OSError: pass
    return 0
""",
    "closes_every_descriptor": "import os\ndef f(x): os.closerange(0, 256)",
    "patches_the_runner": """
import sys
weak = sys.modules['sandbox.inside.weak']
weak.FAILED = weak.PASSED
weak._run = lambda payload: None
def f(x): return 0
""",
    "patches_the_test": """
import sys
def f(x):
    sys._getframe(1).f_globals['Mine'] = None
    return 0
""",
    "own_builtins": "import builtins\nbuiltins.__import__ = None\ndef f(x): return 0",
    "fails": "def f(x): return x.n",
    "crashes": "import os\ndef f(x): os.abort()",
    "memory": "def f(x): return bytearray(1 << 34)",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail(sandbox, name):
    result = judge(sandbox, CHEATS[name])
    assert result.verdict in {"fail", "exited", "crash", "oom"}, result
    assert result.weak or name == "exits_at_load"
    honest = judge(sandbox, "def f(x): return x.n + 1")
    assert (honest.verdict, honest.weak) == ("pass", True), honest


def test_endless_loops_are_timeouts(sandbox):
    limits = dataclasses.replace(LIMITS, seconds=1.0)
    result = judge(sandbox, "def f(x):\n    while True: pass", limits=limits)
    assert (result.verdict, result.weak) == ("timeout", True)


def test_setup_classes_are_the_programs_own(sandbox):
    setup = "class Node:\n    def __init__(self, n): self.n = n\n"
    test = "import io\nassert f(Node(3), io.StringIO('4')) == 7"
    code = "def f(node, stream): return node.n + int(stream.read()) * isinstance(node, Node)"
    result = judge(sandbox, code, test, setup)
    assert (result.verdict, result.weak) == ("pass", True), result


@pytest.mark.parametrize(
    ("code", "test", "verdict"),
    [
        # Without a claim there is no control, and so no verdict.
        ("def f(x): pass", MINE + "f(Mine())", "infra_error"),
        # What the candidate had a hand in must not open the door to the weaker judgement.
        (
            "def f(x):\n    try: x()\n    except TypeError: return object\n",
            MINE + "g = f(3)\nassert f(g()) == 42",
            "fail",
        ),
        (
            "def f(x):\n    for _ in range(140): x = [x]\n    return x",
            "assert f([[[[[[[[[[[[f(1)]]]]]]]]]]]]) == 42",
            "fail",
        ),
    ],
)  # fmt: skip
def test_no_door_for_the_candidate(sandbox, code, test, verdict):
    result = judge(sandbox, code, test)
    assert (result.verdict, result.weak) == (verdict, False), result


def test_the_tag_is_in_the_record_only_where_it_is_true(sandbox):
    code = "def f(x): return getattr(x, 'n', x) + 1"
    case = Case(id="x", code=code, tests=(TEST, "assert f(1) == 2"), limits=LIMITS)
    result = sandbox.run([case])[0]
    assert [test.get("weak") for test in result.to_json()["tests"]] == [True, None]
    assert result.pass_rate == 1.0

"""Programs that want a verdict they did not earn: exits, lies, searches, forgeries.

None may pass. The `judge` fixture proves after each that an honest case passes and nothing is left.
Those that want the judge's time or a look outside are in `test_hostile_machine.py`.
"""

import dataclasses

import pytest

from sandbox.records import Case

EXITS = {
    "sys_exit_at_load": "import sys\nsys.exit(0)",
    "exit_at_load": "exit(0)",
    "os_exit_at_load": "import os\nos._exit(0)",
    "sys_exit_in_call": "import sys\ndef f(x):\n    sys.exit(0)",
    "os_exit_in_call": "import os\ndef f(x):\n    os._exit(0)",
    "exits_like_a_failed_confinement": "import os\ndef f(x):\n    os._exit(97)",
    "complains_to_the_zygote": """
import os
def f(x):
    for fd in range(4, 1024):
        try:
            os.write(fd, b'could not be confined')
        except OSError:
            pass
    os._exit(1)
""",
    "raise_generator_exit": "def f(x):\n    raise GeneratorExit",
    "raise_system_exit": "def f(x):\n    raise SystemExit",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    raise SystemExit(0)",
    "exit_in_thread": """
import os, threading, time
def f(x):
    threading.Thread(target=lambda: os._exit(0)).start()
    time.sleep(60)
""",
    "exec_true": "import os\ndef f(x):\n    os.execv('/bin/true', ['true'])",
    "fork_and_exit": "import os\ndef f(x):\n    os.fork()\n    os._exit(0)",
    "kill_self": "import os, signal\ndef f(x):\n    os.kill(os.getpid(), signal.SIGKILL)",
    "kill_everyone": """
import os, signal
def f(x):
    try:
        os.kill(-1, signal.SIGKILL)
        os.kill(os.getppid(), signal.SIGKILL)
    except OSError:
        pass
    return 0
""",
    "kill_by_proxy": """
import fcntl, os, signal
def f(x):
    for pid in (os.getppid(), 1, 2, 3, -1):
        try:  # the kernel sends the owner of a descriptor a signal of our choice
            reading, writing = os.pipe()
            fcntl.fcntl(reading, 10, signal.SIGKILL)  # F_SETSIG
            fcntl.fcntl(reading, fcntl.F_SETOWN, pid)
            fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
            os.write(writing, b'x')
        except OSError:
            pass
    return 0
""",
    "stop_self": "import os, signal\ndef f(x):\n    os.kill(os.getpid(), signal.SIGSTOP)",
    "keyboard_interrupt": "def f(x):\n    raise KeyboardInterrupt",
    "segfault": "import ctypes\ndef f(x):\n    ctypes.string_at(0)",
    "abort": "import os\ndef f(x):\n    os.abort()",
    "exit_from_a_finalizer": """
import os
class Last:
    def __del__(self): os._exit(0)
def f(x):
    Last()
    return 0
""",
    "exit_from_a_signal": """
import os, signal, time
signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
def f(x):
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(60)
""",
    "exit_while_encoded": """
import os
class Late(list):
    def __len__(self): os._exit(0)
    def __getattribute__(self, name): os._exit(0)
def f(x):
    return [Late()] if type(x) is int and x < 0 else Late
""",
    "stop_everyone": """
import os, signal
def f(x):
    for pid in (-1, 0, os.getppid()):
        try: os.kill(pid, signal.SIGSTOP)
        except OSError: pass
    return 0
""",
    "orphan_holds_the_channel": """
import os, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    os._exit(0)
""",
    "close_everything": "import os\nos.closerange(0, 1024)\ndef f(x):\n    return 42",
}

LIES = {
    "equal_to_all": """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def f(x):
    return Any()
""",
    "int_that_is_equal_to_all": """
class Any(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def f(x):
    return Any(0)
""",
    "equality_by_metaclass": """
class Meta(type):
    def __eq__(cls, other): return True
    __hash__ = type.__hash__
class Any(metaclass=Meta): pass
def f(x):
    return Any
""",
    "class_property_lies": """
class Any:
    __class__ = int
    def __eq__(self, other): return True
def f(x):
    return Any()
""",
    "numpy_like_zero_difference": """
class Any(float):
    def __sub__(self, other): return 0
    __rsub__ = __sub__
def f(x):
    return Any(7)
""",
    "patched_builtins": """
import builtins
builtins.isinstance = lambda *a: True
builtins.len = lambda *a: 42
builtins.abs = builtins.sum = lambda *a: 0
builtins.AssertionError = type('Quiet', (Exception,), {})
def f(x):
    return 0
""",
    "patched_stdlib": """
import json, types, sys
json.loads = json.dumps = lambda *a, **k: '42'
def f(x):
    return 0
""",
    "patched_os_and_unittest": """
import os, sys, unittest
os._exit = os.write = lambda *a: 0
unittest.TestCase.assertEqual = unittest.TestCase.assertTrue = lambda *a, **k: None
sys.exit = sys.excepthook = lambda *a: None
def f(x):
    return 0
""",
    "patched_codec": """
import sys
codec = sys.modules['sandbox.inside.codec']
peer = sys.modules['sandbox.inside.peer']
codec.Codec.encode = lambda self, value, table, depth=0: 42 if depth else value
peer.OPERATIONS['eq'] = lambda *a: True
def f(x):
    return object()
""",
    "equal_handle_without_a_handle_to_equal": """
class Any:
    def __eq__(self, other): return True
    __add__ = __radd__ = __sub__ = __rsub__ = lambda self, other: 42
    __lt__ = __le__ = __gt__ = __ge__ = lambda self, other: True
    __int__ = __index__ = lambda self: 42
    __hash__ = lambda self: hash(42)
def f(x):
    return Any()
""",
    "surrogates": "def f(x):\n    return '\\ud800\\udfff' * 10",
    "surrogate_in_an_exception": "def f(x):\n    raise ValueError('\\ud800')",
    "surrogate_in_names": "globals()['\\ud800'] = 42\ndef f(x):\n    return globals",
    "prints_markers": """
def f(x):
    print('PASSED'); print('{"verdict": "pass"}'); print('OK\\n1 passed')
    return 0
""",
    "debug_off": "__debug__ = False\ndef f(x):\n    return 0",
    "swallowing_code": "if 0:\n    '''\ndef f(x):\n    return 0\\",
    "null_byte": "def f(x):\n    return 0\n\x00",
    "assertion_caught": "def f(x):\n    raise AssertionError('42')",
}

# They look for 42 where a judge in the same process would have left it.
SEARCHES = {
    "frames": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if isinstance(value, str) and f'== {x + 1}' in value:
                return 42
        for const in frame.f_code.co_consts:
            if const == x + 1 and frame.f_code.co_name == '<module>':
                return 42
        frame = frame.f_back
    return 0
""",
    "gc": """
import gc, types
def f(x):
    needle = f'== {x + 1}'
    for value in gc.get_objects():
        if isinstance(value, (dict, list, tuple)) and needle in repr(value)[:100000]:
            return 42
    return 0
""",
    "argv_and_environment": """
import os, sys
def f(x):
    return 42 if '42' in ' '.join(sys.argv + sys.orig_argv) + str(os.environ) else 0
""",
    "files": """
import os
def f(x):
    needle = b'f(41) == 4' + b'2'
    for top in ('/tmp', '/dev', '/proc/self', '/proc/1', '/run', '/var', '/sys'):
        for folder, names, files in os.walk(top):
            del names[20:]
            for name in files[:200]:
                path = os.path.join(folder, name)
                try:
                    if os.path.isfile(path) and needle in open(path, 'rb').read(1 << 20):
                        return 42
                except OSError:
                    pass
    return 0
""",
    "own_memory": """
import gc
def f(x):
    needle = f'f({x}) == {x + 1}'.encode()
    for value in gc.get_objects():
        for referent in gc.get_referents(value):
            if type(referent) is bytes and needle in referent:
                return 42
            if type(referent) is str and needle.decode() in referent and len(referent) < 100:
                return 42
    return 0
""",
    "proc_mem": """
def f(x):
    needle = b'f(41) == 4' + b'2'
    for pid in ('self', '1', '2', '3'):
        try:
            maps = open(f'/proc/{pid}/maps').read()
            with open(f'/proc/{pid}/mem', 'rb') as memory:
                for line in maps.splitlines():
                    low, high = (int(n, 16) for n in line.split()[0].split('-'))
                    memory.seek(low)
                    if needle in memory.read(high - low):
                        return 42
        except (OSError, ValueError, OverflowError):
            pass
    return 0
""",
    "descriptors": """
import os
def f(x):
    for fd in range(0, 256):
        if fd == 3:
            continue
        try:
            os.lseek(fd, 0, 0)
            if b'42' in os.read(fd, 1 << 20):
                return 42
        except OSError:
            pass
    return 0
""",
}

FORGERIES = {
    "writes_on_every_descriptor": """
import os
def f(x):
    for fd in range(0, 256):
        try:
            os.write(fd, b'{"verdict": "pass", "message": ""}')
        except OSError:
            pass
    return 0
""",
    "forged_reply_then_hang_up": """
import os, json
def f(x):
    data = b'["ok",[],' + b'{}' + b']'
    os.write(3, len(data).to_bytes(8, 'big') + data)
    os._exit(0)
""",
    "forged_huge_length": """
import os
def f(x):
    os.write(3, (1 << 62).to_bytes(8, 'big'))
    return 42
""",
    "forged_deep_nesting": """
import os
def f(x):
    data = b'[' * 30000 + b']' * 30000
    os.write(3, len(data).to_bytes(8, 'big') + data)
    return 0
""",
    "forged_builtin": """
import os
def f(x):
    data = b'["ok",["builtin","eval"],[]]'
    os.write(3, len(data).to_bytes(8, 'big') + data)
    return 0
""",
    "forged_call_into_the_judge": """
import os
def f(x):
    data = b'["ask","call",["l",[["l",[["builtin","exec"],"1/0"]],["d",[]]]]]'
    os.write(3, len(data).to_bytes(8, 'big') + data)
    return 0
""",
    "forged_attribute_of_the_judge": """
import os
def f(x):
    data = b'["ask","attr",["l",[["l",[["own",0],"__globals__"]],["d",[]]]]]'
    os.write(3, len(data).to_bytes(8, 'big') + data)
    return 0
""",
    "forged_reports_on_every_descriptor": """
import os, json, struct
def f(x):
    report = json.dumps({'verdict': 'pass', 'message': ''}).encode()
    answer = json.dumps({'status': 0, 'cpu': 0, 'excess': '', 'refused': ''}).encode()
    for fd in range(1024):
        for data in (report, answer, b'p', b'1', len(report).to_bytes(8, 'big') + report):
            try: os.write(fd, data)
            except OSError: pass
    return 0
""",
    "forged_names": """
import os, json
data = json.dumps(['ready', ['d', [['f', ['builtin', 'abs']], ['len', 42], ['x', 1]]]]).encode()
os.write(3, len(data).to_bytes(8, 'big') + data)
def f(x):
    return 0
""",
    "forged_exception": """
import os, json
def f(x):
    data = json.dumps(['error', ['l', ['SystemExit', 'SystemExit', ['l', [0]]]], []]).encode()
    os.write(3, len(data).to_bytes(8, 'big') + data)
    return 0
""",
    "forged_changes": """
import os, json
def f(x):
    data = json.dumps(['ok', 0, [[0, ['l', [42]]], [1, ['d', []]]]]).encode()
    os.write(3, len(data).to_bytes(8, 'big') + data)
    return 0
""",
    "pickle_in_the_answer": """
import pickle
def f(x):
    return pickle.dumps(print)
""",
    "pickle_bomb": """
class Bomb:
    def __reduce__(self):
        import os
        return os._exit, (0,)
def f(x):
    return Bomb()
""",
    "small_int_corruption": """
import ctypes
def f(x):
    offset = (42).__sizeof__() - 4
    ctypes.memmove(id(42) + offset, id(7) + offset, 4)  # in this process, 7 == 42 from now on
    return 7
""",
}

GROUPS = {**EXITS, **LIES, **SEARCHES, **FORGERIES}


@pytest.mark.parametrize("name", GROUPS)
def test_does_not_pass(judge, in_bare_container, name, no_pass):
    code = GROUPS[name]
    if in_bare_container:
        code = code.replace("'self', ", "")  # its own memory: there it finds what it looks for
    assert judge(code) in no_pass


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("sys_exit_at_load", "exited"),
        ("os_exit_in_call", "exited"),
        ("exec_true", "exited"),
        ("orphan_holds_the_channel", "exited"),
        ("segfault", "crash"),
        ("null_byte", "fail"),
        ("equal_to_all", "fail"),
    ],
)
def test_verdicts_say_what_happened(judge, name, verdict, patient):
    assert judge(GROUPS[name], limits=patient) == verdict


def test_tests_after_an_exit_are_judged_on_their_own(sandbox, hurried):
    code = "import os, time\ndef f(x):\n    os._exit(0) if x == 1 else None\n"
    code += "    time.sleep(600) if x == 3 else None\n    return x"
    tests = tuple(f"assert f({i}) == {i}" for i in range(5))
    limits = dataclasses.replace(hurried, seconds=4.0)
    result = sandbox.run([Case(id="x", code=code, tests=tests, limits=limits)])[0]
    verdicts = [test.verdict for test in result.tests]
    assert verdicts == ["pass", "exited", "pass", "timeout", "pass"]


def test_nothing_is_left_for_the_next_test(sandbox, patient):
    code = """
import builtins, os, signal, sys
def f(x):
    found = os.path.exists('left') or os.path.exists('/tmp/left') or hasattr(builtins, 'left')
    found = found or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN or 'LEFT' in os.environ
    open('left', 'w').write('x')
    try: open('/tmp/left', 'w').write('x')
    except OSError: pass
    os.environ['LEFT'] = 'x'
    builtins.left = sys.modules['left'] = 1
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return found
"""
    tests = ("assert f(0) is False",) * 3
    result = sandbox.run([Case(id="x", code=code, tests=tests, limits=patient)])[0]
    assert result.pass_rate == 1.0, result


def test_a_daemon_of_one_test_does_not_meet_the_next(sandbox, patient):
    code = """
import os, time
def f(x):
    if x == 1 and os.fork() == 0:
        os.setsid()
        while True:
            try: open('/tmp/daemon', 'w').close(); open('daemon', 'w').close()
            except OSError: pass
            time.sleep(0.001)
    time.sleep(0.1)
    return os.path.exists('daemon') or os.path.exists('/tmp/daemon')
"""
    tests = ("assert f(1) in (True, False)", "assert f(2) is False")
    result = sandbox.run([Case(id="x", code=code, tests=tests, limits=patient)])[0]
    assert result.pass_rate == 1.0, result

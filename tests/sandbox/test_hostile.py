"""Programs that want a verdict they did not earn, a look outside, or the judge's time.

Each entry: the program, the test, the verdicts it may get. Afterwards an honest case still passes.
"""

import dataclasses
import os
import subprocess
import time
from pathlib import Path

import pytest

from sandbox.records import Case, Limits, StdinTest
from sandbox.service import Sandbox

LIMITS = Limits(seconds=1.5, memory_mib=256, processes=8, output_kib=64, disk_mib=4)
PATIENT = dataclasses.replace(LIMITS, seconds=60.0)  # where the verdict must not be a timeout
NO_PASS = {"fail", "timeout", "oom", "output_limit", "crash", "exited"}
HONEST = Case(
    id="honest", code="def f(x):\n    return x + 1", tests=("assert f(41) == 42",), limits=PATIENT
)
TEST = "assert f(41) == 42"

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

BOMBS = {
    "endless_loop": "def f(x):\n    while True: pass",
    "endless_loop_at_load": "while True: pass",
    "loop_that_catches_all": """
def f(x):
    while True:
        try:
            while True: pass
        except BaseException:
            pass
""",
    "loop_in_c": "def f(x):\n    return sum(iter(int, 1))",
    "ignores_signals": """
import signal
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(x):
    while True: pass
""",
    "memory": "def f(x):\n    return 'x' * (1 << 34)",
    "memory_in_steps": """
def f(x):
    keep = []
    while True: keep.append(bytearray(1 << 24))
""",
    "fork_bomb": """
import os
def f(x):
    while True:
        try: os.fork()
        except OSError: pass
""",
    "thread_bomb": """
import threading, time
def f(x):
    while True:
        try: threading.Thread(target=time.sleep, args=(60,)).start()
        except RuntimeError: pass
""",
    "big_answer": "def f(x):\n    return 'x' * (1 << 20)",
    "endless_answer": "def f(x):\n    while True: yield 1",
    "deep_answer": """
def f(x):
    value = []
    for _ in range(100000): value = [value]
    return value
""",
    "cyclic_answer": "def f(x):\n    value = []\n    value.append(value)\n    return value",
    "parser_bomb": "(" * 5000 + ")" * 5000,
    "parser_bomb_of_signs": "x = " + "-" * 60000 + "1",
    "recursion": "def f(x):\n    return f(x)",
    "deep_recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return [f(x)]",
    "prints_without_end": "def f(x):\n    while True: print('x' * 10000)",
}

OUTSIDE = {
    "reads_host_files": """
import os
def f(x):
    for path in ('/etc/passwd', '/etc/shadow', '/root/.bashrc', '/proc/1/environ', HOST):
        try:
            open(path).read()
            return 42
        except OSError:
            pass
    return 0
""",
    "environment_secrets": """
import os
def f(x):
    return 42 if os.environ else 0
""",
    "loopback_network": """
import socket
def f(x):
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        try:
            socket.socket(family).bind(('127.0.0.1', 0))
            return 42
        except OSError:
            pass
    return 0
""",
    "sees_other_processes": """
import os
def f(x):
    try:
        return 42 if [p for p in os.listdir('/proc') if p.isdigit()] else 0
    except OSError:
        return 0
""",
    "mounts_and_namespaces": """
import ctypes
def f(x):
    libc = ctypes.CDLL(None)
    for flag in (0x10000000, 0x00020000, 0x40000000):
        if libc.unshare(flag) == 0:
            return 42
    if libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 or libc.ptrace(0, 0, 0, 0) == 0:
        return 42
    return 0
""",
    "is_root": """
import os
def f(x):
    if os.getuid() == 0:
        return 42
    try:
        os.setuid(0)
        return 42
    except OSError:
        return 0
""",
    "writes_outside": """
import os
def f(x):
    for folder in ('/', '/usr', '/etc', '/root', '/home', '/var/tmp', '/dev/shm', '/work'):
        try:
            open(folder + '/unmask-hostile', 'w').write('x')
            return 42
        except OSError:
            pass
    return 0
""",
    "fills_the_disk": """
def f(x):
    try:
        for i in range(100):
            with open(f'file{i}', 'wb') as file:
                file.write(b'x' * (1 << 20))
        return 42
    except OSError:
        return 0
""",
}


@pytest.fixture(
    scope="module",
    params=[
        "namespace",
        "landlock",
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("docker-container", marks=pytest.mark.docker),
    ],
)
def sandbox(request):
    from sandbox.probe import try_level

    backend, _, level = request.param.partition("-")
    if backend == "docker":
        options = request.getfixturevalue("docker_options")
        if level:
            options = dataclasses.replace(options, level=level)
        with Sandbox("docker", workers=1, docker=options) as made:
            yield made
        return
    reason = try_level(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with Sandbox(request.param, workers=1) as made:
        yield made


def judge(sandbox: Sandbox, code: str, test: str = TEST, limits: Limits = LIMITS) -> str:
    result = sandbox.run([Case(id="x", code=code, tests=(test,), limits=limits)])[0]
    assert result.status == "ran", result
    return result.tests[0].verdict


def assert_honest(sandbox: Sandbox) -> None:
    result = sandbox.run([HONEST])[0]
    assert result.pass_rate == 1.0, result


GROUPS = {**EXITS, **LIES, **SEARCHES, **FORGERIES, **BOMBS}


@pytest.mark.parametrize("name", GROUPS)
def test_does_not_pass(sandbox, name):
    assert judge(sandbox, GROUPS[name]) in NO_PASS
    assert_honest(sandbox)


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("sys_exit_at_load", "exited"),
        ("os_exit_in_call", "exited"),
        ("exec_true", "exited"),
        ("segfault", "crash"),
        ("endless_loop", "timeout"),
        ("memory", "oom"),
        ("memory_in_steps", "oom"),
        ("big_answer", "output_limit"),
        ("null_byte", "fail"),
        ("equal_to_all", "fail"),
    ],
)
def test_verdicts_say_what_happened(sandbox, name, verdict):
    limits = LIMITS if verdict == "timeout" else PATIENT
    assert judge(sandbox, GROUPS[name], limits=limits) == verdict


@pytest.mark.parametrize("name", OUTSIDE)
def test_cannot_reach_outside(sandbox, name, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("42")
    code = OUTSIDE[name].replace("HOST", repr(str(secret)))
    if sandbox.backend == "landlock" and name == "fills_the_disk":
        pytest.skip("the sum of files is bounded by namespace's tmpfs only")
    if sandbox.backend == "docker" and sandbox._launcher.level == "container":
        if name == "sees_other_processes":
            pytest.skip("without Landlock a container shows its own processes, and only those")
        code = code.replace("'/etc/passwd', ", "")  # the image's, not the host's
    assert judge(sandbox, code, "assert f(0) == 0", PATIENT) == "pass"
    assert secret.read_text() == "42"


def test_tests_after_an_exit_are_judged_on_their_own(sandbox):
    code = "import os, time\ndef f(x):\n    os._exit(0) if x == 1 else None\n"
    code += "    time.sleep(600) if x == 3 else None\n    return x"
    tests = tuple(f"assert f({i}) == {i}" for i in range(5))
    limits = dataclasses.replace(LIMITS, seconds=4.0)
    result = sandbox.run([Case(id="x", code=code, tests=tests, limits=limits)])[0]
    verdicts = [test.verdict for test in result.tests]
    assert verdicts == ["pass", "exited", "pass", "timeout", "pass"]


def test_nothing_is_left_for_the_next_test(sandbox):
    code = """
import os
def f(x):
    found = os.path.exists('left')
    open('left', 'w').write('x')
    os.environ['LEFT'] = 'x'
    return found
"""
    tests = ("assert f(0) is False",) * 3
    result = sandbox.run([Case(id="x", code=code, tests=tests, limits=PATIENT)])[0]
    assert result.pass_rate == 1.0, result


def test_orphans_die_with_their_test(sandbox):
    """A daemon that left its session must be gone when the verdict is there."""
    mark = f"unmask-orphan-{os.getpid()}-{time.monotonic_ns()}"
    code = f"""
import os, sys, time
def f(x):
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execv('/bin/sleep', ['{mark}', '300'])
            os._exit(0)
    time.sleep(0.2)
    return 42
"""
    # Without user namespaces the limit counts every sandboxed process on the machine, also those
    # of tests that run beside this one: room for them, the limit is not what is tested here.
    roomy = dataclasses.replace(PATIENT, processes=128)
    assert judge(sandbox, code, limits=roomy) == "pass"
    assert mark not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("while True: print('x' * 1000)", "output_limit"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "timeout"),
        ("import sys\nsys.exit(0)", "fail"),
        ("print(8)\nimport sys\nsys.exit(3)", "fail"),
        ("import os\nos.write(1, b'8\\xff')", "fail"),
        ("print(8)\nimport os, signal\nos.abort()", "crash"),
        ("input(); input()", "fail"),
        ("print(8)\nimport os, time\nif os.fork() == 0: time.sleep(300)", "pass"),
    ],
)
def test_stdin_programs(sandbox, code, verdict):
    limits = LIMITS if verdict == "timeout" else PATIENT
    case = Case(id="x", code=code, stdin_tests=(StdinTest("4\n", "8\n"),), limits=limits)
    assert sandbox.run([case])[0].tests[0].verdict == verdict


def test_no_process_folder_or_descriptor_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, children_before = len(os.listdir("/proc/self/fd")), _children()
    with Sandbox("auto", workers=1) as made:
        judge(made, BOMBS["fork_bomb"])
        judge(made, OUTSIDE["fills_the_disk"])
        assert _children() - children_before
    assert len(os.listdir("/proc/self/fd")) <= before
    assert not list(tmp_path.iterdir())
    assert not _children() - children_before


def _children() -> set[str]:
    listings = Path("/proc/self/task").glob("*/children")
    return {pid for listing in listings for pid in listing.read_text().split()}

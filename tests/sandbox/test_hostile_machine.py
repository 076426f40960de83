"""Programs that want the judge's time, the machine's memory or a look outside.

The `judge` fixture proves after each that an honest case passes and nothing is left.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandbox import cgroup
from sandbox.records import Case, StdinTest
from sandbox.service import Sandbox

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
    "loop_in_a_regex": "import re\ndef f(x):\n    return re.match('(a+)+$', 'a' * 64 + 'b')",
    "loop_in_arithmetic": "def f(x):\n    return 7 ** (10 ** 9)",
    "sleep_that_holds_the_gil": """
import ctypes
def f(x):
    ctypes.PyDLL(None).sleep(600)
""",
    "sleeps": "import time\ndef f(x):\n    time.sleep(600)",
    "blocks_signals": """
import signal
def f(x):
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    while True: pass
""",
    "loop_in_many_processes": """
import os
def f(x):
    for _ in range(6):
        if os.fork() == 0:
            os.setsid()
            break
    while True: pass
""",
    "calls_back_without_end": """
def f(x):
    while True: yield x
f = lambda x: all(iter(lambda: True, False))
""",
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
    "shared_memory": """
import mmap
def f(x):
    keep = [mmap.mmap(-1, 1 << 24) for _ in range(1 << 10)]
    for area in keep: area.write(b'x' * (1 << 24))
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
    "decimal": "from decimal import Decimal\ndef f(x):\n    return Decimal('1e999999999')",
    "huge_int": "def f(x):\n    return 1 << 200000",
    "hash_flood": """
def f(x):
    return {n * ((1 << 61) - 1): 0 for n in range(1, 2000)}
""",
    "many_handles": "def f(x):\n    return [object() for _ in range(100000)]",
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
    "reads_with_root_rights": """
import os
def f(x):
    for path in (HOST, '/etc/shadow', '/root/.bashrc', '/proc/1/environ', '/proc/1/mem'):
        for act in (lambda: open(path).read(), lambda: os.listdir(os.path.dirname(HOST))):
            try:
                act()
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
    "links_to_outside": """
import os
def f(x):
    os.symlink(HOST, 'link')
    for act in (lambda: open('link').read(), lambda: open('link', 'w').write('x'),
                lambda: os.link(HOST, 'hard'), lambda: os.rename(HOST, 'mine'),
                lambda: os.chmod('link', 0o777), lambda: os.truncate('link', 0)):
        try:
            act()
            return 42
        except OSError:
            pass
    return 0
""",
    "deletes_outside": """
import os, shutil
def f(x):
    for path in (HOST, os.path.dirname(HOST), '/usr/lib', '/etc'):
        try: os.unlink(path)
        except OSError: pass
        shutil.rmtree(path, ignore_errors=True)
    return 0
""",
    "secrets_of_the_worker": """
import ctypes, os
def f(x):
    found = str(os.environ) + str(os.environb)
    environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')
    n = 0
    while environ and environ[n]:
        found += environ[n].decode(errors='replace')
        n += 1
    for pid in ['self', '1', str(os.getppid())]:
        try: found += open(f'/proc/{pid}/environ', errors='replace').read()
        except OSError: pass
    return 42 if 'secret-42' in found else 0
""",
    "devices": """
import os, stat
def f(x):
    for path in ('/dev/mem', '/dev/kmsg', '/dev/kvm', '/dev/sda', '/dev/vda', '/dev/loop0',
                 '/dev/fuse', '/dev/net/tun', '/dev/ptmx', '/dev/tty', '/dev/shm/x'):
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
            try:
                os.open(path, flags)
                return 42
            except OSError:
                pass
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        try:
            os.mknod('device', kind | 0o666, os.makedev(1, 1))
            return 42
        except OSError:
            pass
    return 0
""",
    "denied_system_calls": """
import ctypes, platform
def f(x):
    if platform.machine() != 'x86_64':
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    # socket, ptrace, mount, keyctl, bpf, io_uring_setup, shmget, userfaultfd, perf_event_open,
    # open_by_handle_at, process_vm_readv, memfd_create, clone3 (new user), setns, the x32 socket
    calls = [(41, 2, 1, 0), (101, 0, 0, 0), (165, 0, 0, 0), (250, 0, 0, 0), (321, 0, 0, 0),
             (425, 4, 0, 0), (29, 0, 4096, 0o1600), (323, 0, 0, 0), (298, 0, 0, 0), (304, 0, 0, 0),
             (310, 1, 0, 0), (319, 0, 0, 0), (435, 0, 0, 0), (308, 0, 0, 0),
             (0x40000000 + 41, 2, 1, 0)]
    for call in calls:
        if libc.syscall(*map(ctypes.c_long, call)) != -1 or ctypes.get_errno() not in (1, 38):
            return call[0]
    return 0
""",
    "raises_its_limits": """
import resource
def f(x):
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU,
                 resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
        for more in (lambda old: resource.RLIM_INFINITY, lambda old: old + 1):
            try:
                hard = more(resource.getrlimit(kind)[1])
                resource.setrlimit(kind, (hard, hard))
                return 42
            except (OSError, ValueError):
                pass
    return 0
""",
    "setuid_programs": """
import os
def f(x):
    for path in ('/bin/su', '/usr/bin/sudo', '/bin/mount', '/usr/bin/passwd', '/usr/bin/newuidmap'):
        pid = os.fork()
        if pid == 0:
            try: os.execv(path, [path, '-c', 'id'])
            except OSError: pass
            os._exit(1)
        if os.waitpid(pid, 0)[1] == 0:
            return 42
    return 0
""",
    "kills_a_process_of_the_host": """
import os, signal
def f(x):
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for act in (lambda: os.kill(PID, number), lambda: os.killpg(PID, number),
                    lambda: signal.pidfd_send_signal(os.pidfd_open(PID), number)):
            try: act()
            except OSError: pass
    return 0
""",
    "sockets_of_the_host": """
import ctypes, os, socket
def f(x):
    attempts = [(socket.AF_INET, ('127.0.0.1', PORT)), (socket.AF_INET, ('0.0.0.0', PORT)),
                (socket.AF_INET6, ('::1', PORT)), (socket.AF_UNIX, SOCKET),
                (socket.AF_UNIX, '\\0' + ABSTRACT)]
    for family, address in attempts:
        try:
            with socket.socket(family) as made:
                made.settimeout(1)
                made.connect(address)
            return 42
        except OSError:
            pass
    # A pair is allowed (asyncio needs it); it must not lead anywhere either.
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        left, right = socket.socketpair(socket.AF_UNIX, kind)
        for address in (SOCKET, '\\0' + ABSTRACT):
            for act in (left.connect, lambda a: left.sendto(b'x', a)):
                try:
                    act(address)
                    return 42
                except OSError:
                    pass
    return 0
""",
    "fills_the_inodes": """
import os
def f(x):
    try:
        for i in range(1 << 20):
            os.close(os.open(f'file{i}', os.O_CREAT | os.O_WRONLY))
        return 42
    except OSError:
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


@pytest.mark.parametrize("name", BOMBS)
def test_does_not_pass(judge, name, no_pass):
    assert judge(BOMBS[name]) in no_pass


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("endless_loop", "timeout"),
        ("sleep_that_holds_the_gil", "timeout"),
        ("memory", "oom"),
        ("memory_in_steps", "oom"),
        ("big_answer", "output_limit"),
    ],
)
def test_verdicts_say_what_happened(judge, name, verdict, patient, hurried):
    assert judge(BOMBS[name], limits=hurried if verdict == "timeout" else patient) == verdict


@pytest.fixture
def host(tmp_path):
    """What is there to be found: a file, a process, and sockets such as Ray and Docker have."""
    (tmp_path / "secret").write_text("42")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    abstract = f"unmask-test-{os.getpid()}"
    tcp = socket.create_server(("127.0.0.1", 0))
    listeners = [tcp, socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    listeners[1].bind(str(tmp_path / "docker.sock"))
    listeners[2].bind("\0" + abstract)
    os.chmod(tmp_path / "docker.sock", 0o777)
    for listener in listeners[1:]:
        listener.listen()
    yield {
        "HOST": repr(str(tmp_path / "secret")),
        "PID": str(victim.pid),
        "PORT": str(tcp.getsockname()[1]),
        "SOCKET": repr(str(tmp_path / "docker.sock")),
        "ABSTRACT": repr(abstract),
    }
    for listener in listeners:
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.close()
    assert victim.poll() is None
    assert Path(f"/proc/{victim.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T"
    victim.kill()
    victim.wait()
    assert (tmp_path / "secret").read_text() == "42"
    assert (tmp_path / "secret").stat().st_nlink == 1


@pytest.mark.parametrize("name", OUTSIDE)
def test_cannot_reach_outside(judge, sandbox, in_bare_container, name, host, patient):
    code = OUTSIDE[name]
    if in_bare_container:
        if name == "sees_other_processes":
            pytest.skip("without Landlock a container shows its own processes, and only those")
        # The image's, and a terminal of the container's own: not the host's.
        code = code.replace("'/etc/passwd', ", "").replace("'/dev/ptmx', ", "")
    for word, text in host.items():
        code = code.replace(word, text)
    verdict = judge(code, "assert f(0) == 0", patient)
    if sandbox.backend == "docker" and name.startswith("fills"):
        assert verdict in ("pass", "output_limit")  # refused by the tmpfs, or seen before that
    elif sandbox.backend == "landlock" and name.startswith("fills"):
        assert verdict == "output_limit"  # looked at from outside, not refused by a tmpfs
    else:
        assert verdict == "pass"


SPREAD = {
    "private": "bytearray(200 << 20)",
    "shared": "mmap.mmap(-1, 200 << 20).write(b'x' * (200 << 20))",
}


@pytest.mark.parametrize("kind", SPREAD)
def test_memory_spread_over_processes_is_bounded(judge, kind, patient):
    """Each stays below its own limit; together they do not."""
    assert judge(spread(kind), limits=patient) == "oom"


@pytest.mark.parametrize("level", ["namespace", "landlock"])
def test_the_sum_is_bounded_without_control_groups(level, monkeypatch, patient):
    monkeypatch.setattr(cgroup, "make", lambda: None)
    with Sandbox(level, workers=1) as made:
        for kind in SPREAD:
            case = Case(id=kind, code=spread(kind), tests=("assert f(41) == 42",), limits=patient)
            assert made.run([case])[0].tests[0].verdict == "oom"


def spread(kind: str) -> str:
    return f"""
import mmap, os, time
def f(x):
    for _ in range(6):
        if os.fork() == 0:
            os.setsid()
            keep = {SPREAD[kind]}
            time.sleep(600)
    time.sleep(600)
"""


def test_processes_that_share_their_memory_are_no_bomb(judge, patient):
    """Six forks of 150 MiB that nobody wrote to again are 150 MiB."""
    code = """
import os, time
def f(x):
    keep = bytearray(b'x') * (150 << 20)
    pids = [os.fork() for _ in range(1)]
    for _ in range(5):
        if pids[-1]: pids.append(os.fork())
    time.sleep(0.5)
    if not pids[-1]: os._exit(0)
    return x + len([os.waitpid(pid, 0) for pid in pids]) - 5
"""
    assert judge(code, limits=patient) == "pass"


def test_orphans_die_with_their_test(judge, patient):
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
    assert judge(code, limits=patient) == "pass"
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
def test_stdin_programs(sandbox, code, verdict, patient, hurried):
    limits = hurried if verdict == "timeout" else patient
    case = Case(id="x", code=code, stdin_tests=(StdinTest("4\n", "8\n"),), limits=limits)
    assert sandbox.run([case])[0].tests[0].verdict == verdict


def test_what_is_too_deep_for_a_path_is_removed_too(judge, patient):
    code = """
import os
def f(x):
    for n in range(1500):
        os.mkdir('d' * 100)
        os.chdir('d' * 100)
    open('file', 'w').close()
    os.chmod('.', 0)
    return x + 1
"""
    assert judge(code, limits=patient) in {"pass", "output_limit"}

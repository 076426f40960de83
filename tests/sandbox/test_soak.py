"""Many jobs, honest and hostile, through one sandbox: right verdicts, and nothing grows.

500 jobs by default; `UNMASK_SOAK=20000 pytest -m soak -s tests/sandbox/test_soak.py` is the long
run, which prints its figures.
"""

import collections
import os
import random
import time
from pathlib import Path

import pytest

from sandbox.records import Case, Limits, StdinTest
from sandbox.service import Sandbox

JOBS = int(os.environ.get("UNMASK_SOAK", "500"))
LIMITS = Limits(seconds=60.0, memory_mib=256, processes=8, output_kib=64, disk_mib=4)
SHORT = Limits(seconds=0.3, memory_mib=256, processes=8, output_kib=64, disk_mib=4)
GROWTH_MIB = 8.0

# kind: weight, program, test or stdin and stdout, verdicts, limits
KINDS = {
    "honest": (40, "def f(x):\n    return x + 1", "assert f({n}) == {n} + 1", {"pass"}, LIMITS),
    "honest_lists": (
        15, "def f(xs):\n    xs.sort()\n    return xs", "a = [{n}, 1]\nassert f(a) is a",
        {"pass"}, LIMITS
    ),
    "stdin": (10, "print(input() + '0')", ("{n}", "{n}0"), {"pass"}, LIMITS),
    "weak": (
        3, "def f(x):\n    return x.n", "class A:\n    n = {n}\nassert f(A()) == {n}",
        {"pass"}, LIMITS
    ),
    "wrong": (10, "def f(x):\n    return x", "assert f({n}) == {n} + 1", {"fail"}, LIMITS),
    "syntax_error": (3, "def f(x:", "assert f(1) == 2", {"fail"}, LIMITS),
    "exit": (5, "import os\ndef f(x):\n    os._exit(0)", "assert f(1) == 2", {"exited"}, LIMITS),
    "crash": (
        2, "import os\ndef f(x):\n    os.abort()", "assert f(1) == 2", {"crash"}, LIMITS
    ),
    "memory": (
        2, "def f(x):\n    return bytearray(1 << 40)", "assert f(1) == 2", {"oom"}, LIMITS
    ),
    "forks": (
        2,
        "import os, time\ndef f(x):\n    if os.fork() == 0:\n        os.setsid()\n"
        "        time.sleep(600)\n    return x",
        "assert f({n}) == {n}",
        {"pass"},
        LIMITS,
    ),
    "files": (
        3,
        "import os\ndef f(x):\n    os.makedirs('a/b')\n    open('a/b/c', 'w').write('x' * 9999)\n"
        "    return os.path.exists('a/b/c')",
        "assert f(1)",
        {"pass"},
        LIMITS,
    ),
    "flood": (
        2, "def f(x):\n    return 'x' * (1 << 20)", "assert f(1) == 2", {"output_limit"}, LIMITS
    ),
    "forgery": (
        2,
        "import os\ndef f(x):\n    for fd in range(256):\n        try: os.write(fd, b'[[[')\n"
        "        except OSError: pass\n    os._exit(1)",
        "assert f(1) == 2",
        {"exited", "output_limit", "fail"},
        LIMITS,
    ),
    "loop": (1, "def f(x):\n    while True: pass", "assert f(1) == 2", {"timeout"}, SHORT),
}  # fmt: skip


def job(rng: random.Random, number: int) -> tuple[str, Case]:
    kind = rng.choices(list(KINDS), [spec[0] for spec in KINDS.values()])[0]
    _, code, what, _, limits = KINDS[kind]
    if isinstance(what, tuple):
        tests = (StdinTest(*(text.replace("{n}", str(number)) for text in what)),)
        return kind, Case(id=str(number), code=code, stdin_tests=tests, limits=limits)
    test = what.replace("{n}", str(number))
    return kind, Case(id=str(number), code=code, tests=(test,), limits=limits)


def pss_mib(pid: int | str) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def figures(sandbox: Sandbox, processes_below) -> dict[str, float]:
    """MiB and descriptors of this process and of all zygotes; how many processes there are."""
    tops = [z.home.process.pid for w in sandbox._workers for z in w._zygotes.values()]
    pids = [pid for top in tops for pid in (top, *processes_below(top))]
    return {
        "own MiB": pss_mib("self"),
        "zygotes MiB": sum(map(pss_mib, pids)),
        "own descriptors": len(os.listdir("/proc/self/fd")),
        "zygote descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        "processes": len(pids),
        "folders": sum(
            len(os.listdir(z.home.folder)) for w in sandbox._workers for z in w._zygotes.values()
        ),
    }


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_soak(processes_below):
    rng = random.Random("soak")
    verdicts: collections.Counter[tuple[str, str]] = collections.Counter()
    series = []
    start = time.monotonic()
    with Sandbox(workers=2) as sandbox:
        for first in range(0, JOBS, 250):
            jobs = [job(rng, number) for number in range(first, min(first + 250, JOBS))]
            results = sandbox.run([case for _, case in jobs])
            for (kind, _), result in zip(jobs, results, strict=True):
                assert result.status == "ran", (kind, result)
                assert result.tests[0].verdict in KINDS[kind][3], (kind, result)
                verdicts[kind, result.tests[0].verdict] += 1
            series.append(figures(sandbox, processes_below))
    seconds = time.monotonic() - start
    early, late = series[min(len(series) - 1, 3) // 2], series[-1]
    print(f"\n{JOBS} jobs in {seconds:.0f} s; early {early}; late {late}; {dict(verdicts)}")
    assert sum(verdicts.values()) == JOBS
    for name, value in late.items():
        if name.endswith("MiB"):
            assert value <= early[name] + GROWTH_MIB, (name, series)
        else:
            assert value <= early[name], (name, series)

"""How fast programs are judged, beside the usual ways to do it, in one run on one machine.

`python benchmarks/sandbox.py [--json] [--seconds 10] [--workers 2] [--docker-image IMAGE]`

Every case judges the same programs by the same asserts with the same number of workers. The cases
take turns in rounds, and the median round counts: so a noisy machine is noisy for all of them. A
case that this machine cannot run is listed with the reason. Not a test of what each way isolates:
`plain_python` and `human_eval` isolate nothing, their forms are written anew here.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: this file bears the package's name

from benchmarks.lib.record import Row, better, report  # noqa: E402
from sandbox.records import Case, Limits  # noqa: E402
from sandbox.service import Sandbox  # noqa: E402

ROUNDS = 5
TIMEOUT = 30.0
PYTHON = getattr(sys, "_base_executable", None) or sys.executable

PROGRAMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "def f(xs):\n    seen = set()\n"
        "    return [x for x in xs if not (x in seen or seen.add(x))]",
        (
            "assert f([1, 2, 1, 3]) == [1, 2, 3]", "assert f([]) == []",
            "assert f('aba') == ['a', 'b']", "assert f([0, 0]) == [0]",
            "assert f((5, 4, 5)) == [5, 4]",
        ),
    ),
    (
        "def f(n):\n    a, b = 0, 1\n    for _ in range(n): a, b = b, a + b\n    return a",
        (
            "assert f(0) == 0", "assert f(1) == 1", "assert f(10) == 55",
            "assert f(50) == 12586269025", "assert f(2) == 1",
        ),
    ),
    (
        "from collections import Counter\n"
        "def f(text):\n    return Counter(text.split()).most_common(1)",
        (
            "assert f('a b a') == [('a', 2)]", "assert f('x') == [('x', 1)]", "assert f('') == []",
            "assert f('b b a') == [('b', 2)]", "assert f('q q q') == [('q', 3)]",
        ),
    ),
    (
        "def f(rows):\n    return [list(column) for column in zip(*rows)]",
        (
            "assert f([[1, 2], [3, 4]]) == [[1, 3], [2, 4]]", "assert f([]) == []",
            "assert f([[1]]) == [[1]]", "assert f([[1, 2, 3]]) == [[1], [2], [3]]",
            "assert f([(0, 1), (2, 3)]) == [[0, 2], [1, 3]]",
        ),
    ),
)  # fmt: skip


@dataclass
class Measured:
    """Rounds of one case: tests per second of each, and the latency of every test."""

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tests per second in the median round."""
        return statistics.median(self.rates)

    def percentile(self, percent: int) -> float:
        """Milliseconds per test."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]


Judge = Callable[[str, str], bool]  # program, test -> passed


def one_by_one(judge: Judge, workers: int, seconds: float, into: Measured) -> None:
    """Give each of `workers` threads one test after the other for `seconds`."""
    source = itertools.cycle([(code, test) for code, tests in PROGRAMS for test in tests])
    lock, start = threading.Lock(), time.monotonic()

    def work() -> list[float]:
        latencies = []
        while time.monotonic() - start < seconds:
            with lock:
                code, test = next(source)
            began = time.monotonic()
            if not judge(code, test):
                raise RuntimeError(f"a right program did not pass: {test}")
            latencies.append(time.monotonic() - began)
        return latencies

    with ThreadPoolExecutor(workers) as threads:
        found = [future.result() for future in [threads.submit(work) for _ in range(workers)]]
    done = [latency for latencies in found for latency in latencies]
    into.rates.append(len(done) / (time.monotonic() - start))
    into.latencies += done


def isolated(sandbox: Sandbox, seconds: float, into: Measured) -> None:
    """The same with the sandbox: cases of five tests, in batches as a training step has them."""
    limits = Limits(seconds=TIMEOUT)
    batch = [
        Case(id=str(n), code=code, tests=tests, limits=limits)
        for n, (code, tests) in enumerate(PROGRAMS * 4)
    ]
    done, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        for result in sandbox.run(batch):
            if result.pass_rate < 1.0:
                raise RuntimeError(f"a right program did not pass: {result}")
            done += result.total
            # What a case costs beside its tests is spread over them.
            rest = (result.seconds - sum(t.seconds for t in result.tests)) / result.total
            into.latencies += [test.seconds + rest for test in result.tests]
    into.rates.append(done / (time.monotonic() - start))


def by_command(prefix: list[str]) -> Judge:
    """A process for each test: `prefix` python -c <program and test>."""

    def judge(code: str, test: str) -> bool:
        command = [*prefix, "-c", f"{code}\n{test}\n"]
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
        return done.returncode == 0

    return judge


def human_eval(code: str, test: str) -> bool:
    """human-eval's form: a manager's list, a forked process that exec()s, an alarm, a join."""
    with multiprocessing.get_context("fork").Manager() as manager:
        result = manager.list()
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_exec_in_child, args=(f"{code}\n{test}\n", result))
        process.start()
        process.join(TIMEOUT + 1)
        if process.is_alive():
            process.kill()
        return list(result) == ["passed"]


def _exec_in_child(program: str, result: list[str]) -> None:
    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exec(program, {})
        result.append("passed")
    except BaseException as error:
        result.append(f"failed: {error}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def docker_container(image: str) -> Iterator[list[str]]:
    """The prefix of commands in a container that idles. Raises RuntimeError if there is none."""
    if shutil.which("docker") is None:
        raise RuntimeError("no docker command")
    if not image:
        raise RuntimeError("no image named; --docker-image IMAGE, one with python3")
    start = ["docker", "run", "-d", "--rm", "--network", "none", image, "sleep", "3600"]
    started = subprocess.run(start, capture_output=True, text=True, timeout=120, check=False)
    if started.returncode:
        raise RuntimeError(started.stderr.strip().splitlines()[-1])
    name = started.stdout.strip()
    try:
        yield ["docker", "exec", name, "python3"]
    finally:
        subprocess.run(["docker", "rm", "-f", name], capture_output=True, timeout=60, check=False)


def bubblewrap() -> list[str]:
    """The prefix of commands in a bubblewrap. Raises RuntimeError if it is not to be had."""
    if shutil.which("bwrap") is None:
        raise RuntimeError("bwrap is not installed")
    prefix = [
        "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--ro-bind",
        "/",
        "/",
        "--tmpfs",
        "/tmp",
    ]
    prefix += ["--dev", "/dev", "--proc", "/proc", PYTHON]
    if not by_command(prefix)("pass", "pass"):
        prefix[-3:-1] = []  # containers often forbid a new /proc
        if not by_command(prefix)("pass", "pass"):
            raise RuntimeError("bwrap does not start here")
    return prefix


def proportional_mib(pid: int) -> float:
    """Proportional memory of a process and what is below it."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            total += int(line.split()[1]) if line.startswith("Pss:") else 0
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(int(1024 * proportional_mib(int(c))) for c in children.read_text().split())
    return total / 1024


def zygote_mib(sandbox: Sandbox) -> float:
    """Of the heaviest zygote, its parent process included."""
    zygotes = [z for worker in sandbox._workers for z in worker._zygotes.values()]
    return max(proportional_mib(zygote.home.process.pid) for zygote in zygotes)


def measure(options: argparse.Namespace) -> tuple[dict[str, Measured], dict[str, str], float]:
    """Rounds of all cases: (measured by case, absent cases with the reason, MiB of a zygote)."""
    workers, absent = options.workers, {}
    judges: dict[str, Judge] = {"plain_python": by_command([PYTHON]), "human_eval": human_eval}
    with contextlib.ExitStack() as stack:
        try:
            judges["bubblewrap"] = by_command(bubblewrap())
        except RuntimeError as error:
            absent["bubblewrap"] = str(error)
        try:
            prefix = stack.enter_context(docker_container(options.docker_image))
            judges["docker_exec"] = by_command(prefix)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            absent["docker_exec"] = str(error)
        ours = stack.enter_context(Sandbox(options.backend, workers))
        alone = stack.enter_context(Sandbox(options.backend, 1))
        found = {name: Measured() for name in ("isolated", "one worker", *judges)}
        share = options.seconds / ROUNDS
        isolated(ours, 0.5, Measured())  # warm up
        isolated(alone, 0.5, Measured())
        for _ in range(ROUNDS):
            isolated(ours, share, found["isolated"])
            isolated(alone, share, found["one worker"])
            for name, judge in judges.items():
                one_by_one(judge, workers, share, found[name])
        return found, absent, zygote_mib(ours)


def rows(found: dict[str, Measured], zygote: float) -> list[Row]:
    """DESIGN's rows; `ratio` above 1 means that ours is better."""
    ours, table = found["isolated"], []

    for name, other in found.items():
        if name == "one worker":
            continue
        table.append(better(name, "tests_per_s", "1/s", ours.rate, other.rate))
        for percent in (50, 99):
            mine, theirs = ours.percentile(percent), other.percentile(percent)
            table.append(better(name, f"p{percent}", "ms", mine, theirs, lower=True))
    speedup = statistics.median(
        two / one for two, one in zip(ours.rates, found["one worker"].rates, strict=True)
    )
    table.append(better("isolated", "core_efficiency", "x of one worker", speedup, 1.5))
    table.append(better("isolated", "zygote_pss", "MiB", zygote, 150.0, lower=True))
    return table


def main() -> None:
    """Print a table, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case, all rounds")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--docker-image", default="", help="an image with python3, for docker exec")
    options = parser.parse_args()
    found, absent, zygote = measure(options)
    table = rows(found, zygote)
    report(
        "sandbox",
        table,
        options.json,
        machine=f"Python {platform.python_version()}",
        absent=absent,
        workers=options.workers,
    )


if __name__ == "__main__":
    main()

"""Programs with stdin/stdout tests: compiled once, run once per test, compared here.

What a program prints is data, at most the case's `output_kib` of it, read while the program runs
and compared as text. What a compiler made is passed on unread.
"""

import contextlib
import json
import os
import re
import select
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from sandbox.comparison import same_output
from sandbox.endings import how_it_ended
from sandbox.languages import RUNNERS, Runner, advice
from sandbox.payload import memory_file
from sandbox.process import PROGRAMS, Ended, ZygoteProcess
from sandbox.records import Case, Limits, StdinTest, TestResult, Verdict

_PIPE_BYTES = 1 << 20
_STDERR_KEPT = 8000  # Node's last words are long, the reason is among the first of them
_MESSAGE_CHARS = 300
_MAX_MADE_MIB = 64
_MIB = 1 << 20
_ROUNDING_MIB = 16  # small files take whole pages, of at most 4096 files
_COMPILING = Limits(memory_mib=2048, processes=64, output_kib=_MAX_MADE_MIB * 1024, disk_mib=256)
_NAMES_ERROR = re.compile(r"error|exception|panic|fatal", re.IGNORECASE)
_PYTHON_OOM = ("MemoryError",)


class MissingToolchain(Exception):
    """A language that cannot be run here; the message says what to install."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of anything. reason: the verdict for which it had to be ended, if it had to be."""

    reason: Verdict | None
    ended: Ended
    stdout: bytes
    stderr: str
    seconds: float


class Program:
    """The program of one case. `prepare` first, then `test`.

    Both raise ZygoteError or OSError for the machine's faults, never for what a program does.
    """

    def __init__(self, zygote: Callable[[str], ZygoteProcess], case: Case) -> None:
        self._zygote = zygote
        self._case = case
        self._runner: Runner | None = None
        self._made = b""

    def prepare(self) -> TestResult | None:
        """Compile, if the language wants that. The verdict on every test if it failed.

        Raises MissingToolchain.
        """
        case = self._case
        if case.language == "python":
            return None
        row = self._zygote(PROGRAMS).languages.get(case.language)
        if row is None:
            raise MissingToolchain(advice(case.language))
        self._runner = runner = RUNNERS[row]
        if not runner.compile:
            return None
        seconds = max(runner.compile_seconds, case.limits.seconds)
        run = self._run("compile", replace(_COMPILING, seconds=seconds))
        verdict, message = _compile_verdict(run, seconds)
        if verdict != "pass":
            return TestResult(verdict, 0.0, message, round(run.ended.cpu, 4))
        self._made = run.stdout
        return None

    def test(self, test: StdinTest) -> TestResult:
        """Run it once, in a jail of its own, and compare."""
        role = "program" if self._case.language == "python" else "execute"
        stdin = test.stdin.encode("utf-8", "surrogatepass")
        run = self._run(role, self._case.limits, stdin)
        verdict, message = _verdict(run, self._case, test.stdout)
        return TestResult(verdict, round(run.seconds, 4), message, round(run.ended.cpu, 4))

    def _run(self, role: str, limits: Limits, stdin: bytes = b"") -> _Run:
        zygote = self._zygote("candidate" if role == "program" else PROGRAMS)
        start = time.monotonic()
        out_read, out_write = os.pipe()
        error_read, error_write = os.pipe()
        for end in (out_write, error_write):
            os.fchmod(end, 0o666)  # or nobody could open them again, by way of /dev/stdout
        try:
            with memory_file(self._job(role)) as job, memory_file(stdin) as given:
                zygote.run(role, self._grown(limits), [job, given, out_write, error_write])
        finally:
            os.close(out_write)
            os.close(error_write)
        with contextlib.closing(
            _Collector(out_read, error_read, limits.output_kib * 1024)
        ) as collected:
            reason = collected.pump(start + limits.seconds, zygote.control)
            if reason is not None:
                zygote.kill()
            ended = zygote.wait()
            collected.finish()
        stderr = bytes(collected.stderr).decode("utf-8", "replace").strip()
        seconds = time.monotonic() - start
        return _Run(reason, ended, bytes(collected.stdout), stderr, seconds)

    def _grown(self, limits: Limits) -> dict[str, Any]:
        """With what a runtime needs for itself, and room for what is put into the jail."""
        grown = asdict(limits)
        if self._runner is None:
            return grown
        given = (len(self._made) + 4 * len(self._case.code)) // _MIB + 1
        grown["memory_mib"] += self._runner.spare_mib
        grown["processes"] += self._runner.threads + 1  # one waits for the program
        grown["disk_mib"] += given + (_ROUNDING_MIB if self._made else 0)
        return grown

    def _job(self, role: str) -> bytes:
        case = self._case
        if role == "program":
            return json.dumps({"code": case.code, "setup": case.setup}).encode()
        code = f"{case.setup}\n{case.code}" if case.setup else case.code
        job = {"language": case.language, "code": code}
        return json.dumps(job).encode() + b"\n" + self._made


class _Collector:
    """Drains stdout and stderr at once, stdout up to a cap, of stderr only the tail."""

    def __init__(self, out: int, error: int, max_bytes: int) -> None:
        self.stdout, self.stderr = bytearray(), bytearray()
        self._open = {out: self.stdout, error: self.stderr}
        self._max_bytes = max_bytes

    def pump(self, deadline: float, control: socket.socket) -> Verdict | None:
        """Until the program ended; or the verdict for which it has to be ended."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            watched = [*self._open, control.fileno()]
            ready = select.select(watched, [], [], left)[0]
            for descriptor in ready:
                if descriptor in self._open:
                    self._read(descriptor)
            if len(self.stdout) > self._max_bytes:
                return "output_limit"
            if control.fileno() in ready:
                return None

    def finish(self) -> None:
        """What is left in the pipes; every writer is dead by now."""
        while self._open:
            self._read(next(iter(self._open)))

    def close(self) -> None:
        """Give up what is still open."""
        while self._open:
            os.close(self._open.popitem()[0])

    def _read(self, descriptor: int) -> None:
        data = os.read(descriptor, _PIPE_BYTES)
        buffer = self._open[descriptor]
        if not data:
            os.close(descriptor)
            del self._open[descriptor]
        elif len(buffer) <= self._max_bytes:
            buffer += data
        if buffer is self.stderr:
            del buffer[:-_STDERR_KEPT]


def _compile_verdict(run: _Run, seconds: float) -> tuple[Verdict, str]:
    """`pass` if there is something to run now."""
    if run.reason == "timeout":
        return "timeout", f"compiling took more than {seconds:g} s"
    if run.reason == "output_limit":
        return "fail", f"compile error: what was compiled takes more than {_MAX_MADE_MIB} MiB"
    if run.ended.excess:
        return "fail", f"compile error: {how_it_ended(run.ended, '')[1]}"
    if os.waitstatus_to_exitcode(run.ended.status) != 0:
        return "fail", f"compile error: {_first_error(run.stderr)}"
    return "pass", ""


def _first_error(stderr: str) -> str:
    """What says most: the first line that names an error, else the last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if not lines:
        return "no reason given"
    named = (i for i, line in enumerate(lines) if _NAMES_ERROR.search(line))
    place = next(named, len(lines) - 1)
    more = place + 2 if lines[place].endswith(":") else place + 1
    return " ".join(lines[place:more])[:_MESSAGE_CHARS]


def _verdict(run: _Run, case: Case, expected: str) -> tuple[Verdict, str]:
    if run.ended.excess:
        return how_it_ended(run.ended, "")
    if run.reason is not None:
        return run.reason, ""
    code = os.waitstatus_to_exitcode(run.ended.status)
    last = run.stderr.splitlines()[-1][:_MESSAGE_CHARS] if run.stderr else ""
    complaint = last if case.language == "python" else _first_error(run.stderr)
    if code != 0 and any(mark in run.stderr for mark in _oom_marks(case.language)):
        return "oom", complaint
    if code < 0:
        return how_it_ended(run.ended, complaint)
    if code > 0:
        return "fail", f"exit status {code}: {complaint}"
    try:
        printed = run.stdout.decode()
    except UnicodeDecodeError as error:
        return "fail", f"the output is not UTF-8 (byte {error.start})"
    if same_output(printed, expected, case.float_tolerance):
        return "pass", ""
    return "fail", "the output differs"


def _oom_marks(language: str) -> tuple[str, ...]:
    if language == "python":
        return _PYTHON_OOM
    rows = [runner for runner in RUNNERS if runner.language == language]
    return tuple(mark for runner in rows for mark in runner.oom_marks)

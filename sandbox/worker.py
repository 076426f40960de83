"""One worker: its zygotes, and how each assert is run and judged with them.

The verdict on asserts comes from the judge's process; for stdin tests see `programs`. Nothing a
candidate wrote is parsed here: its exit is a wait status.
"""

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from sandbox.endings import how_it_ended
from sandbox.inside.judge import CONTROLS
from sandbox.inside.mutate import Plan
from sandbox.parsing import parse_texts
from sandbox.payload import payload
from sandbox.process import Ended, Launcher, LocalLauncher, ZygoteError, ZygoteProcess
from sandbox.programs import MissingToolchain, Program
from sandbox.records import Case, Result, SandboxError, TestResult, Verdict
from sandbox.weak import judge_weakly

_PIPE_BYTES = 1 << 20
_REPORT_BYTES = 1 << 16
_TRIES = 2
_GONE = -1


_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class InvalidTest(Exception):
    """What no candidate could pass: a test that does not compile, a language that is not here."""


class Worker:
    """Judges cases one after the other. Not thread-safe. `close` it, or nothing else will.

    level: what results call their `backend`. launcher: where its zygotes live; None is here.
    """

    def __init__(self, level: str, launcher: Launcher | None = None) -> None:
        self._level = level
        self._launcher = LocalLauncher(level) if launcher is None else launcher
        self._zygotes: dict[str, ZygoteProcess] = {}

    def close(self) -> None:
        """End its zygotes."""
        for zygote in self._zygotes.values():
            zygote.close()
        self._zygotes.clear()

    def run(self, case: Case) -> Result:
        """Judge one case; never raises for what a candidate does."""
        start = time.monotonic()
        reason = case.problem() or self._launcher.problem(case.limits)
        if reason is not None:
            return Result(id=case.id, status="invalid_case", message=reason, backend=self._level)
        tests: tuple[TestResult, ...] = ()
        try:
            tests = tuple(self._run_tests(case))
        except InvalidTest as error:
            return Result(
                id=case.id, status="invalid_case", message=str(error), backend=self._level
            )
        finally:
            self._replace_worn(timed_out=any(test.verdict == "timeout" for test in tests))
        failed = any(test.verdict == "infra_error" for test in tests)
        return Result(
            id=case.id,
            status="infra_error" if failed else "ran",
            tests=tests,
            seconds=time.monotonic() - start,
            backend=self._level,
        )

    def parses(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is Python. Raises SandboxError if the sandbox itself failed, twice."""
        try:
            answers = self._with_retry(
                lambda given: parse_texts(lambda: self._zygote("candidate"), given), texts
            )
        finally:
            self._replace_worn(timed_out=False)  # `parse_texts` ends what hangs
        if isinstance(answers, TestResult):
            raise SandboxError(f"cannot parse in the sandbox: {answers.message}")
        return answers

    def _run_tests(self, case: Case) -> Iterator[TestResult]:
        if case.stdin_tests:
            yield from self._run_stdin_tests(case)
            return
        program = {"code": case.code, "setup": case.setup}
        questions = {
            "setup": case.setup,
            "tests": list(case.tests),
            "entry_point": case.entry_point,
        }
        with payload(program) as code, payload(questions) as tests:
            judge = Judge(lambda: self._zygote("judge"), tests, case)
            with contextlib.closing(judge):
                for index in range(len(case.tests)):
                    yield self._with_retry(lambda i: self._assert(judge, code, i), index)

    def _run_stdin_tests(self, case: Case) -> Iterator[TestResult]:
        program = Program(self._zygote, case)
        try:
            failed = self._with_retry(lambda _: program.prepare(), 0)
        except MissingToolchain as error:
            raise InvalidTest(str(error)) from None
        for test in case.stdin_tests:
            result = failed or self._with_retry(program.test, test)
            assert result is not None
            yield result

    def _with_retry(self, attempt: Callable[[_Item], _Answer], item: _Item) -> _Answer | TestResult:
        for _ in range(_TRIES):
            try:
                return attempt(item)
            except (ZygoteError, OSError) as error:
                message = str(error)
                self.close()
        return TestResult("infra_error", 0.0, message)

    def _zygote(self, role: str) -> ZygoteProcess:
        if role not in self._zygotes:
            self._zygotes[role] = ZygoteProcess(self._launcher, role)
        return self._zygotes[role]

    def _replace_worn(self, timed_out: bool) -> None:
        for role in list(self._zygotes):
            if self._launcher.worn(role, self._zygotes[role].jobs, timed_out):
                self._zygotes.pop(role).close()

    def _assert(self, judge: "Judge", code: int, index: int) -> TestResult:
        candidate = self._zygote("candidate")
        judge.start()
        start = time.monotonic()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            candidate.run("calls", asdict(judge.limits), [code, theirs.fileno()])
            judge.order(index, ours.fileno())
        report = judge.report(start + judge.limits.seconds)
        seconds = time.monotonic() - start
        if report is not None and report["verdict"] == "lost":
            select.select([candidate.control], [], [], 1.0)  # let it end by itself: how, matters
        candidate.kill()
        ended = candidate.wait()
        if report is not None and report["verdict"] == "uncarriable":
            plan = judge.controls(index, start + 2 * judge.limits.seconds)
            return judge_weakly(candidate, judge.case, plan, seed=f"{judge.case.id} {index}")
        verdict, message = _assert_verdict(report, ended)
        return TestResult(verdict, round(seconds, 4), message, round(ended.cpu, 4))


class Judge:
    """The judge's process for the tests of one case; started when needed, replaced if it hung."""

    def __init__(self, zygote: Callable[[], ZygoteProcess], tests: int, case: Case) -> None:
        self._zygote = zygote
        self._tests = tests
        self._running: tuple[ZygoteProcess, socket.socket] | None = None
        self.case = case
        self._cpu_limits = asdict(case.limits)
        self._cpu_limits["seconds"] *= len(case.tests)
        self.limits = case.limits

    def start(self) -> None:
        """Have a process running."""
        zygote = self._zygote()
        if self._running is not None and self._running[0] is zygote:
            return
        self.close()  # what is left of one whose zygote was replaced
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            zygote.run("judge", self._cpu_limits, [self._tests, theirs.fileno()])
        self._running = zygote, ours

    def order(self, index: int, connection: int) -> None:
        """Judge test `index` with the candidate at the other end of `connection`."""
        self._send(str(index), connection)

    def _send(self, order: str, connection: int) -> None:
        assert self._running is not None
        socket.send_fds(self._running[1], [order.encode()], [connection])

    def controls(self, index: int, deadline: float) -> Plan:
        """Test `index` for a run in one process, with its controls. Raises ZygoteError."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._send(f"{CONTROLS}{index}", theirs.fileno())
            parts = [b"-"]
            while parts[-1]:
                if not select.select([ours], [], [], max(deadline - time.monotonic(), 0.0))[0]:
                    raise ZygoteError("the judge gave no controls in time")
                parts.append(ours.recv(_PIPE_BYTES))
        if len(parts) == 2:
            raise ZygoteError("the judge ended over the controls")
        return Plan(**json.loads(b"".join(parts[1:])))

    def report(self, deadline: float) -> dict[str, Any] | None:
        """What the judge says; None if nothing by the deadline. Raises ZygoteError if it died."""
        assert self._running is not None
        orders = self._running[1]
        left = max(deadline - time.monotonic(), 0.0)
        if not select.select([orders], [], [], left)[0]:
            if self.close() == _GONE:
                raise ZygoteError("the judge's zygote is gone")
            return None
        data = orders.recv(_REPORT_BYTES)
        if not data:
            raise ZygoteError(f"the judge ended without a verdict, status {self.close()}")
        return json.loads(data)

    def close(self) -> int:
        """End the process, if there is one; its wait status (_GONE if its zygote is too)."""
        if self._running is None:
            return 0
        zygote, orders = self._running
        self._running = None
        orders.close()
        try:
            zygote.kill()
            return zygote.wait().status
        except ZygoteError:
            return _GONE


def _assert_verdict(report: dict[str, Any] | None, ended: Ended) -> tuple[Verdict, str]:
    if ended.excess:
        return how_it_ended(ended, "")
    if report is None:
        return "timeout", ""
    verdict, message = report["verdict"], report["message"]
    if verdict == "invalid":
        raise InvalidTest(message)
    if verdict == "lost":
        return how_it_ended(ended, message)
    return verdict, message

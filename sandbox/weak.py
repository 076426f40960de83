"""The verdict on a test that must share a process with the candidate. The worker's side.

The test and its controls (`inside.mutate`) run in processes of their own, in an order drawn by
name; none is told which it is. The test passes if it reports so and every control reports a
failure: a program that makes anything pass, or reports a pass of its own, fails with its controls.
A program written against this very scheme can still tell them apart, hence `TestResult.weak`.
"""

import os
import random
import secrets
import select
import time
from dataclasses import asdict, replace

from sandbox.endings import how_it_ended
from sandbox.inside.mutate import Plan
from sandbox.inside.weak import FAILED, PASSED
from sandbox.payload import payload
from sandbox.process import Ended, ZygoteProcess
from sandbox.records import Case, TestResult, Verdict

_REPORT_BYTES = 4096  # one atomic write


def judge_weakly(zygote: ZygoteProcess, case: Case, plan: Plan, seed: str) -> TestResult:
    """Run `plan` for `case`; seconds are those of the test itself. `seed` names the order.

    A plan without controls gives `infra_error`: nothing could be concluded from a pass.
    """
    if not plan.controls:
        reason = "the test must share a process with the program, but has no claim to control"
        return TestResult("infra_error", 0.0, reason)
    runs = [(True, plan.original), *((False, control) for control in plan.controls)]
    random.Random(seed).shuffle(runs)
    results: dict[bool, list[TestResult]] = {True: [], False: []}
    for is_original, test in runs:
        result = _run(zygote, case, test)
        results[is_original].append(result)
        if is_original and result.verdict != "pass":
            return replace(result, weak=True)
    original = results[True][0]
    for control in results[False]:
        if control.verdict == "pass":
            message = "it also passes with another expectation"
            return replace(original, verdict="fail", message=message, weak=True)
        if control.verdict != "fail":
            return replace(control, message=f"control: {control.message}", weak=True)
    return replace(original, weak=True)


def _run(zygote: ZygoteProcess, case: Case, test: str) -> TestResult:
    nonce = secrets.token_hex(16)
    job = {
        "code": case.code,
        "setup": case.setup,
        "test": test,
        "entry_point": case.entry_point,
        "nonce": nonce,
    }
    start = time.monotonic()
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        try:
            with payload(job) as descriptor:
                zygote.run("weak", asdict(case.limits), [descriptor, write_end])
        finally:
            os.close(write_end)
        late = not select.select([pipe], [], [], case.limits.seconds)[0]
        seconds = time.monotonic() - start
        report = b"" if late else os.read(pipe.fileno(), _REPORT_BYTES)  # the first one counts
        if not late and not report:
            select.select([zygote.control], [], [], 1.0)  # let it end by itself: how, matters
        zygote.kill()
        ended = zygote.wait()
    verdict, message = _outcome(None if late else report, nonce.encode(), ended)
    return TestResult(verdict, round(seconds, 4), message, round(ended.cpu, 4))


def _outcome(report: bytes | None, nonce: bytes, ended: Ended) -> tuple[Verdict, str]:
    if report is None and not ended.excess:
        return "timeout", ""
    if ended.excess or not report:
        return how_it_ended(ended, "no report")
    if report.startswith(nonce + PASSED):  # whatever follows: the first report counts
        return "pass", ""
    if not report.startswith(nonce + FAILED):
        return "crash", "a report that is not ours"  # no `fail`: that would do for a control
    message = report[len(nonce) + 1 :].decode("utf-8", "replace")
    if message.startswith("MemoryError"):
        return "oom", message
    return "fail", message

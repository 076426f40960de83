"""What the end of a candidate's process means. Not what its output or its answers mean."""

import os
import signal

from sandbox.process import Ended
from sandbox.records import Verdict


def how_it_ended(ended: Ended, message: str) -> tuple[Verdict, str]:
    """Verdict and message for a process that ended without having done what it was there for."""
    if ended.excess == "memory":
        return "oom", "all its processes together took more memory than the limit"
    if ended.excess == "files":
        return "output_limit", "its files together took more than the limit"
    code = os.waitstatus_to_exitcode(ended.status)
    if code >= 0:
        return "exited", f"the program exited with status {code} before the test ended"
    if -code == signal.SIGXCPU:
        return "timeout", "CPU time"
    if -code == signal.SIGKILL:
        return "exited", f"the program hung up: {message}"
    return "crash", f"signal {-code} ({signal.Signals(-code).name})"

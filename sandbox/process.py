"""The worker's end of one zygote: start it, have it run something, kill it. No verdicts here.

Where the zygote lives is its launcher's affair: a process of this machine (here), or of a
container (`sandbox.docker`).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sandbox.records import Limits

_START_SECONDS = 30.0
_ANSWER_SECONDS = 10.0
_WHY_SECONDS = 0.5
_ROOT = Path(__file__).resolve().parent.parent
# -I -S -E: no environment, no site-packages, no user code; the checkout is visible to our own
# imports only.
_BOOT = (
    "import sys, json; sys.path.append(sys.argv[1]); from sandbox.inside import zygote; "
    "sys.path.pop(); zygote.main(json.loads(sys.argv[2]))"
)


class ZygoteError(Exception):
    """A zygote did not start, answer or end in time; it is gone now. Infrastructure, no verdict."""


class Home(Protocol):
    """Where one zygote lives. `control` is the worker's end of its control socket."""

    control: socket.socket

    def why(self) -> str:
        """What is known of why the zygote ended; may be nothing."""

    def stop(self) -> None:
        """End the zygote and everything below it; returns when it is gone."""


class Launcher(Protocol):
    """Makes homes for zygotes."""

    def start(self, role: str) -> Home:
        """A home for the zygote of `role` (judge, candidate). Raises ZygoteError."""

    def problem(self, limits: Limits) -> str | None:
        """Why a test cannot have `limits` in such a home, or None."""

    def worn(self, role: str, jobs: int) -> bool:
        """Whether a home that saw `jobs` processes has to be replaced before the next case."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: a wait status, CPU seconds of it and its reaped children."""

    status: int
    cpu: float


@dataclass(frozen=True, slots=True)
class LocalLauncher:
    """Zygotes as processes of this machine, confined as `level` says (`inside.jail`)."""

    level: str

    def start(self, role: str) -> "LocalHome":
        """See `Launcher`."""
        return LocalHome(self.level)

    def problem(self, limits: Limits) -> str | None:
        """See `Launcher`: whatever the records permit."""
        return None

    def worn(self, role: str, jobs: int) -> bool:
        """See `Launcher`: never."""
        return False


class LocalHome:
    """A zygote's process and its folder. Raises ZygoteError."""

    def __init__(self, level: str) -> None:
        self._folder = tempfile.mkdtemp(prefix="unmask-sandbox-")
        os.chmod(self._folder, 0o711)  # the landlock level runs as another user when we are root
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        options = {"control": theirs.fileno(), "level": level, "folder": self._folder}
        python = getattr(sys, "_base_executable", None) or sys.executable
        command = [python, "-I", "-S", "-E", "-B", "-c", _BOOT, str(_ROOT), json.dumps(options)]
        try:
            self.process = subprocess.Popen(
                command,
                env={},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the worker, which then closes us
            )
        except OSError as error:
            self.control.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise ZygoteError(f"cannot start {python}: {error}") from None
        finally:
            theirs.close()

    def why(self) -> str:
        """See `Home`: the status it exited with, or the signal that ended it (negative)."""
        try:
            return f"status {self.process.wait(_WHY_SECONDS)}"
        except subprocess.TimeoutExpired:
            return ""

    def stop(self) -> None:
        """See `Home`."""
        self.control.close()
        try:
            self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class ZygoteProcess:
    """One zygote in its home. Not thread-safe: a worker owns it.

    Raises ZygoteError from the constructor if the zygote cannot live there.
    """

    def __init__(self, launcher: Launcher, role: str = "candidate") -> None:
        self.jobs = 0
        self.home = launcher.start(role)
        self.control = self.home.control
        greeting = self._receive(_START_SECONDS)
        if "error" in greeting:
            self.close()
            raise ZygoteError(str(greeting["error"]))

    def run(self, role: str, limits: dict[str, Any], descriptors: Sequence[int]) -> None:
        """Start a child; `descriptors[0]` holds its payload. `wait` must follow before the next."""
        self.jobs += 1
        request = {"op": "run", "role": role, "limits": limits}
        try:
            socket.send_fds(self.control, [json.dumps(request).encode()], list(descriptors))
        except OSError as error:
            self.close()
            raise ZygoteError(f"zygote is gone: {error}") from None

    def kill(self) -> None:
        """SIGKILL the running child, if it still runs, and all it started."""
        try:
            self.control.send(b'{"op": "kill"}')
        except OSError as error:
            self.close()
            raise ZygoteError(f"zygote is gone: {error}") from None

    def wait(self, seconds: float = _ANSWER_SECONDS) -> Ended:
        """How the child ended; every process it started is gone.

        Raises ZygoteError after `seconds`, or if the child could not be confined and ran nothing.
        """
        answer = self._receive(seconds)
        status, cpu = answer.get("status"), answer.get("cpu")
        if not isinstance(status, int) or not isinstance(cpu, float) or not _is_end(status):
            self.close()
            raise ZygoteError("the zygote's answer makes no sense")
        if answer.get("refused"):
            raise ZygoteError(f"a process could not be confined: {str(answer['refused']).strip()}")
        return Ended(status, cpu)

    def _receive(self, seconds: float) -> dict[str, Any]:
        self.control.settimeout(seconds)
        try:
            data = self.control.recv(1 << 16)
            reason = "it ended"
        except OSError as error:
            data = b""
            late = isinstance(error, TimeoutError)
            reason = f"no answer in {seconds:g} s" if late else str(error)
        try:
            answer = json.loads(data) if data else None
        except (ValueError, RecursionError):
            answer = reason = "the zygote's answer makes no sense"
        if not isinstance(answer, dict):
            why = "" if reason.startswith("no answer") else self.home.why()
            self.close()
            raise ZygoteError(f"zygote: {reason}{': ' if why else ''}{why}")
        return answer

    def close(self) -> None:
        """End the zygote and everything below it; returns when it is gone."""
        self.home.stop()


def _is_end(status: int) -> bool:
    """Whether `status` is what wait(2) says of a process that ended."""
    return 0 <= status <= 0xFFFF and (os.WIFEXITED(status) or os.WIFSIGNALED(status))

"""The worker's end of one zygote: start it, have it run something, kill it. No verdicts here.

Where the zygote lives is its launcher's affair: a process of this machine (here), or of a
container (`sandbox.docker`).
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sandbox import cgroup
from sandbox.inside import folders
from sandbox.inside.jail import JUDGE_MEMORY_MIB
from sandbox.records import Limits

PROGRAMS = "programs"  # the zygote for languages other than Python
_START_SECONDS = 30.0
_ANSWER_SECONDS = 10.0
_WHY_SECONDS = 0.5
_EXCESSES = ("", "memory", "files")
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

    def limit(self, role: str, limits: dict[str, Any]) -> None:
        """Bound what the next process and all it starts may take together. Raises OSError."""

    def why(self) -> str:
        """What is known of why the zygote ended; may be nothing."""

    def stop(self) -> None:
        """End the zygote and everything below it; returns when it is gone."""


class Launcher(Protocol):
    """Makes homes for zygotes."""

    def start(self, role: str) -> Home:
        """A home for the zygote of `role` (judge, candidate, PROGRAMS). Raises ZygoteError."""

    def problem(self, limits: Limits) -> str | None:
        """Why a test cannot have `limits` in such a home, or None."""

    def worn(self, role: str, jobs: int, timed_out: bool) -> bool:
        """Whether a home that saw `jobs` processes has to be replaced before the next case.

        timed_out: a test of the last case had to be ended by force.
        """


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: a wait status, CPU seconds of it and its reaped children.

    excess: `memory` or `files` if it was ended, or a part of it was, because all its processes
    together had too much of that; else empty.
    """

    status: int
    cpu: float
    excess: str = ""


@dataclass(frozen=True, slots=True)
class LocalLauncher:
    """Zygotes as processes of this machine, confined as `level` says (`inside.jail`)."""

    level: str

    def start(self, role: str) -> "LocalHome":
        """See `Launcher`."""
        return LocalHome(self.level, os.environ.get("PATH", "") if role == PROGRAMS else None)

    def problem(self, limits: Limits) -> str | None:
        """See `Launcher`: whatever the records permit."""
        return None

    def worn(self, role: str, jobs: int, timed_out: bool) -> bool:
        """See `Launcher`: never."""
        return False


class LocalHome:
    """A zygote's process, its folder and its control group. Raises ZygoteError.

    toolchains: where to look for other languages, as in PATH; None for a zygote without.
    """

    def __init__(self, level: str, toolchains: str | None = None) -> None:
        self.folder = tempfile.mkdtemp(prefix="unmask-sandbox-")
        os.chmod(self.folder, 0o711)  # the landlock level runs as another user when we are root
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.group = cgroup.make()
        events = None if self.group is None else self.group.open_events()
        try:
            self.process = self._spawn(level, toolchains, theirs.fileno(), events)
        except OSError as error:
            self.control.close()
            self._clean_up()
            raise ZygoteError(f"cannot start {sys.executable}: {error}") from None
        finally:
            theirs.close()
            if events is not None:
                os.close(events)
        if self.group is not None:
            with contextlib.suppress(OSError):  # then the zygote's own watch has to do
                self.group.add(self.process.pid)
            with contextlib.suppress(OSError):  # it ended: no greeting comes, which says so
                self.control.send(b"go")

    def _spawn(
        self, level: str, toolchains: str | None, control: int, events: int | None
    ) -> subprocess.Popen[bytes]:
        options: dict[str, Any] = {"control": control, "level": level, "folder": self.folder}
        if events is not None:
            options["events"] = events
        if toolchains is not None:
            options["toolchains"] = toolchains
        python = getattr(sys, "_base_executable", None) or sys.executable
        return subprocess.Popen(
            [python, "-I", "-S", "-E", "-B", "-c", _BOOT, str(_ROOT), json.dumps(options)],
            env={},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[control] if events is None else [control, events],
            start_new_session=True,  # Ctrl-C is for the worker, which then closes us
        )

    def limit(self, role: str, limits: dict[str, Any]) -> None:
        """See `Home`."""
        if self.group is not None:
            memory = JUDGE_MEMORY_MIB if role == "judge" else limits["memory_mib"]
            self.group.limit(memory + limits["disk_mib"], limits["processes"])

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
        self._clean_up()

    def _clean_up(self) -> None:
        if self.group is not None:
            self.group.remove()
        folders.remove(self.folder)


class ZygoteProcess:
    """One zygote in its home. Not thread-safe: a worker owns it.

    languages: those other than Python that it found, with their rows in `languages.RUNNERS`.

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
        self.languages: dict[str, int] = greeting.get("languages", {})

    def run(self, role: str, limits: dict[str, Any], descriptors: Sequence[int]) -> None:
        """Start a child; `descriptors[0]` holds its payload. `wait` must follow before the next."""
        self.jobs += 1
        request = {"op": "run", "role": role, "limits": limits}
        try:
            self.home.limit(role, limits)
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
        status, cpu, excess = answer.get("status"), answer.get("cpu"), str(answer.get("excess"))
        if (
            not isinstance(status, int)
            or not isinstance(cpu, float)
            or excess not in _EXCESSES
            or not _is_end(status)
        ):
            self.close()
            raise ZygoteError("the zygote's answer makes no sense")
        if answer.get("refused"):
            raise ZygoteError(f"a process could not be confined: {str(answer['refused']).strip()}")
        return Ended(status, cpu, excess)

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

"""The worker's end of one zygote: start it, have it run something, kill it. No verdicts here."""

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
from typing import Any

from sandbox import cgroup
from sandbox.inside import folders
from sandbox.inside.jail import JUDGE_MEMORY_MIB

_START_SECONDS = 30.0
_ANSWER_SECONDS = 10.0
_ROOT = Path(__file__).resolve().parent.parent
# -I -S -E: no environment, no site-packages, no user code; the checkout is visible to our own
# imports only.
_BOOT = (
    "import sys, json; sys.path.append(sys.argv[1]); from sandbox.inside import zygote; "
    "sys.path.pop(); zygote.main(json.loads(sys.argv[2]))"
)


class ZygoteError(Exception):
    """A zygote did not start, answer or end in time; it is gone now. Infrastructure, no verdict."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: a wait status, CPU seconds of it and its reaped children.

    excess: `memory` or `files` if it was ended, or a part of it was, because all its processes
    together had too much of that; else empty.
    """

    status: int
    cpu: float
    excess: str = ""


class ZygoteProcess:
    """One zygote. Not thread-safe: a worker owns it.

    toolchains: where to look for other languages, as in PATH; None for a zygote without.
    languages: those it found, with their rows in `languages.RUNNERS`.

    Raises ZygoteError from the constructor if the zygote cannot have `level` on this machine.
    """

    def __init__(self, level: str, toolchains: str | None = None) -> None:
        self.level = level
        self._toolchains = toolchains
        self._folder = tempfile.mkdtemp(prefix="unmask-sandbox-")
        os.chmod(self._folder, 0o711)  # the landlock level runs as another user when we are root
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours
        self._group = cgroup.make()
        events = None if self._group is None else self._group.open_events()
        try:
            self._process = self._spawn(theirs.fileno(), events)
        except OSError as error:
            self._clean_up()
            raise ZygoteError(f"cannot start {sys.executable}: {error}") from None
        finally:
            theirs.close()
            if events is not None:
                os.close(events)
        if self._group is not None:
            with contextlib.suppress(OSError):  # then the zygote's own watch has to do
                self._group.add(self._process.pid)
            with contextlib.suppress(OSError):  # it ended: no greeting comes, which says so
                self.control.send(b"go")
        greeting = self._receive(_START_SECONDS)
        if "error" in greeting:
            self.close()
            raise ZygoteError(greeting["error"])
        self.languages: dict[str, int] = greeting["languages"]

    def _spawn(self, control: int, events: int | None) -> subprocess.Popen[bytes]:
        options: dict[str, Any] = {"control": control, "level": self.level, "folder": self._folder}
        if events is not None:
            options["events"] = events
        if self._toolchains is not None:
            options["toolchains"] = self._toolchains
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

    def run(self, role: str, limits: dict[str, Any], descriptors: Sequence[int]) -> None:
        """Start a child; `descriptors[0]` holds its payload. `wait` must follow before the next."""
        request = {"op": "run", "role": role, "limits": limits}
        try:
            if self._group is not None:
                memory = JUDGE_MEMORY_MIB if role == "judge" else limits["memory_mib"]
                self._group.limit(memory + limits["disk_mib"], limits["processes"])
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
        if answer["refused"]:
            raise ZygoteError(f"a process could not be confined: {answer['refused'].strip()}")
        return Ended(answer["status"], answer["cpu"], answer["excess"])

    def _receive(self, seconds: float) -> dict[str, Any]:
        self.control.settimeout(seconds)
        try:
            data = self.control.recv(1 << 16)
        except OSError as error:
            data = b""
            late = isinstance(error, TimeoutError)
            reason = f"no answer in {seconds:g} s" if late else str(error)
        else:
            reason = "it ended"
        if not data:
            self.close()
            raise ZygoteError(f"zygote (level {self.level}): {reason}")
        return json.loads(data)

    def close(self) -> None:
        """End the zygote and everything below it; returns when it is reaped."""
        self.control.close()
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._clean_up()

    def _clean_up(self) -> None:
        if self._group is not None:
            self._group.remove()
        folders.remove(self._folder)

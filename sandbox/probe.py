"""What this machine permits, found out by doing it. `unmask doctor` prints the answer."""

import functools
import os
from dataclasses import dataclass

from sandbox.inside import landlock, seccomp
from sandbox.process import ZygoteError
from sandbox.records import Case, Limits, SandboxError
from sandbox.worker import Worker

LEVELS = ("namespace", "landlock", "unsafe")
BACKENDS = ("auto", *LEVELS, "docker")
_PROBE = Case(
    id="probe",
    code="def f(x):\n    return [x]",
    tests=("assert f(1) == [1]",),
    limits=Limits(seconds=20.0),
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The strongest level at which a probe program was judged, and why not the stronger ones.

    level: `namespace` (own namespaces, no host files, no network), `landlock` (files by Landlock,
    sockets and signals by seccomp), `unsafe` (limits only) or `none`.
    """

    level: str
    refused: tuple[tuple[str, str], ...]
    seccomp: bool
    landlock_abi: int
    as_root: bool

    def report(self) -> str:
        """One line for people."""
        text = f"sandbox level: {self.level}"
        why = "; ".join(f"no {level}: {reason}" for level, reason in self.refused)
        return f"{text} ({why})" if why else text


@functools.cache
def probe() -> Capabilities:
    """Judge a tiny program at each level, strongest first, until one works (about 0.2 s)."""
    refused: list[tuple[str, str]] = []
    level = "none"
    for candidate in LEVELS:
        reason = try_level(candidate)
        if reason is None:
            level = candidate
            break
        refused.append((candidate, reason))
    return Capabilities(
        level=level,
        refused=tuple(refused),
        seccomp=seccomp.supported(),
        landlock_abi=landlock.abi(),
        as_root=os.geteuid() == 0,
    )


@functools.cache
def try_level(level: str) -> str | None:
    """Why a program cannot be judged at `level` here, or None if it can."""
    worker = Worker(level)
    try:
        test = worker.run(_PROBE).tests[0]
    except (ZygoteError, OSError) as error:
        return str(error)
    finally:
        worker.close()
    return None if test.verdict == "pass" else f"{test.verdict}: {test.message}"


def choose_level(backend: str, allow_unsafe: bool) -> str:
    """The level of this machine for `backend` (not docker). Raises SandboxError."""
    if backend not in ("auto", *LEVELS):
        raise SandboxError(f"backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend != "auto":
        reason = try_level(backend)
        if reason is not None:
            raise SandboxError(f"backend {backend!r} does not work on this machine: {reason}")
        return backend
    found = probe()
    if found.level == "none" or (found.level == "unsafe" and not allow_unsafe):
        raise SandboxError(
            f"no safe way to run untrusted programs here ({found.report()}); permit unprivileged "
            "user namespaces (sysctl kernel.unprivileged_userns_clone=1), or accept plain limits "
            "with allow_unsafe: true"
        )
    return found.level

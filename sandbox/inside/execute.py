"""Compiles programs of other languages and runs them, inside a test's jail. Judges nothing.

The jail's first process (pid 1 at the namespace level) runs trusted code only: it forks, waits and
reports. The program is its child, because the kernel spares pid 1 every signal without a handler:
an `abort` there would not end it. When the first process ends, all others do.

A job is one JSON line, {"language", "code"}, and behind it what the compiler made (a tar
archive, opaque to all outside): role `compile` writes it to stdout, role `execute` unpacks it.
"""

import io
import json
import os
import re
import signal
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from sandbox.inside import jail, syscalls
from sandbox.languages import OUT, Toolchain

ROLES = ("compile", "execute")
_MIB = 1 << 20
_CANNOT_EXECUTE = 126  # as shells say it
# Java wants a file to be called like its public class. Text, not syntax: who hides one class
# behind another in a comment is told by the compiler.
_PUBLIC_CLASS = re.compile(
    r"^[ \t]*public[ \t]+(?:(?:final|abstract|strictfp|sealed)[ \t]+)*"
    r"(?:class|record|enum|interface)[ \t]+([A-Za-z_]\w{0,199})\b",
    re.MULTILINE | re.ASCII,
)
_PACKAGE = re.compile(r"^[ \t]*package[ \t]+([A-Za-z_][\w.]*)[ \t]*;", re.MULTILINE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to do with a program.

    made: the archive. limits: the request's, with what the runtime needs on top (`grown`).
    """

    role: str
    code: str
    made: bytes
    toolchain: Toolchain
    limits: dict[str, Any]


def parse(
    role: str, data: bytes, limits: dict[str, Any], toolchains: Mapping[str, Toolchain]
) -> Job:
    """The job of a request. Raises KeyError for a language that is not installed."""
    line, _, made = data.partition(b"\n")
    header = json.loads(line)
    return Job(role, header["code"], made, toolchains[header["language"]], limits)


def serve(job: Job, seal: Callable[[], None], report: int) -> NoReturn:
    """Do `job` in the working directory, on descriptors 0, 1 and 2.

    seal: confines the calling process for good; its filter knows the one pid that may get signals.
    How the program ended is written to descriptor `report` (a wait status in digits), which the
    program does not have. Raises OSError for what is the machine's fault.
    """
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python's own would be inherited, or hurt pid 1
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # pid 1 is out of sight; exec sets it back
    os.environ.clear()
    program = os.fork()
    seal()
    if program == 0:
        _become_program(job)
    status = _wait_for(program)
    if job.role == "compile" and status == 0:
        _send(OUT)
    os.write(report, str(status).encode())
    os._exit(0)


def _wait_for(program: int) -> int:
    while True:
        pid, status = os.wait()  # orphans come to pid 1
        if pid == program:
            return status


def _become_program(job: Job) -> NoReturn:
    runner = job.toolchain.runner
    names = _names(job)
    if job.role == "compile":
        os.mkdir(OUT)
        os.dup2(2, 1)  # some complain to stdout, which is for what they made
        template = runner.compile
    else:
        template = runner.run
    if runner.compile and job.role == "execute":
        _unpack(job.made)
    else:
        _write(names["source"], job.code.encode("utf-8", "surrogatepass"))
        for name, text in runner.beside:
            _write(name, text.encode())
    command = [part.format(**names) for part in template]
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": names["home"],
        "TMPDIR": names["home"],
        "LANG": "C.UTF-8",
    } | {name: text.format(**names) for name, text in runner.environment}
    _limit(job)
    try:
        os.execve(command[0], command, environment)
    except OSError as error:
        if not command[0].startswith("./"):
            raise  # a toolchain that does not start is no fault of the program
        os.write(2, f"cannot execute what was compiled: {error}\n".encode())
        os._exit(_CANNOT_EXECUTE)


def _names(job: Job) -> dict[str, str]:
    """What the templates of a runner may name."""
    public, package = _PUBLIC_CLASS.search(job.code), _PACKAGE.search(job.code)
    main = public.group(1) if public else "Main"
    return {
        **job.toolchain.tools,
        "home": os.getcwd(),
        "memory": str(job.limits["memory_mib"] - job.toolchain.runner.spare_mib),
        "main": main,
        "class": f"{package.group(1)}.{main}" if package else main,
        "source": job.toolchain.runner.source.format(main=main),
    }


def _limit(job: Job) -> None:
    runner, limits = job.toolchain.runner, job.limits
    jail.limit(
        limits["seconds"] * len(os.sched_getaffinity(0)),  # CPU time: of all threads
        limits["memory_mib"],
        limits["disk_mib"],
        limits["processes"],
        address_space=runner.address_space,
    )


def _write(path: str, content: bytes, mode: int = 0o600) -> None:
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)


def _send(folder: str) -> None:
    """The regular files in `folder`, as an archive, to stdout."""
    with (
        open(1, "wb", closefd=False) as stdout,
        tarfile.open(fileobj=stdout, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for place, _, names in os.walk(folder):
            for path in (os.path.join(place, name) for name in names):
                if os.path.islink(path) or not os.path.isfile(path):
                    continue
                with open(path, "rb") as file:
                    found = os.fstat(file.fileno())
                    info = tarfile.TarInfo(os.path.relpath(path, folder))
                    info.size, info.mode = found.st_size, found.st_mode & 0o700
                    archive.addfile(info, file)


def _unpack(made: bytes) -> None:
    """Regular files only, below the working directory only."""
    with tarfile.open(fileobj=io.BytesIO(made)) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() else None
            path = os.path.normpath(member.name)
            if content is None or os.path.isabs(path) or path.split("/")[0] == "..":
                continue
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            _write(path, content.read(), member.mode & 0o700)

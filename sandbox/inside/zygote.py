"""The warm process from which judges and candidates are forked. It never runs or reads their code.

Single-threaded, exec'd with an empty environment; imports what programs usually import, enters the
shell, then serves one test at a time: the payload travels in a descriptor that only the forked
child reads, so no job's data is ever in a later job's memory. Ends when its worker does.

Control socket (SOCK_SEQPACKET): {"op": "run", "role", "limits"} with descriptors, answered by
{"status", "cpu", "excess", "refused"} when the child *and all its descendants* are gone; {"op":
"kill"} ends it early.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from sandbox import languages
from sandbox.inside import (
    candidate,
    execute,
    folders,
    jail,
    judge,
    parsing,
    seccomp,
    shell,
    syscalls,
    weak,
)
from sandbox.inside.census import Census

_PRELOADED = (
    "abc array bisect cmath collections collections.abc contextlib copy dataclasses datetime "
    "decimal enum fractions functools hashlib heapq io itertools json math numbers operator os "
    "queue random re statistics string struct sys textwrap threading time types typing unittest"
)
_LOOK_MS = 100  # how often the sum of memory is looked at; short tests never pay for it
_COMPLAIN = 250  # where a child tells its zygote that it could not be confined; closed once it is
_REPORT = 251  # where the first process of a jail tells how its program ended


def main(options: dict[str, Any]) -> NoReturn:
    """Serve the worker at the other end of descriptor options["control"].

    options["folder"]: where tests write, at the levels without a folder of their own. Nobody
    else's: it is emptied after each test.
    options["events"]: a descriptor of our control group's memory events, if there is to be one:
    then the worker sends a go-ahead when we are in it. options["toolchains"]: where to look for
    other languages (as in PATH, empty: the usual places), if we are to serve them.
    """
    control = socket.socket(fileno=options["control"])
    events = options.get("events")
    os.set_inheritable(control.fileno(), False)
    if events is not None:
        os.set_inheritable(events, False)
    for name in _PRELOADED.split():
        importlib.import_module(name)
    if events is not None and not control.recv(64):
        os._exit(0)
    surroundings = None
    spare = shell.spare_uid()
    toolchains, readable = _toolchains(options, spare)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        if options["level"] == "namespace":
            surroundings = shell.enter(proc, spare, readable)
        else:
            syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    except OSError as error:
        control.send(json.dumps({"error": str(error)}).encode())
        os._exit(1)
    if seccomp.supported():
        seccomp.prepare(shared_pids=surroundings is None)
    gc.collect()
    gc.disable()
    gc.freeze()
    place = Place(
        options["level"], options["folder"], surroundings, spare, proc, events, toolchains,
        readable or (),
    )  # fmt: skip
    zygote = Zygote(control, place)
    rows = {name: languages.RUNNERS.index(found.runner) for name, found in toolchains.items()}
    control.send(json.dumps({"ready": os.getpid(), "languages": rows}).encode())
    while True:
        zygote.serve_one()


def _toolchains(
    options: dict[str, Any], spare: int | None
) -> tuple[Mapping[str, languages.Toolchain], list[str] | None]:
    """The languages to serve, and what their jails must be able to read; None: no languages."""
    if options.get("toolchains") is None:
        return {}, None
    level = options["level"]
    as_nobody = level != "namespace" and spare is not None
    found = languages.find(options["toolchains"] or None, as_nobody, own_proc=level != "landlock")
    readable = {folder for toolchain in found.values() for folder in toolchain.folders}
    return found, sorted(readable | set(languages.configuration()))


@dataclass(frozen=True)
class Place:
    """Where a zygote is: its level, its folder for tests, its shell and its spare user id, if any.

    proc, events: descriptors of the host's /proc and of the control group's memory events, if it
    has one; closed in every child. toolchains: how other languages are run, if it serves them;
    readable: what those need to read.
    """

    level: str
    folder: str
    surroundings: shell.Shell | None
    spare: int | None
    proc: int
    events: int | None
    toolchains: Mapping[str, languages.Toolchain]
    readable: Sequence[str]


class Zygote:
    """One control socket, one test at a time."""

    def __init__(self, control: socket.socket, place: Place) -> None:
        self._control = control
        self._place = place
        self._surroundings = place.surroundings
        self._census = Census(place.proc)

    def serve_one(self) -> None:
        """Receive a request, run it to its end, answer. Exits when the worker hangs up."""
        data, descriptors, _, _ = socket.recv_fds(self._control, 1 << 16, 8)
        if not data:
            os._exit(0)
        request = json.loads(data)
        if request["op"] != "run":
            return  # a kill that crossed the answer
        folder = None
        if self._surroundings is None and request["role"] != "judge":
            folder = self._make_folder()
        complaints, complain = os.pipe()
        reports, report = os.pipe()
        child = self._fork(request["role"])
        if child == 0:
            os.dup2(complain, _COMPLAIN, inheritable=False)
            os.dup2(report, _REPORT, inheritable=False)
            self._be_child(request, descriptors, folder)
        for descriptor in (*descriptors, complain, report):
            os.close(descriptor)
        status, cpu, excess = self._wait(child, request, folder)
        self._end_descendants()
        if self._surroundings is None:
            folders.empty(self._place.folder)
        status = int(os.read(reports, 100) or status)
        refused = os.read(complaints, 2000).decode()
        answer = {"status": status, "cpu": cpu, "excess": excess, "refused": refused}
        os.close(complaints)
        os.close(reports)
        with contextlib.suppress(BrokenPipeError):
            self._control.send(json.dumps(answer).encode())

    def _fork(self, role: str) -> int:
        if self._surroundings is not None and role != "judge":
            return syscalls.fork_into(jail.CANDIDATE_NAMESPACES)
        return os.fork()

    def _wait(
        self, child: int, request: dict[str, Any], folder: str | None
    ) -> tuple[int, float, str]:
        """Until the child ended: wait status, CPU seconds, of what it had too much."""
        watched = os.pidfd_open(child)
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        ended, excess = False, ""
        oom_kills = self._oom_kills()
        while not ended:
            ready = poll.poll(_LOOK_MS)
            if not ready and not excess:
                excess = self._excess(request, folder, oom_kills)
                if not excess and self._census.memory_above(_memory_mib(request) << 20):
                    excess = "memory"
                if excess:
                    signal.pidfd_send_signal(watched, signal.SIGKILL)
            for descriptor, _ in ready:
                if descriptor == watched:
                    ended = True
                    continue
                hung_up = not self._control.recv(1 << 16)
                signal.pidfd_send_signal(watched, signal.SIGKILL)
                if hung_up:
                    self._end_descendants()
                    os._exit(0)
        os.close(watched)
        _, status, usage = os.wait4(child, 0)
        excess = excess or self._excess(request, folder, oom_kills)  # what was too quick to see
        return status, usage.ru_utime + usage.ru_stime, excess

    def _excess(self, request: dict[str, Any], folder: str | None, oom_kills: int) -> str:
        """Whether the kernel ended one of several processes, or the folder is too full."""
        if self._oom_kills() > oom_kills:
            return "memory"
        if folder is not None and folders.too_full(folder, request["limits"]["disk_mib"] << 20):
            return "files"
        return ""

    def _oom_kills(self) -> int:
        """How many processes of our control group the kernel has ended so far."""
        if self._place.events is None:
            return 0
        lines = os.pread(self._place.events, 4096, 0).split(b"\n")
        return next((int(line[9:]) for line in lines if line.startswith(b"oom_kill ")), 0)

    def _end_descendants(self) -> None:
        """SIGKILL whatever the child left, until nothing is left."""
        while True:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if self._surroundings is not None:
                try:
                    os.kill(-1, signal.SIGKILL)  # we are pid 1 of our namespace
                except ProcessLookupError:
                    return
            elif not _kill_children():
                return
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)

    def _make_folder(self) -> str:
        folder = tempfile.mkdtemp(prefix="test-", dir=self._place.folder)
        if self._place.spare is not None:
            os.chown(folder, self._place.spare, self._place.spare)
        return folder

    def _be_child(
        self, request: dict[str, Any], descriptors: list[int], folder: str | None
    ) -> NoReturn:
        try:
            os.setpgid(0, 0)  # kill(0) must not reach us; a session of its own costs 0.5 ms
            self._confine(request, descriptors, folder)
        except BaseException:
            # Before the seal this is the machine's fault. After it the descriptor is closed: a
            # candidate cannot pretend that it was.
            with contextlib.suppress(OSError):
                os.write(_COMPLAIN, traceback.format_exc()[-1000:].encode())
            os._exit(1)
        os._exit(0)

    def _confine(self, request: dict[str, Any], descriptors: list[int], folder: str | None) -> None:
        role, limits = request["role"], request["limits"]
        data = _read_all(descriptors[0])
        jail.volunteer_for_the_oom_killer(self._place.proc)
        disk, processes = limits["disk_mib"], limits["processes"]
        if role == "judge":
            disk, processes = 1, None
        elif self._surroundings is not None:
            jail.enter_namespaces(self._surroundings, disk)
        else:
            os.chdir(folder or "/")
            if self._place.spare is None:  # the limit counts all that this user runs
                processes += self._census.tasks_of(os.geteuid())
        if role in execute.ROLES:
            limits = limits | {"processes": processes}
            self._execute(
                execute.parse(role, data, limits, self._place.toolchains), descriptors[1:], folder
            )
        kept = _arrange_descriptors(descriptors[1:], as_program=role == "program")
        jail.limit(limits["seconds"], _memory_mib(request), disk, processes)
        os.environ.clear()
        jail.seal(self._place.level, folder, self._place.spare)
        os.close(_COMPLAIN)
        gc.enable()
        _run_role(role, json.loads(data), kept, limits["output_kib"] * 1024)

    def _execute(self, job: execute.Job, descriptors: list[int], folder: str | None) -> NoReturn:
        if self._surroundings is not None:
            shell.own_proc()
        _arrange_descriptors(descriptors, as_program=True, kept=_REPORT)
        place = self._place
        seal = functools.partial(jail.seal, place.level, folder, place.spare, place.readable)
        execute.serve(job, seal, _REPORT)


def _memory_mib(request: dict[str, Any]) -> int:
    return jail.JUDGE_MEMORY_MIB if request["role"] == "judge" else request["limits"]["memory_mib"]


def _run_role(role: str, payload: Any, kept: list[int], max_bytes: int) -> None:
    sys.argv = [""]
    if role == "program":
        candidate.run_program(payload)
    if role == "parse":
        parsing.serve(payload, kept[0])
        return
    if role == "weak":
        weak.serve(payload, kept[0])
    connection = socket.socket(fileno=kept[0])
    if role == "calls":
        candidate.serve_calls(payload, connection, max_bytes)
    judge.serve(payload, connection, max_bytes)


def _read_all(descriptor: int) -> bytes:
    # pread: the payload's offset is shared with the other tests of the case.
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _arrange_descriptors(
    descriptors: list[int], as_program: bool, kept: int = _COMPLAIN
) -> list[int]:
    """Put `descriptors` at 0.. (program) or 3.. (else, with /dev/null below).

    Closes all others but those from _COMPLAIN to `kept`.
    """
    null = os.open("/dev/null", os.O_RDWR)
    wanted = descriptors if as_program else [null, null, null, *descriptors]
    high = [os.dup2(d, 100 + i, inheritable=False) for i, d in enumerate(wanted)]
    for target, descriptor in enumerate(high):
        os.dup2(descriptor, target, inheritable=target < 3)
    os.closerange(len(wanted), _COMPLAIN)
    os.closerange(kept + 1, 1024)
    return list(range(3, len(wanted)))


def _kill_children() -> bool:
    """SIGKILL our children (orphans come to us, their subreaper); False if there are none."""
    with open(f"/proc/self/task/{os.getpid()}/children") as listing:
        children = [int(pid) for pid in listing.read().split()]
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(children)

"""Confinement of one test's process, from its fork to the candidate's first line. Irrevocable.

Levels, strongest first: `namespace` (own user, pid, mount, ipc and uts namespaces inside the
shell), `landlock` (files by Landlock, signals by seccomp, for containers that forbid namespaces),
`container` (signals by seccomp, files by the container around it: only where `container` is the
first process), `unsafe` (limits and another uid only). seccomp and no_new_privs wherever the
machine has them.
"""

import contextlib
import os
import resource
from collections.abc import Sequence

from sandbox.inside import landlock, seccomp, shell, syscalls

JUDGE_MEMORY_MIB = 2048
_MIB = 1 << 20
_CAP_DAC_READ_SEARCH = 1 << 2
CANDIDATE_NAMESPACES = (
    syscalls.NEWUSER | syscalls.NEWPID | syscalls.NEWNS | syscalls.NEWIPC | syscalls.NEWUTS
)


def enter_namespaces(surroundings: shell.Shell, disk_mib: int) -> None:
    """First thing in a child cloned with CANDIDATE_NAMESPACES: ids, then a private /tmp as cwd."""
    shell.write_id_maps(surroundings.proc, shell.NOBODY, surroundings.uid, surroundings.gid)
    options = f"size={disk_mib}m,nr_inodes=4096,mode=700"
    syscalls.mount("none", "/tmp", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, options)
    os.chdir("/tmp")


def limit(
    seconds: float,
    memory_mib: int,
    disk_mib: int,
    processes: int | None,
    address_space: bool = True,
) -> None:
    """Resource limits of the calling process and its children; `processes` None leaves them.

    Without `address_space`, memory is bounded as RLIMIT_DATA counts it (private writable pages).
    """
    cpu = int(seconds) + 2  # only a net under the wall clock, which somebody else holds
    limits = [
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS if address_space else resource.RLIMIT_DATA, memory_mib * _MIB),
        (resource.RLIMIT_FSIZE, disk_mib * _MIB),
        (resource.RLIMIT_NOFILE, 128),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ]
    if processes is not None:
        limits.append((resource.RLIMIT_NPROC, processes))
    for kind, value in limits:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def volunteer_for_the_oom_killer(proc: int) -> None:
    """Be the first to go, before the zygote and whatever else runs; `proc`: a descriptor of /proc.

    In a container our zygote is not dumpable, which makes /proc/self root's: undone here, for this
    process alone.
    """
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    with contextlib.suppress(OSError):  # then it goes by size, as usual
        descriptor = os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=proc)
        os.write(descriptor, b"1000")
        os.close(descriptor)


def seal(level: str, folder: str | None, spare: int | None, readable: Sequence[str] = ()) -> None:
    """Give up every privilege, for good.

    spare: the user to become if we are root (`shell.spare_uid`). At the landlock level `folder` is
    the one writable folder, and `readable` is what may be read besides the runtime; at the
    namespace level the shell has decided that.

    Raises OSError where a level's part is missing: never runs on with less than was promised.
    """
    if level == "namespace":
        syscalls.set_capabilities(0)
    elif spare is not None:
        # The right to read is Landlock's to limit, and lost with the next exec.
        keep = level == "landlock" and not shell.runtime_is_public()
        if keep:
            syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(spare, spare, spare)
        os.setresuid(spare, spare, spare)
        syscalls.set_capabilities(_CAP_DAC_READ_SEARCH if keep else 0)
    elif os.geteuid() == 0:
        syscalls.set_capabilities(0)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    if level == "landlock":
        paths = [*shell.runtime_paths(), *readable]
        landlock.restrict(paths, folder or os.getcwd(), shell.DEVICES)
    if level == "unsafe" and not seccomp.supported():
        return
    try:
        seccomp.install(None if level == "namespace" else os.getpid())
    except OSError:
        if level != "unsafe":
            raise

"""Confinement of one test's process, from its fork to the candidate's first line. Irrevocable.

Levels, strongest first: `namespace` (own user, pid, mount, ipc and uts namespaces inside the
shell), `landlock` (files by Landlock, signals by seccomp, for containers that forbid namespaces),
`container` (signals by seccomp, files by the container around it: only where `container` is the
first process), `unsafe` (limits and another uid only). seccomp and no_new_privs wherever the
machine has them.
"""

import os
import resource

from sandbox.inside import landlock, seccomp, shell, syscalls

_MIB = 1 << 20
CANDIDATE_NAMESPACES = (
    syscalls.NEWUSER | syscalls.NEWPID | syscalls.NEWNS | syscalls.NEWIPC | syscalls.NEWUTS
)


def enter_namespaces(surroundings: shell.Shell, disk_mib: int) -> None:
    """First thing in a child cloned with CANDIDATE_NAMESPACES: ids, then a private /tmp as cwd."""
    shell.write_id_maps(surroundings.proc, shell.NOBODY, surroundings.uid, surroundings.gid)
    options = f"size={disk_mib}m,nr_inodes=4096,mode=700"
    syscalls.mount("none", "/tmp", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, options)
    os.chdir("/tmp")


def limit(seconds: float, memory_mib: int, disk_mib: int, processes: int | None) -> None:
    """Resource limits of the calling process and its children; `processes` None leaves them."""
    cpu = int(seconds) + 2  # only a net under the wall clock, which somebody else holds
    limits = [
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory_mib * _MIB),
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


def volunteer_for_the_oom_killer() -> None:
    """Be the first to be killed where memory runs out, before the zygote and other tests."""
    # /proc/self belongs to root while the process is not dumpable. The flag is our own: no fork
    # shares memory, and a candidate may not trace others anyway.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


def seal(level: str, folder: str | None) -> None:
    """Give up every privilege, for good. `folder` is the one writable folder (landlock level).

    Raises OSError where a level's part is missing: never runs on with less than was promised.
    """
    if level == "namespace":
        syscalls.set_capabilities(0)
    elif shell.must_become_nobody():
        os.setgroups([])
        os.setresgid(shell.NOBODY, shell.NOBODY, shell.NOBODY)
        os.setresuid(shell.NOBODY, shell.NOBODY, shell.NOBODY)
    elif os.geteuid() == 0:
        syscalls.set_capabilities(0)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    if level == "landlock":
        landlock.restrict(shell.runtime_paths(), folder or os.getcwd(), shell.DEVICES)
    if level == "unsafe" and not seccomp.supported():
        return
    try:
        seccomp.install(None if level == "namespace" else os.getpid())
    except OSError:
        if level != "unsafe":
            raise

"""The outer shell, built once per zygote: own namespaces and a read-only root without the host.

Not the per-test confinement (that is `jail`). Inside, only the Python runtime and the system
libraries exist, read-only; no /proc, no /sys, no home directories, no network interface that is up.

Raw system calls and not bubblewrap, also where that is installed: each test needs namespaces of its
own inside, so bubblewrap opens no machine that these calls do not open (where it may only because
it is setuid, or has an AppArmor profile, what it starts may not make namespaces again); it would be
started once per zygote and hide nothing more than `_build_root` does; and one per test costs as
much as a new Python (docs/RESULTS.md). One way in is one way to test.
"""

import os
import signal
import sys
from dataclasses import dataclass

from sandbox.inside import syscalls

NOBODY = 65534
_SPARE_UIDS, _MAX_PID, _FEW_UIDS = 0x70000000, 1 << 22, 4096
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_MOUNT_POINTS = ("/mnt", "/srv", "/media", "/opt", "/tmp", "/run", "/var")


@dataclass(frozen=True)
class Shell:
    """What a zygote knows of its surroundings.

    proc: a descriptor of the host's /proc, to write id maps; closed in every child.
    uid, gid: the zygote's ids, as seen in its user namespace.
    """

    proc: int
    uid: int
    gid: int


def runtime_paths() -> list[str]:
    """What a test may read: system libraries and the running Python."""
    prefixes = {os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)}
    extra = sorted(p for p in prefixes if not p.startswith("/usr/") and p not in ("/", "/usr"))
    return [path for path in _SYSTEM if os.path.lexists(path)] + extra


def runtime_is_public() -> bool:
    """Whether users other than root can get at the running Python (not below /root, as a rule)."""
    prefix = os.path.realpath(sys.base_prefix)
    folders = [prefix]
    while folders[-1] != "/":
        folders.append(os.path.dirname(folders[-1]))
    return all(os.stat(folder).st_mode & 0o001 for folder in folders)


def write_id_maps(proc: int, inside: int, uid: int, gid: int) -> None:
    """Map our one uid and gid to `inside` in the user namespace we are in now."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside} {uid} 1"),
        ("gid_map", f"{inside} {gid} 1"),
    ):
        descriptor = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(descriptor, text.encode())
        os.close(descriptor)


def spare_uid() -> int | None:
    """A user id for this process alone, None if we may not become anybody else.

    RLIMIT_NPROC counts the processes of a user, and a user may signal his own: so no two zygotes
    share an id. It is derived from the pid, in a range that nobody hands out (systemd's list,
    "Users, Groups, UIDs and GIDs"); where the user namespace has only some ids, among its last.

    A root that is alone in its namespace (rootless containers) is an ordinary user outside.
    """
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map") as ranges:
        spans = [[int(number) for number in line.split()] for line in ranges]
    first, _, count = max(spans, key=lambda span: span[2], default=[0, 0, 0])
    if first <= _SPARE_UIDS and first + count > _SPARE_UIDS + _MAX_PID:
        return _SPARE_UIDS + os.getpid()
    if first <= NOBODY < first + count:
        return NOBODY - 1 - os.getpid() % _FEW_UIDS
    return None


def enter(proc: int, spare: int | None) -> Shell:
    """Move this process into a shell of its own; returns in a forked child that is its pid 1.

    proc: a descriptor of /proc. spare: `spare_uid()`, whom we become if there is one.

    Raises OSError if the kernel, or whoever configured it, does not permit this.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = syscalls.NEWNS | syscalls.NEWNET | syscalls.NEWIPC | syscalls.NEWUTS | syscalls.NEWPID
    if spare is not None:
        syscalls.unshare(flags)
    else:
        syscalls.unshare(flags | syscalls.NEWUSER)
        write_id_maps(proc, NOBODY, uid, gid)
    child = os.fork()
    if child:
        # Held by us alone: when the worker kills us, pid 1 gets PDEATHSIG and all of it goes.
        os.closerange(0, 1024)
        os.waitpid(child, 0)
        os._exit(0)
    _build_root()
    if spare is not None:
        _become(spare)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root: no id maps
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    uid = NOBODY if spare is None else spare
    return Shell(proc, uid, uid)


def _become(uid: int) -> None:
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    cap_sys_admin, cap_kill = 21, 5
    syscalls.set_capabilities((1 << cap_sys_admin) | (1 << cap_kill))


def _build_root() -> None:
    paths = runtime_paths()
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    root = next(
        point
        for point in _MOUNT_POINTS
        if os.path.isdir(point) and not any(p.startswith(f"{point}/") for p in paths)
    )
    syscalls.mount("none", root, "tmpfs", syscalls.MS_NOSUID, "mode=755,size=1m")
    os.umask(0o022)
    for path in paths:
        _bind(path, root + path)
    for device in DEVICES:
        if os.path.exists(device):
            _bind_file(device, root + device)
    for folder in ("/tmp", "/old"):
        os.mkdir(root + folder)
    syscalls.pivot_root(root, root + "/old")
    os.chdir("/")
    syscalls.unmount("/old")
    os.rmdir("/old")
    flags = syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | syscalls.MS_NOSUID
    syscalls.mount("none", "/", "", flags)


def _bind(source: str, target: str) -> None:
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if not os.path.isdir(source):
        _bind_file(source, target)
        return
    os.makedirs(target, exist_ok=True)
    syscalls.mount(source, target, "", syscalls.MS_BIND | syscalls.MS_REC)
    syscalls.make_read_only(target)


def _bind_file(source: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    syscalls.mount(source, target, "", syscalls.MS_BIND)

"""The few Linux calls Python does not wrap. Not policy: `shell` and `jail` decide what to use.

Everything raises OSError with the kernel's errno. x86_64 and aarch64.
"""

import ctypes
import os
import platform
import signal
import struct

NEWNS, NEWUTS, NEWIPC = 0x00020000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACE_FLAGS = NEWNS | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | 0x02000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP = 1, 4, 8, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38

MACHINE = platform.machine()
_NUMBERS = {
    "x86_64": {"clone": 56, "pivot_root": 155, "capset": 126},
    "aarch64": {"clone": 220, "pivot_root": 41, "capset": 91},
}.get(MACHINE, {})
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446

# PyDLL keeps the GIL: these calls are short, and after `clone` nobody could hand it back.
_libc = ctypes.PyDLL(None, use_errno=True)
_python = ctypes.pythonapi


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def supported() -> bool:
    """Whether the numbers of this machine's system calls are known."""
    return bool(_NUMBERS)


def raw(number: int, *arguments: object, what: str = "syscall") -> int:
    """A system call by number. Integers are passed as 64-bit values, buffers by address."""
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *converted), what)


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def prctl(option: int, value: int = 0) -> None:
    """`prctl(option, value, 0, 0, 0)`."""
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero), "prctl")


def set_seccomp_filter(program_address: int) -> None:
    """Install a seccomp filter (`struct sock_fprog` at the address). Needs no_new_privs."""
    mode_filter = 2
    arguments = (ctypes.c_ulong(mode_filter), ctypes.c_void_p(program_address))
    _check(_libc.prctl(ctypes.c_int(PR_SET_SECCOMP), *arguments), "seccomp")


def fork_into(flags: int) -> int:
    """`fork` with new namespaces: 0 in the child, its pid in the parent."""
    _python.PyOS_BeforeFork()
    zero = ctypes.c_long(0)
    number = ctypes.c_long(_NUMBERS["clone"])
    pid = _libc.syscall(number, ctypes.c_long(flags | signal.SIGCHLD), zero, zero, zero, zero)
    if pid == 0:
        _python.PyOS_AfterFork_Child()
        return 0
    _python.PyOS_AfterFork_Parent()
    return _check(pid, "clone")


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    texts = [text.encode() if text else None for text in (source, target, kind)]
    result = _libc.mount(*texts, ctypes.c_ulong(flags), data.encode() if data else None)
    _check(result, f"mount {target}")


def unmount(target: str) -> None:
    """Detach a mount at once; it goes when its last user does."""
    _check(_libc.umount2(target.encode(), ctypes.c_int(MNT_DETACH)), f"umount {target}")


def make_read_only(target: str) -> None:
    """Read-only, nosuid and nodev for `target` and what is mounted under it."""

    class MountAttr(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]

    at_fdcwd, at_recursive = -100, 0x8000
    attributes = MountAttr(set=MS_RDONLY | MS_NOSUID | MS_NODEV)  # same bits as MOUNT_ATTR_*
    raw(
        MOUNT_SETATTR,
        at_fdcwd,
        ctypes.c_char_p(target.encode()),
        at_recursive,
        ctypes.byref(attributes),
        ctypes.sizeof(attributes),
        what=f"mount_setattr {target}",
    )


def pivot_root(new_root: str, put_old: str) -> None:
    """Make `new_root` the root; the old one appears at `put_old`."""
    texts = [ctypes.c_char_p(text.encode()) for text in (new_root, put_old)]
    raw(_NUMBERS["pivot_root"], *texts, what="pivot_root")


def set_capabilities(mask: int) -> None:
    """Effective and permitted := mask, inheritable := 0."""
    version_3 = 0x20080522
    low, high = mask & 0xFFFFFFFF, mask >> 32
    # Buffers, not ctypes structures: making those classes would cost more than all the rest.
    header = ctypes.create_string_buffer(struct.pack("=Ii", version_3, 0))
    data = ctypes.create_string_buffer(struct.pack("=6I", low, low, 0, high, high, 0))
    raw(_NUMBERS["capset"], header, data, what="capset")

"""The system-call filter of a test process. A list of what is denied, not of what is allowed:
the honest programs judged here may use any of the standard library.
"""

import ctypes
import functools
import struct

from sandbox.inside import syscalls

_EPERM, _ENOSYS = 1, 38
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# name: (x86_64, aarch64). Sockets (socketpair stays, asyncio needs it), other processes' memory,
# mounts and namespaces, keyrings, bpf, perf, io_uring, SysV and POSIX IPC, modules, file handles.
_DENIED = {
    "socket": (41, 198), "ptrace": (101, 117), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "shmget": (29, 194),
    "shmctl": (31, 195), "shmat": (30, 196), "semget": (64, 190), "semctl": (66, 191),
    "semtimedop": (220, 192), "semop": (65, 193), "msgget": (68, 186), "msgctl": (71, 187),
    "msgrcv": (70, 188), "msgsnd": (69, 189), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kexec_load": (246, 104), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "pidfd_getfd": (438, 438), "memfd_create": (319, 279),
    "mq_open": (240, 180), "kcmp": (312, 272), "quotactl": (179, 60), "reboot": (169, 142),
    "syslog": (103, 116), "swapon": (167, 224), "acct": (163, 89),
}  # fmt: skip
# Without a pid namespace other processes are in reach: signals and limits for oneself only.
_DENIED_SHARED_PIDS = {
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "ioprio_set": (251, 30),
}  # fmt: skip
_OWN = 0x7EEEEEEE  # no pid is that large, no other constant of the program is that
# name: (x86_64, aarch64, whether the pid 0 is oneself). getrlimit is prlimit64, the JVM needs it.
_ONLY_SELF = {
    "kill": (62, 129, False), "tgkill": (234, 131, False), "prlimit64": (302, 261, True),
}  # fmt: skip
# F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP: the kernel would send a signal for us.
_DENIED_COMMANDS = {"fcntl": ((72, 25), (8, 10, 15)), "ioctl": ((16, 29), (0x8901, 0x8902))}
_CLONE, _CLONE3 = {"x86_64": 56, "aarch64": 220}, 435

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_OFFSET_NUMBER, _OFFSET_ARCH, _OFFSET_ARG0, _OFFSET_ARG1 = 0, 4, 16, 24


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _program(own_pid: int | None) -> bytes:
    """BPF for this machine. `own_pid` if the pid namespace is shared with others, else None."""
    if own_pid is None:
        return prepare(shared_pids=False)
    return prepare(shared_pids=True).replace(struct.pack("=I", _OWN), struct.pack("=I", own_pid))


@functools.cache
def prepare(shared_pids: bool) -> bytes:
    """The program, with _OWN for one's own pid; made once in the zygote, for all its children."""
    column = list(_ARCH).index(syscalls.MACHINE)
    deny = _op(_RETURN, _ERRNO | _EPERM)
    reload_number = _op(_LOAD, _OFFSET_NUMBER)
    parts = [
        _op(_LOAD, _OFFSET_ARCH),
        _op(_JUMP_EQ, _ARCH[syscalls.MACHINE], 1, 0),
        _op(_RETURN, _KILL),
        reload_number,
        _op(_JUMP_GE, 0x40000000, 0, 1),  # the x32 table
        deny,
        _op(_JUMP_EQ, _CLONE3, 0, 1),
        _op(_RETURN, _ERRNO | _ENOSYS),  # libc falls back to clone, whose flags can be read
        _op(_JUMP_EQ, _CLONE[syscalls.MACHINE], 0, 4),
        _op(_LOAD, _OFFSET_ARG0),
        _op(_JUMP_SET, syscalls.NAMESPACE_FLAGS, 0, 1),
        deny,
        reload_number,
    ]
    denied = dict(_DENIED)
    if shared_pids:
        denied |= _DENIED_SHARED_PIDS
        for *pair, zero_is_self in _ONLY_SELF.values():
            parts += [
                _op(_JUMP_EQ, pair[column], 0, 5),
                _op(_LOAD, _OFFSET_ARG0),
                _op(_JUMP_EQ, _OWN, 2, 0),
                _op(_JUMP_EQ, 0 if zero_is_self else _OWN, 1, 0),
                deny,
                reload_number,
            ]
        for numbers, commands in _DENIED_COMMANDS.values():
            tests = [part for c in commands for part in (_op(_JUMP_EQ, c, 0, 1), deny)]
            block = [_op(_LOAD, _OFFSET_ARG1), *tests, reload_number]
            parts += [_op(_JUMP_EQ, numbers[column], 0, len(block)), *block]
    for left, numbers in zip(range(len(denied), 0, -1), denied.values(), strict=True):
        parts.append(_op(_JUMP_EQ, numbers[column], left, 0))  # to the last instruction
    return b"".join([*parts, _op(_RETURN, _ALLOW), deny])


def supported() -> bool:
    """Whether a filter can be written for this machine."""
    return syscalls.MACHINE in _ARCH


def install(own_pid: int | None) -> None:
    """Filter this process and its children from now on. Needs no_new_privs; raises OSError."""
    program = _program(own_pid)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(header, len(header))
    syscalls.set_seccomp_filter(ctypes.addressof(holder))

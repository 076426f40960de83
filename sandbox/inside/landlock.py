"""Files by Landlock, for machines that forbid namespaces: read the runtime, write one folder."""

import ctypes
import os
from collections.abc import Iterable

from sandbox.inside import syscalls

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE
_ALL_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_ALL_RIGHTS_NEWEST = (1 << 16) - 1
_TRUNCATE = 1 << 14
_NET_RIGHTS = 3
_SCOPE_SIGNAL_AND_ABSTRACT_SOCKETS = 3
_RULE_PATH_BENEATH = 1


class _Ruleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("files", "net", "scope")]


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def abi() -> int:
    """Landlock's version in this kernel; 0 if there is none."""
    try:
        return syscalls.raw(syscalls.LANDLOCK_CREATE, 0, 0, 1, what="landlock")
    except OSError:
        return 0


def restrict(readable: Iterable[str], writable: str, devices: Iterable[str]) -> None:
    """Confine this process and its children. Needs no_new_privs; raises OSError."""
    version = abi()
    rights = _ALL_RIGHTS.get(version, _ALL_RIGHTS_NEWEST)
    ruleset = _Ruleset(
        files=rights,
        net=_NET_RIGHTS if version >= 4 else 0,
        scope=_SCOPE_SIGNAL_AND_ABSTRACT_SOCKETS if version >= 6 else 0,
    )
    size = 8 if version < 4 else 16 if version < 6 else 24
    handle = syscalls.raw(
        syscalls.LANDLOCK_CREATE, ctypes.byref(ruleset), size, 0, what="landlock ruleset"
    )
    for path in readable:
        _allow(handle, path, _EXECUTE | _READ_FILE | _READ_DIR)
    for path in devices:
        _allow(handle, path, (_READ_FILE | _WRITE_FILE | _TRUNCATE) & rights)
    _allow(handle, writable, rights)
    syscalls.raw(syscalls.LANDLOCK_RESTRICT, handle, 0, what="landlock restrict")
    os.close(handle)


def _allow(ruleset: int, path: str, rights: int) -> None:
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        rights &= _FILE_RIGHTS | _TRUNCATE
    folder = os.open(path, os.O_PATH)
    rule = _PathRule(rights, folder)
    arguments = (ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    syscalls.raw(syscalls.LANDLOCK_ADD, *arguments, what=f"landlock {path}")
    os.close(folder)

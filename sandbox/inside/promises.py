"""What an engine promised of a container, checked from inside it before anything untrusted runs.

`facts` are read in every container. `limits` are found out by breaking them, in a small container
made for it. Both return what does not hold, in words.
"""

import functools
import os
import select
import signal
import socket
import tempfile
from collections.abc import Callable

from sandbox.inside import jail

LEVELS = ("landlock", "container")
_MIB = 1 << 20
_PATIENCE = 20  # seconds for one check
_SOMEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))  # documentation


def facts(writable: str) -> list[str]:
    """Promises that are broken, of user, capabilities, root and network.

    writable: the one folder that may be written to.
    """
    broken = []
    if os.getuid() == 0:
        broken.append("it runs as root")
    if _capabilities():
        broken.append("it has capabilities")
    if not os.statvfs("/").f_flag & os.ST_RDONLY:
        broken.append("its root is not read-only")
    places = [place for place in _writable_places() if place != writable]
    if not os.access(writable, os.W_OK):
        broken.append(f"{writable} cannot be written to")
    if places:
        broken.append(f"{places[0]} can be written to (a VOLUME of the image?)")
    if any(_has_route(family, address) for family, address in _SOMEWHERE):
        broken.append("it has a network")
    return broken


def _capabilities() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))


def _writable_places() -> list[str]:
    with open("/proc/self/mounts") as mounts:
        points = [line.split()[1] for line in mounts]
    # /dev/mqueue belongs to everyone, but a test may not make a queue (RLIMIT_MSGQUEUE is 0).
    return [
        point
        for point in points
        if os.path.isdir(point) and os.access(point, os.W_OK) and point != "/dev/mqueue"
    ]


def _has_route(family: int, address: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
    except OSError:
        return False
    return True


def limits(memory_mib: int, processes: int, disk_mib: int, folder: str) -> list[str]:
    """Promises that are broken, of memory, number of processes and size of `folder`."""
    broken = []
    if _fill(folder, 2 * disk_mib):
        broken.append(f"{folder} holds more than its {disk_mib} MiB")
    if _ends_well(lambda: _multiply(2 * processes)):
        broken.append(f"it may have more than {processes} processes")
    if _ends_well(lambda: _use_memory(2 * memory_mib)):
        broken.append(f"it may use more than {memory_mib} MiB of memory")
    return broken


def level(folder: str) -> str:
    """The strongest of LEVELS that a process here can be sealed at. Raises OSError."""
    for name in LEVELS:
        if _ends_well(functools.partial(jail.seal, name, folder, None)):
            return name
    raise OSError("no process can be sealed in it: its kernel lacks seccomp")


def _ends_well(attempt: Callable[[], None]) -> bool:
    """Whether a child process did `attempt` to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            jail.volunteer_for_the_oom_killer(os.open("/proc", os.O_RDONLY | os.O_DIRECTORY))
            attempt()
            code = 0
        finally:
            os._exit(code)
    watched = os.pidfd_open(child)
    try:
        if not select.select([watched], [], [], _PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1] == 0
    finally:
        os.close(watched)


def _use_memory(mib: int) -> None:
    b"x" * (mib * _MIB)


def _multiply(count: int) -> None:
    children: list[int] = []
    try:
        for _ in range(count):
            child = os.fork()
            if child == 0:
                signal.pause()
            children.append(child)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _fill(folder: str, mib: int) -> bool:
    """Whether a file of `mib` fits."""
    block = bytes(_MIB)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return all(file.write(block) == _MIB for _ in range(mib))
    except OSError:
        return False

"""Control groups for zygotes: a hard limit of memory and processes for all that is below one.

Only where we may make one below our own group (root in most cases; version 1 and 2). Elsewhere the
zygote's own watch (`inside.census`) bounds the sum, a tenth of a second later. A group holds the
zygote too, so that each test is born into it: moving a process costs more than judging it.
"""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CONTROLLERS = ("memory", "pids")
_SLACK_MIB, _SLACK_PROCESSES = 48, 8  # the zygote itself, its parent, the kernel's own
_REMOVE_SECONDS = 2.0
_numbers = itertools.count()


class NoGroups(Exception):
    """Why there are no control groups here."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where our own group is: one folder for each controller (version 1), or twice the same."""

    version: int
    folders: Mapping[str, Path]


class Group:
    """One group. Not thread-safe. `remove` it when its processes are gone."""

    def __init__(self, hierarchy: Hierarchy) -> None:
        """Makes the group; raises OSError."""
        name = f"unmask-{os.getpid()}-{next(_numbers)}"
        self._version = hierarchy.version
        self._folders = {kind: folder / name for kind, folder in hierarchy.folders.items()}
        self._limits: tuple[int, int] | None = None
        try:
            for folder in set(self._folders.values()):
                folder.mkdir()
        except OSError:
            self.remove()
            raise

    def add(self, pid: int) -> None:
        """Move a process in; its later children are born there. Raises OSError."""
        for folder in set(self._folders.values()):
            (folder / "cgroup.procs").write_text(str(pid))

    def limit(self, memory_mib: int, processes: int) -> None:
        """Bound what all processes take together, files in memory included. Raises OSError."""
        if self._limits == (memory_mib, processes):
            return
        size = "memory.max" if self._version == 2 else "memory.limit_in_bytes"
        (self._folders["memory"] / size).write_text(str((memory_mib + _SLACK_MIB) << 20))
        (self._folders["pids"] / "pids.max").write_text(str(processes + _SLACK_PROCESSES))
        self._limits = memory_mib, processes

    def open_events(self) -> int:
        """A descriptor of the file whose line `oom_kill` counts what the kernel ended here."""
        name = "memory.events" if self._version == 2 else "memory.oom_control"
        return os.open(self._folders["memory"] / name, os.O_RDONLY | os.O_CLOEXEC)

    def remove(self) -> None:
        """Give it back; waits a moment for processes that are being ended."""
        deadline = time.monotonic() + _REMOVE_SECONDS
        for folder in set(self._folders.values()):
            while folder.exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    break
                if time.monotonic() > deadline:
                    return  # `_remove_leftovers` of the next process will
                time.sleep(0.01)


def make() -> Group | None:
    """A new group, or None where there are none (`availability` says why)."""
    try:
        return Group(_hierarchy())
    except (NoGroups, OSError):
        return None


def availability() -> str:
    """One line for people: the version, or why there are none."""
    try:
        return f"memory and pids, version {_hierarchy().version}"
    except NoGroups as error:
        return f"none ({error})"


@functools.cache
def _hierarchy() -> Hierarchy:
    """The groups of this machine, tried out once. Raises NoGroups."""
    try:
        own = Path("/proc/self/cgroup").read_text()
        mounts = Path("/proc/self/mountinfo").read_text()
        found = find(own, mounts)
        if found.version == 2:
            _delegate(found.folders["memory"])
        for folder in set(found.folders.values()):
            _remove_leftovers(folder)
        trial = Group(found)
    except OSError as error:
        raise NoGroups(str(error)) from None
    try:
        trial.limit(64, 1)
        os.close(trial.open_events())
    except OSError as error:
        raise NoGroups(str(error)) from None
    finally:
        trial.remove()
    return found


def find(own: str, mounts: str) -> Hierarchy:
    """Our group's folders, from /proc/self/cgroup and /proc/self/mountinfo. Raises NoGroups."""
    paths: dict[str, str] = {}
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= {name: path for name in controllers.split(",")}  # version 2: the empty name
    folders: dict[str, Path] = {}
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, *_, options = right.split()
        names = options.split(",") if kind == "cgroup" else [""] if kind == "cgroup2" else []
        for name in names:
            if name in paths and paths[name].startswith(root):
                below = paths[name][len(root) :].lstrip("/")
                folders.setdefault(name, Path(point) / below)
    if all(name in folders for name in CONTROLLERS):
        return Hierarchy(1, {name: folders[name] for name in CONTROLLERS})
    if "" in folders and not any(name in paths for name in CONTROLLERS):
        return Hierarchy(2, dict.fromkeys(CONTROLLERS, folders[""]))
    raise NoGroups("no memory and pids controllers are mounted")


def _delegate(folder: Path) -> None:
    """Have version 2 offer our controllers below `folder`. Raises OSError, NoGroups."""
    control = folder / "cgroup.subtree_control"
    missing = [name for name in CONTROLLERS if name not in control.read_text().split()]
    if missing:
        try:
            control.write_text(" ".join(f"+{name}" for name in missing))
        except OSError as error:
            raise NoGroups(f"{', '.join(missing)} not delegated: {error}") from None


def _remove_leftovers(folder: Path) -> None:
    """Groups of workers that were killed. One that still has processes does not let go."""
    for left in folder.glob("unmask-*-*"):
        pid = left.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):
                left.rmdir()

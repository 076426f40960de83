"""What the processes of a user, or below a zygote, take; read from a /proc. Looks, never acts."""

import contextlib
import os


class Census:
    """Of the processes below the calling one.

    proc: a descriptor of /proc, also of one that is not mounted here any more.
    """

    def __init__(self, proc: int) -> None:
        self._proc = proc
        self._own = os.readlink("self", dir_fd=proc)  # our number there, not here

    def memory_above(self, max_bytes: int) -> bool:
        """Whether all processes below us together take more than `max_bytes`.

        Memory that several share counts once; of a process that hides its share, all counts.
        """
        pids = self._below(self._own)
        if sum(map(self._resident, pids)) <= max_bytes:  # cheap, and never less than the truth
            return False
        return sum(map(self._proportional, pids)) > max_bytes

    def _below(self, pid: str) -> list[str]:
        found = [pid]
        for parent in found:  # grows meanwhile
            with contextlib.suppress(OSError):  # it ended
                for task in self._list(f"{parent}/task"):
                    found += self._read(f"{parent}/task/{task}/children").split()
        return found[1:]

    def _resident(self, pid: str) -> int:
        try:
            return int(self._read(f"{pid}/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    def _proportional(self, pid: str) -> int:
        try:
            lines = self._read(f"{pid}/smaps_rollup").splitlines()
        except OSError:
            return self._resident(pid)
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)

    def tasks_of(self, uid: int) -> int:
        """Processes and threads of a user."""
        count = 0
        for pid in filter(str.isdigit, self._list(".")):
            with contextlib.suppress(OSError):
                if os.stat(pid, dir_fd=self._proc).st_uid == uid:
                    count += len(self._list(f"{pid}/task"))
        return count

    def _list(self, path: str) -> list[str]:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._proc)
        try:
            return os.listdir(folder)
        finally:
            os.close(folder)

    def _read(self, path: str) -> str:
        file = os.open(path, os.O_RDONLY, dir_fd=self._proc)
        try:
            return b"".join(iter(lambda: os.read(file, 1 << 16), b"")).decode()
        finally:
            os.close(file)

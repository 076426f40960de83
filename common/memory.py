"""The highest memory of this process and all below it, sampled by a thread. Not a limit.

Per process the proportional set size (PSS) where the kernel lets us read it: memory that several
processes share (libraries, Ray's object store) counts once in the sum. Elsewhere the resident set
size (RSS), which counts shared pages in each process and so overstates the sum.
"""

import threading

import psutil

GIB = 1024**3
MEANING = (
    "highest sum over the process tree of proportional set sizes (PSS; RSS where it is not "
    "readable), sampled every {interval:g} s"
)


class PeakMemory:
    """`with PeakMemory() as peak: ...`; then `peak.gib`. Peaks between two samples are missed."""

    def __init__(self, interval_s: float = 0.5) -> None:
        self._interval_s = interval_s
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    @property
    def gib(self) -> float:
        """The peak so far, in GiB."""
        return self._peak / GIB

    @property
    def meaning(self) -> str:
        """What `gib` is, for reports."""
        return MEANING.format(interval=self._interval_s)

    def sample(self) -> int:
        """Bytes of the process tree now; counts towards the peak."""
        current = tree_bytes(psutil.Process())
        self._peak = max(self._peak, current)
        return current

    def __enter__(self) -> "PeakMemory":
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.sample()


def tree_bytes(root: psutil.Process) -> int:
    """PSS (or RSS) of a process and all its descendants, in bytes."""
    return sum(_bytes(process) for process in [root, *root.children(recursive=True)])


def _bytes(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
        return int(full.pss if hasattr(full, "pss") else full.rss)
    except psutil.AccessDenied:
        return _resident(process)
    except psutil.NoSuchProcess:  # ended since it was listed
        return 0


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return 0

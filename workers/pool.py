"""Who works on what: pieces of work wait in order, whoever is free takes the next. No processes.

A piece is somebody's until it is answered or its worker is given up; then it goes back to its
place in the queue. An answer counts if its sender still has the piece: a late one of a worker that
was declared dead is nobody's. So every piece is counted exactly once, whoever dies.
"""

import heapq
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Job:
    """Pieces that were asked for together. `future` holds their results in the order asked."""

    since: float
    left: int
    results: list[Any]
    future: Future[list[Any]] = field(default_factory=Future)


@dataclass
class _Piece:
    job: Job
    place: int
    work: Any


class Pool:
    """The books of one role. One thread keeps them; others may only look at the counts."""

    def __init__(self) -> None:
        self._numbers = count()
        self._pieces: dict[int, _Piece] = {}
        self._waiting: list[int] = []  # a heap: what comes back goes first
        self._running: dict[str, int] = {}
        self.reissued = 0

    def submit(self, work: Sequence[Any], now: float) -> Job:
        """Queue pieces behind all others. No pieces are done at once."""
        job = Job(now, len(work), [None] * len(work))
        for place, one in enumerate(work):
            number = next(self._numbers)
            self._pieces[number] = _Piece(job, place, one)
            heapq.heappush(self._waiting, number)
        if not work:
            job.future.set_result([])
        return job

    def assign(self, free: Iterable[str]) -> list[tuple[str, int, Any]]:
        """Hand the next pieces to `free` workers: (worker, number of the piece, its work)."""
        handed = []
        for worker in free:
            if worker in self._running:
                continue
            while self._waiting and self._waiting[0] not in self._pieces:
                heapq.heappop(self._waiting)  # dropped meanwhile
            if not self._waiting:
                break
            number = heapq.heappop(self._waiting)
            self._running[worker] = number
            handed.append((worker, number, self._pieces[number].work))
        return handed

    def running(self, worker: str) -> int | None:
        """The number of the piece that it has."""
        return self._running.get(worker)

    def finish(self, worker: str, number: int, result: Any) -> bool:
        """`worker` has answered; False if the answer comes too late to count."""
        if self._running.get(worker) != number:
            return False
        del self._running[worker]
        piece = self._pieces.pop(number, None)
        if piece is None:
            return False
        job = piece.job
        job.results[piece.place] = result
        job.left -= 1
        if job.left == 0:
            job.future.set_result(job.results)
        return True

    def lose(self, worker: str) -> int | None:
        """`worker` is given up; the piece it had waits again, in its old place."""
        number = self._running.pop(worker, None)
        if number is None or number not in self._pieces:
            return None
        heapq.heappush(self._waiting, number)
        self.reissued += 1
        return number

    def fail(self, job: Job, error: BaseException) -> None:
        """Forget a job; whoever works on it may finish for nothing."""
        self._pieces = {n: piece for n, piece in self._pieces.items() if piece.job is not job}
        if not job.future.done():
            job.future.set_exception(error)

    def job_of(self, number: int) -> Job | None:
        """Whose piece this is; None if it is forgotten."""
        piece = self._pieces.get(number)
        return piece.job if piece else None

    def jobs(self) -> list[Job]:
        """Those that are not done, oldest first."""
        return list(dict.fromkeys(piece.job for piece in self._pieces.values()))

    @property
    def queued(self) -> bool:
        """There may be work for somebody (it may have been forgotten since)."""
        return bool(self._waiting)

    @property
    def waiting(self) -> int:
        """Pieces that nobody has."""
        return max(0, len(self._pieces) - self.under_way)  # counted while others may come

    @property
    def under_way(self) -> int:
        """Pieces that somebody has."""
        return sum(number in self._pieces for number in list(self._running.values()))


def cut(items: Sequence[T], workers: int, smallest: int = 1) -> list[list[T]]:
    """Consecutive pieces, large ones first: each is half a fair share of what is left.

    Large pieces keep a decoder's batch full; small ones at the end let the fast workers take over
    from the slow. Where `smallest` is a fair share, every worker gets one piece.
    """
    pieces, start = [], 0
    while start < len(items):
        left = len(items) - start
        size = max(1, smallest, -(-left // (2 * max(workers, 1))))
        pieces.append(list(items[start : start + size]))
        start += size
    return pieces

"""Whether a worker lives, by its heartbeat, and whether a role fails over and over. Plain values.

Not who reacts to it: `workers.crew` replaces rollout and reward workers, `workers.gang` the
learner. Times are seconds of one monotonic clock.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from common.errors import InfrastructureError


class State(StrEnum):
    """STALE: started, has not said yet that it is built and holds the newest weights. HEALTHY:
    takes work. SUSPECT: silent for a while, gets no new work. DEAD: gone, or silent for too long.
    RETIRED: finishes what it has and goes.
    """

    STALE = "STALE"
    HEALTHY = "HEALTHY"
    SUSPECT = "SUSPECT"
    DEAD = "DEAD"
    RETIRED = "RETIRED"


@dataclass(frozen=True)
class Limits:
    """heartbeat_s: between two questions. dead_after_s: of silence. start_s: to be built, and for
    one piece of work.
    """

    heartbeat_s: float
    dead_after_s: float
    start_s: float

    @property
    def suspect_after_s(self) -> float:
        """Two questions without an answer."""
        return min(2 * self.heartbeat_s + 1, self.dead_after_s)


@dataclass(frozen=True)
class Beat:
    """What a worker says of itself."""

    pid: int
    node: str
    policy_version: int | None = None


class Vitals:
    """One worker's signs of life since it was started."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._started = now
        self.last_beat: float | None = None
        self.leaving = False

    def beat(self, now: float) -> None:
        """It has answered."""
        self.last_beat = now

    def excuse(self, seconds: float) -> None:
        """The listener itself was away that long: nobody's silence."""
        self._started += seconds
        if self.last_beat is not None:
            self.last_beat += seconds

    def state(self, now: float) -> State:
        """As of `now`; a process that is known to be gone is not asked."""
        if self.last_beat is None:
            late = now - self._started > self._limits.start_s
            return State.DEAD if late else State.STALE
        silent = now - self.last_beat
        if silent > self._limits.dead_after_s:
            return State.DEAD
        if self.leaving:
            return State.RETIRED
        return State.SUSPECT if silent > self._limits.suspect_after_s else State.HEALTHY


class WorkerFailed(InfrastructureError):
    """One worker raised, died or went silent. `details`: its traceback or what is known."""

    def __init__(self, text: str, details: str = "", died: bool = False) -> None:
        super().__init__(text)
        self.details = details or text
        self.died = died


@dataclass(frozen=True)
class Failure:
    """Who failed, and with what."""

    actor: str
    pid: int | None
    node: str | None
    log: str
    reason: str
    details: str

    @property
    def text(self) -> str:
        """What is known, then who it was, then where to look."""
        where = f"pid {self.pid or '?'}, node {self.node or '?'}"
        head = f"{self.details.strip()}\n{self.actor} ({where}): {self.reason}"
        return f"{head}\nlog file: {self.log}"


class CrashWatch:
    """Counts failures of the same worker, or over the same piece of work, between finished steps.

    Many workers that die at once (a node that is switched off) are no loop: each died once.

    Args:
        limit: so many failures are a loop.
        window_s: older ones are forgotten.
        log: file that every failure is written to, with its traceback; None keeps none.
    """

    def __init__(self, limit: int, window_s: float, log: Path | None = None) -> None:
        self._limit = limit
        self._window_s = window_s
        self._log = log
        self._lock = threading.Lock()
        self._failures: dict[str, list[tuple[float, Failure]]] = {}
        self.total = 0

    def failed(self, failure: Failure, keys: Iterable[str], now: float) -> str | None:
        """Count one failure under each of `keys`; the key that has become a loop, if one has."""
        looping = None
        with self._lock:
            self.total += 1
            self._write(failure)
            for key in keys:
                recent = self._failures.setdefault(key, [])
                recent.append((now, failure))
                recent[:] = [item for item in recent if now - item[0] <= self._window_s]
                if len(recent) >= self._limit:
                    looping = key
        return looping

    def _write(self, failure: Failure) -> None:
        if self._log is None:
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as file:
            file.write(f"{datetime.now().isoformat(' ', 'seconds')} {failure.text}\n\n")

    def progress(self) -> None:
        """A step is finished: whatever failed before was survived."""
        with self._lock:
            self._failures.clear()

    def verdict(self, key: str) -> InfrastructureError:
        """What to stop the run with: its last lines are the root cause, the first failure."""
        with self._lock:
            found = [failure for _, failure in self._failures[key]]
        return InfrastructureError(
            f"{key} failed {len(found)} times without a finished step between (the last time: "
            f"{found[-1].reason}); the run stops here and resumes from its last checkpoint\n"
            f"root cause, the first failure:\n{found[0].text}"
        )

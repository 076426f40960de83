"""The places of a crew and who is in them. Not what is done about a failure (`workers.crew`)."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from common.futures import in_thread
from workers.health import Beat, Failure, Limits, State, Vitals, WorkerFailed

CLOSE_TIMEOUT_S = 3.0


class Worker(Protocol):
    """A started worker. Futures fail with UserError, LearnerLost or WorkerFailed."""

    @property
    def log(self) -> Path: ...

    def call(self, method: str, *args: Any) -> Future[Any]: ...
    def beat(self) -> Future[Beat]: ...
    def kill(self) -> None: ...


@dataclass
class Slot:
    """A place in the crew. Its worker may be replaced; its name and its counts stay."""

    name: str
    worker: Worker
    vitals: Vitals
    incarnation: int = 0
    facts: Beat | None = None
    asked_at: float | None = None  # of the beat under way
    beaten_at: float = 0.0
    piece_since: float | None = None
    completed: int = 0
    failures: int = 0
    gone: bool = False  # waits for `restart_at`
    restart_at: float = 0.0

    @property
    def key(self) -> str:
        """Names this worker and none before or after it."""
        return f"{self.name}.{self.incarnation}"

    def state(self, now: float) -> State:
        """DEAD also while it waits for its successor."""
        return State.DEAD if self.gone else self.vitals.state(now)

    def dismiss(self, closes: bool) -> None:
        """End the worker, who has done nothing wrong; `closes` lets it close first. Waits not."""
        self.gone = True  # whatever it still answers
        if closes:
            closing = self.worker.call("close")
            in_thread(partial(_kill_after, closing, self.worker), f"dismiss-{self.name}")
        else:
            self.worker.kill()

    def describe(self, role: str, now: float) -> dict[str, Any]:
        """As `unmask status` shows it."""
        return {
            **describe(role, self.name, self.facts, self.vitals, now),
            "state": str(self.state(now)),
            "completed": self.completed,
        }


class Places:
    """The slots of a crew by name, and the starting of who belongs there.

    Args:
        role: first part of the names.
        start: begins to start worker (name, incarnation) and returns at once.
    """

    def __init__(self, role: str, start: Callable[[str, int], Worker], limits: Limits) -> None:
        self._role = role
        self._start = start
        self._limits = limits
        self._lives = Counter[str]()  # of each name: one that has retired may not be gone yet
        self.slots: dict[str, Slot] = {}

    def begin(self, now: float) -> None:
        """One more, with the first name that is free."""
        numbers = {int(name.rpartition("-")[2]) for name in self.slots}
        number = next(n for n in range(len(numbers) + 1) if n not in numbers)
        name = f"{self._role}-{number}"
        self.slots[name] = Slot(name, *self._life(name, now))

    def replace(self, slot: Slot, now: float) -> None:
        """Another worker where one is gone."""
        slot.worker, slot.vitals, slot.incarnation = self._life(slot.name, now)
        slot.gone, slot.facts, slot.asked_at, slot.beaten_at = False, None, None, 0.0

    def _life(self, name: str, now: float) -> tuple[Worker, Vitals, int]:
        incarnation = self._lives[name]
        self._lives[name] += 1
        return self._start(name, incarnation), Vitals(self._limits, now), incarnation


@dataclass(frozen=True)
class CrewStatus:
    """What others may know."""

    actors: list[dict[str, Any]] = field(default_factory=list)
    waiting: int = 0
    under_way: int = 0
    reissued: int = 0


def describe(
    role: str, name: str, facts: Beat | None, vitals: Vitals, now: float
) -> dict[str, Any]:
    """A worker in the words of `unmask status`."""
    heard = vitals.last_beat
    return {
        "role": role,
        "id": name,
        "pid": facts.pid if facts else None,
        "node": facts.node if facts else None,
        "state": str(vitals.state(now)),
        "policy_version": facts.policy_version if facts else None,
        "completed": 0,
        "last_heartbeat_s": None if heard is None else round(now - heard, 2),
    }


def describe_failure(
    name: str, facts: Beat | None, worker: Worker, error: BaseException
) -> Failure:
    """For the crash watch."""
    return Failure(
        actor=name,
        pid=facts.pid if facts else None,
        node=facts.node if facts else None,
        log=str(worker.log),
        reason=str(error),
        details=getattr(error, "details", "") or str(error),
    )


def _kill_after(closing: Future[Any], worker: Worker) -> None:
    """Its answer, or its silence, ends it."""
    try:
        closing.result(CLOSE_TIMEOUT_S)
    except (TimeoutError, WorkerFailed, UserError):
        pass
    finally:
        worker.kill()

"""One place in a crew, and what is said of a worker. Not what is done about it (`workers.crew`)."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from common.futures import in_thread
from workers.health import Beat, Failure, State, Vitals, WorkerFailed

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

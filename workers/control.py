"""Where operators and a run meet: the desk (an actor), and the run's side of it. Knows no Ray.

The desk holds no truth: the run posts its status there every heartbeat and takes the wishes that
operators left. So a desk that dies is simply made again; a wish that was not taken yet is asked for
again by whoever waits for its answer. The desk lives as long as the run's own process.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.errors import InfrastructureError, UserError
from common.futures import in_thread
from workers.health import WorkerFailed
from workers.slot import Worker

CONTROL = "control"
SPAN = 60  # posts over which idle fractions and the pace are measured


@dataclass
class ControlDesk:
    """The actor's body."""

    _status: dict[str, Any] = field(default_factory=dict)
    _posted: float = 0.0
    _wishes: dict[str, dict[str, int]] = field(default_factory=dict)
    _answers: dict[str, str] = field(default_factory=dict)

    def post(self, status: dict[str, Any], answers: Mapping[str, str]) -> dict[str, dict[str, int]]:
        """What the run says: its status and the answers to wishes; the new wishes by ticket."""
        self._status, self._posted = status, time.monotonic()
        self._answers |= answers
        wishes, self._wishes = self._wishes, {}
        return wishes

    def status(self) -> dict[str, Any]:
        """The last status, and how old it is; {} before the first."""
        if not self._status:
            return {}
        return self._status | {"age_s": round(time.monotonic() - self._posted, 2)}

    def wish(self, ticket: str, sizes: dict[str, int]) -> str | None:
        """Ask for sizes of pools. None until the run has answered; ask again with the same ticket.

        The answer starts with "ok: " or with "no: ".
        """
        if ticket not in self._answers:
            self._wishes[ticket] = sizes
        return self._answers.get(ticket)


class Reporter:
    """The run's side: posts, takes wishes, and makes the desk again when it is gone.

    Args:
        start: begins to start desk number n.
        status: of the run, now.
        scale: grants a wish and says what it did; UserError refuses it.
        say: one line for people.
    """

    def __init__(
        self,
        start: Callable[[int], Worker],
        status: Callable[[], dict[str, Any]],
        scale: Callable[[dict[str, int]], str],
        say: Callable[[str], None],
        every_s: float,
        patience_s: float,
    ) -> None:
        self._start = start
        self._status = status
        self._scale = scale
        self._say = say
        self._every_s = every_s
        self._patience_s = patience_s
        self._desks = 0
        self._answers: dict[str, str] = {}
        self._closed = threading.Event()
        self._desk = start(0)
        self._first = True

    def open(self) -> None:
        """Post from now on, in a thread."""
        in_thread(self._run, "reporter")

    def _run(self) -> None:
        try:
            while not self._closed.wait(self._every_s):
                self.turn()
        except Exception as error:  # the run goes on; whoever asks for its status must know why not
            self._say(f"status and scale have stopped working: {type(error).__name__}: {error}")
            raise

    def turn(self) -> None:
        """Post once and grant what is wished."""
        # The first desk may still be starting, like everything else.
        patience = 4 * self._patience_s if self._first else self._patience_s
        answers, self._answers = self._answers, {}
        try:
            wishes = self._desk.call("post", self._status(), answers).result(patience)
        except (WorkerFailed, TimeoutError) as error:
            self._answers = answers | self._answers
            if not self._closed.is_set():
                self._again(error)
            return
        self._first = False
        for ticket, sizes in wishes.items():
            try:
                self._answers[ticket] = f"ok: {self._scale(sizes)}"
            except (UserError, InfrastructureError) as error:
                self._answers[ticket] = f"no: {error}"

    def _again(self, error: Exception) -> None:
        reason = str(error) or f"it did not answer within {self._patience_s:g} s"
        self._say(f"the control actor is made again: {reason}")
        self._desk.kill()
        self._desks += 1
        self._desk = self._start(self._desks)
        self._first = True

    def close(self) -> None:
        """Stop posting and end the desk."""
        self._closed.set()
        self._desk.kill()


class Pace:
    """How fast the run goes, over the last steps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[float] = deque([clock()], maxlen=11)

    def step(self) -> None:
        """A step is finished."""
        self._steps.append(self._clock())

    def eta_s(self, left: int) -> float | None:
        """Seconds until `left` more steps are done; None before the first."""
        if len(self._steps) < 2:
            return None
        return left * (self._steps[-1] - self._steps[0]) / (len(self._steps) - 1)


class Idle:
    """The share of a role's time without work, from how long it has worked since the start.

    worked_s: seconds, added up over its workers; what it is at first is not looked at. size: of
        these.
    """

    def __init__(self, worked_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._step = (clock(), worked_s)
        self._seen: deque[tuple[float, float]] = deque([self._step], maxlen=SPAN)

    def step(self, worked_s: float, size: int = 1) -> float:
        """Since the last step."""
        before, self._step = self._step, (self._clock(), worked_s)
        return _idle_share(before, self._step, size)

    def recent(self, worked_s: float, size: int = 1) -> float:
        """Over the last calls of this."""
        self._seen.append((self._clock(), worked_s))
        return _idle_share(self._seen[0], self._seen[-1], size)


def _idle_share(before: tuple[float, float], now: tuple[float, float], size: int) -> float:
    span = (now[0] - before[0]) * size
    return 1.0 - min(1.0, max(0.0, now[1] - before[1]) / span) if span > 0 else 1.0

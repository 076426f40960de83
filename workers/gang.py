"""The ranks of the learner: called together, watched while they work, lost together. Knows no Ray.

One dead or hanging rank makes the others useless, for they wait for it in a collective: so the
first failure ends the call, and `rebuild` starts all of them anew.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from typing import Any

from common.errors import LearnerLost, UserError
from workers.health import Beat, CrashWatch, Limits, State, Vitals, WorkerFailed
from workers.slot import Worker, describe, describe_failure

GRACE_S = 1.0
ROLE = "learner"


class Gang:
    """`size` ranks that `start` begins to start; `rank-0`'s answer is the gang's.

    busy: there is a call under way, or none yet to this life of the ranks.

    Args:
        start: starts every rank, given how often that was done before; returns at once.
        meet: makes the started ranks find each other and load the run's model.
    """

    def __init__(
        self,
        start: Callable[[int], Sequence[Worker]],
        meet: Callable[["Gang"], None],
        limits: Limits,
        watch: CrashWatch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start
        self._meet = meet
        self._limits = limits
        self._watch = watch
        self._clock = clock
        self._lock = threading.Lock()
        self._order = threading.Lock()  # of calls: the same at every rank
        self._listened = clock()
        self._lives = 0
        self.completed = 0
        self.busy_s = 0.0  # with calls
        self.posted_s = 0.0  # with what was posted
        self._begin()

    def _begin(self) -> None:
        self.ranks = list(self._start(self._lives))
        self._lives += 1
        now = self._clock()
        self.facts: list[Beat | None] = [None] * len(self.ranks)
        self._vitals = [Vitals(self._limits, now) for _ in self.ranks]
        self._beats: list[Future[Beat] | None] = [None] * len(self.ranks)
        self._asked = [0.0] * len(self.ranks)
        with self._order:
            self.busy = True  # before the first call nothing can be posted
            self._posted: list[Future[float]] = []

    def meet(self) -> None:
        """Finish what the constructor began.

        Raises:
            UserError: bad input that only a rank could see.
            LearnerLost: a rank failed.
        """
        self._meet(self)
        beats = [rank.beat() for rank in self.ranks]
        self.facts = list(self._wait("beat", beats))

    def rebuild(self) -> None:
        """Kill what is left of the ranks and start new ones. See `meet` for errors."""
        self.kill()
        self._begin()
        self.meet()

    def call(self, method: str, *args: Any) -> list[Any]:
        """Every rank at once; their answers.

        Raises:
            UserError: a rank found bad input.
            LearnerLost: a rank failed, died, or was silent for too long; names the likely cause.
            InfrastructureError: that has become a loop.
        """
        with self._order:
            self.busy, posted, self._posted = True, self._posted, []
        self.posted_s += sum(self._wait("post", posted)) / len(self.ranks)
        began = self._clock()
        answers = self._wait(method, [rank.call(method, *args) for rank in self.ranks])
        self.busy_s += self._clock() - began
        self.completed += 1
        self.busy = False  # one that has failed stays busy: nothing is posted to the dead
        return answers

    def post(self, method: str, *args: Any) -> None:
        """Something for every rank to do until it is called again; dropped if it is `busy`.

        `method` returns its seconds. Who fails is found out by the next call. Any thread may.
        """
        with self._order:
            if not self.busy:
                for rank in self.ranks:
                    self._posted.append(rank.call(method, *args))

    def ask(self, rank: int, method: str) -> Any:
        """One rank alone. See `call` for errors."""
        return self._wait(method, [self.ranks[rank].call(method)])[0]

    def _wait(self, method: str, calls: list[Future[Any]]) -> list[Any]:
        left, waited = set(calls), 0.0
        while left:
            began = self._clock()
            done, left = wait_for(left, self._limits.heartbeat_s / 2, FIRST_COMPLETED)
            failed = [f for f in done if f.exception() is not None]
            if failed:
                self._lost(self._root_cause(failed, left))
            # A pause of this process itself (a stopped or suspended machine) is nobody's silence.
            waited += min(self._clock() - began, self._limits.heartbeat_s)
            self.listen()
            self._check(method, waited)
        return [future.result() for future in calls]

    def listen(self) -> None:
        """Ask for signs of life and take down those that came. Any thread may."""
        with self._lock:
            now = self._clock()
            away = now - self._listened - 2 * self._limits.heartbeat_s
            self._listened = now
            for i, rank in enumerate(self.ranks):
                if away > 0:
                    self._vitals[i].excuse(away)
                beat = self._beats[i]
                if beat is not None and beat.done():
                    self._beats[i] = None
                    if beat.exception() is None:
                        self.facts[i] = beat.result()
                        self._vitals[i].beat(now)
                elif beat is None and now - self._asked[i] >= self._limits.heartbeat_s:
                    self._asked[i] = now
                    self._beats[i] = rank.beat()

    def _check(self, method: str, waited: float) -> None:
        limits, now = self._limits, self._clock()
        for i, vitals in enumerate(self._vitals):
            if vitals.state(now) is State.DEAD:
                text = f"{ROLE}-{i} did not answer within {limits.dead_after_s:g} s in `{method}`"
                self._lost(WorkerFailed(f"{text}; its log is {self.ranks[i].log}"))
        if waited > limits.start_s:
            log = self.ranks[0].log
            text = f"{ROLE}-0 did not finish `{method}` within {limits.start_s:g} s"
            self._lost(WorkerFailed(f"{text} (cluster.timeout_s); its log is {log}"))

    def _root_cause(self, failed: list[Future[Any]], left: set[Future[Any]]) -> BaseException:
        """Of several that fail within a moment: bad input before a death, a death before those
        who lost a peer.
        """
        done, _ = wait_for(left, GRACE_S)
        errors = [e for f in (*failed, *done) if (e := f.exception()) is not None]
        inputs = [error for error in errors if isinstance(error, UserError)]
        deaths = [e for e in errors if isinstance(e, WorkerFailed) and e.died]
        return [*inputs, *deaths, errors[0]][0]

    def _lost(self, error: BaseException) -> None:
        if isinstance(error, UserError):
            raise error
        number = next((i for i in range(len(self.ranks)) if f"{ROLE}-{i} " in str(error)), 0)
        name, facts = f"{ROLE}-{number}", self.facts[number]
        failure = describe_failure(name, facts, self.ranks[number], error)
        self.kill()  # whoever waits for the others must not wait long
        if self._watch.failed(failure, [ROLE], self._clock()) is not None:
            raise self._watch.verdict(ROLE)
        raise LearnerLost(str(error)) from error

    def describe(self, policy_version: int) -> list[dict[str, Any]]:
        """The ranks as `unmask status` shows them."""
        now = self._clock()
        more = {"policy_version": policy_version, "completed": self.completed}
        ranks = enumerate(zip(self.facts, self._vitals, strict=True))
        return [describe(ROLE, f"{ROLE}-{i}", facts, v, now) | more for i, (facts, v) in ranks]

    def kill(self) -> None:
        """End every rank."""
        for rank in self.ranks:
            rank.kill()

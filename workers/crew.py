"""The workers of one role: started, watched, given work, replaced, added, drained. Knows no Ray.

`workers.cluster` gives it a way to start a worker; tests give it fakes. Everything happens in one
thread, which takes what there is to do from a queue: answers, requests, and the time.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from common.errors import InfrastructureError, LearnerLost, UserError
from common.futures import in_thread
from workers.health import Beat, CrashWatch, Limits, State, WorkerFailed
from workers.pool import Pool
from workers.slot import CLOSE_TIMEOUT_S, CrewStatus, Places, Slot, Worker, describe_failure

# Looking after everybody costs as much as there are workers, so it is not done at every answer.
LOOKS_PER_HEARTBEAT = 20
Work = tuple[str, tuple[Any, ...]]  # method and arguments
Reaction = Callable[..., None]


class Crew:
    """`size` workers of one role, kept alive.

    Args:
        role: first part of the workers' names.
        start: begins to start worker (name, incarnation) and returns at once.
        limits: how long silence may last.
        watch: shared by all roles; says when failing has become a loop.
        say: one line for people.
        closes: workers have a `close` that must be called before they are killed.
    """

    def __init__(
        self,
        role: str,
        start: Callable[[str, int], Worker],
        size: int,
        limits: Limits,
        watch: CrashWatch,
        say: Callable[[str], None],
        closes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.role = role
        self._limits = limits
        self._watch = watch
        self._say = say
        self._closes = closes
        self._clock = clock
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._pool = Pool()
        self._places = Places(role, start, limits)
        self._slots = self._places.slots
        self._ready: Future[None] = Future()
        self._error: Exception | None = None
        self._closed = False
        self._held = False
        self._missing: LearnerLost | None = None  # why there are no weights
        self._target = 0
        self._last_turn = clock()
        self._worked_s = 0.0
        self._look_at = clock()
        self._resize(size)
        self._grow()
        self._thread: Future[None] | None = None

    # Called from any thread

    def open(self) -> Future[None]:
        """Begin to work; done once every worker of the first size is HEALTHY."""
        self._thread = in_thread(self._run, f"crew-{self.role}")
        return self._ready

    def submit(self, work: Sequence[Work]) -> Future[list[Any]]:
        """Have every piece done by somebody; the results in order."""
        out: Future[list[Any]] = Future()
        self._events.put(partial(self._submit, list(work), out))
        return out

    def resize(self, size: int) -> None:
        """Add workers, or let the last ones finish what they have and go."""
        self._events.put(partial(self._resize, size))

    def drop(self, error: Exception) -> None:
        """Forget all work; the futures of its jobs fail with `error`."""
        self._events.put(partial(self._fail_jobs, error))

    def hold(self, held: bool) -> None:
        """While held, nobody is started and no work is handed out: there are no weights to pull."""
        self._held = held
        if not held:
            self._missing = None
        self._events.put(self._look_soon)

    def make_room(self) -> None:
        """End everybody: their work is taken up again, and they start anew once not held."""
        self._events.put(self._make_room)

    def tell(self, method: str, *args: Any) -> None:
        """Call a method of everybody who is HEALTHY, for what it does; no answer is waited for."""
        self._events.put(partial(self._tell, method, args))

    @property
    def size(self) -> int:
        """Workers that are there to stay."""
        return sum(not slot.vitals.leaving for slot in list(self._slots.values()))

    @property
    def worked_s(self) -> float:
        """Seconds that all members together have had work, since the start."""
        now = self._clock()
        begun = [slot.piece_since for slot in list(self._slots.values())]
        return self._worked_s + sum(now - since for since in begun if since is not None)

    @property
    def pids(self) -> dict[str, int]:
        """Of the workers that have said so."""
        return {s.name: s.facts.pid for s in list(self._slots.values()) if s.facts}

    @property
    def status(self) -> CrewStatus:
        """What there is to say of everybody now."""
        now, slots = self._clock(), list(self._slots.values())
        return CrewStatus(
            actors=[slot.describe(self.role, now) for slot in slots],
            waiting=self._pool.waiting,
            under_way=self._pool.under_way,
            reissued=self._pool.reissued,
        )

    def close(self) -> None:
        """End the thread and the workers."""
        self._closed = True
        self._events.put(lambda: None)
        if self._thread is not None:
            self._thread.result(CLOSE_TIMEOUT_S + 2 * self._limits.heartbeat_s + 1)
        closing = []
        if self._closes:
            closing = [slot.worker.call("close") for slot in self._slots.values() if not slot.gone]
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for future in closing:
            try:
                future.result(max(0.0, deadline - time.monotonic()))
            except (TimeoutError, WorkerFailed, UserError):
                continue  # it is killed all the same
        for slot in self._slots.values():
            slot.worker.kill()
        self._fail_jobs(InfrastructureError(f"{self.role}: the cluster was closed"))

    # In the crew's own thread

    def _run(self) -> None:
        try:
            while not self._closed:
                self.turn(wait_s=min(self._limits.heartbeat_s / 2, 0.5))
        except Exception as error:  # whoever waits for work must not wait for a dead thread
            self._give_up(error)
            raise

    def turn(self, wait_s: float = 0.0) -> None:
        """Do what there is to do; wait for it a little first."""
        try:
            self._events.get(timeout=wait_s)() if wait_s else self._events.get_nowait()()
            while not self._closed:
                self._events.get_nowait()()
        except Empty:
            pass
        now = self._clock()
        away = now - self._last_turn - max(wait_s, self._limits.heartbeat_s)
        self._last_turn = now
        if away > 0:
            for slot in self._slots.values():
                slot.vitals.excuse(away)
        if now >= self._look_at:
            self._look_at = now + self._limits.heartbeat_s / LOOKS_PER_HEARTBEAT
            self._grow()
            for slot in list(self._slots.values()):
                self._look_after(slot, now)
            self._check_jobs(now)
        self._hand_out(now)

    def _look_soon(self) -> None:
        """Something has happened that `_look_after` answers to: not a mere result."""
        self._look_at = self._clock()

    def _submit(self, work: list[Work], out: Future[list[Any]]) -> None:
        error = self._error or self._missing
        if error is not None:
            out.set_exception(error)
            return
        job = self._pool.submit(work, self._clock())

        def pass_on(done: Future[list[Any]]) -> None:
            error = done.exception()
            out.set_result(done.result()) if error is None else out.set_exception(error)

        job.future.add_done_callback(pass_on)

    def _resize(self, size: int) -> None:
        self._look_soon()
        self._target = size
        staying = [slot for slot in self._slots.values() if not slot.vitals.leaving]
        staying.sort(key=lambda slot: (slot.gone, slot.facts is None))  # who works stays first
        for slot in staying[size:]:
            slot.vitals.leaving = True
            if slot.facts is not None and not slot.gone:
                self._say(f"{slot.name} retires once it has finished its work")
                continue
            self._say(f"{slot.name} is not started any more")
            if not slot.gone:  # it may wait for room that there never is
                slot.dismiss(self._closes)

    def _grow(self) -> None:
        """Begin who is missing, unless held."""
        for _ in range(0 if self._held else self._target - self.size):
            self._places.begin(self._clock())

    def _look_after(self, slot: Slot, now: float) -> None:
        if slot.gone:
            if slot.vitals.leaving:
                del self._slots[slot.name]
            elif now >= slot.restart_at and not self._held:
                self._places.replace(slot, now)
                self._look_soon()  # and ask it whether it is there
            return
        state = slot.vitals.state(now)
        if state is State.DEAD:
            silent = "did not start" if slot.facts is None else "did not answer"
            limits = self._limits
            limit = limits.start_s if slot.facts is None else limits.dead_after_s
            self._lost(slot, WorkerFailed(f"{slot.name} {silent} within {limit:g} s"))
        elif slot.piece_since is not None and now - slot.piece_since > self._limits.start_s:
            limit = self._limits.start_s
            text = f"{slot.name} did not finish its work within {limit:g} s (cluster.timeout_s)"
            self._lost(slot, WorkerFailed(text))
        elif state is State.RETIRED and self._pool.running(slot.key) is None:
            self._let_go(slot)
        elif slot.asked_at is None and now - slot.beaten_at >= self._limits.heartbeat_s:
            slot.asked_at = now
            self._then(slot, slot.worker.beat(), self._beaten)

    def _then(
        self, slot: Slot, future: Future[Any], react: Callable[..., None], *rest: Any
    ) -> None:
        """Have `react` called in this thread with what the worker answered."""
        key = slot.key

        def pass_on(done: Future[Any]) -> None:
            self._events.put(partial(react, slot, key, done, *rest))

        future.add_done_callback(pass_on)

    def _beaten(self, slot: Slot, key: str, done: Future[Beat]) -> None:
        if slot.key != key or slot.gone:
            return
        error = done.exception()
        if error is not None:
            self._failed(slot, error)
            return
        now = self._clock()
        slot.vitals.beat(now)
        slot.asked_at, slot.beaten_at, slot.facts = None, now, done.result()
        if not self._ready.done() and all(s.facts for s in self._slots.values()):
            self._ready.set_result(None)

    def _tell(self, method: str, args: tuple[Any, ...]) -> None:
        now = self._clock()
        for slot in self._slots.values():
            if slot.state(now) is State.HEALTHY:
                slot.worker.call(method, *args)

    def _hand_out(self, now: float) -> None:
        if self._held or not self._pool.queued:
            return
        free = {
            slot.key: slot
            for slot in self._slots.values()
            if slot.piece_since is None and slot.state(now) is State.HEALTHY
        }
        for key, number, (method, args) in self._pool.assign(free):
            slot = free[key]
            slot.piece_since = now
            self._then(slot, slot.worker.call(method, *args), self._answered, number)

    def _answered(self, slot: Slot, key: str, done: Future[Any], number: int) -> None:
        if slot.vitals.leaving:
            self._look_soon()
        error = done.exception()
        if error is None:
            counted = self._pool.finish(key, number, done.result())
            if slot.key == key and slot.piece_since is not None:
                self._end_piece(slot)
                slot.completed += counted
                slot.failures = 0
        elif slot.key == key and not slot.gone:
            self._failed(slot, error)

    def _end_piece(self, slot: Slot) -> None:
        if slot.piece_since is not None:
            self._worked_s += self._clock() - slot.piece_since
            slot.piece_since = None

    def _failed(self, slot: Slot, error: BaseException) -> None:
        """Bad input is nobody's death; before the first answer of all it ends the start."""
        number = self._pool.running(slot.key)
        if isinstance(error, LearnerLost):
            self._starved(slot, error)
            return
        if not isinstance(error, UserError):
            self._lost(slot, error)
        elif number is not None:
            job = self._pool.job_of(number)
            if job is not None:
                self._pool.fail(job, error)
            self._pool.lose(slot.key)
            self._end_piece(slot)
        elif not self._ready.done():
            self._give_up(error)
        else:
            self._lost(slot, error)

    def _starved(self, slot: Slot, error: LearnerLost) -> None:
        """The worker is well, but there are no weights: nobody can work until there are others."""
        number = self._pool.lose(slot.key)
        self._end_piece(slot)
        if number is None or self._held:  # dropped, or known already
            return
        self._held, self._missing = True, error
        failure = describe_failure(slot.name, slot.facts, slot.worker, error)
        looping = self._watch.failed(failure, ["weights"], self._clock())
        if looping is None:
            self._fail_jobs(error)
        else:
            self._give_up(self._watch.verdict(looping))

    def _lost(self, slot: Slot, error: BaseException) -> None:
        """Give the worker up: its piece goes back, another one takes its place."""
        now = self._clock()
        self._look_soon()
        number = self._pool.lose(slot.key)
        slot.worker.kill()
        self._end_piece(slot)
        slot.gone = True
        slot.failures += 1
        slot.restart_at = now + (0 if slot.failures == 1 else min(2.0 ** (slot.failures - 2), 30))
        again = "" if number is None else "; its work goes to another"
        self._say(f"{error}{again}")
        failure = describe_failure(slot.name, slot.facts, slot.worker, error)
        keys = [slot.name] if number is None else [slot.name, f"piece {number} of {self.role}"]
        looping = self._watch.failed(failure, keys, now)
        if looping is None:
            return
        others = any(not (s is slot or s.gone or s.vitals.leaving) for s in self._slots.values())
        if looping == slot.name and slot.facts is None and self._ready.done() and others:
            slot.vitals.leaving = True
            self._target -= 1
            self._say(f"{slot.name} is given up: it does not start; the others go on")
        else:
            self._give_up(self._watch.verdict(looping))

    def _make_room(self) -> None:
        self._look_soon()
        for slot in self._slots.values():
            if not slot.gone:
                self._pool.lose(slot.key)
                self._end_piece(slot)
                slot.restart_at = self._clock()
                slot.dismiss(self._closes)

    def _let_go(self, slot: Slot) -> None:
        del self._slots[slot.name]
        self._say(f"{slot.name} has retired")
        slot.dismiss(self._closes)

    def _check_jobs(self, now: float) -> None:
        limit = 2 * self._limits.start_s
        for job in self._pool.jobs():
            if now - job.since > limit:
                states = ", ".join(f"{s.name} {s.state(now)}" for s in self._slots.values())
                text = f"{self.role}: work was not done within {limit:g} s (twice "
                self._pool.fail(job, InfrastructureError(f"{text}cluster.timeout_s); {states}"))

    def _give_up(self, error: Exception) -> None:
        """The run cannot go on; everybody who asks is told why."""
        self._error = error
        self._fail_jobs(error)
        if not self._ready.done():
            self._ready.set_exception(error)

    def _fail_jobs(self, error: Exception) -> None:
        for job in self._pool.jobs():
            self._pool.fail(job, error)

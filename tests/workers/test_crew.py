"""Crews and the gang with workers that are made of futures, on a clock that we move."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from common.errors import InfrastructureError, LearnerLost, UserError
from workers.crew import Crew
from workers.gang import Gang
from workers.health import Beat, CrashWatch, Failure, Limits, State, Vitals, WorkerFailed

LIMITS = Limits(heartbeat_s=2.0, dead_after_s=10.0, start_s=60.0)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeWorker:
    """Answers heartbeats at once while it is `alive`, and calls when the test says so."""

    name: str
    alive: bool = True
    killed: bool = False
    calls: list[tuple[str, tuple[Any, ...], Future[Any]]] = field(default_factory=list)
    problem: Exception | None = None
    answers: bool = False

    @property
    def log(self) -> Path:
        return Path(f"{self.name}.log")

    def call(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.calls.append((method, args, future))
        if self.answers:
            future.set_result(f"{self.name} {method}")
        return future

    def beat(self) -> Future[Beat]:
        future: Future[Beat] = Future()
        if self.problem is not None:
            future.set_exception(self.problem)
        elif self.alive:
            future.set_result(Beat(pid=1000 + len(self.name), node="here", policy_version=7))
        return future

    def kill(self) -> None:
        self.killed = True

    def answer(self) -> None:
        method, args, future = next(call for call in self.calls if not call[2].done())
        future.set_result((method, *args))

    def die(self, text: str = "killed") -> None:
        self.alive = False
        for _, _, future in self.calls:
            if not future.done():
                future.set_exception(WorkerFailed(f"{self.name} {text}", died=True))


@dataclass
class Stage:
    """A crew, its clock, all workers that were ever started, and what was said."""

    crew: Crew
    clock: Clock
    started: list[FakeWorker]
    said: list[str]
    watch: CrashWatch

    def turns(self, count: int = 3, seconds: float = 0.0) -> None:
        for _ in range(count):
            self.clock.now += seconds
            self.crew.turn()

    def worker(self, name: str) -> FakeWorker:
        return [w for w in self.started if w.name.startswith(name + ".")][-1]

    def states(self) -> dict[str, str]:
        return {actor["id"]: actor["state"] for actor in self.crew.status.actors}


Make = Callable[..., Stage]


@pytest.fixture
def make() -> Make:
    def build(size: int = 2, limit: int = 3, closes: bool = False, **traits: Any) -> Stage:
        clock, started, said = Clock(), [], []

        def start(name: str, incarnation: int) -> FakeWorker:
            started.append(FakeWorker(f"{name}.{incarnation}", **traits))
            return started[-1]

        watch = CrashWatch(limit, window_s=600.0)
        crew = Crew("rollout", start, size, LIMITS, watch, said.append, closes, clock=clock)
        return Stage(crew, clock, started, said, watch)

    return build


def test_work_goes_to_whoever_is_free(make: Make) -> None:
    stage = make()
    done = stage.crew.submit([("generate", (i,)) for i in range(3)])
    stage.turns()
    assert stage.states() == {"rollout-0": "HEALTHY", "rollout-1": "HEALTHY"}
    fast, slow = stage.worker("rollout-0"), stage.worker("rollout-1")
    fast.answer()
    stage.turns()
    fast.answer()
    stage.turns()
    assert len(slow.calls) == 1
    slow.answer()
    stage.turns()
    assert done.result(0) == [("generate", 0), ("generate", 1), ("generate", 2)]
    assert {a["id"]: a["completed"] for a in stage.crew.status.actors} == {
        "rollout-0": 2,
        "rollout-1": 1,
    }


def test_a_dead_process_is_replaced_at_once_and_its_work_done_by_another(make: Make) -> None:
    stage = make()
    done = stage.crew.submit([("generate", (i,)) for i in range(2)])
    stage.turns()
    first = stage.worker("rollout-0")
    first.die()
    stage.worker("rollout-1").answer()
    stage.turns(1)
    assert first.killed
    stage.turns(2)
    assert [w.name for w in stage.started] == ["rollout-0.0", "rollout-1.0", "rollout-0.1"]
    again = stage.worker("rollout-1")  # free before the new one is there
    assert again.calls[-1][:2] == ("generate", (0,))  # the same work, seeds and all
    again.answer()
    stage.turns()
    assert done.result(0) == [("generate", 0), ("generate", 1)]
    assert "rollout-0.0 killed; its work goes to another" in stage.said
    assert stage.states() == {"rollout-0": "HEALTHY", "rollout-1": "HEALTHY"}


def test_a_hung_worker_is_suspected_then_dead_and_its_late_answer_ignored(make: Make) -> None:
    stage = make()
    done = stage.crew.submit([("generate", ("a",)), ("generate", ("b",))])
    stage.turns()
    hung = stage.worker("rollout-0")
    hung.alive = False  # SIGSTOP: no word, no end
    stage.turns(4, seconds=1.8)
    assert stage.states()["rollout-0"] == "SUSPECT"
    assert not hung.killed
    stage.turns(3, seconds=1.8)
    assert hung.killed
    stage.worker("rollout-1").answer()
    stage.turns(3)
    other = next(w for w in stage.started if not w.killed and w.calls and not w.calls[-1][2].done())
    hung.answer()  # it woke up and answers after all
    stage.turns()
    assert not done.done()
    other.answer()
    stage.turns()
    assert done.result(0) == [("generate", "a"), ("generate", "b")]
    assert "rollout-0 did not answer within 10 s; its work goes to another" in stage.said


def test_a_suspect_gets_no_new_work(make: Make) -> None:
    stage = make()
    stage.turns()
    stage.worker("rollout-0").alive = False
    stage.turns(4, seconds=1.8)
    stage.crew.submit([("generate", (i,)) for i in range(3)])
    stage.turns()
    assert stage.worker("rollout-0").calls == []


def test_a_pause_of_the_driver_itself_kills_nobody(make: Make) -> None:
    stage = make()
    stage.turns()
    stage.clock.now += 1000.0
    stage.turns()
    assert len(stage.started) == 2
    assert set(stage.states().values()) == {"HEALTHY"}


def test_work_that_never_ends_is_given_to_another(make: Make) -> None:
    stage = make()
    stage.crew.submit([("generate", (1,))])
    stage.turns(45, seconds=1.5)
    assert "(cluster.timeout_s); its work goes to another" in stage.said[0]
    assert stage.worker("rollout-1").calls[0][:2] == ("generate", (1,))


def test_one_that_does_not_start_in_time_is_replaced(make: Make) -> None:
    stage = make(size=1)
    stage.worker("rollout-0").alive = False
    stage.turns(42, seconds=1.5)
    assert stage.said == ["rollout-0 did not start within 60 s"]
    assert len(stage.started) == 2


def test_added_workers_help_and_removed_ones_finish_first(make: Make) -> None:
    stage = make(size=2)
    done = stage.crew.submit([("generate", (i,)) for i in range(4)])
    stage.turns()
    stage.crew.resize(3)
    stage.turns()
    assert [w.name for w in stage.started] == ["rollout-0.0", "rollout-1.0", "rollout-2.0"]
    assert stage.worker("rollout-2").calls
    stage.crew.resize(1)
    stage.turns()
    assert stage.states() == {
        "rollout-0": "HEALTHY",
        "rollout-1": "RETIRED",
        "rollout-2": "RETIRED",
    }
    assert stage.crew.size == 1
    leaving = [stage.worker("rollout-1"), stage.worker("rollout-2")]
    for worker in leaving:
        worker.answer()
    stage.turns()
    assert all(worker.killed for worker in leaving)
    assert stage.states() == {"rollout-0": "HEALTHY"}
    for _ in range(2):
        stage.worker("rollout-0").answer()
        stage.turns()
    assert done.result(0) == [("generate", i) for i in range(4)]


def test_bad_input_fails_its_job_and_nobody_else(make: Make) -> None:
    stage = make(size=1)
    bad, good = stage.crew.submit([("generate", ("bad",))]), stage.crew.submit([("score", ())])
    stage.turns()
    worker = stage.worker("rollout-0")
    worker.calls[0][2].set_exception(UserError("decoding.gen_length: no"))
    stage.turns()
    with pytest.raises(UserError, match="gen_length"):
        bad.result(0)
    worker.answer()
    stage.turns()
    assert good.result(0) == [("score",)]
    assert len(stage.started) == 1


def test_bad_input_found_at_the_start_ends_it(make: Make) -> None:
    stage = make(problem=UserError("model.path: nothing there"))
    work = stage.crew.submit([("generate", ())])
    stage.turns()
    with pytest.raises(UserError, match=r"model\.path"):
        stage.crew._ready.result(0)
    with pytest.raises(UserError, match=r"model\.path"):
        work.result(0)


def test_a_worker_that_fails_over_and_over_stops_the_run_with_the_first_cause(make: Make) -> None:
    stage = make(size=1)
    done = stage.crew.submit([("generate", ())])
    for number in range(3):
        stage.turns(6, seconds=1.0)
        error = WorkerFailed(f"rollout-0 failed: {number}", f"Traceback ...\nValueError: {number}")
        stage.worker("rollout-0").calls[-1][2].set_exception(error)
        stage.turns(1)
    with pytest.raises(InfrastructureError) as caught:
        done.result(0)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("piece 0 of rollout failed 3 times without a finished step between")
    assert lines[1:4] == ["root cause, the first failure:", "Traceback ...", "ValueError: 0"]
    assert lines[4] == "rollout-0 (pid 1011, node here): rollout-0 failed: 0"
    assert lines[5] == "log file: rollout-0.0.log"
    later = stage.crew.submit([("generate", ())])
    stage.turns()
    with pytest.raises(InfrastructureError, match="piece 0 of rollout failed 3 times"):
        later.result(0)


def test_finished_steps_between_make_it_no_loop(make: Make) -> None:
    stage = make(size=1)
    done = stage.crew.submit([("generate", ())])
    for _ in range(5):
        stage.turns(12, seconds=1.0)
        stage.worker("rollout-0").die()
        stage.turns(1)
        stage.watch.progress()
    stage.turns(12, seconds=1.0)
    stage.worker("rollout-0").answer()
    stage.turns()
    assert done.result(0) == [("generate",)]


def test_a_node_that_dies_with_many_workers_is_no_loop(make: Make) -> None:
    stage = make(size=8)
    done = stage.crew.submit([("generate", (i,)) for i in range(8)])
    stage.turns()
    for worker in list(stage.started):
        worker.die()
    stage.turns(6, seconds=1.0)
    for worker in stage.started[8:]:
        worker.answer()
    stage.turns()
    assert done.result(0) == [("generate", i) for i in range(8)]


def test_an_added_worker_that_cannot_start_does_not_end_the_run(make: Make) -> None:
    stage = make(size=1)
    stage.turns()
    stage.crew.resize(2)
    for _ in range(60):
        for worker in stage.started:
            if worker.name.startswith("rollout-1"):
                worker.problem = WorkerFailed("rollout-1 died: no such file")
        stage.turns(1, seconds=1.0)
    assert stage.states() == {"rollout-0": "HEALTHY"}
    assert any("rollout-1 is given up" in text for text in stage.said)
    done = stage.crew.submit([("generate", ())])
    stage.turns()
    stage.worker("rollout-0").answer()
    stage.turns()
    assert done.result(0) == [("generate",)]


def test_dropped_and_held_work(make: Make) -> None:
    stage = make(size=1)
    old = stage.crew.submit([("generate", ("old",))])
    stage.turns()
    stage.crew.drop(InfrastructureError("dropped"))
    stage.crew.hold(True)
    new = stage.crew.submit([("generate", ("new",))])
    stage.turns()
    with pytest.raises(InfrastructureError, match="dropped"):
        old.result(0)
    worker = stage.worker("rollout-0")
    worker.answer()
    stage.turns()
    assert len(worker.calls) == 1
    stage.crew.hold(False)
    stage.turns()
    worker.answer()
    stage.turns()
    assert new.result(0) == [("generate", "new")]


def test_lost_weights_are_nobodys_death_and_end_the_wait_at_once(make: Make) -> None:
    """All 3 workers fail at the same moment: one loss, which only other weights can mend."""
    stage = make(size=3, limit=3)
    done = stage.crew.submit([("generate", (name,)) for name in "abcd"])
    stage.turns()
    for worker in stage.started:
        worker.calls[0][2].set_exception(LearnerLost("weights: bucket 0 is gone"))
    stage.turns(5, seconds=1.0)
    with pytest.raises(LearnerLost, match="bucket 0 is gone"):
        done.result(0)
    assert len(stage.started) == 3 and not any(worker.killed for worker in stage.started)
    assert [len(worker.calls) for worker in stage.started] == [1, 1, 1]
    late = stage.crew.submit([("generate", ("e",))])  # nobody is left to wait for
    stage.turns()
    with pytest.raises(LearnerLost, match="bucket 0 is gone"):
        late.result(0)
    assert stage.watch.total == 1
    stage.crew.hold(False)
    again = stage.crew.submit([("generate", ("e",))])
    stage.turns()
    [busy] = [worker for worker in stage.started if len(worker.calls) == 2]
    busy.answer()
    stage.turns()
    assert again.result(0) == [("generate", "e")]


def test_weights_that_are_lost_over_and_over_stop_the_run(make: Make) -> None:
    stage = make(size=1, limit=2)
    for _ in range(2):
        stage.crew.hold(False)
        done = stage.crew.submit([("generate", ("a",))])
        stage.turns()
        stage.started[0].calls[-1][2].set_exception(LearnerLost("weights: bucket 0 is gone"))
        stage.turns()
    error = done.exception(0)
    assert isinstance(error, InfrastructureError) and not isinstance(error, LearnerLost)
    assert str(error).startswith("weights failed 2 times without a finished step between")


def test_a_held_crew_makes_room_and_goes_on_with_the_same_work(make: Make) -> None:
    stage = make(size=2)
    done = stage.crew.submit([("generate", ("a",)), ("generate", ("b",))])
    stage.turns()
    first = list(stage.started)
    stage.crew.hold(True)
    stage.crew.make_room()
    stage.turns(seconds=5.0)
    assert [worker.killed for worker in first] == [True, True]
    assert stage.started == first  # nobody starts while the room is needed
    first[0].answer()  # too late: it was ended
    stage.turns()
    stage.crew.hold(False)
    stage.turns()
    assert [w.name for w in stage.started[2:]] == ["rollout-0.1", "rollout-1.1"]
    assert not any(worker.killed for worker in stage.started[2:])
    stage.turns()
    stage.worker("rollout-0").answer()
    stage.worker("rollout-1").answer()
    stage.turns()
    assert done.result(0) == [("generate", "a"), ("generate", "b")]
    assert stage.watch.total == 0  # nobody failed


def test_making_room_ends_those_that_start_or_leave_as_well(make: Make) -> None:
    stage = make(size=2, closes=True)
    stage.turns()
    done = stage.crew.submit([("score", ("a",)), ("score", ("b",))])
    stage.turns()
    stage.crew.resize(1)  # one leaves once it has finished
    stage.turns()
    stage.crew.resize(2)
    stage.turns(1)
    assert [worker.name for worker in stage.started][2:] == ["rollout-2.0"]  # not there yet
    stage.crew.hold(True)
    stage.crew.make_room()
    stage.turns()
    for worker in stage.started:  # asked to close; their silence or their answer ends them
        assert worker.calls[-1][0] == "close"
    stage.crew.hold(False)
    stage.turns(4)
    assert stage.states() == {"rollout-0": "HEALTHY", "rollout-2": "HEALTHY"}
    for worker in stage.started[3:]:
        worker.answer()
    stage.turns()
    assert done.result(0) == [("score", "a"), ("score", "b")]


def test_who_works_stays_and_who_never_came_goes_at_once(make: Make) -> None:
    stage = make(size=4)
    stage.turns()
    for name in ("rollout-0", "rollout-1"):  # their node has died, and there is no room for others
        stage.worker(name).problem = WorkerFailed(f"{name} died", died=True)
    stage.turns(2, seconds=LIMITS.heartbeat_s)
    pending = stage.started[4:]
    assert [worker.name for worker in pending] == ["rollout-0.1", "rollout-1.1"]
    for worker in pending:
        worker.alive = False
    stage.crew.resize(2)
    stage.turns()
    assert stage.states() == {"rollout-2": "HEALTHY", "rollout-3": "HEALTHY"}
    assert all(worker.killed for worker in pending)
    stage.crew.resize(4)
    stage.turns()
    assert stage.states() == dict.fromkeys([f"rollout-{i}" for i in (2, 3, 0, 1)], "HEALTHY")


def test_nobody_is_added_while_held(make: Make) -> None:
    stage = make(size=1)
    stage.turns()
    stage.crew.hold(True)
    stage.crew.resize(3)
    stage.turns(5, seconds=1.0)
    assert len(stage.started) == 1
    stage.crew.hold(False)
    stage.turns()
    assert len(stage.started) == 3


def test_work_that_nobody_can_do_ends_with_who_is_there(make: Make) -> None:
    stage = make(size=1, limit=99)
    stage.turns()
    stage.worker("rollout-0").alive = False
    work = stage.crew.submit([("generate", ())])
    for _ in range(130):
        stage.turns(1, seconds=1.0)
        stage.started[-1].alive = False
    with pytest.raises(InfrastructureError, match=r"not done within 120 s.*rollout-0 (STALE|DEAD)"):
        work.result(0)


def test_the_thread_serves_and_ends(make: Make) -> None:
    stage = make(size=2, answers=True)
    stage.crew._clock = time.monotonic
    stage.crew.open().result(10)
    assert len(stage.crew.submit([("generate", (i,)) for i in range(5)]).result(10)) == 5
    stage.crew.close()
    assert all(worker.killed for worker in stage.started)


# Vitals and the watch by themselves


def test_an_answer_costs_no_look_at_everybody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a thousand workers would cost a thousand looks for each of a thousand answers."""
    stage, looks = make(size=20), []
    stage.crew.submit([("generate", (i,)) for i in range(60)])
    stage.turns()
    look = Crew._look_after
    monkeypatch.setattr(Crew, "_look_after", lambda *args: (looks.append(args), look(*args)))
    for number in range(20):
        stage.worker(f"rollout-{number}").answer()
        stage.turns(1)
        assert len(stage.worker(f"rollout-{number}").calls) == 2  # the next piece, at once
    assert looks == []
    stage.turns(1, seconds=LIMITS.heartbeat_s / 20)
    assert len(looks) == 20


def test_a_name_that_is_used_again_is_another_worker(make: Make) -> None:
    """What has retired may still be about, and its last words must not count for its successor."""
    stage = make()
    stage.turns(3)
    late: Future[Beat] = Future()
    stage.worker("rollout-1").beat = lambda: late  # type: ignore[method-assign]
    stage.turns(1, seconds=LIMITS.heartbeat_s)
    stage.crew.resize(1)
    stage.turns(2)
    stage.crew.resize(2)
    stage.turns(3)
    names = [worker.name for worker in stage.started]
    assert len(names) == len(set(names)) == 3
    late.set_exception(WorkerFailed("rollout-1 was killed", died=True))
    stage.turns(2)
    assert stage.states() == {"rollout-0": "HEALTHY", "rollout-1": "HEALTHY"}
    assert len(stage.started) == 3


def test_seconds_of_work_are_added_up(make: Make) -> None:
    stage = make()
    stage.crew.submit([("generate", (0,)), ("generate", (1,))])
    stage.turns(3)
    stage.turns(4, seconds=1.0)
    assert stage.crew.worked_s == pytest.approx(8.0)  # under way: both
    stage.worker("rollout-0").answer()
    stage.turns(1)
    stage.turns(4, seconds=1.0)
    assert stage.crew.worked_s == pytest.approx(12.0)
    assert (stage.crew.status.waiting, stage.crew.status.under_way) == (0, 1)
    stage.worker("rollout-1").die()
    stage.turns(2)
    assert stage.crew.worked_s >= 12.0  # also what was for nothing


def test_states_in_time() -> None:
    vitals = Vitals(LIMITS, now=0.0)
    assert [vitals.state(t) for t in (0, 60, 61)] == [State.STALE, State.STALE, State.DEAD]
    vitals.beat(10.0)
    found = [vitals.state(10.0 + t) for t in (0, 5, 5.1, 10, 10.1)]
    assert found == [State.HEALTHY, State.HEALTHY, State.SUSPECT, State.SUSPECT, State.DEAD]
    vitals.leaving = True
    assert vitals.state(11.0) is State.RETIRED
    assert vitals.state(30.0) is State.DEAD


def test_old_failures_are_forgotten() -> None:
    watch = CrashWatch(2, window_s=10.0)
    failure = Failure("a", 1, "n", "a.log", "gone", "trace")
    assert watch.failed(failure, ["a"], 0.0) is None
    assert watch.failed(failure, ["b"], 5.0) is None
    assert watch.failed(failure, ["a"], 10.5) is None
    assert watch.failed(failure, ["a"], 12.0) == "a"
    assert watch.total == 4


def test_every_failure_is_written_down(tmp_path: Path) -> None:
    watch = CrashWatch(2, 10.0, tmp_path / "logs" / "failures.log")
    watch.failed(Failure("rollout-1", 1, "n", "a.log", "gone", "Traceback\nE: x"), ["a"], 0.0)
    lines = (tmp_path / "logs" / "failures.log").read_text().splitlines()
    assert lines[0].endswith(" Traceback")
    assert lines[1:4] == ["E: x", "rollout-1 (pid 1, node n): gone", "log file: a.log"]


# The gang


@pytest.fixture
def gang_of() -> Callable[..., tuple[Gang, list[list[FakeWorker]], Clock]]:
    def build(size: int = 2, limit: int = 3) -> tuple[Gang, list[list[FakeWorker]], Clock]:
        clock, lives = Clock(), []

        def start(life: int) -> list[FakeWorker]:
            lives.append([FakeWorker(f"learner-{i}.{life}", answers=True) for i in range(size)])
            return lives[-1]

        limits = Limits(heartbeat_s=0.02, dead_after_s=10.0, start_s=60.0)
        watch = CrashWatch(limit, window_s=600.0)
        gang = Gang(start, lambda gang: None, limits, watch, clock=clock)
        gang.meet()
        return gang, lives, clock

    return build


def test_all_ranks_are_called_together(gang_of: Any) -> None:
    gang, lives, _ = gang_of()
    assert gang.call("update", 1) == ["learner-0.0 update", "learner-1.0 update"]
    assert [fact.pid for fact in gang.facts] == [1011, 1011]


def test_what_is_posted_is_done_before_the_next_call_and_counts_as_work(gang_of: Any) -> None:
    gang, lives, clock = gang_of()
    for rank in lives[0]:
        rank.answers = False
    gang.post("prepare", "too early: nothing was called yet")
    assert [rank.calls for rank in lives[0]] == [[], []]
    for rank in lives[0]:
        rank.answers = True
    gang.call("start")
    for rank in lives[0]:
        rank.answers = False
    gang.post("prepare", "groups")
    for rank in lives[0]:
        method, args, future = rank.calls[-1]
        assert (method, args) == ("prepare", ("groups",))
        rank.answers = True
        future.set_result(1.5)
    gang.call("update")
    assert (gang.busy_s, gang.posted_s) == (0.0, 1.5)  # the clock stood still
    assert [[method for method, *_ in rank.calls] for rank in lives[0]] == [
        ["start", "prepare", "update"]
    ] * 2


def test_nothing_is_posted_to_a_busy_gang(gang_of: Any) -> None:
    gang, lives, _ = gang_of()
    gang.call("start")
    first = lives[0][0]
    answer = first.call

    def call(method: str, *args: Any) -> Future[Any]:
        gang.post("prepare", "groups")  # from another thread, while the ranks are being called
        return answer(method, *args)

    first.call = call
    gang.call("update")
    assert [method for method, *_ in first.calls] == ["start", "update"]


def test_what_fails_behind_a_post_is_found_by_the_next_call(gang_of: Any) -> None:
    gang, lives, _ = gang_of()
    gang.call("start")
    for rank in lives[0]:
        rank.answers = False
    gang.post("prepare", "groups")
    lives[0][1].die("ran out of memory")
    with pytest.raises(LearnerLost, match=r"learner-1\.0 ran out of memory"):
        gang.call("update")
    gang.rebuild()
    for rank in lives[1]:
        rank.answers = True
    gang.post("prepare", "of the life before: it must not meet ranks that have not started")
    assert gang.call("start") == ["learner-0.1 start", "learner-1.1 start"]
    assert [method for method, *_ in lives[1][0].calls] == ["start"]


def test_one_dead_rank_loses_the_gang_and_is_named(gang_of: Any) -> None:
    gang, lives, _ = gang_of()
    peer, dead = lives[0]
    peer.answers = dead.answers = False

    def broken(method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(WorkerFailed("learner-0 failed in `update`: connection reset by peer"))
        return future

    def died(method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(WorkerFailed("learner-1 failed in `update`: killed", died=True))
        return future

    peer.call, dead.call = broken, died  # type: ignore[method-assign]
    with pytest.raises(LearnerLost, match="learner-1 failed in `update`: killed"):
        gang.call("update", 1)
    gang.rebuild()
    assert all(worker.killed for worker in lives[0])
    assert gang.call("update", 1) == ["learner-0.1 update", "learner-1.1 update"]


def test_bad_input_of_a_rank_is_bad_input(gang_of: Any) -> None:
    gang, lives, _ = gang_of(size=1)

    def refuse(method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(UserError("engine: no"))
        return future

    lives[0][0].call = refuse  # type: ignore[method-assign]
    with pytest.raises(UserError, match="engine: no"):
        gang.call("update", 1)


def test_a_silent_rank_is_lost_after_its_deadline(gang_of: Any) -> None:
    gang, lives, clock = gang_of()
    hung = lives[0][1]
    hung.answers = hung.alive = False

    class Ticking(Clock):
        def __call__(self) -> float:
            self.now += 0.01
            return self.now

    gang._clock = Ticking(clock.now)
    with pytest.raises(LearnerLost, match=r"learner-1 did not answer within 10 s in `update`"):
        gang.call("update", 1)


def test_a_learner_that_dies_over_and_over_stops_the_run(gang_of: Any) -> None:
    gang, lives, _ = gang_of(size=1)
    for _ in range(2):
        lives[-1][0].answers = False

        def die(method: str, *args: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(WorkerFailed("learner-0 failed", "Traceback\nOOM", died=True))
            return future

        lives[-1][0].call = die  # type: ignore[method-assign]
        with pytest.raises(LearnerLost):
            gang.call("update", 1)
        gang.rebuild()
    lives[-1][0].call = die  # type: ignore[method-assign]
    with pytest.raises(InfrastructureError) as caught:
        gang.call("update", 1)
    assert not isinstance(caught.value, LearnerLost)
    assert "root cause, the first failure:\nTraceback\nOOM" in str(caught.value)

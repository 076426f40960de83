"""What a save takes with it, and who hears of what. Around a whole run: test_loop.py."""

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from common.errors import InfrastructureError, UserError
from common.records import Completion, Group, Problem, Rollout, Score, Scored
from rl.checkpoint import Checkpoints, RunState, read_state
from rl.inflight import Flight, read_batches
from rl.saving import Saver


class Notebook:
    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.said: list[str] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.records.append((step, dict(metrics)))

    def say(self, text: str) -> None:
        self.said.append(text)


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def batch(step: int) -> list[Problem]:
    return [Problem(f"{step}/{i}", "do") for i in range(2)]


def rollout(name: str) -> Rollout:
    completion = Completion((4, 1), (), "x", "eos", (0, 1), (1.0, 1.0))
    return Rollout(name, 0, (3,), completion, 5, 1, Score(0.5))


def test_a_save_takes_what_is_scored_and_waits_for_nothing(tmp_path: Path) -> None:
    """A batch that is still being rolled out, or whose rollout failed, is rolled out anew."""
    groups = [Group(problem, (rollout(problem.problem_id),)) for problem in batch(5)]
    scored = Scored(groups, {"n": 1.0})
    failed: Future[Any] = Future()
    failed.set_exception(InfrastructureError("reward-0 died"))
    flights: list[Flight] = [
        (batch(4), Future()),
        (batch(5), done(scored)),
        (batch(6), failed),
    ]
    notebook = Notebook()
    saver = Saver(Checkpoints(tmp_path), lambda folder: None, notebook)
    saver.save(RunState(4, 5, 7), flights)
    saver.finish()
    assert saver.newest == tmp_path / "rl" / "global_step_4"
    assert read_batches(saver.newest, batch) == {5: scored}
    assert read_state(saver.newest, 7).pending == (("4/0", "4/1"), ("5/0", "5/1"), ("6/0", "6/1"))
    assert [step for step, _ in notebook.records] == [4, 4]


def test_a_worker_that_dies_while_it_copies_is_no_full_disk(tmp_path: Path) -> None:
    def dies(folder: Path) -> None:
        raise InfrastructureError("learner-0 died")

    saver = Saver(Checkpoints(tmp_path), dies, Notebook())
    with pytest.raises(InfrastructureError, match="learner-0 died"):
        saver.save(RunState(4, 5, 7), [])
    saver.finish(must=True)  # nothing is under way


def test_a_worker_that_dies_while_it_writes_costs_the_save(tmp_path: Path) -> None:
    died: Future[Any] = Future()
    died.set_exception(InfrastructureError("learner-0 died"))
    notebook = Notebook()
    saver = Saver(Checkpoints(tmp_path), lambda folder: died, notebook, tmp_path / "before")
    saver.save(RunState(4, 5, 7), [])
    saver.finish()
    assert saver.newest == tmp_path / "before"
    assert notebook.records[-1] == (4, {"checkpoint/failed": 1.0})
    assert "learner-0 died" in notebook.said[0]


def test_a_lost_learner_does_not_go_back_to_what_was_damaged_since(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "weights").write_text("w")

    notebook = Notebook()
    saver = Saver(Checkpoints(tmp_path), write, notebook)
    for step in (2, 4):
        saver.save(RunState(step, step, 7), [])
    saver.finish()
    first, second = (tmp_path / "rl" / f"global_step_{step}" for step in (2, 4))
    (second / "weights").write_text("x")
    assert saver.newest == second
    assert saver.go_on(lost=True) == first == saver.newest
    assert "global_step_4 is damaged (weights: its checksum differs)" in notebook.said[0]
    assert Checkpoints(tmp_path).latest() == first
    (first / "weights").write_text("x")
    with pytest.raises(UserError, match="no earlier checkpoint is sound"):
        saver.go_on(lost=True)


def test_an_interrupt_while_waiting_for_a_save_leaves_it_under_way(tmp_path: Path) -> None:
    class Interrupted(Future[Any]):
        waits = 0

        def result(self, timeout: float | None = None) -> Any:
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            return super().result(timeout)

    notebook = Notebook()
    saver = Saver(Checkpoints(tmp_path), lambda folder: None, notebook)
    saver.save(RunState(4, 5, 7), [])
    assert saver._under_way is not None
    step, began, future = saver._under_way
    path, interrupted = future.result(60), Interrupted()
    interrupted.set_result(path)
    saver._under_way = step, began, interrupted
    with pytest.raises(KeyboardInterrupt):
        saver.finish(must=True)
    saver.finish(must=True)  # what the handler does
    assert saver.newest == path and interrupted.waits == 2

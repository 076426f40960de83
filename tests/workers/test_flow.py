"""Problems on their way through two crews: what is scored when, in which order, and what fails."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from common.errors import InfrastructureError
from common.records import Completion, Group, Problem, Rollout, Score, Scored
from workers.flow import Flow

PROBLEMS = [Problem(f"p{number}", "do") for number in range(5)]


@dataclass
class Crew:
    """Does nothing by itself: the test answers."""

    size: int = 1
    asked: list[tuple[str, tuple[Any, ...], Future[list[Any]]]] = field(default_factory=list)

    def submit(self, work: Sequence[tuple[str, tuple[Any, ...]]]) -> Future[list[Any]]:
        future: Future[list[Any]] = Future()
        [(method, args)] = work
        self.asked.append((method, args, future))
        return future

    def names(self) -> list[list[str]]:
        """The problems of every piece that was asked for."""
        pieces = [args[0] for _, args, _ in self.asked]
        return [[getattr(x, "problem", x).problem_id for x in piece] for piece in pieces]


def decoded(problem: Problem) -> Group:
    completion = Completion((4, 1), (), "x", "eos", (0, 1), (1.0, 1.0))
    return Group(problem, (Rollout(problem.problem_id, 0, (3,), completion, 1, 0),))


def decode(crew: Crew, number: int) -> None:
    method, args, future = crew.asked[number]
    assert method == "generate" and args[1:] == (7, "more")
    future.set_result([[decoded(problem) for problem in args[0]]])


def judge(crew: Crew, number: int, failed: bool = False) -> None:
    method, (groups,), future = crew.asked[number]
    assert method == "score"
    score = Score(None, error="timeout") if failed else Score(1.0)
    done = [replace(g, rollouts=tuple(replace(r, score=score) for r in g.rollouts)) for g in groups]
    future.set_result([Scored(done, {"programs": float(len(done))})])


class Heard:
    def __init__(self) -> None:
        self.events: list[tuple[str, list[str]]] = []

    def __call__(self, event: str, groups: Sequence[Group]) -> None:
        self.events.append((event, [group.problem.problem_id for group in groups]))


def test_a_piece_is_scored_before_the_others_are_decoded() -> None:
    rollouts, rewards, heard = Crew(size=2), Crew(size=1), Heard()
    whole = Flow(rollouts, rewards, (2, 1), 0.0).roll_out(PROBLEMS, (7, "more"), heard)
    assert rollouts.names() == [["p0", "p1"], ["p2", "p3"], ["p4"]]
    decode(rollouts, 1)
    # Half a fair share for the only reward worker, twice.
    assert rewards.names() == [["p2"], ["p3"]]
    judge(rewards, 1)
    assert heard.events == [("generated", ["p2", "p3"]), ("scored", ["p3"])]
    for number in (2, 0):
        decode(rollouts, number)
    for number in (4, 3, 2, 0):
        assert not whole.done()
        judge(rewards, number)
    scored = whole.result(0)
    assert [group.problem for group in scored.groups] == PROBLEMS  # in their own order
    assert scored.sums == {"programs": 5.0}
    assert all(group.rollouts[0].score == Score(1.0) for group in scored.groups)
    assert sorted(name for event, names in heard.events if event == "scored" for name in names) == [
        problem.problem_id for problem in PROBLEMS
    ]


def test_what_fails_anywhere_fails_the_batch() -> None:
    for role in (0, 1):
        crews = Crew(), Crew()
        whole = Flow(*crews, (5, 5), 0.0).roll_out(PROBLEMS, (7, "more"))
        if role == 1:
            decode(crews[0], 0)
        crews[role].asked[0][2].set_exception(InfrastructureError("gone"))
        with pytest.raises(InfrastructureError, match="gone"):
            whole.result(0)


def test_too_many_failed_rewards_are_counted_over_the_whole_batch() -> None:
    outcomes = []
    for limit in (0.19, 0.2):
        rollouts, rewards = Crew(), Crew()
        whole = Flow(rollouts, rewards, (1, 1), limit).roll_out(PROBLEMS, (7, "more"))
        for number in range(len(rollouts.asked)):
            decode(rollouts, number)
        for number in range(len(rewards.asked)):
            # One of five: of its own piece it would be all, or half.
            judge(rewards, number, failed=rewards.names()[number] == ["p4"])
        outcomes.append(type(whole.exception(0)))
    assert outcomes == [InfrastructureError, type(None)]

"""Records cross process borders: frozen, picklable, without tensors."""

import dataclasses
import pickle

import pytest

from common.records import Completion, Group, Message, Problem, Rollout, Score, StdinTest


def test_a_group_survives_pickling_unchanged() -> None:
    problem = Problem(
        problem_id="p",
        prompt=(Message("user", "add"),),
        tests=("assert f(1) == 2",),
        stdin_tests=(StdinTest("1", "2"),),
        columns={"level": 3},
    )
    completion = Completion((1, 2), (3,), "x", "eos", (1, 0, 2), (0.5, 0.9, 0.1))
    score = Score(2.5, {"code": 1.0, "code_format": None}, {"n": 1.0}, ("passed",))
    rollout = Rollout("p", 0, (7, 8), completion, 4, 99, score)
    group = Group(problem, (rollout,))
    assert pickle.loads(pickle.dumps(group)) == group


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Score(1.0).total = 2.0  # type: ignore[misc]

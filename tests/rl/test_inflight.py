"""Scored batches through a file and back, to the bit."""

import math
from pathlib import Path

import pytest

from common.errors import UserError
from common.records import Completion, Group, Problem, Rollout, Score, Scored
from rl.inflight import INFLIGHT_FILE, read_batches, write_batches


def problems(step: int) -> list[Problem]:
    columns = {"any": object()}  # is not stored, so it need not be storable
    return [Problem(f"{step}/{i}", "do", columns=columns) for i in range(2)]


def scored(step: int, total: float | None = 1 / 3) -> Scored:
    def rollout(problem: Problem, index: int) -> Rollout:
        completion = Completion(
            (4, 1), (7,), 'text "ü" \ud83d\n\0', "eos", (0, 1, 1), (0.1, 1e-300, 1.0), ((-0.7,),)
        )
        score = Score(total, {"code": 0.1 + 0.2, "x": None}, {"t": -0.0}, ("pass", "fail"), "why")
        return Rollout(problem.problem_id, index, (3,), completion, 5, 2**62 + 1, score)

    groups = [Group(p, tuple(rollout(p, i) for i in range(2))) for p in problems(step)]
    return Scored(groups, {"sandbox/programs": 2.0})


def same_but_problems(ours: Scored, theirs: Scored) -> bool:
    return ours.sums == theirs.sums and [g.rollouts for g in ours.groups] == [
        g.rollouts for g in theirs.groups
    ]


def test_to_the_bit(tmp_path: Path) -> None:
    batches = {3: scored(3), 4: scored(4, None), 5: scored(5, math.inf)}
    write_batches(tmp_path, batches)
    back = read_batches(tmp_path, problems)
    assert list(back) == [3, 4, 5]
    assert all(same_but_problems(back[step], batches[step]) for step in batches)
    assert math.copysign(1, dict(back[3].groups[0].rollouts[0].score.extras)["t"]) == -1  # type: ignore[union-attr]
    assert [group.problem.problem_id for group in back[3].groups] == ["3/0", "3/1"]


def test_batches_of_other_problems_are_left_out(tmp_path: Path) -> None:
    write_batches(tmp_path, {3: scored(3), 4: scored(4)})
    assert list(read_batches(tmp_path, lambda step: problems(step if step == 3 else 99))) == [3]


def test_a_part_of_todays_batch_is_left_out(tmp_path: Path) -> None:
    write_batches(tmp_path, {3: scored(3)})
    assert read_batches(tmp_path, lambda step: [*problems(step), Problem("3/2", "do")]) == {}


@pytest.mark.parametrize("text", ["{", '{"3": {}}', '{"x": 1}', '{"3": {"groups": [[{}]]}}', "[]"])
def test_damage_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / INFLIGHT_FILE).write_text(text)
    with pytest.raises(UserError, match="damaged") as caught:
        read_batches(tmp_path, problems)
    assert "\n" not in str(caught.value)

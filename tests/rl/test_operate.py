"""What `unmask status` shows, and what `unmask scale` refuses before it asks anybody."""

from io import StringIO

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rl.cli import app
from rl.operate import _show_run

STATUS = {
    "run": "mine",
    "folder": "runs/mine",
    "step": 12,
    "steps": 200,
    "policy_version": 13,
    "eta_s": 3725.0,
    "idle": {"rollout": 0.25, "reward": 0.9, "learner": 0.5},
    "queues": {"rollout": {"waiting": 3, "under_way": 2}},
    "reissued": 4,
    "failures": 2,
    "age_s": 61.0,
    "actors": [
        {
            "role": "rollout",
            "id": "rollout-0",
            "pid": 71,
            "node": "10.0.0.1",
            "state": "SUSPECT",
            "policy_version": 13,
            "completed": 9,
            "last_heartbeat_s": 5.21,
        },
        {
            "role": "reward",
            "id": "reward-0",
            "pid": None,
            "node": None,
            "state": "STALE",
            "policy_version": None,
            "completed": 0,
            "last_heartbeat_s": None,
        },
    ],
}


def test_the_table() -> None:
    out = StringIO()
    _show_run(STATUS, Console(file=out, width=120))
    text = out.getvalue()
    assert "mine: step 12 of 200, policy version 13, about 1 h 02 min left" in text
    rows = {line.split()[1]: line.split()[3::2] for line in text.splitlines() if "-0" in line}
    assert rows["rollout-0"][:5] == ["SUSPECT", "71", "10.0.0.1", "13", "9"]
    assert rows["reward-0"] == ["STALE", "-", "-", "-", "0", "-"]
    assert "5.2 s ago" in text
    assert "idle: rollout 25%, reward 90%, learner 50%" in text
    assert "rollout 3 waiting, 2 under way" in text
    assert "failures survived: 2, work handed out again: 4" in text
    assert "the run has said nothing for 1 min 01 s" in text


@pytest.mark.parametrize("size", ["rollout", "rollout=", "rollout=many", "=3", "rollout=-1"])
def test_sizes_that_are_none(size: str) -> None:
    found = CliRunner().invoke(app, ["scale", size])
    assert found.exit_code == 2
    assert "write role=number, for example rollout=6" in found.stderr

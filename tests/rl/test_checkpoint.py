"""The run folder: atomic, resumable, and clear when it cannot be."""

import json
import os
import signal
from pathlib import Path

import pytest

from common.errors import InfrastructureError, UserError
from rl.checkpoint import Checkpoints, RunState, interrupt_deferred, read_state


def write(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "weights").write_text("w")


def state(step: int) -> RunState:
    return RunState(step, policy_version=step + 1, run_seed=7, pending=(("a", "b"),))


def test_save_and_read_back(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path).save(state(3), write)
    assert saved == tmp_path / "rl" / "global_step_3"
    assert (tmp_path / "rl" / "latest").read_text() == "global_step_3\n"
    assert (saved / "policy" / "weights").read_text() == "w"
    back = read_state(saved, run_seed=7)
    assert (back.step, back.policy_version, back.pending) == (3, 4, (("a", "b"),))
    assert back.code_version
    assert not list((tmp_path / "rl").glob(".*"))


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), write)

    def full(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(InfrastructureError, match=r"global_step_2.*No space left"):
        checkpoints.save(state(2), full)
    assert checkpoints.resume_from("auto") == tmp_path / "rl" / "global_step_1"
    assert [p.name for p in checkpoints.saved()] == ["global_step_1"]


def test_keep_last_n(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last_n=2)
    for step in (2, 9, 10, 11):
        checkpoints.save(state(step), write)
    assert [p.name for p in checkpoints.saved()] == ["global_step_10", "global_step_11"]


def test_going_on_from_an_earlier_step_keeps_what_it_writes(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last_n=1)
    checkpoints.save(state(20), write)
    checkpoints.save(state(5), write)
    assert checkpoints.latest() == tmp_path / "rl" / "global_step_5"


def test_saving_a_step_twice_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(4), write)
    checkpoints.save(state(4), lambda folder: (folder / "other").touch())
    assert (tmp_path / "rl" / "global_step_4" / "other").exists()
    assert not (tmp_path / "rl" / "global_step_4" / "policy").exists()


def test_a_pointer_to_nothing_falls_back_to_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), write)
    (tmp_path / "rl" / "latest").write_text("global_step_99\n")
    (tmp_path / "rl" / "global_step_50").mkdir()  # no state.json: incomplete
    assert checkpoints.resume_from("auto") == tmp_path / "rl" / "global_step_1"


def test_resume_words(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.resume_from("auto") is None
    assert checkpoints.resume_from("never") is None
    saved = checkpoints.save(state(1), write)
    assert checkpoints.resume_from("auto") == saved
    assert checkpoints.resume_from(str(saved)) == saved
    assert checkpoints.resume_from(str(tmp_path / "run")) == saved
    with pytest.raises(UserError, match=r"run\.resume=never.*global_step_1"):
        checkpoints.resume_from("never")
    with pytest.raises(UserError, match="no checkpoint there"):
        checkpoints.resume_from(str(tmp_path / "elsewhere"))


def test_state_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        read_state(tmp_path, 7)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_state(tmp_path, 7)
    (tmp_path / "state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(UserError, match="damaged"):
        read_state(tmp_path, 7)
    saved = Checkpoints(tmp_path).save(state(1), write)
    with pytest.raises(UserError, match=r"run\.seed=7.*run\.seed=8"):
        read_state(saved, 8)


def test_the_first_interrupt_waits_the_second_does_not() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), interrupt_deferred():
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert reached
    passed = False
    with pytest.raises(KeyboardInterrupt), interrupt_deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        passed = True
    assert not passed

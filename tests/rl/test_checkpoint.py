"""The run folder: atomic, resumable, and clear when it cannot be."""

import json
import os
import shutil
import signal
from concurrent.futures import Future
from pathlib import Path

import pytest

from common.errors import InfrastructureError, UserError
from common.integrity import FileRecord, find_damage, record_of
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


def test_what_is_half_written_is_removed(tmp_path: Path) -> None:
    """Also when the refusal comes later, from the thread of a worker."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), write)

    def later(folder: Path) -> Future[dict[str, FileRecord]]:
        write(folder)
        refused: Future[dict[str, FileRecord]] = Future()
        refused.set_exception(InfrastructureError("cannot write w: No space left on device"))
        return refused

    future = checkpoints.begin(state(2), later)
    with pytest.raises(InfrastructureError, match=r"global_step_2.*No space left"):
        future.result(60)
    assert sorted(p.name for p in (tmp_path / "rl").iterdir()) == ["global_step_1", "latest"]


def test_no_room_is_seen_before_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.save(state(1), write)
    monkeypatch.setattr(
        "rl.checkpoint.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10)
    )
    with pytest.raises(InfrastructureError, match=r"global_step_2.*10 bytes free, the last"):
        checkpoints.save(state(2), lambda folder: pytest.fail("nothing may be written"))
    assert checkpoints.latest() == first
    assert sorted(p.name for p in (tmp_path / "rl").iterdir()) == ["global_step_1", "latest"]


def test_the_pointer_moves_only_when_all_is_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), write)
    files: Future[dict[str, FileRecord]] = Future()

    def slow(folder: Path) -> Future[dict[str, FileRecord]]:
        write(folder)
        return files

    future = checkpoints.begin(state(2), slow)
    assert not future.done()
    assert Checkpoints(tmp_path).latest() == tmp_path / "rl" / "global_step_1"
    weights = tmp_path / "rl" / ".global_step_2.tmp" / "policy" / "weights"
    files.set_result({str(weights.resolve()): record_of(weights)})
    assert future.result(60) == tmp_path / "rl" / "global_step_2"
    assert Checkpoints(tmp_path).latest() == tmp_path / "rl" / "global_step_2"
    assert find_damage(tmp_path / "rl" / "global_step_2") is None


def test_files_that_only_another_node_has_are_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank's own disk in the place of one that all share: found out when it is saved."""
    monkeypatch.setattr("rl.checkpoint.VISIBLE_S", 0.3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), write)
    for size in (1, 2):  # missing here, or another file here
        weights = tmp_path / "rl" / ".global_step_2.tmp" / "policy" / "weights"
        elsewhere: Future[dict[str, FileRecord]] = Future()
        name = weights.with_name("shard") if size == 1 else weights
        elsewhere.set_result({str(name.resolve()): FileRecord(2, 3)})

        def start(folder: Path) -> Future[dict[str, FileRecord]]:
            write(folder)
            return elsewhere  # noqa: B023

        with pytest.raises(InfrastructureError, match="file system that all nodes share"):
            checkpoints.begin(state(2), start).result(60)
    assert checkpoints.resume_from("auto") == tmp_path / "rl" / "global_step_1"


def test_files_that_are_seen_late_are_waited_for(tmp_path: Path) -> None:
    written: Future[dict[str, FileRecord]] = Future()

    def start(folder: Path) -> Future[dict[str, FileRecord]]:
        return written

    future = Checkpoints(tmp_path).begin(state(1), start)
    late = tmp_path / "rl" / ".global_step_1.tmp" / "shard"
    written.set_result({str(late.resolve()): FileRecord(2, 0)})
    with pytest.raises(TimeoutError):
        future.result(0.7)
    late.write_text("xx")
    assert future.result(60) == tmp_path / "rl" / "global_step_1"


def damage(checkpoint: Path, how: str) -> None:
    weights = checkpoint / "policy" / "weights"
    if how == "flipped":
        weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]))
    elif how == "truncated":
        weights.write_bytes(b"")
    elif how == "state":
        text = (checkpoint / "state.json").read_text()
        (checkpoint / "state.json").write_text(text.replace('"step": 3', '"step": 2'))
    else:
        weights.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "state"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, how: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last_n=9)
    for step in (1, 2, 3):
        checkpoints.save(state(step), write)
    checkpoints.save(state(9), write)
    (tmp_path / "rl" / "latest").write_text("global_step_3\n")  # 9: a future that was left
    damage(tmp_path / "rl" / "global_step_3", how)
    said: list[str] = []
    assert checkpoints.resume_from("auto", said.append) == tmp_path / "rl" / "global_step_2"
    assert len(said) == 1
    assert "global_step_3 is damaged" in said[0]
    assert f"going back to {tmp_path / 'rl' / 'global_step_2'}" in said[0]
    with pytest.raises(UserError, match=r"run\.resume=.*global_step_3 is damaged"):
        checkpoints.resume_from(str(tmp_path / "rl" / "global_step_3"), said.append)


def test_nothing_sound_is_left(tmp_path: Path) -> None:
    """Starting anew without a word would overwrite what somebody may still want to mend."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state(step), write)
        damage(tmp_path / "rl" / f"global_step_{step}", "flipped")
    said: list[str] = []
    with pytest.raises(UserError, match=r"global_step_1 is damaged.*no earlier.*remove"):
        checkpoints.resume_from("auto", said.append)


def test_leftovers_of_a_killed_save_are_swept(tmp_path: Path) -> None:
    """They may be as large as a checkpoint, and of a step that is never saved again."""
    left = tmp_path / "rl" / ".global_step_7.tmp" / "policy"
    left.mkdir(parents=True)
    (left / "half").write_text("written")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.resume_from("auto") is None
    checkpoints.save(state(4), write)
    assert sorted(p.name for p in (tmp_path / "rl").iterdir()) == ["global_step_4", "latest"]


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


def test_steps_of_a_future_that_was_left_are_kept_apart(tmp_path: Path) -> None:
    """They neither count as kept ones nor are gone back to; who wants them back can name them."""
    checkpoints, said = Checkpoints(tmp_path, keep_last_n=2), list[str]()
    for step in (10, 17):
        checkpoints.save(state(step), write)
    first = tmp_path / "rl" / "global_step_10"
    checkpoints.abandon_after(first, said.append)
    assert checkpoints.latest() == first  # also if nothing is saved any more
    assert said == [
        "global_step_17 comes after global_step_10, where the run goes on: kept as "
        "abandoned_step_17.1"
    ]
    checkpoints.save(state(17), write)
    checkpoints.save(state(20), write)
    assert [path.name for path in checkpoints.saved()] == ["global_step_17", "global_step_20"]
    left = tmp_path / "rl" / "abandoned_step_17.1"
    assert checkpoints.resume_from(str(left)) == left
    checkpoints.abandon_after(left, said.append)
    assert [path.name for path in checkpoints.saved()] == ["global_step_17"]
    assert checkpoints.resume_from("auto") == left
    elsewhere = Checkpoints(tmp_path / "other")
    elsewhere.save(state(30), write)
    elsewhere.abandon_after(left, said.append)  # another run's: nothing of ours is later
    assert [path.name for path in elsewhere.saved()] == ["global_step_30"]


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
    (tmp_path / "rl" / "global_step_50").mkdir()  # no manifest: incomplete
    (tmp_path / "rl" / "global_step_50" / "state.json").write_text("{}")
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


def test_an_interrupt_is_not_forgotten_when_the_block_fails() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interrupt_deferred():
        os.kill(os.getpid(), signal.SIGINT)
        raise InfrastructureError("the learner is lost")
    assert str(caught.value.__context__) == "the learner is lost"

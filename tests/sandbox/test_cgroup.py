"""Control groups: found in both versions, limits written, nothing left; and users of their own."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from sandbox import cgroup
from sandbox.cgroup import Group, Hierarchy, NoGroups, find
from sandbox.inside.shell import spare_uid
from sandbox.probe import try_level
from sandbox.process import ZygoteProcess
from sandbox.records import Case, Limits
from sandbox.service import Sandbox

V1 = """\
24 1 0:20 / /sys/fs/cgroup rw - tmpfs tmpfs rw
25 24 0:21 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
26 24 0:22 / /sys/fs/cgroup/pids rw - cgroup none rw,pids
27 24 0:23 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""
V2 = "29 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
LIMITS = Limits(seconds=60.0, memory_mib=256, processes=8)


def test_version_1_has_a_folder_for_each_controller():
    found = find("4:memory:/a/b\n8:pids:/\n0::/\n", V1)
    assert found.version == 1
    assert found.folders == {
        "memory": Path("/sys/fs/cgroup/memory/a/b"), "pids": Path("/sys/fs/cgroup/pids")
    }  # fmt: skip


def test_version_2_has_one_folder():
    found = find("0::/user.slice/x.scope\n", V2)
    assert found.version == 2
    assert set(found.folders.values()) == {Path("/sys/fs/cgroup/user.slice/x.scope")}


def test_a_container_sees_its_part_of_the_tree():
    mounts = V1.replace("0:21 / ", "0:21 /docker/c1 ").replace("0:22 / ", "0:22 /docker/c1 ")
    found = find("4:memory:/docker/c1/job\n8:pids:/docker/c1\n", mounts)
    assert found.folders["memory"] == Path("/sys/fs/cgroup/memory/job")
    assert found.folders["pids"] == Path("/sys/fs/cgroup/pids")


@pytest.mark.parametrize(
    ("own", "mounts"), [("", V1), ("0::/\n", ""), ("4:memory:/\n", V1), ("4:memory:/\n0::/\n", V2)]
)
def test_without_both_controllers_there_are_none(own, mounts):
    with pytest.raises(NoGroups):
        find(own, mounts)


@pytest.mark.parametrize(
    ("version", "size_file", "events", "text"),
    [
        (1, "memory.limit_in_bytes", "memory.oom_control", "under_oom 0\noom_kill 3\n"),
        (2, "memory.max", "memory.events", "oom 5\noom_kill 3\n"),
    ],
)
def test_limits_are_written_in_the_words_of_the_version(tmp_path, version, size_file, events, text):
    group = Group(Hierarchy(version, dict.fromkeys(cgroup.CONTROLLERS, tmp_path)))
    (folder,) = tmp_path.iterdir()
    group.add(77)
    group.limit(100, 8)
    assert (folder / "cgroup.procs").read_text() == "77"
    assert int((folder / size_file).read_text()) == (100 + cgroup._SLACK_MIB) << 20
    assert int((folder / "pids.max").read_text()) == 8 + cgroup._SLACK_PROCESSES
    (folder / events).write_text(text)
    descriptor = group.open_events()
    assert os.read(descriptor, 100).decode() == text
    os.close(descriptor)


def test_what_is_not_delegated_is_asked_for_or_named(tmp_path):
    control = tmp_path / "cgroup.subtree_control"
    control.write_text("cpu memory")
    cgroup._delegate(tmp_path)
    assert control.read_text() == "+pids"
    control.unlink()
    control.mkdir()
    with pytest.raises(OSError):
        cgroup._delegate(tmp_path)


needs_groups = pytest.mark.skipif(
    cgroup.availability().startswith("none"), reason="cannot make control groups here"
)


def own_groups() -> list[Path]:
    folders = set(cgroup._hierarchy().folders.values())
    return [path for folder in folders for path in folder.glob(f"unmask-{os.getpid()}-*")]


@needs_groups
def test_groups_go_with_their_sandbox():
    assert own_groups() == []
    with Sandbox(workers=1) as sandbox:
        case = Case(id="a", code="def f(): return 1", tests=("assert f() == 1",), limits=LIMITS)
        assert sandbox.run([case])[0].pass_rate == 1.0
        assert len(own_groups()) == 2 * len(set(cgroup._hierarchy().folders.values()))
        for worker in sandbox._workers:
            for zygote in worker._zygotes.values():
                os.kill(zygote.home.process.pid, signal.SIGKILL)
        assert sandbox.run([case])[0].pass_rate == 1.0
    assert own_groups() == []


@needs_groups
def test_leftovers_of_dead_workers_are_removed_and_others_are_not():
    dead = subprocess.Popen(["true"])
    dead.wait()
    folders = set(cgroup._hierarchy().folders.values())
    names = [f"unmask-{dead.pid}-0", f"unmask-{os.getpid()}-999999"]
    for folder in folders:
        for name in names:
            (folder / name).mkdir()
    cgroup._hierarchy.cache_clear()
    cgroup._hierarchy()
    for folder in folders:
        assert not (folder / names[0]).exists()
        (folder / names[1]).rmdir()


@pytest.mark.parametrize("level", ["namespace", "landlock"])
def test_a_stuck_zygote_is_replaced(level, monkeypatch):
    if try_level(level) is not None:
        pytest.skip(try_level(level))
    monkeypatch.setattr(ZygoteProcess.wait, "__defaults__", (1.0,))
    case = Case(
        id="a", code="def f(): return 1", tests=("assert f() == 1",), limits=Limits(seconds=2.0)
    )
    with Sandbox(level, workers=1) as sandbox:
        assert sandbox.run([case])[0].pass_rate == 1.0
        for role in ("candidate", "judge"):
            zygote = sandbox._workers[0]._zygotes[role]
            pids = [zygote.home.process.pid]
            children = Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text()
            for pid in [*pids, *map(int, children.split())]:
                os.kill(pid, signal.SIGSTOP)
            result = sandbox.run([case])[0]
            assert result.pass_rate == 1.0, (role, result)
            assert not Path(f"/proc/{pids[0]}").exists()


@pytest.mark.skipif(spare_uid() is None, reason="needs root, to become others")
@pytest.mark.parametrize("level", ["namespace", "landlock"])
def test_a_fork_bomb_beside_it_costs_an_honest_program_no_process(level):
    if try_level(level) is not None:
        pytest.skip(try_level(level))
    bomb = Case(
        id="bomb",
        code="import os\ndef f():\n    while True:\n        try: os.fork()\n"
        "        except OSError: pass",
        tests=("assert f()",),
        limits=Limits(seconds=6.0, processes=8),
    )
    forks = """
import os
def f():
    pids = [os.fork() for _ in range(2)]
    if 0 in pids: os._exit(0)
    return len([os.waitpid(pid, 0) for pid in pids])
"""
    honest = Case(id="h", code=forks, tests=("assert f() == 2",) * 5, limits=LIMITS)
    with Sandbox(level, workers=2) as sandbox:
        bombing = threading.Thread(target=sandbox.run, args=([bomb],))
        bombing.start()
        result = sandbox.run([honest])[0]
        bombing.join(60)
    assert result.pass_rate == 1.0, result

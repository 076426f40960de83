"""What the hostile tests share: a sandbox per level, and the proof that each leaves nothing."""

import dataclasses
import os
from pathlib import Path

import pytest

from sandbox.inside.shell import _SPARE_UIDS
from sandbox.probe import try_level
from sandbox.records import Case, Limits
from sandbox.service import Sandbox

LIMITS = Limits(seconds=1.5, memory_mib=256, processes=8, output_kib=64, disk_mib=4)
PATIENT = dataclasses.replace(LIMITS, seconds=60.0)  # where the verdict must not be a timeout
HONEST = Case(
    id="honest", code="def f(x):\n    return x + 1", tests=("assert f(41) == 42",), limits=PATIENT
)


@pytest.fixture(scope="module", params=["namespace", "landlock"])
def sandbox(request):
    reason = try_level(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMASK_TEST_SECRET", "secret-42")
        with Sandbox(request.param, workers=1) as made:
            yield made


@pytest.fixture
def judge(sandbox):
    """judge(code, test, limits) -> verdict. Afterwards all is as before, and honest code passes."""

    def one(code: str, test: str = "assert f(41) == 42", limits: Limits = LIMITS) -> str:
        result = sandbox.run([Case(id="x", code=code, tests=(test,), limits=limits)])[0]
        assert result.status == "ran", result
        assert not result.tests[0].weak
        return result.tests[0].verdict

    assert_honest(sandbox)
    before = state(sandbox)
    yield one
    assert_honest(sandbox)
    assert state(sandbox) == before


def assert_honest(sandbox: Sandbox) -> None:
    result = sandbox.run([HONEST])[0]
    assert result.pass_rate == 1.0, result


def state(sandbox: Sandbox) -> dict[str, object]:
    """What a test could leave: processes, descriptors, mounts, files and groups of each zygote."""
    (worker,) = sandbox._workers
    found: dict[str, object] = {"own descriptors": len(os.listdir("/proc/self/fd"))}
    for role, zygote in worker._zygotes.items():
        pids = [zygote._process.pid, *below(zygote._process.pid)]
        users = {os.stat(f"/proc/{pid}").st_uid for pid in pids} - {os.geteuid()}
        users.add(_SPARE_UIDS + zygote._process.pid)  # whom its tests are, if we are root
        found[f"{role}: processes"] = len(pids)
        found[f"{role}: descriptors"] = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
        if sandbox.backend == "namespace":  # else the machine's own
            mounts = Path(f"/proc/{pids[-1]}/mountinfo").read_text()
            found[f"{role}: mounts"] = len(mounts.splitlines())
        found[f"{role}: files"] = os.listdir(zygote._folder)
        found[f"{role}: processes of its users"] = sum(map(processes_of, users))
        if zygote._group is not None:
            for kind, folder in zygote._group._folders.items():
                members = (folder / "cgroup.procs").read_text().split()
                found[f"{role}: {kind} group"] = sorted(members) == sorted(map(str, pids))
    return found


def below(pid: int) -> list[int]:
    """All descendants, parents first."""
    pids = [pid]
    for parent in pids:
        for listing in Path(f"/proc/{parent}/task").glob("*/children"):
            pids += map(int, listing.read_text().split())
    return pids[1:]


def processes_of(uid: int) -> int:
    """How many processes a user has."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            count += folder.stat().st_uid == uid
        except FileNotFoundError:
            continue
    return count


@pytest.fixture
def processes_below():
    """processes_below(pid) -> its descendants."""
    return below

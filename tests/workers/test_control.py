"""The desk and the run's side of it with fakes; then over Ray, from another process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.records import Problem
from rl.config import TrainConfig
from workers.cluster import RayCluster
from workers.control import ControlDesk, Idle, Pace, Reporter
from workers.health import Beat, WorkerFailed
from workers.operator import RunControl, find_place

ROOT = Path(__file__).resolve().parents[2]


class DeskWorker:
    """A desk that answers at once until it is made to die."""

    log = Path("control.log")

    def __init__(self) -> None:
        self.desk = ControlDesk()
        self.dead = False
        self.hung = False

    def call(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.dead:
            future.set_exception(WorkerFailed("control failed in `post`: killed", died=True))
        elif not self.hung:
            future.set_result(getattr(self.desk, method)(*args))
        return future

    def beat(self) -> Future[Beat]:
        raise NotImplementedError

    def kill(self) -> None:
        self.dead = True


class Run:
    """The run behind a reporter."""

    def __init__(self) -> None:
        self.desks: list[DeskWorker] = []
        self.sizes = {"rollout": 2}
        self.said: list[str] = []
        self.reporter = Reporter(
            self.start, lambda: {"sizes": dict(self.sizes)}, self.scale, self.said.append, 0.01, 0.1
        )

    def start(self, number: int) -> DeskWorker:
        assert number == len(self.desks)
        self.desks.append(DeskWorker())
        return self.desks[-1]

    def scale(self, sizes: dict[str, int]) -> str:
        if sizes.get("rollout", 1) > 9:
            raise UserError("cluster: asks for 10 CPU")
        self.sizes |= sizes
        return f"rollout {self.sizes['rollout']}"

    @property
    def desk(self) -> ControlDesk:
        return self.desks[-1].desk


def test_status_and_wishes_pass_over_the_desk() -> None:
    run = Run()
    assert run.desk.status() == {}
    run.reporter.turn()
    assert run.desk.status()["sizes"] == {"rollout": 2}
    assert run.desk.wish("t1", {"rollout": 6}) is None
    assert run.desk.wish("t2", {"rollout": 10}) is None
    run.reporter.turn()
    run.reporter.turn()
    assert run.desk.wish("t1", {"rollout": 6}) == "ok: rollout 6"
    assert run.desk.wish("t2", {"rollout": 10}) == "no: cluster: asks for 10 CPU"
    assert run.desk.status()["sizes"] == {"rollout": 6}


@pytest.mark.parametrize("how", ["dead", "hung"])
def test_a_lost_desk_is_made_again_and_an_answer_on_its_way_is_kept(how: str) -> None:
    run = Run()
    run.desk.wish("t1", {"rollout": 6})
    run.reporter.turn()
    setattr(run.desks[0], how, True)
    run.reporter.turn()
    assert len(run.desks) == 2
    assert run.desks[0].dead
    assert len(run.said) == 1
    assert run.said[0].startswith("the control actor is made again: ")
    run.reporter.turn()
    assert run.desk.wish("t1", {"rollout": 6}) == "ok: rollout 6"
    assert run.desk.status()["sizes"] == {"rollout": 6}


def test_pace() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.eta_s(10) is None
    for step in range(1, 4):
        now[0] = 2.0 * step
        pace.step()
    assert pace.eta_s(10) == 20.0


def test_idle_shares() -> None:
    now = [0.0]
    idle = Idle(clock=lambda: now[0])
    assert idle.recent(0.0) == idle.step(0.0) == 1.0
    now[0] = 2.0
    assert idle.step(0.5) == 0.75
    assert idle.step(0.5) == 1.0  # no time has passed
    now[0] = 4.0
    assert idle.step(2.5, size=2) == 0.5  # of these two seconds
    assert idle.recent(2.5, size=1) == 0.375  # of all four
    now[0] = 5.0
    assert idle.step(9.0) == 0.0  # never below
    assert idle.step(8.0) == 1.0  # nor above
    now[0] = 9.0
    later = Idle(30.0, lambda: now[0])  # a start that took half a minute
    now[0] = 10.0
    assert later.step(30.5) == later.recent(30.5) == 0.5


@pytest.mark.parametrize(
    ("run", "message"),
    [("nowhere", "--run nowhere: no such run folder"), ("ended", "this run is not going on")],
)
def test_where_no_run_is(
    run: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "runs" / "ended").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        find_place(run, None)
    assert find_place(run, "host:1").address == "host:1"


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [sys.executable, "-m", "rl.cli", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_run_whose_driver_was_killed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text('{"address": "127.0.0.1:1", "prefix": "unmask-x-1"}')
    for arguments in (["status"], ["scale", "rollout=2"]):
        found = command(*arguments, "--run", str(tmp_path))
        assert found.returncode == 2, found
        assert len(found.stderr.strip().splitlines()) == 1
        assert "its cluster at 127.0.0.1:1 does not answer" in found.stderr


def tokens(cluster: RayCluster, problems: list[Problem]) -> list[tuple[int, ...]]:
    """Without confidences: those are floats, whose last bits depend on who is in the batch."""
    groups = cluster.roll_out(problems, seed=1).result(250).groups
    return [rollout.completion.token_ids for group in groups for rollout in group.rollouts]


@pytest.mark.ray
def test_status_and_scale_from_another_process(
    make_config: Callable[..., TrainConfig],
    ray_started: None,
    problems: list[Problem],
    tmp_path: Path,
) -> None:
    cluster = RayCluster(
        make_config(cluster={"kind": "ray", "heartbeat_s": 0.5, "dead_after_s": 20.0}),
        with_learner=False,
    )
    try:
        found = command("status", "--run", str(tmp_path), "--json")
        assert (found.returncode, found.stderr) == (0, ""), found
        status = json.loads(found.stdout)
        assert (status["run"], status["step"], status["steps"]) == ("test", None, 4)
        actors = {actor["id"]: actor for actor in status["actors"]}
        assert sorted(actors) == ["reward-0", "rollout-0"]
        assert {key: actors["rollout-0"][key] for key in ("state", "pid", "policy_version")} == {
            "state": "HEALTHY",
            "pid": cluster.pids["rollout-0"],
            "policy_version": 0,
        }
        before = tokens(cluster, problems)
        found = command("scale", "--run", str(tmp_path), "rollout=2")
        assert (found.stdout, found.stderr) == ("rollout 1 -> 2\n", ""), found
        assert tokens(cluster, problems) == before
        # The control actor dies, and is there again. From this process now: it is faster.
        pid = RunControl(str(tmp_path), None)._ask("status") and _pid_of_the_desk(cluster)
        os.kill(pid, signal.SIGKILL)
        assert RunControl(str(tmp_path), None).scale({"rollout": 1}) == "rollout 2 -> 1"
        deadline = time.monotonic() + 60
        while len(cluster.pids) > 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert sorted(cluster.pids) == ["reward-0", "rollout-0"]
        assert tokens(cluster, problems) == before
        for wish, message in (
            ({"rollout": 10_000_000}, "asks for"),
            ({"learner": 2}, "give reward or rollout"),
            ({"rollout": 0}, "a number from 1"),
        ):
            with pytest.raises(UserError, match=message):
                RunControl(str(tmp_path), None).scale(wish)
        with pytest.raises(UserError, match=r"no such run is going on at .*; running there: test"):
            RunControl("other", "127.0.0.1:1")
    finally:
        cluster.close()
    assert not (tmp_path / "cluster.json").exists()


def _pid_of_the_desk(cluster: RayCluster) -> int:
    assert cluster._reporter is not None
    return int(cluster._reporter._desk.beat().result(60).pid)

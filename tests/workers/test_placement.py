"""Joining, starting, waiting: the errors people will meet. What needs a running Ray is marked."""

import inspect
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray._private.worker as ray_worker
from ray import cloudpickle

from common.errors import InfrastructureError, UserError
from workers import nodes
from workers.fitting import Want
from workers.health import WorkerFailed
from workers.nodes import Reservation, check_fits, connect
from workers.placement import Actor, Remote, find, launch, ray, wait


class Parrot:
    """A worker for tests."""

    def __init__(self, word: str = "hello") -> None:
        if word == "bad":
            raise UserError("parrot.word: bad is no word; use another")
        self.word = word

    def say(self) -> str:
        print(f"saying {self.word}")
        return self.word

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def fail(self) -> None:
        raise ValueError("no seed left")

    def refuse(self) -> None:
        raise UserError("parrot.seed: none left; buy some")


@pytest.fixture
def start(ray_started: None, tmp_path: Path) -> Iterator[Callable[..., Actor]]:
    # By value: the actors cannot import this file.
    this = sys.modules[Parrot.__module__]
    cloudpickle.register_pickle_by_value(this)

    def make(word: str = "hello", **options: Any) -> Actor:
        options = {"num_cpus": 0.0, "run": tmp_path.name, "local": False} | options
        log = tmp_path / "logs" / "parrot-0.log"
        return launch("parrot-0", log, partial(Parrot, word), **options)

    yield make
    cloudpickle.unregister_pickle_by_value(this)


# Without Ray


def test_address_where_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(UserError, match=f"cluster.address={address}: nobody answers there"):
        nodes._join(address)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("address", "message"), [("ray://head:10001", "Ray Client"), ("head", "give host:port")]
)
def test_address_of_another_kind(address: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        nodes._join(address)


def test_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "SHM", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere: no shared memory.*cluster\.kind=local"):
        nodes._object_store(0)


def test_too_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="MiB free, Ray needs .* MiB"):
        nodes._object_store(weight_bytes=10**15)


def test_object_store_grows_with_the_model() -> None:
    assert nodes._object_store(4_000_000) == nodes.MIN_OBJECT_STORE
    weights = 100 * nodes.MIB
    assert nodes._object_store(weights) == 4 * weights + 100 * nodes.MIB


# With Ray


@pytest.mark.ray
def test_connected_processes_stay_connected(ray_started: None) -> None:
    assert connect(None, logical_cpus=1, weight_bytes=0) is False


@pytest.mark.ray
def test_output_goes_to_the_log_only(
    start: Callable[..., Actor], capfd: pytest.CaptureFixture[str]
) -> None:
    actor = start("polly")
    assert wait([actor.call("say"), actor.call("say")], 60) == ["polly", "polly"]
    assert actor.log.read_text() == "saying polly\n" * 2
    out, error = capfd.readouterr()
    assert "polly" not in out + error


def test_raylet_remarks_are_still_switched_off_by_this_name() -> None:
    """A private name of Ray: if it goes, a restart would write on stdout."""
    assert "if not _worker_logs_enabled" in inspect.getsource(ray_worker.print_worker_logs)


@pytest.mark.ray
def test_bad_input_arrives_as_it_was_raised(start: Callable[..., Actor]) -> None:
    with pytest.raises(UserError) as caught:
        wait([start("bad").beat()], 60)
    assert str(caught.value) == "parrot.word: bad is no word; use another"
    with pytest.raises(UserError) as caught:
        wait([start(run="other").call("refuse")], 60)
    assert str(caught.value) == "parrot.seed: none left; buy some"


@pytest.mark.ray
def test_failure_names_actor_method_cause_and_log(start: Callable[..., Actor]) -> None:
    actor = start()
    expected = r"parrot-0 failed in `fail`: ValueError: no seed left; its log is .*parrot-0\.log"
    with pytest.raises(InfrastructureError, match=expected):
        wait([actor.call("fail")], 60)


@pytest.mark.ray
def test_waiting_ends(start: Callable[..., Actor]) -> None:
    actor = start()
    wait([actor.beat()], 60)
    with pytest.raises(InfrastructureError, match="parrot-0 did not finish `sleep` within 0.5 s"):
        wait([actor.call("sleep", 30)], 0.5)


@pytest.mark.ray
def test_death_without_restart(start: Callable[..., Actor]) -> None:
    actor = start()
    pid = wait([actor.beat()], 60)[0].pid
    call = actor.call("sleep", 30)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(InfrastructureError, match="parrot-0 failed in `sleep`.*parrot-0.log"):
        wait([call], 60)


@pytest.mark.ray
def test_a_heartbeat_comes_beside_the_work_and_stops_with_the_process(
    start: Callable[..., Actor],
) -> None:
    worker = Remote(start())
    beat = worker.beat().result(60)
    assert psutil.Process(beat.pid).is_running()
    work = worker.call("sleep", 1.0)
    assert worker.beat().result(60) == beat
    assert not work.done()
    assert work.result(60) == 1.0
    os.kill(beat.pid, signal.SIGSTOP)
    silent = worker.beat()
    with pytest.raises(TimeoutError):
        silent.result(1.0)
    worker.kill()
    with pytest.raises(WorkerFailed, match="parrot-0 failed in `beat`") as caught:
        silent.result(60)
    assert caught.value.died
    psutil.wait_procs([psutil.Process(beat.pid)] if psutil.pid_exists(beat.pid) else [], 30)
    assert not psutil.pid_exists(beat.pid)


@pytest.mark.ray
def test_a_failure_brings_its_traceback_and_a_death_the_end_of_the_log(
    start: Callable[..., Actor],
) -> None:
    worker = Remote(start("last words"))
    with pytest.raises(WorkerFailed) as caught:
        worker.call("fail").result(60)
    assert "Traceback" in caught.value.details or "in fail" in caught.value.details
    assert not caught.value.died
    worker.call("say").result(60)
    work, pid = worker.call("sleep", 30.0), worker.beat().result(60).pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerFailed) as caught:
        work.result(60)
    assert caught.value.died
    assert caught.value.details.endswith("saying last words")


@pytest.mark.ray
def test_environment_of_an_actor(
    start: Callable[..., Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = wait([start(secrets=False, threads=3).call("environment")], 60)[0]
    assert "WANDB_API_KEY" not in found
    assert found["CUDA_VISIBLE_DEVICES"] == ""
    assert found["OMP_NUM_THREADS"] == "3"


@pytest.mark.ray
def test_finding_by_name(start: Callable[..., Actor], tmp_path: Path) -> None:
    actor = start("polly")
    wait([actor.beat()], 60)
    assert wait([find(tmp_path.name, "parrot-0", actor.log).call("say")], 60) == ["polly"]
    with pytest.raises(InfrastructureError, match="parrot-9 is gone"):
        find(tmp_path.name, "parrot-9", actor.log)


@pytest.mark.ray
def test_impossible_placement(ray_started: None) -> None:
    check_fits([Want("rollout", 1, {"CPU": 0.5}), Want("learner", 1, {"CPU": 0.5})])
    expected = r"cluster\.rollout: asks for 1 x \(CPU 1e\+06\), at most 0 fit: .* has CPU"
    with pytest.raises(UserError, match=expected):
        check_fits([Want("rollout", 1, {"CPU": 1e6})])
    with pytest.raises(UserError, match=r"labelled zone=moon, at most 0 fit: .*zone=-"):
        check_fits([Want("rollout", 1, {"CPU": 0.1}, {"zone": "moon"})])


@pytest.mark.ray
def test_room_that_is_not_there_ends_the_wait_and_leaves_no_group(ray_started: None) -> None:
    want = Want("learner", 2, {"CPU": 1.0, "telescope": 1.0})
    with pytest.raises(InfrastructureError, match=r"no room for 2 x .*pack.* within 1 s"):
        Reservation("no-room", want, "pack", 1.0)
    deadline = time.monotonic() + 30
    while _groups("no-room") != {"REMOVED"} and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _groups("no-room") == {"REMOVED"}


@pytest.mark.ray
def test_a_full_cluster_has_room_for_who_needs_nothing(start: Callable[..., Actor]) -> None:
    everything = start(num_cpus=ray.available_resources()["CPU"])
    assert wait([everything.call("say")], 60) == ["hello"]
    Reservation("nothing", Want("learner", 2, {"CPU": 0.0}), "pack", 20.0).release()
    everything.kill()


@pytest.mark.ray
def test_others_are_asked_to_make_room(start: Callable[..., Actor]) -> None:
    cpus = ray.cluster_resources()["CPU"]
    other, asked = start(num_cpus=0.75 * cpus), []

    def make_room() -> None:
        asked.append(True)
        other.kill()

    assert wait([other.call("say")], 60) == ["hello"]
    Reservation("half", Want("learner", 1, {"CPU": cpus / 2}), "pack", 60.0, make_room).release()
    assert asked == [True]
    Reservation("again", Want("learner", 1, {"CPU": cpus / 2}), "pack", 60.0, make_room).release()
    assert asked == [True]  # nobody is asked for what is free


def _groups(name: str) -> set[str]:
    table = ray.util.placement_group_table().values()
    return {group["state"] for group in table if group["name"] == name}


TWO_NODES = """
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from common.errors import UserError
from workers.fitting import Want
from workers.nodes import Reservation, check_fits
from workers.placement import launch, wait

folder = Path(sys.argv[1])
node = {"num_cpus": 4, "object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=node)
other = cluster.add_node(**node, labels={"pool": "training"})
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")


class Where:
    def node(self):
        return ray.get_runtime_context().get_node_id()


def nodes_of(strategy, labels=None):
    want = Want("learner", 2, {"CPU": 1.0}, labels or {}, strategy == "strict_spread")
    check_fits([want])
    room = Reservation(f"gang-{strategy}-{bool(labels)}", want, strategy, 60)
    name = f"{strategy}-{bool(labels)}"
    actors = [
        launch(f"{name}-{i}", folder / f"{name}-{i}.log", Where, run="r", num_cpus=1.0, local=True,
               place=room.place(i))
        for i in range(2)
    ]
    found = wait([actor.call("node") for actor in actors], 100)
    room.release()  # and with it the actors
    return found


assert len(set(nodes_of("pack"))) == 1
assert len(set(nodes_of("spread"))) == 2
assert len(set(nodes_of("strict_spread"))) == 2
assert set(nodes_of("pack", {"pool": "training"})) == {other.node_id}
try:
    check_fits([Want("learner", 3, {"CPU": 1.0}, {}, True)])
    raise SystemExit("three ranks cannot have a node each here")
except UserError as error:
    assert "learner" in str(error), error
left = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
assert left == [], left
ray.shutdown()
cluster.shutdown()
print("placed")
"""


@pytest.mark.slow
def test_gangs_on_two_nodes(run_script: Callable[..., Any], tmp_path: Path) -> None:
    """Packed on one, spread over both, bound to a label; each rank where its bundle is."""
    found = run_script(TWO_NODES, tmp_path)
    assert found.stdout.strip().endswith("placed"), found.stdout + found.stderr

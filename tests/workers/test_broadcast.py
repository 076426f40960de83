"""The broadcast beside the pull store: equal bytes, changing membership, deaths, bounded waits.

Members are threads, each with a store object and a process group of its own, or, to be killed or
stopped, a process. `test_cluster.py` does the same over Ray.
"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InfrastructureError
from workers.broadcast import ALIGNMENT, BroadcastWeightStore, Group, Patience, _backend, _places
from workers.roster import Plan, Roster
from workers.weights import LocalWeightStore
from workers.wire import Bucket, cut

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = Patience(join_s=4.0, bucket_s=3.0, whole_s=20.0)
State = dict[str, torch.Tensor]


def state_of(version: int) -> State:
    generator = torch.Generator().manual_seed(version)
    return {
        "a": torch.randn(5, generator=generator).bfloat16(),
        "big": torch.randn(40, 5, generator=generator),
        "b": torch.randn(3, generator=generator),
    }


def buckets_of(version: int) -> Iterator[Bucket]:
    return cut([state_of(version)], max_bytes=256)


def rebuilt(buckets: Iterator[Bucket]) -> State:
    """Copied at once, as `load_into` does: a bucket is good until the next."""
    parts: dict[str, list[torch.Tensor]] = {}
    for bucket in buckets:
        for piece in bucket.pieces:
            parts.setdefault(piece.name, []).append(piece.values.clone())
    return {name: torch.cat(values) for name, values in parts.items()}


def assert_is(version: int, found: State) -> None:
    expected = state_of(version)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.flatten()), name


class CountingStore(LocalWeightStore):
    """Knows how often it was pulled from."""

    pulls = 0

    def fetch(self, version: int | None = None) -> tuple[int, Iterator[Bucket]]:
        self.pulls += 1
        return super().fetch(version)


class Scene:
    """One pull store, one roster, a publisher and members."""

    def __init__(self) -> None:
        self.pull = CountingStore()
        self.roster = Roster()
        self.pool = ThreadPoolExecutor(8)
        self.publisher = self.store()

    def ask(self, method: str, *args: Any) -> Any:
        return getattr(self.roster, method)(*args)

    def store(self, patience: Patience = PATIENCE) -> BroadcastWeightStore:
        return BroadcastWeightStore(self.pull, self.ask, patience)

    def member(self) -> BroadcastWeightStore:
        store = self.store()
        store.enrol()
        return store

    def receive(self, store: BroadcastWeightStore, version: int) -> "Future[State]":
        return self.pool.submit(lambda: rebuilt(store.fetch(version)[1]))

    def round(self, members: list[BroadcastWeightStore], version: int) -> None:
        """Publish to `members`; all must end with the version."""
        futures = [self.receive(member, version) for member in members]
        self.publisher.publish(version, buckets_of(version))
        for future in futures:
            assert_is(version, future.result(30))

    def generation(self, version: int) -> int:
        plan = self.roster.plan(version)
        assert plan is not None
        return plan.generation


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.pool.shutdown(wait=True)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Every wait is bounded; a hang would hang the tests."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(seconds)


def test_both_implementations_give_the_same_bytes(scene: Scene) -> None:
    members = [scene.member(), scene.member()]
    for version in (1, 2, 3):
        scene.round(members, version)
        assert_is(version, rebuilt(scene.pull.fetch(version)[1]))
        scene.pull.pulls -= 1
    assert scene.pull.pulls == 0  # the members had everything from the broadcast
    assert scene.generation(1) == scene.generation(3)  # and the group was made once


def test_without_members_everybody_pulls(scene: Scene) -> None:
    started = time.monotonic()
    scene.publisher.publish(1, buckets_of(1))
    assert time.monotonic() - started < PATIENCE.join_s
    late = scene.member()
    version, buckets = late.fetch()
    assert version == 1
    assert_is(1, rebuilt(buckets))


def test_a_worker_that_joins_in_the_middle_pulls_then_receives(scene: Scene) -> None:
    first, late = scene.member(), scene.store()
    joined: list[Future[State]] = []

    def joining() -> Iterator[Bucket]:
        for number, bucket in enumerate(buckets_of(1)):
            yield bucket
            if number == 1:
                joined.append(scene.receive(late, 1))

    received = scene.receive(first, 1)
    scene.publisher.publish(1, joining())
    assert_is(1, received.result(30))
    assert_is(1, joined[0].result(30))
    assert scene.pull.pulls == 1
    scene.round([first, late], 2)
    assert scene.pull.pulls == 1
    assert scene.generation(2) > scene.generation(1)


def test_a_worker_that_does_not_come_is_waited_for_once(scene: Scene) -> None:
    scene.publisher = scene.store(Patience(join_s=0.5, bucket_s=3.0, whole_s=20.0))
    here, absent = scene.member(), scene.member()
    scene.round([here], 1)
    plan = scene.roster.plan(1)
    assert plan is not None and len(plan.members) == 1
    assert scene.roster.call_roll(9)[1] == set(plan.members)  # nobody waits for it again
    assert_is(1, rebuilt(absent.fetch()[1]))
    scene.round([here, absent], 2)
    assert scene.pull.pulls == 1


def vanish(store: BroadcastWeightStore, version: int, how: str) -> None:
    """Take two buckets, then be gone (connections close) or hang (they stay, silent)."""
    buckets = store.fetch(version)[1]
    next(buckets), next(buckets)
    if how == "dies":
        assert store._group is not None
        store._group.abort()
    vanished.append(buckets)  # a generator that is freed would leave in good order


vanished: list[Iterator[Bucket]] = []


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_member_gone_in_the_middle_stops_nobody(scene: Scene, how: str) -> None:
    alive, gone = scene.member(), scene.member()
    received, _ = scene.receive(alive, 1), scene.pool.submit(vanish, gone, 1, how)
    within(30, lambda: scene.publisher.publish(1, buckets_of(1)))
    assert_is(1, received.result(30))
    assert_is(1, rebuilt(scene.pull.fetch()[1]))
    # The next version goes to a new group, without waiting for the dead.
    started = time.monotonic()
    within(30, lambda: scene.round([alive], 2))
    assert time.monotonic() - started < PATIENCE.join_s
    plan = scene.roster.plan(2)
    assert plan is not None and len(plan.members) == 1
    assert plan.generation > scene.generation(1)


class Door(BaseManager):
    """Lets another process ask the roster and the pull store of the test."""


RECEIVER = """
import os, sys
from multiprocessing.managers import BaseManager
from workers.broadcast import BroadcastWeightStore, Patience

class Door(BaseManager): ...
Door.register("pull")
Door.register("roster")
door = Door(("127.0.0.1", int(sys.argv[1])), authkey=b"test")
door.connect()
roster = door.roster()
ask = lambda method, *args: getattr(roster, method)(*args)
store = BroadcastWeightStore(door.pull(), ask, Patience(join_s=30, bucket_s=30, whole_s=30))
store.enrol()
buckets = store.fetch(1)[1]
next(buckets), next(buckets)
os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_process_stops_nobody(scene: Scene, sent: signal.Signals) -> None:
    scene.publisher = scene.store(Patience(join_s=60.0, bucket_s=3.0, whole_s=60.0))
    alive = scene.store(Patience(join_s=60.0, bucket_s=3.0, whole_s=60.0))
    alive.enrol()
    Door.register("pull", callable=lambda: scene.pull)
    Door.register("roster", callable=lambda: scene.roster)
    server = Door(("127.0.0.1", 0), authkey=b"test").get_server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    arguments = [str(server.address[1]), str(int(sent))]
    gone = subprocess.Popen([sys.executable, "-c", RECEIVER, *arguments], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while len(scene.roster._enrolled) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        received = scene.receive(alive, 1)
        within(90, lambda: scene.publisher.publish(1, buckets_of(1)))
        assert_is(1, received.result(60))
        plan = scene.roster.plan(1)
        assert plan is not None and len(plan.members) == 2
        within(30, lambda: scene.round([alive], 2))
    finally:
        gone.kill()
        gone.wait(10)


def test_publisher_dies_between_buckets(scene: Scene) -> None:
    scene.publisher.publish(1, buckets_of(1))

    def dying() -> Iterator[Bucket]:
        yield from list(buckets_of(2))[:2]
        raise KeyboardInterrupt("killed")

    member = scene.store(Patience(join_s=5.0, bucket_s=3.0, whole_s=1.0))
    member.enrol()
    received = scene.receive(member, 2)
    with pytest.raises(KeyboardInterrupt):
        scene.publisher.publish(2, dying())
    with pytest.raises(InfrastructureError, match="version 2 was not completed within 1 s"):
        received.result(30)
    assert_is(1, rebuilt(member.fetch()[1]))  # the old version is still whole
    # The next version goes to a new group, in which the member is.
    scene.publisher = scene.store()
    started = time.monotonic()
    scene.round([member], 3)
    assert time.monotonic() - started < PATIENCE.join_s
    assert scene.pull.pulls == 1


def test_a_successor_with_other_weights_under_the_same_number_is_noticed(scene: Scene) -> None:
    """The member must not go on with half of the one and half of the other."""

    def dying() -> Iterator[Bucket]:
        yield from list(buckets_of(2))[:2]
        raise KeyboardInterrupt("killed")

    received = scene.receive(scene.member(), 2)
    with pytest.raises(KeyboardInterrupt):
        scene.publisher.publish(2, dying())
    scene.pull.publish(2, buckets_of(5))
    with pytest.raises(InfrastructureError, match="version 2 is not what was broadcast"):
        received.result(30)


def test_never_announced(scene: Scene) -> None:
    store = scene.store(Patience(join_s=1.0, bucket_s=1.0, whole_s=0.3))
    with pytest.raises(InfrastructureError, match="version 6 was not announced within 0.3 s"):
        rebuilt(store.fetch(6)[1])


def test_a_bucket_damaged_on_the_way_is_pulled(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, count = Group.finish, 0

    def damaging(group: Group) -> None:
        nonlocal count
        finish(group)
        if threading.current_thread() is not threading.main_thread():
            count += 1
            if count == 2:
                group._buffer[0] ^= 1

    monkeypatch.setattr(Group, "finish", damaging)
    member = scene.member()
    scene.round([member], 1)
    assert scene.pull.pulls == 1
    scene.round([member], 2)
    assert scene.pull.pulls == 1


def test_a_fetch_during_a_publish_sees_the_old_version(scene: Scene) -> None:
    scene.publisher.publish(1, buckets_of(1))
    other = scene.store()

    def watched() -> Iterator[Bucket]:
        for bucket in buckets_of(2):
            yield bucket
            version, buckets = other.fetch()
            assert version == 1
            assert_is(1, rebuilt(buckets))

    scene.publisher.publish(2, watched())
    assert other.fetch()[0] == 2


def test_headers_of_old_versions_are_forgotten(scene: Scene) -> None:
    member = scene.member()
    keys = []
    for version in range(1, 6):
        scene.round([member], version)
        assert scene.publisher._group is not None
        keys.append(scene.publisher._group._store.num_keys())
    assert keys[-1] == keys[1]


def test_places_are_aligned() -> None:
    headers = [("a", (5,), 0, "bfloat16", 5), ("b", (3,), 0, "float32", 3)]
    assert _places(headers) == ([(0, 10), (16, 28)], 32)
    assert ALIGNMENT == 16


@pytest.mark.parametrize(
    ("gpus", "backend"),
    [
        (["x", "y", "z"], "nccl"),
        (["x", "y", "y"], "gloo"),  # two on one GPU: NCCL refuses
        (["x", None], "gloo"),
        ([None, None], "gloo"),
    ],
)
def test_nccl_needs_a_gpu_for_each(gpus: list[str | None], backend: str) -> None:
    assert _backend(gpus) == backend


def test_roll_of_a_version_that_is_published_again() -> None:
    roster = Roster()
    roster.enrol("m")
    roster.arrive(1, "m", None)
    generation, expected = roster.call_roll(1)
    assert (expected, roster.present(1)) == ({"m"}, {"m": None})
    roster.enrol("late")  # after the roll was called: nobody missed it
    roster.close(1, Plan(generation, "host:1", "gloo", ("m",)))
    again, expected = roster.call_roll(1)
    assert (again, expected) == (generation + 1, {"m", "late"})
    assert (roster.present(1), roster.plan(1)) == ({}, None)
    for version in range(2, 9):
        roster.call_roll(version)
    assert roster.plan(1) is None and list(roster._rolls) == [5, 6, 7, 8]

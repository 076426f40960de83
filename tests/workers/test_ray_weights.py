"""The store over Ray: versions, memory, damage, a publisher's death, one transfer per node."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from ray import cloudpickle
from ray._private.internal_api import node_stats

from common.errors import InfrastructureError, LearnerLost
from workers.placement import Actor, launch, ray, wait
from workers.ray_weights import WEIGHTS, RayWeightStore
from workers.shelf import WeightShelf
from workers.weights import INITIAL_VERSION
from workers.wire import Bucket, Piece, cut

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:The given NumPy array")]
MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]


def buckets(value: float, count: int = 3, mib: int = 1) -> Iterator[Bucket]:
    """`count` buckets of `mib` MiB of float32."""
    state = {f"w{i}": torch.full((mib * MIB // 4,), value + i) for i in range(count)}
    return cut([state], max_bytes=mib * MIB)


class Publisher:
    """A learner's part in publishing, in a process of its own."""

    def __init__(self, store: RayWeightStore) -> None:
        self._store = store

    def publish(self, version: int, value: float, count: int, mib: int, die_after: int = 0) -> int:
        def dying() -> Iterator[Bucket]:
            for number, bucket in enumerate(buckets(value, count, mib)):
                if die_after and number == die_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield bucket

        self._store.publish(version, dying())
        return version


class Reader:
    """A rollout worker's part."""

    def __init__(self, store: RayWeightStore) -> None:
        self._store = store

    def sums(self, version: int | None = None) -> tuple[int, list[float]]:
        found, reading = self._store.fetch(version)
        return found, [float(piece.values.double().sum()) for b in reading for piece in b.pieces]

    def first_bucket_is_mapped(self) -> bool:
        """Its bytes lie in shared memory: nothing was copied on the way here."""
        bucket = next(self._store.fetch()[1])
        address = bucket.pieces[0].values.data_ptr()
        maps = psutil.Process().memory_maps(grouped=False)
        ranges = [(m.addr.split("-"), m.path, m.perms) for m in maps]
        return any(
            int(low, 16) <= address < int(high, 16)
            for (low, high), path, perms in ranges
            if "s" in perms and path.startswith("/dev/shm")
        )


@pytest.fixture
def by_value() -> Iterator[None]:
    this = sys.modules[Publisher.__module__]
    cloudpickle.register_pickle_by_value(this)  # the actors cannot import this file
    yield
    cloudpickle.unregister_pickle_by_value(this)


@pytest.fixture
def start(ray_started: None, by_value: None, tmp_path: Path) -> Iterator[Callable[..., Actor]]:
    started: list[Actor] = []

    def make(name: str, build: Callable[[], Any]) -> Actor:
        options = {"run": tmp_path.name, "num_cpus": 0.0, "local": False}
        started.append(launch(name, tmp_path / f"{name}.log", build, **options))
        return started[-1]

    yield make
    for actor in started:
        ray.kill(actor.handle)


@pytest.fixture
def store(start: Callable[..., Actor], tmp_path: Path) -> RayWeightStore:
    shelf = start(WEIGHTS, partial(WeightShelf, 2, INITIAL_VERSION))
    return RayWeightStore(tmp_path.name, shelf.log, timeout_s=60)


def used_mib(node: dict[str, Any] | None = None) -> float:
    """What the object store of a node holds."""
    node = node or next(node for node in ray.nodes() if node["Alive"])
    reply = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
    return float(reply.store_stats.object_store_bytes_used) / MIB


def settles(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_versions(store: RayWeightStore) -> None:
    assert store.newest() == INITIAL_VERSION
    for version in (1, 2, 3):
        store.publish(version, buckets(float(version)))
    assert store.newest() == 3
    version, reading = store.fetch(2)
    for ours, theirs in zip(reading, buckets(2.0), strict=True):
        assert [piece.header for piece in ours.pieces] == [piece.header for piece in theirs.pieces]
        assert torch.equal(ours.pieces[0].values, theirs.pieces[0].values)
    assert version == 2
    assert store.digests(3) == [bucket.digest() for bucket in buckets(3.0)]
    with pytest.raises(InfrastructureError, match=r"no version 1; the store holds \[2, 3\]"):
        store.fetch(1)


def test_a_damaged_bucket_is_refused(store: RayWeightStore, start: Callable[..., Actor]) -> None:
    good, bad = (next(buckets(value)) for value in (1.0, 2.0))
    digests = [good.digest(), good.digest()]
    store._line.ask("publish", 4, [ray.put(good), ray.put(bad)], digests)
    reader = start("reader", partial(Reader, store))
    with pytest.raises(InfrastructureError, match="bucket 1 of version 4 arrived damaged"):
        wait([reader.call("sums")], 60)


def test_readers_map_what_the_publisher_wrote(
    store: RayWeightStore, start: Callable[..., Actor]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        store.publish(1, cut([{"w": torch.ones(MIB)}], dtype))
        reader = start(f"reader-{dtype}", partial(Reader, store))
        assert wait([reader.call("first_bucket_is_mapped")], 60) == [True]


def test_a_fetch_during_a_publish_sees_the_old_version(store: RayWeightStore) -> None:
    def watched() -> Iterator[Bucket]:
        for bucket in buckets(2.0):
            yield bucket
            found, reading = store.fetch()
            assert (found, float(next(reading).pieces[0].values[0])) == (1, 1.0)

    store.publish(1, buckets(1.0))
    store.publish(2, watched())
    assert store.fetch()[0] == 2


def test_old_versions_leave_the_object_store(
    store: RayWeightStore, start: Callable[..., Actor]
) -> None:
    publisher = start("publisher", partial(Publisher, store))
    reader = start("reader", partial(Reader, store))
    before = used_mib()
    for version in range(1, 21):
        wait([publisher.call("publish", version, float(version), 4, 2)], 60)
        found, sums = wait([reader.call("sums")], 60)[0]
        assert (found, sums[0]) == (version, version * 2 * MIB / 4)
        # Two versions of 8 MiB are kept. Ray frees in batches, once a second.
        if version % 5 == 0:
            assert settles(lambda: used_mib() - before < 17), (version, used_mib() - before)
    ray.kill(publisher.handle)
    assert settles(lambda: used_mib() - before < 1), used_mib() - before


def test_publisher_dies_between_buckets(store: RayWeightStore, start: Callable[..., Actor]) -> None:
    before = used_mib()
    store.publish(1, buckets(1.0))
    publisher = start("publisher", partial(Publisher, store))
    with pytest.raises(InfrastructureError, match="publisher failed in `publish`"):
        wait([publisher.call("publish", 2, 2.0, 6, 4, 3)], 60)
    # Nobody ever sees the half; its bytes go; the old version is whole.
    found, reading = store.fetch()
    assert (found, len(list(reading))) == (1, 3)
    del reading
    assert settles(lambda: used_mib() - before < 4), used_mib() - before
    # A version that was whole, but whose publisher is gone: said at once, by its number.
    second = start("publisher-2", partial(Publisher, store))
    wait([second.call("publish", 3, 3.0, 2, 4)], 60)
    ray.kill(second.handle)
    started = time.monotonic()

    def lost() -> bool:
        try:
            list(store.fetch(3)[1])
        except LearnerLost as error:
            return str(error) == (
                "weights: bucket 0 of version 3 is gone with the learner that published it"
            )
        return False

    assert settles(lost)
    assert time.monotonic() - started < 40


def test_every_wait_ends(ray_started: None, tmp_path: Path) -> None:
    nobody = RayWeightStore("no-such-run", tmp_path / "weights.log", timeout_s=1)
    with pytest.raises(InfrastructureError, match=r"weights is gone; its log is .*weights\.log"):
        nobody.fetch()


def test_piece_of_a_large_array_is_no_copy_of_the_whole() -> None:
    whole = torch.zeros(4 * MIB)
    piece = Piece("w", (4 * MIB,), 0, whole[:MIB])
    raw = piece.__reduce__()[1][1]
    assert isinstance(raw, np.ndarray)
    assert raw.nbytes == 4 * MIB


TWO_NODES = """
import sys, time
from functools import partial
from pathlib import Path

import ray
import torch
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster

from workers.placement import launch
from workers.ray_weights import WEIGHTS, RayWeightStore
from workers.shelf import WeightShelf
from workers.wire import cut

MIB = 2**20
folder = Path(sys.argv[1])
node = {"num_cpus": 2, "object_store_memory": 100 * MIB}
cluster = Cluster(initialize_head=True, head_node_args=node)
other = cluster.add_node(**node, resources={"other": 2})
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")


class Reader:
    def __init__(self, store):
        self.store = store

    def begin(self):
        self.begun = self.store.fetch()[1]
        next(self.begun)

    def read(self):
        buckets = self.store.fetch()[1]
        total = sum(float(piece.values[-1]) for bucket in buckets for piece in bucket.pieces)
        return total, ray.get_runtime_context().get_node_id()


def arrived():
    "MiB that ever came to the other node's store."
    [there] = [n for n in ray.nodes() if n["NodeID"] == other.node_id]
    stats = node_stats(there["NodeManagerAddress"], there["NodeManagerPort"], False).store_stats
    return stats.cumulative_created_bytes / MIB


build = partial(WeightShelf, 2, 0)
shelf = launch(WEIGHTS, folder / "w.log", build, run="r", num_cpus=0, local=True)
store = RayWeightStore("r", shelf.log, 60)
state = {f"w{i}": torch.full((2 * MIB,), i + 1.0) for i in range(5)}
store.publish(1, cut([state], None, 8 * MIB))
readers = [ray.remote(Reader).options(resources={"other": 1}).remote(store) for _ in range(2)]
# The next two buckets come while the first is being read, and no more.
ray.get(readers[0].begin.remote(), timeout=100)
deadline = time.monotonic() + 20
while arrived() < 24 and time.monotonic() < deadline:
    time.sleep(0.1)
time.sleep(0.5)
assert 24 <= arrived() < 32, arrived()
found = ray.get([reader.read.remote() for reader in readers], timeout=100)
assert found == [(15.0, other.node_id)] * 2, found
assert 40 <= arrived() < 48, arrived()
ray.shutdown()
cluster.shutdown()
print("one transfer")
"""


@pytest.mark.slow
def test_two_readers_on_another_node_cost_one_transfer(
    run_script: Callable[..., Any], tmp_path: Path
) -> None:
    found = run_script(TWO_NODES, tmp_path)
    assert found.stdout.strip().endswith("one transfer"), found.stdout + found.stderr

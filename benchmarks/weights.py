"""From the learner into the models of the receivers, beside a plain memcpy of the same bytes.

`python benchmarks/weights.py [--json] [--sizes 0.25,1,3] [--receivers 1,2,4] [--rounds 5]`

One node; publisher and receivers are processes with one torch thread each. A receiver fetches,
checks and loads every bucket into its model; the reference is the same number of bytes copied from
private memory into the same model, by the same processes at the same time. `sync` is from the start
of the publish until the last receiver has loaded. Sources repeat 256 MiB and models lie in 1 GiB:
more than any cache, and four receivers of 3 GB fit into a laptop. Medians; rounds whose publish
writes to pages of the object store that nobody touched before are dropped, as a run has few.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder

import psutil  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.lib.record import Row, better, report  # noqa: E402
from models.engine import BUCKET_BYTES  # noqa: E402
from workers.broadcast import BroadcastWeightStore, Patience  # noqa: E402
from workers.placement import Actor, launch, ray, wait  # noqa: E402
from workers.ray_weights import WEIGHTS, Line, RayWeightStore  # noqa: E402
from workers.roster import Roster  # noqa: E402
from workers.shelf import WeightShelf  # noqa: E402
from workers.weights import INITIAL_VERSION, WeightStore  # noqa: E402
from workers.wire import Bucket, cut, load_into  # noqa: E402

MATRIX = 16 * 2**20  # bytes of one parameter: 4 Mi float32
SOURCE, MODEL = 256 * 2**20, 2**30
TIMEOUT_S = 300.0
KEPT = 2  # versions in the object store: one served, one being written
WARM_UP = KEPT + 1
RELEASE_S = 1.5  # Ray frees in batches, once a second; a training step takes longer


def arena(nbytes: int, count: int) -> list[Tensor]:
    """`count` float32 matrices of `MATRIX` bytes that share `nbytes` of touched memory."""
    memory = torch.ones(nbytes // 4).view(-1, MATRIX // 4)
    return [memory[index % len(memory)].view(2048, -1) for index in range(count)]


class Process:
    """A publisher or a receiver of a model of `count` matrices."""

    def __init__(self, store: WeightStore, count: int, receives: bool) -> None:
        self._store = store
        self._source = arena(SOURCE, count)
        self._model = nn.Module()
        if receives:
            for index, matrix in enumerate(arena(MODEL, count)):
                self._model.register_parameter(f"w{index}", nn.Parameter(matrix))
            store.enrol()

    def publish(self, version: int) -> float:
        """Seconds."""
        return timed(lambda: self._store.publish(version, cut(self._engine())))

    def _engine(self) -> Iterator[dict[str, Tensor]]:
        """What `models.engine` yields, its export (a copy off the GPU) left out."""
        size = BUCKET_BYTES // MATRIX
        named = [(f"w{index}", matrix) for index, matrix in enumerate(self._source)]
        for start in range(0, len(named), size):
            yield dict(named[start : start + size])

    def receive(self, version: int) -> float:
        """Seconds."""
        return timed(lambda: load_into(self._model, self._store.fetch(version)[1]))

    @torch.no_grad()
    def memcpy(self) -> float:
        """Seconds that copying the same bytes takes, with nothing else."""
        pairs = list(zip(self._model.parameters(), self._source, strict=True))
        return timed(lambda: [into.copy_(source) for into, source in pairs])


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Node:
    """Ray on this machine, for one size and number of receivers."""

    def __init__(self, kind: str, count: int, receivers: int) -> None:
        version = count * MATRIX
        ray.init(
            address="local",
            num_cpus=max(4, receivers),
            include_dashboard=False,
            object_store_memory=KEPT * version + 2**28,
            log_to_driver=False,
            logging_level="ERROR",
        )
        self._logs = tempfile.TemporaryDirectory(prefix="weights-")
        self._actors: list[Actor] = []  # an actor ends with its last handle
        shelf = self._start(WEIGHTS, partial(WeightShelf, 1, INITIAL_VERSION))
        store: WeightStore = RayWeightStore("bench", shelf.log, TIMEOUT_S)
        if kind == "broadcast":
            line = Line("bench", "roster", self._start("roster", Roster).log, TIMEOUT_S)
            store = BroadcastWeightStore(
                RayWeightStore("bench", shelf.log, TIMEOUT_S), line.ask, Patience()
            )
        self.publisher = self._start("publisher", partial(Process, store, count, False))
        self.receivers = [
            self._start(f"receiver-{i}", partial(Process, store, count, True))
            for i in range(receivers)
        ]
        wait([actor.beat() for actor in self._actors], TIMEOUT_S)

    def _start(self, name: str, build: Callable[[], Any]) -> Actor:
        log = Path(self._logs.name) / f"{name}.log"
        self._actors.append(launch(name, log, build, run="bench", num_cpus=0.0, local=True))
        return self._actors[-1]

    def round(self, version: int, at_once: bool) -> dict[str, float]:
        """Seconds of one publish, one receive by all, one memcpy by all; the slowest of each."""

        def on_all(method: str, *args: Any) -> list[Any]:
            return [actor.call(method, *args) for actor in self.receivers]

        time.sleep(RELEASE_S)
        start = time.perf_counter()
        if at_once:  # receivers take part in the publishing
            calls = [self.publisher.call("publish", version), *on_all("receive", version)]
            publish, *receive = wait(calls, TIMEOUT_S)
        else:
            [publish] = wait([self.publisher.call("publish", version)], TIMEOUT_S)
            receive = wait(on_all("receive", version), TIMEOUT_S)
        sync = time.perf_counter() - start
        memcpy = wait(on_all("memcpy"), TIMEOUT_S)
        return {
            "publish": publish,
            "receive": max(receive),
            "sync": sync,
            "memcpy": max(memcpy),
        }


def measure(kind: str, gigabytes: float, receivers: int, rounds: int) -> list[Row]:
    """One case: rows of publish, receive and sync."""
    count = int(gigabytes * 1e9) // MATRIX
    try:
        node = Node(kind, count, receivers)
        versions = range(1, WARM_UP + rounds + 1)
        found = [node.round(version, kind == "broadcast") for version in versions][WARM_UP:]
    finally:
        ray.shutdown()
    middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
    case = f"{kind} {gigabytes:g} GB to {receivers}"
    return [
        better(case, metric, "s", middle[metric], middle["memcpy"], lower=True)
        for metric in ("publish", "receive", "sync")
    ]


def checksum_row() -> Row:
    """Our checksum of a bucket beside CRC-32, GB/s of one thread."""
    tensors = arena(BUCKET_BYTES, BUCKET_BYTES // MATRIX)
    [bucket] = cut([{str(index): value for index, value in enumerate(tensors)}])
    rate = {
        "ours": bucket.nbytes / 1e9 / min(timed(bucket.digest) for _ in range(5)),
        "crc": bucket.nbytes / 1e9 / min(timed(lambda: crc(bucket)) for _ in range(5)),
    }
    return better("checksum, and CRC-32", "rate", "GB/s", rate["ours"], rate["crc"])


def crc(bucket: Bucket) -> int:
    """CRC-32 of a bucket's bytes."""
    total = 0
    for piece in bucket.pieces:
        total = zlib.crc32(piece.raw.numpy().data, total)
    return total


def lacks_memory(gigabytes: float, receivers: int) -> str | None:
    """Why a case does not fit here; None if it does."""
    arenas = (receivers + 1) * SOURCE + receivers * MODEL
    wanted = KEPT * gigabytes * 1e9 + arenas + (receivers + 3) * 2.5e8
    free = psutil.virtual_memory().available
    if wanted < free:
        return None
    return f"needs {wanted / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"


def main() -> None:
    """Print a table, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sizes", default="0.25,1,3", help="GB of one version")
    parser.add_argument("--receivers", default="1,2,4")
    parser.add_argument("--stores", default="object_store,broadcast")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, absent = [checksum_row()], {}
    for kind in options.stores.split(","):
        for size in map(float, options.sizes.split(",")):
            for receivers in map(int, options.receivers.split(",")):
                reason = lacks_memory(size, receivers)
                if reason:
                    absent[f"{kind} {size:g} GB to {receivers}"] = reason
                else:
                    rows += measure(kind, size, receivers, options.rounds)
    load = f"load {os.getloadavg()[0]:.1f} at the end"
    note = "the reference is a memcpy"
    report("weights", rows, options.json, machine=load, note=note, absent=absent)


if __name__ == "__main__":
    main()

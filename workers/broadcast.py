"""Weights sent to all receivers while they are published: NCCL between GPUs, else gloo. No Ray.

Behind the same interface as the pull stores, and on top of one: every bucket is also stored there.
So whoever missed the roll, joined in the middle, or was in a group that broke, pulls; and nothing
that happens to the group can fail a publish. A group is used as long as its members stay the same;
any change, and any doubt, makes a new one (`Plan.generation`).
"""

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import InfrastructureError
from workers.roster import Plan
from workers.weights import WeightStore
from workers.wire import Bucket, piece_of

log = logging.getLogger(__name__)
POLL_S, WORK_POLL_S = 0.02, 0.0005
# Pieces start at multiples of it in the buffer that is sent: any dtype may be viewed there.
ALIGNMENT = 16


class PullStore(WeightStore, Protocol):
    """A store to fall back on."""

    def digests(self, version: int) -> list[int]:
        """The checksums of a version's buckets. InfrastructureError: no such version any more."""
        ...


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Longest waits in seconds.

    join_s: for receivers at the roll, and for a group to form. bucket_s: for one bucket, its
    gathering included. whole_s: until a version is announced, or whole in the pull store.
    """

    join_s: float = 10.0
    bucket_s: float = 60.0
    whole_s: float = 600.0


def loopback() -> str:
    """The publisher's address where all receivers are on its machine."""
    return "127.0.0.1"


class BroadcastWeightStore:
    """A `WeightStore` that sends what it publishes. One thread at a time; may be pickled unused.

    Args:
        pull: where every version goes too.
        ask: calls a method of the run's `workers.roster.Roster`.
        host: the publisher's address, as receivers reach it.
    """

    def __init__(
        self,
        pull: PullStore,
        ask: Callable[..., Any],
        patience: Patience,
        host: Callable[[], str] = loopback,
    ) -> None:
        self._pull = pull
        self._ask = ask
        self._patience = patience
        self._host = host
        self._group: Group | None = None
        self._member = ""

    # The publisher's side

    def publish(self, version: int, buckets: Iterable[Bucket]) -> None:
        """See `WeightStore`. Waits `join_s` at most for receivers that do not come."""
        self._meet(version)
        whole = False
        try:
            self._pull.publish(version, self._sending(version, buckets))
            whole = True
        finally:
            if not whole:
                self._part()

    def _meet(self, version: int) -> None:
        generation, expected = self._ask("call_roll", version)
        deadline = time.monotonic() + self._patience.join_s
        present: dict[str, str | None] = self._ask("present", version)
        while not expected <= present.keys() and time.monotonic() < deadline:
            time.sleep(POLL_S)
            present = self._ask("present", version)
        if self._group is not None and set(self._group.plan.members) == present.keys():
            self._ask("close", version, self._group.plan)
            return
        self._part()
        members = tuple(sorted(present))
        if not members:
            self._ask("close", version, Plan(generation, "", "", ()))
            return
        host = self._host()
        store = dist.TCPStore(
            host, 0, None, True, timedelta(seconds=self._patience.join_s), wait_for_workers=False
        )
        backend = _backend([_gpu(), *present.values()])
        plan = Plan(generation, f"{host}:{store.port}", backend, members)
        self._ask("close", version, plan)
        with self._or_pull(version):
            self._group = Group(plan, 0, store, self._patience)

    def _sending(self, version: int, buckets: Iterable[Bucket]) -> Iterator[Bucket]:
        """The same buckets; each is stored by whoever takes it while it is being sent."""
        count = 0
        for bucket in buckets:
            with self._or_pull(version):
                if self._group is not None:
                    self._group.send(version, count, bucket)
            yield bucket
            with self._or_pull(version):
                if self._group is not None:
                    self._group.finish()
            count += 1
        with self._or_pull(version):
            if self._group is not None:
                self._group.end(version, count)

    @contextmanager
    def _or_pull(self, version: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what torch.distributed raises, whatever the cause
            log.warning("weights: the broadcast of version %d broke off: %s", version, error)
            self._part()

    def _part(self) -> None:
        """End the group, if there is one: its members notice at once and pull."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()
            self._ask("strike", group.plan.members)

    # The receivers' side

    def newest(self) -> int:
        """See `WeightStore`."""
        return self._pull.newest()

    def enrol(self) -> None:
        """See `WeightStore`. Whoever is enrolled and does not come costs the publisher a wait."""
        self._ask("enrol", self._name())

    def _name(self) -> str:
        if not self._member:
            self._member = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        return self._member

    def fetch(self, version: int | None = None) -> tuple[int, Iterator[Bucket]]:
        """See `WeightStore`. A version that is yet to come is waited for, and received."""
        if version is not None and self._pull.newest() < version:
            return version, self._receiving(version)
        self.enrol()
        return self._pull.fetch(version)

    def _receiving(self, version: int) -> Iterator[Bucket]:
        taken: list[int] = []
        whole = False
        try:
            group = self._join(version)
            while group is not None and (arrived := group.receive(version, len(taken))):
                bucket, digest = arrived
                taken.append(digest)
                yield bucket
            whole = group is not None
        except RuntimeError as error:
            log.warning("weights: version %d broke off, pulling it: %s", version, error)
        finally:
            if not whole:
                self._leave()
        self.enrol()
        self._await_whole(version)
        # Also the proof that what came is what was published, and not a dead publisher's.
        digests = self._pull.digests(version)
        if digests[: len(taken)] != taken or (whole and len(digests) != len(taken)):
            raise InfrastructureError(
                f"weights: version {version} is not what was broadcast (checksum)"
            )
        if not whole:
            yield from islice(self._pull.fetch(version)[1], len(taken), None)

    def _join(self, version: int) -> "Group | None":
        """The group that gets `version`; None if this process is not in it."""
        self._ask("arrive", version, self._name(), _gpu())
        plan: Plan | None = None
        deadline = time.monotonic() + self._patience.whole_s
        while (plan := self._ask("plan", version)) is None:
            if self._pull.newest() >= version:
                return None
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"weights: version {version} was not announced within "
                    f"{self._patience.whole_s:g} s"
                )
            time.sleep(POLL_S)
        if self._member not in plan.members:
            return None
        if self._group is None or self._group.plan.generation != plan.generation:
            host, _, port = plan.address.rpartition(":")
            timeout = timedelta(seconds=self._patience.join_s)
            store = dist.TCPStore(host, int(port), None, False, timeout)
            rank = plan.members.index(self._member) + 1
            self._group = Group(plan, rank, store, self._patience)
        return self._group

    def _leave(self) -> None:
        """Under a new name from now on, so that no old group can be taken for a whole one."""
        self._ask("strike", (self._member,))
        group, self._group, self._member = self._group, None, ""
        if group is not None:
            group.abort()

    def _await_whole(self, version: int) -> None:
        deadline = time.monotonic() + self._patience.whole_s
        while self._pull.newest() < version:
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"weights: version {version} was not completed within "
                    f"{self._patience.whole_s:g} s; its publisher may be dead"
                )
            time.sleep(POLL_S)


class Group:
    """A process group of one generation, apart from the learner's own. Errors are RuntimeErrors.

    Headers go through the TCP store, bytes through one collective per bucket. Building it waits for
    the other members; it must not outlive an error. NCCL has not been run here (no two GPUs); its
    first collective makes the communicator, a wait that NCCL and not `Patience` bounds.
    """

    def __init__(self, plan: Plan, rank: int, store: dist.TCPStore, patience: Patience) -> None:
        self.plan = plan
        self._store = store
        self._bucket_s = patience.bucket_s
        size = len(plan.members) + 1
        join = timedelta(seconds=patience.join_s)
        self._device = torch.device("cuda" if plan.backend == "nccl" else "cpu")
        self._backend: Any
        if plan.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            # Beyond our own limit: at its end NCCL's watchdog would end the process.
            options._timeout = timedelta(seconds=10 * self._bucket_s)
            self._backend = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._backend = dist.ProcessGroupGloo(store, rank, size, join)
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._work: Any = None
        self._keys: list[str] = []

    def send(self, version: int, number: int, bucket: Bucket) -> None:
        """Start to send a bucket; `finish` waits for it."""
        headers = [piece.header for piece in bucket.pieces]
        places, total = _places(headers)
        payload = self._room(total)
        for piece, (start, end) in zip(bucket.pieces, places, strict=True):
            payload[start:end].copy_(piece.raw)
        if number == 0:
            self._forget()
        self._say(version, number, [bucket.digest(), headers])
        self._start(payload)

    def end(self, version: int, count: int) -> None:
        """Say that `version` has `count` buckets and no more."""
        self._say(version, count, None)

    def receive(self, version: int, number: int) -> tuple[Bucket, int] | None:
        """The next bucket, good until the next call, and its checksum; None at the end."""
        key = f"{version}/{number}"
        self._store.wait([key], timedelta(seconds=self._bucket_s))
        said = json.loads(self._store.get(key))
        if said is None:
            return None
        digest, headers = said
        places, total = _places(headers)
        payload = self._room(total)
        self._start(payload)
        self.finish()
        bucket = Bucket(
            tuple(
                piece_of(header, payload[start:end])
                for header, (start, end) in zip(headers, places, strict=True)
            )
        )
        if bucket.digest() != digest:
            raise RuntimeError(f"bucket {number} of version {version} arrived damaged (checksum)")
        return bucket, digest

    def finish(self) -> None:
        """Wait for the collective under way. RuntimeError: a member is gone or too slow."""
        deadline = time.monotonic() + self._bucket_s
        while not self._work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer of a member within {self._bucket_s:g} s")
            time.sleep(WORK_POLL_S)
        self._work.wait()

    def abort(self) -> None:
        """Close all connections: whoever waits for this process gets an error now."""
        self._backend.abort()

    def _start(self, payload: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=self._bucket_s)
        self._work = self._backend.broadcast([payload], options)

    def _say(self, version: int, number: int, what: Any) -> None:
        key = f"{version}/{number}"
        self._store.set(key, json.dumps(what))
        self._keys.append(key)

    def _forget(self) -> None:
        """Headers of the version before: every member has read them, or is no member any more."""
        for key in self._keys:
            self._store.delete_key(key)
        self._keys = []

    def _room(self, size: int) -> Tensor:
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._buffer[:size]


def _places(headers: Sequence[Sequence[Any]]) -> tuple[list[tuple[int, int]], int]:
    """From where to where each piece lies in the buffer, in bytes, and the buffer's size."""
    places, offset = [], 0
    for _, _, _, dtype, count in headers:
        end = offset + count * getattr(torch, dtype).itemsize
        places.append((offset, end))
        offset = -(-end // ALIGNMENT) * ALIGNMENT
    return places, offset


def _gpu() -> str | None:
    """Which GPU this process computes on."""
    if not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _backend(gpus: Sequence[str | None]) -> str:
    """NCCL needs a GPU of its own for every member."""
    return "nccl" if None not in gpus and len(set(gpus)) == len(gpus) else "gloo"

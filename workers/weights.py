"""Versioned weights that workers pull: the interface of every store, and the store of one process.

A version is published once, bucket by bucket, and never changes; it is visible only when it is
whole. The last few are kept so that a reader that has just been told of one can still fetch it.
`workers.ray_weights` keeps them in Ray's object store, `workers.broadcast` sends them as well.
"""

import threading
from collections.abc import Iterable, Iterator
from typing import Protocol

from workers.shelf import WeightShelf
from workers.wire import Bucket, verified

KEEP_VERSIONS = 2
# The weights of the checkpoint folder that every worker starts from: never published.
INITIAL_VERSION = 0


class WeightStore(Protocol):
    """Where the learner puts weights and rollout workers find them."""

    def publish(self, version: int, buckets: Iterable[Bucket]) -> None:
        """Store a version. Holds one bucket at a time; an iterator that raises publishes nothing.

        Raises:
            InfrastructureError: the store did not answer in time; names the version.
        """
        ...

    def newest(self) -> int:
        """The last version published; `INITIAL_VERSION` before the first."""
        ...

    def fetch(self, version: int | None = None) -> tuple[int, Iterator[Bucket]]:
        """A version (None: the newest whole one) and its buckets, each checked as it is taken.

        A bucket is good until the next one is taken, and must not be written to. What has been
        fetched stays readable to its end, even if the store lets go of the version meanwhile.

        Raises:
            InfrastructureError: no such version any more, damaged bytes, or no answer in time;
                names the version. Also while the buckets are read.
            LearnerLost: the version went with its publisher; only another one can be had. Likewise.
        """
        ...

    def enrol(self) -> None:
        """Say that this process will fetch every version from now on; pull stores do not care."""
        ...


class LocalWeightStore:
    """The store of one process."""

    def __init__(self, keep: int = KEEP_VERSIONS) -> None:
        self._shelf = WeightShelf(keep, INITIAL_VERSION)
        self._lock = threading.Lock()

    def publish(self, version: int, buckets: Iterable[Bucket]) -> None:
        """See `WeightStore`."""
        there = list(buckets)
        digests = [bucket.digest() for bucket in there]
        with self._lock:
            self._shelf.publish(version, there, digests)

    def newest(self) -> int:
        """See `WeightStore`."""
        with self._lock:
            return self._shelf.newest()

    def fetch(self, version: int | None = None) -> tuple[int, Iterator[Bucket]]:
        """See `WeightStore`."""
        with self._lock:
            found, buckets, digests = self._shelf.fetch(version)
        return found, verified(found, buckets, digests)

    def digests(self, version: int) -> list[int]:
        """The checksums of a version's buckets. InfrastructureError: no such version any more."""
        with self._lock:
            return self._shelf.digests(version)

    def enrol(self) -> None:
        """See `WeightStore`."""

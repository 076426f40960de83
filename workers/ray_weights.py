"""Weights in Ray's object store, behind `workers.weights.WeightStore`. Not the broadcast.

Within a node every reader maps the same shared memory; a bucket crosses to another node once,
however many read it there. The bytes belong to the publisher's process and go when it does: its
successor publishes again before anybody is asked to serve.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InfrastructureError, LearnerLost
from workers.placement import (
    GetTimeoutError,
    ObjectFetchTimedOutError,
    ObjectLostError,
    RayError,
    find,
    ray,
    wait,
)
from workers.wire import Bucket, verified

WEIGHTS = "weights"
# So many transfers from another node are under way while one bucket is being copied.
AHEAD = 2


def node_address() -> str:
    """This node's address, as the others of the cluster reach it."""
    return str(ray.util.get_node_ip_address())


@dataclass(frozen=True)
class Line:
    """A way to ask a named actor of a run from any process of its cluster; may be pickled."""

    run: str
    name: str
    log: Path
    timeout_s: float

    def ask(self, method: str, *args: Any) -> Any:
        """The answer. InfrastructureError: the actor is gone, failed, or was too slow."""
        actor = find(self.run, self.name, self.log)
        return wait([actor.call(method, *args)], self.timeout_s)[0]


class RayWeightStore:
    """A `WeightStore` whose bytes lie in Ray's object store: shared memory within a node.

    Args:
        run, log: of the actor that keeps the `WeightShelf`.
        timeout_s: longest time for the whole of a fetch, and for any answer of the shelf.
    """

    def __init__(self, run: str, log: Path, timeout_s: float) -> None:
        self._line = Line(run, WEIGHTS, log, timeout_s)

    def publish(self, version: int, buckets: Iterable[Bucket]) -> None:
        """See `WeightStore`."""
        refs, digests = [], []
        for bucket in buckets:
            digests.append(bucket.digest())
            refs.append(ray.put(bucket))
        self._line.ask("publish", version, refs, digests)

    def newest(self) -> int:
        """See `WeightStore`."""
        version: int = self._line.ask("newest")
        return version

    def fetch(self, version: int | None = None) -> tuple[int, Iterator[Bucket]]:
        """See `WeightStore`."""
        found, refs, digests = self._line.ask("fetch", version)
        return found, verified(found, self._buckets(found, refs), digests)

    def digests(self, version: int) -> list[int]:
        """The checksums of a version's buckets. InfrastructureError: no such version any more."""
        found: list[int] = self._line.ask("digests", version)
        return found

    def enrol(self) -> None:
        """See `WeightStore`."""

    def _buckets(self, version: int, refs: Sequence[Any]) -> Iterator[Bucket]:
        deadline = time.monotonic() + self._line.timeout_s
        coming: dict[int, Any] = {}
        for number, ref in enumerate(refs):
            for later in range(number + 1, min(number + 1 + AHEAD, len(refs))):
                if later not in coming:
                    coming[later] = refs[later].future()
            left = max(0.0, deadline - time.monotonic())
            what = f"weights: bucket {number} of version {version}"
            try:
                bucket: Bucket = ray.get(ref, timeout=left)
            except (GetTimeoutError, ObjectFetchTimedOutError) as error:
                limit = f"{self._line.timeout_s:g} s (cluster.timeout_s)"
                raise InfrastructureError(f"{what} did not come within {limit}") from error
            except ObjectLostError as error:
                raise LearnerLost(f"{what} is gone with the learner that published it") from error
            except RayError as error:
                raise InfrastructureError(f"{what} did not come: {error}") from error
            coming.pop(number, None)
            yield bucket

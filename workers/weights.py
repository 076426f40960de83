"""Versioned weights that workers pull. Not who trains them, not how they cross machines.

A version is published once, whole, and never changes; the last few are kept so that a reader that
has just been told of one can still fetch it. `workers.cluster` has the same store over Ray.
"""

import threading
import zlib
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from common.errors import InfrastructureError
from workers.shelf import WeightShelf

KEEP_VERSIONS = 2
# The weights of the checkpoint folder that every worker starts from: never published.
INITIAL_VERSION = 0


class WeightStore(Protocol):
    """Where the learner puts weights and rollout workers find them."""

    def publish(self, version: int, buckets: Iterable[Mapping[str, Tensor]]) -> None:
        """Store a version from CPU tensors under HF names. Visible only once it is complete."""
        ...

    def newest(self) -> int:
        """The last version published; `INITIAL_VERSION` before the first."""
        ...

    def fetch(self, version: int | None = None) -> tuple[int, dict[str, Tensor]]:
        """A version (None: the newest) and its tensors, which the caller must not write to.

        Raises:
            InfrastructureError: no such version any more, or its bytes are damaged.
        """
        ...


class LocalWeightStore:
    """The store of one process."""

    def __init__(self, keep: int = KEEP_VERSIONS) -> None:
        self._shelf = WeightShelf(keep, INITIAL_VERSION)
        self._lock = threading.Lock()

    def publish(self, version: int, buckets: Iterable[Mapping[str, Tensor]]) -> None:
        """See `WeightStore`."""
        copies = list(buckets)
        with self._lock:
            self._shelf.publish(version, copies, 0)

    def newest(self) -> int:
        """See `WeightStore`."""
        with self._lock:
            return self._shelf.newest()

    def fetch(self, version: int | None = None) -> tuple[int, dict[str, Tensor]]:
        """See `WeightStore`."""
        with self._lock:
            found, buckets, _ = self._shelf.fetch(version)
        return found, {name: value for bucket in buckets for name, value in bucket.items()}


def checksum(state: Mapping[str, Tensor], start: int = 0) -> int:
    """CRC-32 over names and bytes, continued from `start`: one number for all buckets."""
    total = start
    for name, value in state.items():
        total = zlib.crc32(name.encode(), total)
        flat = value.detach().contiguous().view(-1).view(torch.uint8)
        total = zlib.crc32(flat.numpy().data, total)
    return total


@torch.no_grad()
def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` (HF names, tied weights once) into `model`, whatever its device and dtype.

    Raises:
        InfrastructureError: names or shapes differ: the learner trains another architecture.
    """
    parameters = dict(model.named_parameters())
    if parameters.keys() != state.keys():
        odd = sorted(parameters.keys() ^ state.keys())
        raise InfrastructureError(f"weights: {len(odd)} names differ, the first is {odd[0]}")
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise InfrastructureError(f"weights: {name} has another shape in the store")
        parameter.copy_(state[name])

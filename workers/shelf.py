"""The catalogue of published weights: versions, references to their bytes, checksums.

A plain class that becomes a small actor; the bytes lie elsewhere. It imports neither torch nor Ray,
so that the process which must outlive all others is also the lightest.
"""

from typing import Any

from common.errors import InfrastructureError


class WeightShelf:
    """Keeps the last `keep` versions; what it lets go of, Ray frees once nobody reads it."""

    def __init__(self, keep: int, initial_version: int) -> None:
        self._keep = keep
        self._initial = initial_version
        self._versions: dict[int, tuple[list[Any], list[int]]] = {}

    def publish(self, version: int, refs: list[Any], digests: list[int]) -> None:
        """Add a complete version: references to its buckets, and the checksum of each."""
        self._versions[version] = (refs, digests)
        for old in sorted(self._versions)[: -self._keep]:
            del self._versions[old]

    def newest(self) -> int:
        """The last version published; the initial one before the first."""
        return max(self._versions, default=self._initial)

    def fetch(self, version: int | None) -> tuple[int, list[Any], list[int]]:
        """Version (None: the newest), references and checksums.

        Raises:
            InfrastructureError: no such version any more.
        """
        wanted = self.newest() if version is None else version
        return wanted, *self._entry(wanted)

    def digests(self, version: int) -> list[int]:
        """The checksums of a version's buckets, in order; raises as `fetch`."""
        return self._entry(version)[1]

    def _entry(self, version: int) -> tuple[list[Any], list[int]]:
        if version not in self._versions:
            there = sorted(self._versions)
            raise InfrastructureError(f"weights: no version {version}; the store holds {there}")
        return self._versions[version]

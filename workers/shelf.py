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
        self._versions: dict[int, tuple[list[Any], int]] = {}

    def publish(self, version: int, refs: list[Any], total: int) -> None:
        """Add a complete version: references to its buckets, and their checksum."""
        self._versions[version] = (refs, total)
        for old in sorted(self._versions)[: -self._keep]:
            del self._versions[old]

    def newest(self) -> int:
        """The last version published; the initial one before the first."""
        return max(self._versions, default=self._initial)

    def fetch(self, version: int | None) -> tuple[int, list[Any], int]:
        """Version (None: the newest), references and checksum.

        Raises:
            InfrastructureError: no such version any more.
        """
        wanted = self.newest() if version is None else version
        if wanted not in self._versions:
            there = sorted(self._versions)
            raise InfrastructureError(f"weights: no version {wanted}; the store holds {there}")
        return wanted, *self._versions[wanted]

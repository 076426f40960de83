"""Weights as they travel: buckets of a bounded size, each with its checksum. Not where they lie.

A bucket is a list of flat pieces, so that one embedding of gigabytes crosses in many. Its bytes are
numpy's when it is serialised: Ray then writes them once into shared memory and every reader of the
node maps them, with no switch to set and in any dtype.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import InfrastructureError, UserError
from models.engine import BUCKET_BYTES


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + len(values)) of the parameter `name`, flattened.

    shape: of the whole parameter. values: 1-D, never written to by a reader.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor

    @property
    def header(self) -> tuple[str, tuple[int, ...], int, str, int]:
        """Everything but the bytes: name, shape, start, dtype, number of elements."""
        dtype = str(self.values.dtype).removeprefix("torch.")
        return self.name, self.shape, self.start, dtype, self.values.numel()

    @property
    def raw(self) -> Tensor:
        """The bytes: uint8, 1-D, a view."""
        return self.values.view(torch.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        return _thaw, (self.header, self.raw.cpu().numpy())


def _thaw(header: Sequence[Any], raw: np.ndarray) -> Piece:
    return piece_of(header, torch.from_numpy(raw))


def piece_of(header: Sequence[Any], raw: Tensor) -> Piece:
    """A piece whose bytes are the uint8 tensor `raw`, not copied."""
    name, shape, start, dtype, _ = header
    return Piece(name, tuple(shape), start, raw.view(getattr(torch, dtype)))


@dataclass(frozen=True)
class Bucket:
    """Pieces that are sent, checked and loaded together."""

    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(piece.raw.numel() for piece in self.pieces)

    def digest(self) -> int:
        """XXH3 (64 bits) of headers and bytes.

        Against accidents, not attackers. CRC-32 at 3.6 GB/s would cost a reader 3.5 times the copy
        itself; this runs faster than memory is copied (docs/RESULTS.md, Weights).
        """
        state = xxhash.xxh3_64()
        for piece in self.pieces:
            state.update(repr(piece.header).encode())
            state.update(piece.raw.cpu().numpy().data)
        return state.intdigest()


def cut(
    buckets: Iterable[Mapping[str, Tensor]],
    dtype: torch.dtype | None = None,
    max_bytes: int = BUCKET_BYTES,
) -> Iterator[Bucket]:
    """The engine's buckets as buckets of at most `max_bytes`, in `dtype` (None: as they are).

    Of everything but the bucket in hand it keeps nothing; an empty bucket gives none.
    """
    for bucket in buckets:
        pieces: list[Piece] = []
        room = max_bytes
        for piece in _pieces(bucket, dtype, max_bytes):
            size = piece.raw.numel()
            if pieces and size > room:
                yield Bucket(tuple(pieces))
                pieces, room = [], max_bytes
            pieces.append(piece)
            room -= size
        if pieces:
            yield Bucket(tuple(pieces))


def _pieces(
    bucket: Mapping[str, Tensor], dtype: torch.dtype | None, max_bytes: int
) -> Iterator[Piece]:
    for name, value in bucket.items():
        flat = value.detach().to(dtype or value.dtype).contiguous().view(-1)
        length = max(1, max_bytes // flat.element_size())
        for start in range(0, flat.numel(), length):
            yield Piece(name, tuple(value.shape), start, flat[start : start + length])


def verified(version: int, buckets: Iterable[Bucket], digests: Sequence[int]) -> Iterator[Bucket]:
    """The same buckets, each compared with its checksum before it is handed on.

    Raises:
        InfrastructureError: a bucket is damaged, or not the one that belongs there.
    """
    for number, (bucket, digest) in enumerate(zip(buckets, digests, strict=True)):
        if bucket.digest() != digest:
            raise InfrastructureError(
                f"weights: bucket {number} of version {version} arrived damaged (checksum)"
            )
        yield bucket


@torch.no_grad()
def load_into(model: nn.Module, buckets: Iterable[Bucket]) -> None:
    """Copy `buckets` (HF names, tied weights once) into `model`, whatever its device and dtype.

    One bucket at a time, so no second copy of the model exists. An error leaves `model` half
    written: do not use it before another version has been loaded whole.

    Raises:
        InfrastructureError: names or shapes differ (the learner trains another architecture), or
            the buckets break off.
    """
    parameters = dict(model.named_parameters())
    left = {name: parameter.numel() for name, parameter in parameters.items()}
    for bucket in buckets:
        for piece in bucket.pieces:
            parameter = parameters.get(piece.name)
            if parameter is None:
                raise InfrastructureError(f"weights: no parameter here is named {piece.name}")
            if tuple(parameter.shape) != piece.shape:
                raise InfrastructureError(f"weights: {piece.name} has another shape in the store")
            end = piece.start + piece.values.numel()
            parameter.view(-1)[piece.start : end].copy_(piece.values)
            left[piece.name] -= piece.values.numel()
    odd = [name for name, elements in left.items() if elements]
    if odd:
        raise InfrastructureError(f"weights: {len(odd)} parameters incomplete, first {odd[0]}")


def version_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of one version of the checkpoint in `folder`, sent in `dtype`.

    Raises:
        UserError: a file of weights that cannot be read.
    """
    elements = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                elements += sum(prod(file.get_slice(name).get_shape()) for name in names)
        except SafetensorError as error:
            raise UserError(f"{path}: cannot read the weights: {error}") from error
    return elements * dtype.itemsize

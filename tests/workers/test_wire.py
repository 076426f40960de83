"""Cutting, checksums, crossing a process border, loading into a model."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import InfrastructureError, UserError
from models.checkpoint import load_checkpoint
from workers.wire import Bucket, Piece, cut, load_into, verified, version_bytes


def outline(buckets: list[Bucket]) -> list[list[tuple[str, int, int]]]:
    return [[(p.name, p.start, p.values.numel()) for p in bucket.pieces] for bucket in buckets]


def test_a_bucket_has_a_limit_and_a_large_parameter_crosses_in_many() -> None:
    state = {"a": torch.arange(2.0), "big": torch.arange(10.0).view(2, 5), "b": torch.ones(1)}
    buckets = list(cut([state, {}, {"c": torch.ones(3)}], max_bytes=16))
    assert outline(buckets) == [
        [("a", 0, 2)],
        [("big", 0, 4)],
        [("big", 4, 4)],
        [("big", 8, 2), ("b", 0, 1)],
        [("c", 0, 3)],
    ]
    assert [bucket.nbytes for bucket in buckets] == [8, 16, 16, 12, 12]
    assert buckets[1].pieces[0].shape == (2, 5)
    assert buckets[3].pieces[0].values.tolist() == [8.0, 9.0]
    # Views: cutting copies nothing.
    assert buckets[1].pieces[0].values.data_ptr() == state["big"].data_ptr()


def test_bf16_on_the_wire_is_the_cast_of_fp32() -> None:
    value = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    [bucket] = cut([{"w": value}], torch.bfloat16)
    assert bucket.nbytes == 70
    assert torch.equal(bucket.pieces[0].values.view(7, 5), value.bfloat16())
    halves = list(cut([{"w": value}], torch.bfloat16, max_bytes=32))
    assert [b.nbytes for b in halves] == [32, 32, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_crossing_a_process_border_changes_nothing(dtype: torch.dtype) -> None:
    [bucket] = cut([{"w": torch.randn(3, 4), "b": torch.randn(5)}], dtype)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(bucket, protocol=5, buffer_callback=buffers.append)
    # The bytes of the weights stay out of the pickle: that is what readers map and do not copy.
    assert sum(buffer.raw().nbytes for buffer in buffers) == bucket.nbytes
    found = pickle.loads(data, buffers=buffers)
    assert found.digest() == bucket.digest()
    for ours, theirs in zip(found.pieces, bucket.pieces, strict=True):
        assert ours.header == theirs.header
        assert torch.equal(ours.values, theirs.values)
        assert ours.values.data_ptr() == theirs.values.data_ptr()


def test_digest_sees_every_name_shape_place_dtype_and_byte() -> None:
    def digest(name: str, shape: tuple[int, ...], start: int, values: torch.Tensor) -> int:
        return Bucket((Piece(name, shape, start, values),)).digest()

    ones = torch.ones(4)
    changed = ones.clone()
    changed[3] = 1.0000001
    found = [
        digest("w", (8,), 0, ones),
        digest("v", (8,), 0, ones),
        digest("w", (2, 4), 0, ones),
        digest("w", (8,), 4, ones),
        digest("w", (8,), 0, ones.view(torch.int32)),
        digest("w", (8,), 0, changed),
    ]
    assert len(set(found)) == len(found)
    assert digest("w", (8,), 0, ones.clone()) == found[0]


def test_a_missing_bucket_is_noticed() -> None:
    buckets = list(cut([{"a": torch.ones(2)}, {"b": torch.ones(2)}]))
    digests = [bucket.digest() for bucket in buckets]
    assert list(verified(3, buckets, digests)) == buckets
    with pytest.raises(InfrastructureError, match="bucket 0 of version 3 arrived damaged"):
        list(verified(3, buckets[::-1], digests))
    with pytest.raises(ValueError, match="longer"):
        list(verified(3, buckets[:1], digests))


def test_load_into_casts_and_keeps_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)
            self.b = self.a

    model = Tied().to(torch.bfloat16)
    state = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}
    load_into(model, cut([state], max_bytes=8))
    assert model.b.weight.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert model.b.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": torch.ones(2, 3)}, "1 parameters incomplete, first bias"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, "weight has another shape"),
        ({"wait": torch.ones(3, 2)}, "no parameter here is named wait"),
    ],
)
def test_weights_of_another_model(wrong: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InfrastructureError, match=message):
        load_into(nn.Linear(3, 2), cut([wrong]))


def test_loading_takes_the_next_bucket_only_when_the_last_is_in_the_model() -> None:
    model = nn.Linear(3, 2)

    def watched():
        for number, bucket in enumerate(cut([{"weight": torch.full((2, 3), 5.0)}], max_bytes=8)):
            if number:
                assert model.weight.flatten()[2 * number - 1] == 5.0
            yield bucket
        yield from cut([{"bias": torch.zeros(2)}])

    load_into(model, watched())
    assert model.weight.tolist() == [[5.0] * 3] * 2


def test_bytes_of_a_version(checkpoint_folder: Path) -> None:
    model = load_checkpoint(checkpoint_folder).denoiser.model
    elements = sum(parameter.numel() for parameter in model.parameters())
    assert version_bytes(checkpoint_folder, torch.float32) == 4 * elements
    assert version_bytes(checkpoint_folder, torch.bfloat16) == 2 * elements


def test_bytes_of_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot read the weights"):
        version_bytes(tmp_path, torch.float32)

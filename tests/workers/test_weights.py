"""The rules of a store, without Ray or a network."""

from collections.abc import Iterator

import pytest
import torch

from common.errors import InfrastructureError
from workers.weights import INITIAL_VERSION, LocalWeightStore
from workers.wire import Bucket, cut


def version(value: float) -> list[Bucket]:
    return list(cut([{"weight": torch.full((2, 3), value)}, {"bias": torch.full((2,), value)}]))


def found(buckets: Iterator[Bucket]) -> dict[str, list[float]]:
    return {piece.name: piece.values.tolist() for b in buckets for piece in b.pieces}


def test_newest_is_what_was_published_last() -> None:
    store = LocalWeightStore()
    assert store.newest() == INITIAL_VERSION
    store.publish(1, version(1.0))
    store.publish(2, version(2.0))
    assert store.newest() == 2
    newest, buckets = store.fetch()
    assert newest == 2
    assert found(buckets) == {"weight": [2.0] * 6, "bias": [2.0] * 2}
    assert found(store.fetch(1)[1])["bias"] == [1.0, 1.0]


def test_old_versions_are_let_go_but_not_under_a_reader() -> None:
    store = LocalWeightStore(keep=2)
    store.publish(1, version(1.0))
    _, reading = store.fetch(1)
    first = next(reading)
    store.publish(2, version(2.0))
    store.publish(3, version(3.0))
    with pytest.raises(InfrastructureError, match=r"no version 1; the store holds \[2, 3\]"):
        store.fetch(1)
    assert first.pieces[0].values.tolist() == [1.0] * 6
    assert found(reading) == {"bias": [1.0, 1.0]}


def test_a_version_that_breaks_off_is_never_visible() -> None:
    def broken() -> Iterator[Bucket]:
        yield version(2.0)[0]
        assert store.fetch()[0] == 1  # while it is published, the old one is the newest
        raise RuntimeError("a rank died")

    store = LocalWeightStore()
    store.publish(1, version(1.0))
    with pytest.raises(RuntimeError, match="a rank died"):
        store.publish(2, broken())
    assert store.newest() == 1
    assert found(store.fetch()[1])["weight"] == [1.0] * 6


def test_a_damaged_bucket_is_refused_before_it_is_handed_on() -> None:
    store = LocalWeightStore()
    buckets = version(1.0)
    store.publish(7, buckets)
    buckets[1].pieces[0].values.view(torch.uint8)[0] ^= 1
    _, reading = store.fetch()
    assert next(reading).pieces[0].name == "weight"
    with pytest.raises(InfrastructureError, match="bucket 1 of version 7 arrived damaged"):
        next(reading)

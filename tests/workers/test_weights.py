"""The store's rules, and copying weights into a model."""

import pytest
import torch
from torch import nn

from common.errors import InfrastructureError
from workers.weights import INITIAL_VERSION, LocalWeightStore, checksum, load_into


def state(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((2, 3), value), "bias": torch.full((2,), value)}


def test_newest_is_what_was_published_last() -> None:
    store = LocalWeightStore()
    assert store.newest() == INITIAL_VERSION
    store.publish(1, [state(1.0)])
    store.publish(2, [{"weight": torch.ones(2, 3)}, {"bias": torch.zeros(2)}])
    assert store.newest() == 2
    version, found = store.fetch()
    assert version == 2
    assert list(found) == ["weight", "bias"]
    assert store.fetch(1)[1]["bias"].tolist() == [1.0, 1.0]


def test_old_versions_are_let_go() -> None:
    store = LocalWeightStore(keep=2)
    for version in (1, 2, 3):
        store.publish(version, [state(version)])
    with pytest.raises(InfrastructureError, match=r"no version 1; the store holds \[2, 3\]"):
        store.fetch(1)


def test_a_version_that_breaks_off_is_never_visible() -> None:
    def broken():
        yield {"weight": torch.ones(2, 3)}
        raise RuntimeError("a rank died")

    store = LocalWeightStore()
    store.publish(1, [state(1.0)])
    with pytest.raises(RuntimeError):
        store.publish(2, broken())
    assert store.newest() == 1


def test_checksum_sees_names_bytes_and_dtypes_but_not_buckets() -> None:
    whole = checksum(state(1.0))
    assert whole == checksum({"bias": state(1.0)["bias"]}, checksum({"weight": torch.ones(2, 3)}))
    changed = state(1.0)
    changed["bias"][1] = 1.0000001
    assert checksum(changed) != whole
    renamed = {"weight": state(1.0)["weight"], "bios": state(1.0)["bias"]}
    assert checksum(renamed) != whole
    assert checksum({"w": torch.ones(2, dtype=torch.bfloat16)}) > 0


def test_load_into_casts_and_keeps_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)
            self.b = self.a

    model = Tied().to(torch.bfloat16)
    load_into(model, {"a.weight": torch.full((2, 3), 0.5), "a.bias": torch.zeros(2)})
    assert model.b.weight.tolist() == [[0.5] * 3] * 2
    assert model.b.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": torch.ones(2, 3)}, "the first is bias"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, "weight has another shape"),
    ],
)
def test_weights_of_another_model(wrong: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InfrastructureError, match=message):
        load_into(nn.Linear(3, 2), wrong)

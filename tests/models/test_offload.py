"""A visiting module: where its numbers are during and after the visit."""

import pytest
import torch
from torch import nn

import models.offload
from models.offload import visiting

CPU = torch.device("cpu")


def pair() -> nn.Sequential:
    """Two layers that share a weight, and a norm with buffers."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, nn.BatchNorm1d(3), second).requires_grad_(False)


def places(module: nn.Module) -> list[int]:
    return [value.data_ptr() for value in module.state_dict().values()]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that a CPU has not: what is brought there is a copy."""
    monkeypatch.setattr(models.offload, "_brought", lambda value, _: value.clone())


def test_everything_moves_and_nothing_is_copied_back(elsewhere: None) -> None:
    module = pair()
    before = places(module)
    with visiting(module, CPU) as guest:
        assert not set(places(guest)) & set(before)
        assert guest[0].weight is guest[2].weight
        guest[0].weight.zero_()
    assert places(module) == before
    assert module[0].weight.abs().min() > 0


def test_no_copy_where_it_lives_already() -> None:
    module = pair()
    before = places(module)
    with visiting(module, CPU) as guest:
        assert places(guest) == before


def test_it_comes_home_after_an_error(elsewhere: None) -> None:
    module = pair()
    before = places(module)
    with pytest.raises(RuntimeError, match="lost"), visiting(module, CPU):
        raise RuntimeError("lost")
    assert places(module) == before


@pytest.mark.gpu
def test_a_gpu_holds_it_only_meanwhile() -> None:
    module, device = pair(), torch.device("cuda")
    start = torch.cuda.memory_allocated()
    with visiting(module, device) as guest:
        assert {value.device.type for value in guest.state_dict().values()} == {"cuda"}
    assert torch.cuda.memory_allocated() == start
    assert module[0].weight.device == CPU

"""The key/value memory by itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from models.cache import SlotCache, affordable_slots, slot_bytes
from models.denoiser import Denoiser


def numbers(rows: int, start: int, count: int) -> Tensor:
    """[rows, 1 head, count, 1]: row r, token n holds 100 r + start + n."""
    values = 100 * torch.arange(rows)[:, None] + torch.arange(start, start + count)
    return values[:, None, :, None].float()


def put(
    cache: SlotCache,
    rows: slice | Tensor,
    places: list[list[int]],
    new: Tensor,
    seen: int | None,
    layer: int = 0,
) -> list[list[float]]:
    index = torch.arange(cache.slots)[rows]
    cache.aim(rows, index, torch.tensor(places), seen)
    keys, values = cache.update(new, -new, layer)
    assert torch.equal(keys, -values)
    return keys[:, 0, :, 0].tolist()


def test_places_are_written_again_in_every_pass() -> None:
    cache, all_rows = SlotCache(1, 6), slice(0, 1)
    assert put(cache, all_rows, [[0, 1, 2, 3]], numbers(1, 0, 4), 4) == [[0, 1, 2, 3]]
    assert put(cache, all_rows, [[2, 3]], numbers(1, 50, 2), 4) == [[0, 1, 50, 51]]
    assert put(cache, all_rows, [[4, 5]], numbers(1, 60, 2), 6) == [[0, 1, 50, 51, 60, 61]]


def test_rows_write_at_places_of_their_own_and_padding_goes_to_the_dump() -> None:
    cache = SlotCache(3, 4)
    places = [[0, 1], [2, cache.dump], [cache.dump, 3]]
    found = put(cache, slice(0, 3), places, numbers(3, 0, 2), 4)
    assert found == [[0, 1, 0, 0], [0, 0, 100, 0], [0, 0, 0, 201]]
    some = put(cache, torch.tensor([0, 2]), [[2], [0]], numbers(2, 7, 1), 4)
    assert some == [[0, 1, 7, 0], [107, 0, 0, 201]]


def test_layers_do_not_mix() -> None:
    cache, all_rows = SlotCache(1, 3), slice(0, 1)
    put(cache, all_rows, [[0, 1, 2]], numbers(1, 0, 3), 3, layer=0)
    put(cache, all_rows, [[0, 1, 2]], numbers(1, 10, 3), 3, layer=1)
    assert put(cache, all_rows, [[2]], numbers(1, 7, 1), 3, layer=0) == [[0, 1, 7]]
    assert put(cache, all_rows, [[2]], numbers(1, 8, 1), 3, layer=1) == [[10, 11, 8]]


def test_a_pass_from_the_start_of_its_rows_reads_what_it_brings() -> None:
    cache = SlotCache(2, 4)
    assert put(cache, torch.tensor([1]), [[0, 1]], numbers(1, 5, 2), None) == [[5, 6]]
    assert put(cache, slice(0, 2), [[0], [2]], numbers(2, 1, 1), 3) == [[1, 0, 0], [5, 6, 101]]


def test_slots_move() -> None:
    cache = SlotCache(3, 2)
    put(cache, slice(0, 3), [[0, 1]] * 3, numbers(3, 0, 2), 2)
    cache.move(torch.tensor([2]), torch.tensor([0]))
    again = put(cache, slice(0, 2), [[cache.dump]] * 2, numbers(2, 9, 1), 2)
    assert again == [[200, 201], [100, 101]]


def test_memory_by_hand(make_denoiser: Callable[..., Denoiser]) -> None:
    denoiser = make_denoiser()
    # 2 layers, keys and values, 2 heads of 8 numbers of 4 bytes; 9 places and the dump.
    each = 2 * 2 * 2 * 8 * 4 * 10
    config = denoiser.model.config
    assert slot_bytes(config, 9, itemsize=4) == each == 2 * slot_bytes(config, 9, itemsize=2)
    cache = SlotCache(1, 9)
    with torch.no_grad():
        cache.aim(slice(0, 1), torch.tensor([0]), torch.tensor([[0]]), 1)
        one = torch.ones(1, 1, dtype=torch.int64)
        denoiser.hidden(one, one, torch.ones(1, 1, 1, 1, dtype=torch.bool), cache)
    held = sum(m.numel() * m.element_size() for pair in cache._layers for m in pair)
    assert held == each
    assert affordable_slots(config, 9, 10_000, cache_mib=1, itemsize=4) == 2**20 // each
    assert affordable_slots(config, 9, 3, cache_mib=1, itemsize=4) == 3


def test_too_little_for_one_request(make_denoiser: Callable[..., Denoiser]) -> None:
    with pytest.raises(UserError, match=r"decoding.cache_mib 1: .* needs 2560256 bytes.* to 3 or"):
        affordable_slots(make_denoiser().model.config, 10_000, 4, cache_mib=1, itemsize=4)

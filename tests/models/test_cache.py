"""The key/value memory by itself."""

import torch
from torch import Tensor

from models.cache import BlockCache, prompt_positions


def numbers(rows: int, start: int, count: int) -> Tensor:
    """[rows, 1 head, count, 1]: row r, slot s holds 100 r + s."""
    values = 100 * torch.arange(rows)[:, None] + torch.arange(start, start + count)
    return values[:, None, :, None].float()


def stored(pair: tuple[Tensor, Tensor]) -> list[list[float]]:
    keys, values = pair
    assert torch.equal(keys, -values)
    return keys[:, 0, :, 0].tolist()


def put(cache: BlockCache, start: int, new: Tensor, layer: int = 0) -> list[list[float]]:
    cache.start = start
    return stored(cache.update(new, -new, layer))


def test_the_window_is_written_again_in_every_pass() -> None:
    cache = BlockCache(slots=6)
    assert put(cache, 0, numbers(1, 0, 4)) == [[0, 1, 2, 3]]
    assert put(cache, 2, numbers(1, 50, 2)) == [[0, 1, 50, 51]]  # over its own slots
    assert put(cache, 2, numbers(1, 60, 4)) == [[0, 1, 60, 61, 62, 63]]
    assert cache.get_seq_length() == 2


def test_layers_do_not_mix() -> None:
    cache = BlockCache(slots=3)
    put(cache, 0, numbers(1, 0, 3), layer=0)
    put(cache, 0, numbers(1, 10, 3), layer=1)
    assert put(cache, 2, numbers(1, 7, 1), layer=0) == [[0, 1, 7]]
    assert put(cache, 2, numbers(1, 8, 1), layer=1) == [[10, 11, 8]]


def test_finished_rows_are_dropped() -> None:
    cache = BlockCache(slots=3)
    put(cache, 0, numbers(3, 0, 2))
    cache.keep_rows(torch.tensor([0, 2]))
    assert put(cache, 2, numbers(2, 2, 1)) == [[0, 1, 2], [200, 201, 102]]


def test_positions_start_behind_the_pads() -> None:
    found = prompt_positions(torch.arange(2, 6), torch.tensor([0, 3]))
    assert found.tolist() == [[2, 3, 4, 5], [0, 0, 1, 2]]

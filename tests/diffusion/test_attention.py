"""Attention patterns drawn as matrices: row = query, column = key, # sees, . does not."""

import textwrap

import pytest
import torch
from torch import Tensor

from diffusion.attention import Pattern, block_index, first_place
from diffusion.layout import Sequence, build_rows


def picture(mask: Tensor) -> str:
    return "\n".join("".join(".#"[int(cell)] for cell in row) for row in mask)


def assert_drawn(mask: Tensor, expected: str) -> None:
    assert picture(mask) == textwrap.dedent(expected).strip()


def pattern(
    block: list[int],
    view: list[int] | None = None,
    document: list[int] | None = None,
    valid: list[int] | None = None,
) -> Tensor:
    def row(values: list[int] | None, default: int) -> Tensor:
        return torch.tensor([values if values is not None else [default] * len(block)])

    documents = None if document is None else torch.tensor([document])
    facts = Pattern(row(view, 0), torch.tensor([block]), documents, row(valid, 1).bool())
    return facts.dense()[0]


def test_causal_is_a_block_per_token() -> None:
    expected = """
        #...
        ##..
        ###.
        ####
        """
    assert_drawn(pattern(block=[0, 1, 2, 3]), expected)


def test_bidirectional_is_one_block() -> None:
    expected = """
        ###
        ###
        ###
        """
    assert_drawn(pattern(block=[0, 0, 0]), expected)


def test_block_causal_after_a_prompt_of_three() -> None:
    # Blocks of 2 counted from the prompt's end: p | p p | c c; the prompt's first is short.
    block = block_index(torch.arange(5), 3, 2)
    assert block.tolist() == [-2, -1, -1, 0, 0]
    expected = """
        #....
        ###..
        ###..
        #####
        #####
        """
    assert_drawn(pattern(block.tolist()), expected)


def test_noisy_then_clean() -> None:
    # [x_t ; x_0] of four tokens in blocks of two.
    expected = """
        ##......
        ##......
        ..####..
        ..####..
        ....##..
        ....##..
        ....####
        ....####
        """
    assert_drawn(pattern(block=[0, 0, 1, 1] * 2, view=[1] * 4 + [0] * 4), expected)


def test_two_views_share_one_clean_context() -> None:
    # p | c0 c1 | first view a0..a3 | second view b0..b3. The last block needs no clean copy.
    masks = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    rows = build_rows(
        [Sequence((9,), (3, 4, 5, 6), 4)], [masks], mask_token_id=0, block_size=2, logit_shift=False
    )
    expected = """
        #..........
        ###........
        ###........
        #..##......
        #..##......
        ###..##....
        ###..##....
        #......##..
        #......##..
        ###......##
        ###......##
        """
    assert_drawn(rows.attention_mask[0, 0], expected)


def test_packed_documents_do_not_see_each_other() -> None:
    # A: plain, two tokens. B: a prompt of one token and a block of two.
    expected = """
        ##...
        ##...
        ..#..
        ..###
        ..###
        """
    assert_drawn(pattern(block=[0, 0, -1, 0, 0], document=[0, 0, 1, 1, 1]), expected)


def test_packed_documents_mutually_visible() -> None:
    # The same row with blocks numbered along it: B sees all of A, A sees nothing of B.
    expected = """
        ##...
        ##...
        ###..
        #####
        #####
        """
    assert_drawn(pattern(block=[0, 0, 1, 2, 2]), expected)


def test_packed_noisy_then_clean_per_document() -> None:
    # A is one block of two tokens, B two blocks of one; x_t in front, x_0 behind.
    expected = """
        ##......
        ##......
        ..#.....
        ...#..#.
        ....##..
        ....##..
        ......#.
        ......##
        """
    mask = pattern(block=[0, 0, 0, 1] * 2, view=[1] * 4 + [0] * 4, document=[0, 0, 1, 1] * 2)
    assert_drawn(mask, expected)


def test_pads_see_and_are_seen_by_themselves_only() -> None:
    expected = """
        ##..
        ##..
        ..#.
        ...#
        """
    assert_drawn(pattern(block=[0, 0, 0, 0], valid=[1, 1, 0, 0]), expected)


def test_no_query_is_blind() -> None:
    """A row without any key is NaN in the softmax, and NaN leaks through masked keys."""
    mask = pattern(block=[3, 1, 2], view=[1, 2, 0], document=[0, 1, 2], valid=[0, 1, 0])
    assert mask.any(-1).all()


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("origin", [0, 1, 4, 6])
def test_block_index_is_floor_division(origin: int, block_size: int) -> None:
    found = block_index(torch.arange(12), origin, block_size).tolist()
    assert found == [(position - origin) // block_size for position in range(12)]
    assert found[origin] == 0 and (origin == 0 or found[origin - 1] == -1)


def test_the_first_place_of_a_completions_blocks() -> None:
    assert [first_place(n, 4, "prompt") for n in (0, 3, 4, 9)] == [0, 3, 4, 9]
    assert [first_place(n, 4, "sequence") for n in (0, 3, 4, 9)] == [0, 0, 4, 8]
    assert first_place(3, None, "prompt") == 3


def test_block_index_takes_one_origin_per_row() -> None:
    found = block_index(torch.arange(4).expand(2, 4), torch.tensor([[1], [2]]), 2)
    assert found.tolist() == [[-1, 0, 0, 1], [-1, -1, 0, 0]]

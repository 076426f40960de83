"""Rows of a forward pass, laid out by hand."""

import pytest
import torch
from torch import Tensor

from diffusion.layout import Sequence, TokenRows, build_rows, row_tokens

M = 0  # the mask token
SEQUENCE = Sequence(prompt_ids=(7, 8, 9), completion_ids=(1, 2, 3, 4, 5), supervised=4)
MASKS = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1]], dtype=torch.bool)


def build(shift: bool, block_size: int | None = 2, masks: Tensor = MASKS) -> TokenRows:
    return build_rows(
        [SEQUENCE], [masks], mask_token_id=M, block_size=block_size, logit_shift=shift
    )


def test_block_row_by_hand() -> None:
    rows = build(shift=False)
    # prompt, clean blocks that a later block may see (all but the last), then the views.
    expected = [7, 8, 9, 1, 2, 3, 4] + [M, M, M, M, M] + [M, 2, M, 4, M]
    assert rows.input_ids.tolist() == [expected]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6] + [3, 4, 5, 6, 7] * 2]
    # Views start at 7 and 12. Position 4 is the tail: hidden, but never scored.
    assert rows.select.tolist() == [7, 8, 9, 10] + [12, 14]
    assert rows.targets.tolist() == [1, 2, 3, 4] + [1, 3]


def test_block_row_with_shift_by_hand() -> None:
    rows = build(shift=True)
    # Inside a block: one place to the left, in the same view. A block's first token: the clean
    # token before the block, that is the prompt's last (2) and the completion's second (4).
    assert rows.select.tolist() == [2, 7, 4, 9] + [2, 4]
    assert rows.targets.tolist() == [1, 2, 3, 4] + [1, 3]


@pytest.mark.parametrize("shift", [False, True])
def test_block_row_from_the_sequences_start_by_hand(shift: bool) -> None:
    rows = build_rows(
        [SEQUENCE],
        [MASKS],
        mask_token_id=M,
        block_size=2,
        logit_shift=shift,
        block_origin="sequence",
    )
    # Blocks 7 8 | 9 1 | 2 3 | 4 5: token 9 is given, as it is in the clean copy and in every view.
    expected = [7, 8, 9, 1, 2, 3] + [9, M, M, M, M, M] + [9, M, 2, M, 4, M]
    assert rows.input_ids.tolist() == [expected]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 5] + [2, 3, 4, 5, 6, 7] * 2]
    assert rows.targets.tolist() == [1, 2, 3, 4] + [1, 3]
    # Views start at 6 and 12. Inside a block (1 behind the given 9; 3; the tail) one place to the
    # left in the view; 2 and 4 open their blocks: the clean tokens before them.
    expected = [6, 3, 8, 5] + [12, 14] if shift else [7, 8, 9, 10] + [13, 15]
    assert rows.select.tolist() == expected
    # The masked 1 sees the first block and, of its own, the given 9 of its own view.
    seen = rows.attention_mask[0, 0, 7].nonzero()[:, 0].tolist()
    assert seen == [0, 1, 6, 7]


@pytest.mark.parametrize("shift", [False, True])
def test_canvas_rows_by_hand(shift: bool) -> None:
    rows = build(shift, block_size=None)
    # One row per view; nothing is shared between them.
    assert rows.input_ids.tolist() == [[7, 8, 9, M, M, M, M, M], [7, 8, 9, M, 2, M, 4, M]]
    assert rows.position_ids.tolist() == [list(range(8))] * 2
    assert rows.attention_mask.all()
    assert rows.select.tolist() == [p - shift for p in [3, 4, 5, 6] + [8 + 3, 8 + 5]]
    assert rows.targets.tolist() == [1, 2, 3, 4] + [1, 3]


def test_short_rows_are_padded_on_the_right() -> None:
    short = Sequence(prompt_ids=(6,), completion_ids=(2, 3), supervised=2)
    masks = [torch.ones(1, 2, dtype=torch.bool), MASKS[:1]]
    rows = build_rows([short, SEQUENCE], masks, mask_token_id=M, block_size=2, logit_shift=False)
    assert rows.input_ids[0].tolist() == [6, M, M] + [0] * 9
    assert rows.select.tolist() == [1, 2] + [12 + 7, 12 + 8, 12 + 9, 12 + 10]
    pads = rows.attention_mask[0, 0, 3:]
    assert torch.equal(pads, torch.eye(12, dtype=torch.bool)[3:])
    assert not rows.attention_mask[0, 0, :3, 3:].any()


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8, None])
@pytest.mark.parametrize("views", [1, 3])
def test_row_tokens_is_what_a_row_costs(block_size: int | None, views: int) -> None:
    masks = torch.ones(views, 5, dtype=torch.bool)
    rows = build(shift=False, block_size=block_size, masks=masks)
    assert row_tokens(SEQUENCE, views, block_size) == rows.input_ids.numel()


def test_shift_needs_a_token_in_front() -> None:
    bare = Sequence(prompt_ids=(), completion_ids=(1, 2), supervised=2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one prompt token"):
        build_rows([bare], [mask], mask_token_id=M, block_size=2, logit_shift=True)


def test_rows_move_as_one() -> None:
    rows = build(shift=False)
    moved = rows.to(torch.device("cpu"))
    assert torch.equal(moved.input_ids, rows.input_ids)
    assert torch.equal(moved.attention_mask, rows.attention_mask)

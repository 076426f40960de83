"""Training rows of each objective, laid out by hand on one packed row of eight tokens.

Document A: plain, tokens 11 12 13, blocks of two from its start: 0 0 1 (the last is short).
Document B: prompt 21, completion 22 23 24; blocks -1 0 0 1. Then one pad.
"""

import textwrap
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import diffusion.objective as objective
from diffusion.masking import Corruption, generator
from diffusion.objective import (
    Noise,
    Packing,
    TrainingRows,
    block_diffusion_rows,
    canvas_rows,
    next_token_rows,
)

M = 1  # the mask token
HIDDEN = [1, 0, 1, 0, 1, 0, 1, 0]  # 11, 13, 22, 24
WEIGHT = [4.0, 4.0, 2.0, 1.0, 3.0, 3.0, 1.5, 9.0]


@dataclass(frozen=True)
class Packed:
    """`objective.Rows`."""

    tokens: Tensor
    document: Tensor
    position: Tensor
    block: Tensor
    segment: Tensor
    supervised: Tensor
    valid: Tensor


def packed() -> Packed:
    return Packed(
        tokens=torch.tensor([[11, 12, 13, 21, 22, 23, 24, 0]]),
        document=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0]]),
        position=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]]),
        block=torch.tensor([[0, 0, 1, -1, 0, 0, 1, 0]]),
        segment=torch.tensor([[0, 0, 1, 2, 3, 3, 4, 5]]),
        supervised=torch.tensor([[1, 1, 1, 0, 1, 1, 1, 0]], dtype=torch.bool),
        valid=torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool),
    )


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both corruptions hide HIDDEN with the weights WEIGHT."""
    drawn = Corruption(torch.tensor([HIDDEN], dtype=torch.bool), torch.tensor([WEIGHT]), 0.125)
    monkeypatch.setattr(objective, "corrupt_blocks", lambda *_: drawn)
    monkeypatch.setattr(objective, "corrupt_canvas", lambda *_: drawn)


def noise(shift: bool = False, packing: Packing = "per_document", u_max: float = 1.0) -> Noise:
    return Noise(
        generator=generator(0),
        block_size=2,
        mask_token_id=M,
        logit_shift=shift,
        u_max=u_max,
        weighted=u_max == 1.0,
        packing=packing,
    )


def assert_drawn(training: TrainingRows, expected: str) -> None:
    mask = training.rows.attention_mask[0, 0]
    picture = "\n".join("".join(".#"[int(cell)] for cell in row) for row in mask)
    assert picture == textwrap.dedent(expected).strip()


# AR


def test_next_token_by_hand() -> None:
    training = next_token_rows(packed())
    # 12 and 13 from the token before; 11 has none. 22 from the prompt's end; 21 is a prompt.
    assert training.rows.select.tolist() == [0, 1, 3, 4, 5]
    assert training.rows.targets.tolist() == [12, 13, 22, 23, 24]
    assert training.weight.tolist() == [1.0] * 5
    assert training.rows.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    expected = """
        #.......
        ##......
        ###.....
        ...#....
        ...##...
        ...###..
        ...####.
        .......#
        """
    assert_drawn(training, expected)


def test_next_token_mutually_visible() -> None:
    training = next_token_rows(packed(), "mutually_visible")
    assert training.rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    expected = """
        #.......
        ##......
        ###.....
        ####....
        #####...
        ######..
        #######.
        .......#
        """
    assert_drawn(training, expected)


# Block diffusion


@pytest.mark.usefixtures("fixed")
def test_block_rows_by_hand() -> None:
    training = block_diffusion_rows(packed(), noise())
    noisy, clean = [M, 12, M, 21, M, 23, M, 0], [11, 12, 13, 21, 22, 23, 24, 0]
    assert training.rows.input_ids.tolist() == [noisy + clean]
    assert training.rows.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0] * 2]
    assert training.rows.select.tolist() == [0, 2, 4, 6]  # loss on the first half
    assert training.rows.targets.tolist() == [11, 13, 22, 24]
    assert training.weight.tolist() == [4.0, 2.0, 3.0, 1.5]
    assert training.fallback_rate == 0.125
    expected = """
        ##..............
        ##..............
        ..#.....##......
        ...#............
        ....##.....#....
        ....##.....#....
        ......#....###..
        .......#........
        ........##......
        ........##......
        ........###.....
        ...........#....
        ...........###..
        ...........###..
        ...........####.
        ...............#
        """
    assert_drawn(training, expected)


@pytest.mark.usefixtures("fixed")
def test_block_rows_with_shift_by_hand() -> None:
    training = block_diffusion_rows(packed(), noise(shift=True))
    # 11 opens its document: nothing before it, so its own place. 13 opens a block: the clean 12
    # at 8 + 1. 22 opens one behind the clean prompt at 8 + 3, 24 behind the clean 23 at 8 + 5.
    assert training.rows.select.tolist() == [0, 9, 11, 13]
    assert training.rows.targets.tolist() == [11, 13, 22, 24]


def test_block_rows_with_shift_inside_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.tensor([[0, 1, 0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    drawn = Corruption(hidden, torch.ones(1, 8), 0.0)
    monkeypatch.setattr(objective, "corrupt_blocks", lambda *_: drawn)
    training = block_diffusion_rows(packed(), noise(shift=True))
    # 12 and 23 are second in their blocks: the noisy place before them.
    assert training.rows.select.tolist() == [0, 4]


def test_a_later_document_is_not_opened_by_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plain documents of four tokens: the second's first token has nothing before it."""
    numbers = torch.arange(8)[None]
    ones = torch.ones(1, 8, dtype=torch.bool)
    rows = Packed(
        tokens=10 + numbers,
        document=numbers // 4,
        position=numbers % 4,
        block=numbers % 4 // 2,
        segment=numbers // 2,
        supervised=ones,
        valid=ones,
    )
    drawn = Corruption(ones, torch.ones(1, 8), 0.0)
    monkeypatch.setattr(objective, "corrupt_blocks", lambda *_: drawn)
    training = block_diffusion_rows(rows, noise(shift=True))
    # Places 0..7 are noisy, 8..15 clean. Tokens 2 and 6 open blocks: clean 1 and 5, at 9 and 13.
    assert training.rows.select.tolist() == [0, 0, 9, 2, 4, 4, 13, 6]


def test_shifted_places_in_the_second_row(monkeypatch: pytest.MonkeyPatch) -> None:
    one = packed()
    two = Packed(*(getattr(one, f).repeat(2, 1) for f in one.__dataclass_fields__))
    hidden = torch.zeros(2, 8, dtype=torch.bool)
    hidden[1, [0, 1, 2]] = True
    drawn = Corruption(hidden, torch.ones(2, 8), 0.0)
    monkeypatch.setattr(objective, "corrupt_blocks", lambda *_: drawn)
    training = block_diffusion_rows(two, noise(shift=True))
    assert training.rows.select.tolist() == [16 + 0, 16 + 0, 16 + 8 + 1]


@pytest.mark.usefixtures("fixed")
def test_block_rows_mutually_visible() -> None:
    training = block_diffusion_rows(packed(), noise(packing="mutually_visible"))
    assert training.rows.position_ids.tolist() == [[*range(8), *range(8)]]
    expected = """
        ##..............
        ##..............
        ..#.....##......
        ...#....###.....
        ....##..####....
        ....##..####....
        ......#.######..
        .......#........
        ........##......
        ........##......
        ........###.....
        ........####....
        ........######..
        ........######..
        ........#######.
        ...............#
        """
    assert_drawn(training, expected)


def test_real_noise_hides_what_may_be_hidden() -> None:
    one = packed()
    rows = Packed(*(getattr(one, f).repeat(200, 1) for f in one.__dataclass_fields__))
    training = block_diffusion_rows(rows, noise())
    hidden = training.rows.input_ids[:, :8] == M
    assert not (hidden & ~rows.supervised).any()
    assert hidden.any(0).tolist() == rows.supervised[0].tolist()
    # Blocks of one token are always hidden, at a weight of 1 / level: never less than one.
    assert hidden[:, 2].all() and hidden[:, 6].all()
    assert float(training.weight.min()) >= 1.0 and float(training.weight.max()) <= 2.0


def test_warmup_drops_the_weight() -> None:
    training = block_diffusion_rows(packed(), noise(u_max=0.3))
    assert set(training.weight.tolist()) == {1.0}


# Full canvas


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("shift", [False, True])
def test_canvas_rows_by_hand(shift: bool) -> None:
    training = canvas_rows(packed(), noise(shift), causal=False)
    assert training.rows.input_ids.tolist() == [[M, 12, M, 21, M, 23, M, 0]]
    assert training.rows.select.tolist() == [place - shift for place in (0, 2, 4, 6)]
    assert training.weight.tolist() == [4.0, 2.0, 3.0, 1.5]
    expected = """
        ###.....
        ###.....
        ###.....
        ...####.
        ...####.
        ...####.
        ...####.
        .......#
        """
    assert_drawn(training, expected)


@pytest.mark.usefixtures("fixed")
def test_causal_canvas_by_hand() -> None:
    training = canvas_rows(packed(), noise(), causal=True)
    assert training.rows.input_ids.tolist() == [[M, 12, M, 21, M, 23, M, 0]]
    expected = """
        #.......
        ##......
        ###.....
        ...#....
        ...##...
        ...###..
        ...####.
        .......#
        """
    assert_drawn(training, expected)


def test_shifted_canvas_leaves_the_first_token_alone() -> None:
    one = packed()
    rows = Packed(*(getattr(one, f).repeat(100, 1) for f in one.__dataclass_fields__))
    training = canvas_rows(rows, noise(shift=True), causal=False)
    hidden = training.rows.input_ids == M
    assert not hidden[:, 0].any()  # document A's first token: nothing predicts it
    assert hidden[:, 4].any()  # the first behind a prompt may be hidden
    # Every prediction comes from the place before the token, in the same row.
    places = training.rows.select + 1
    assert torch.equal(rows.tokens.flatten()[places], training.rows.targets)

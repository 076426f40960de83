"""The distribution that is sampled from, and the draw, by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion.sampling import draw, target_distribution

MASK = 3
# Probabilities 1/2, 1/4, 1/8 and 1/8 for the mask token. Without it: 4/7, 2/7, 1/7.
LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()


def target(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> list[float]:
    return target_distribution(LOGITS, temperature, top_p, top_k, MASK)[0].tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [4 / 7, 2 / 7, 1 / 7, 0]),
        ({"temperature": 0.0}, [4 / 7, 2 / 7, 1 / 7, 0]),  # the model's own
        ({"temperature": 0.5}, [16 / 21, 4 / 21, 1 / 21, 0]),  # squares
        ({"temperature": 1 / 3}, [64 / 73, 8 / 73, 1 / 73, 0]),  # cubes
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 99}, [4 / 7, 2 / 7, 1 / 7, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),  # 4/7 = 0.571 reaches it alone
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),  # 0.571 does not, 0.857 does
        ({"top_p": 0.9}, [4 / 7, 2 / 7, 1 / 7, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),  # never empty
        # Temperature first: 16/21 = 0.76 reaches 0.7 alone, 4/7 would not have.
        ({"temperature": 0.5, "top_p": 0.7}, [1, 0, 0, 0]),
        # Top-k before top-p: 2/3 of two tokens reaches 0.6 alone, 4/7 of three would not have.
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
    ],
)
def test_distribution_by_hand(options: dict[str, float], expected: list[float]) -> None:
    assert target(**options) == pytest.approx(expected, abs=1e-6)


def test_the_mask_token_has_no_chance_however_likely() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 1000.0]])
    probs = target_distribution(logits, 1.0, 1.0, 0, MASK)
    assert float(probs[0, MASK]) == 0.0 and float(probs.sum()) == pytest.approx(1.0)


def test_the_callers_logits_stay_as_they_are() -> None:
    logits = LOGITS.clone()
    target_distribution(logits, 0.5, 0.9, 2, MASK)
    assert torch.equal(logits, LOGITS)


def test_rows_are_filtered_one_by_one() -> None:
    logits = torch.tensor([[0.0, 5.0, 0.0, 0.0], [2.0, 0.0, 1.9, 0.0]])
    probs = target_distribution(logits, 1.0, 0.8, 0, MASK)
    assert (probs > 0).tolist() == [[False, True, False, False], [True, False, True, False]]
    assert probs.sum(-1).tolist() == pytest.approx([1.0, 1.0])


def whole_sort(logits: Tensor, top_p: Tensor) -> Tensor:
    """The nucleus by its definition: everything sorted, ties by token id."""
    probs = target_distribution(logits, 1.0, 1.0, 0, MASK)
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= top_p[:, None], 0.0)
    kept = torch.zeros_like(probs).scatter(-1, index, ordered)
    return torch.where(top_p[:, None] < 1, kept / kept.sum(-1, keepdim=True), probs)


@given(
    # Few levels: ties everywhere, across the edge of the nucleus and of the first look.
    levels=st.lists(st.lists(st.integers(0, 4), min_size=12, max_size=12), min_size=1, max_size=5),
    top_p=st.lists(st.sampled_from([0.05, 0.3, 0.5, 0.75, 0.9, 0.99, 1.0]), min_size=5, max_size=5),
    looked_at=st.sampled_from([1, 2, 5, 11, 12, 1024]),
)
def test_a_nucleus_among_the_first_is_that_among_all(
    levels: list[list[int]], top_p: list[float], looked_at: int
) -> None:
    logits, limit = torch.tensor(levels).float(), torch.tensor(top_p[: len(levels)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.sampling.NUCLEUS_TOKENS", looked_at)
        found = target_distribution(logits, 1.0, limit, 0, MASK)
    assert torch.equal(found, whole_sort(logits, limit))


@pytest.mark.parametrize("scale", [6.0, 4.0, 1.0])
def test_the_nucleus_of_a_large_vocabulary(scale: float) -> None:
    """About 60, 1800 and 112 000 tokens of 151 936: beside each other, and found both ways."""
    gen = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(3, 151_936, generator=gen)
    logits[1] *= 6.0 / scale
    limit = torch.tensor([0.95, 0.95, 0.5])
    found = target_distribution(logits, 1.0, limit, 0, MASK)
    assert torch.equal(found, whole_sort(logits, limit))


def at(probs: list[float], *uniform: float, temperature: float = 1.0) -> list[int]:
    rows = torch.tensor([probs]).expand(len(uniform), -1)
    return draw(rows, torch.tensor(uniform, dtype=torch.float64), temperature).tolist()


def test_inverse_cdf_at_exact_edges() -> None:
    # Token 0 owns [0, 1/4), token 1 owns [1/4, 1/2), token 2 owns [1/2, 1).
    below = 1 - 2**-24  # the largest number that float32 `rand` gives
    probs = [0.25, 0.25, 0.5]
    assert at(probs, 0.0, 0.2499, 0.25, 0.4999, 0.5, below) == [0, 0, 1, 1, 2, 2]


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    # In front, in the middle and at the end: their intervals are empty.
    probs = [0.0, 0.5, 0.0, 0.5, 0.0]
    assert at(probs, 0.0, 0.4999, 0.5, 1 - 2**-24) == [1, 1, 3, 3]


def test_draw_follows_the_distribution() -> None:
    # A regular grid of uniforms hits every token in exact proportion.
    uniform = (torch.arange(1000) + 0.5) / 1000
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(1000, 4)
    counts = draw(probs, uniform, 1.0).bincount(minlength=4)
    assert counts.tolist() == [100, 200, 300, 400]


def test_unnormalised_rows_are_scaled() -> None:
    assert at([0.5, 0.5, 1.0], 0.24, 0.26, 0.51) == [0, 1, 2]


def test_greedy_takes_the_likeliest_and_the_left_of_two() -> None:
    assert at([0.1, 0.6, 0.3], 0.99, temperature=0.0) == [1]
    assert at([0.4, 0.2, 0.4], 0.99, temperature=0.0) == [0]


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(50, 9, generator=generator).softmax(-1)
    uniform = torch.rand(50, generator=generator)
    together = draw(probs, uniform, 1.0)
    alone: list[Tensor] = [draw(probs[i : i + 1], uniform[i : i + 1], 1.0) for i in range(50)]
    assert torch.equal(together, torch.cat(alone))


def test_every_row_has_its_own_settings() -> None:
    """One call with the settings of all hand-made cases, against one call each."""
    settings = [(1.0, 1.0, 0), (0.0, 1.0, 0), (0.5, 0.7, 0), (1.0, 0.9, 2), (1 / 3, 1.0, 1)]
    heat, top_p, top_k = (torch.tensor(values) for values in zip(*settings, strict=True))
    rows = LOGITS.expand(len(settings), -1)
    found = target_distribution(rows, heat, top_p, top_k, MASK)
    for row, one in zip(found.tolist(), settings, strict=True):
        assert row == pytest.approx(target(*one), abs=1e-6)
    uniform = torch.full((len(settings),), 0.9)
    drawn = draw(found, uniform, heat).tolist()
    assert drawn == [2, 0, 0, 1, 0]  # 0.9: the last token, greedy, the only one, of two, of one

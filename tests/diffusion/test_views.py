"""The views of each estimator, by hand; and that elbo and trace are what they claim to be."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import diffusion.views as views
from diffusion.layout import Sequence, build_rows, row_tokens
from diffusion.masking import counted_masks, independent_masks
from diffusion.views import EstimatorConfig, Views, count_views, make_views

KINDS = ("full_mask", "coupled", "uncoupled", "elbo", "trace")
# Blocks of two: steps 0 1 | 2 2 | 5 3 over the whole completion.
SEQUENCE = Sequence((7,), (10, 11, 12, 13, 14, 15), 5, step_map=(0, 1, 2, 2, 5, 3))


def bits(text: str) -> list[list[bool]]:
    return [[letter == "1" for letter in row] for row in text.split()]


def test_full_mask() -> None:
    found = make_views(SEQUENCE, EstimatorConfig(kind="full_mask"), None, 0)
    assert found.hidden.tolist() == bits("111111")
    assert found.scored.tolist() == bits("111110")  # the last token is tail
    assert found.weight[0, :5].tolist() == [1.0] * 5


def test_trace_of_blocks() -> None:
    """Steps within the blocks are 0 1 | 0 0 | 1 0: two views restore all blocks at once."""
    found = make_views(SEQUENCE, EstimatorConfig(kind="trace"), 2, 0)
    assert found.hidden.tolist() == bits("111111 010010")
    assert found.scored.tolist() == bits("101100 010010")
    assert found.weight[found.scored].tolist() == [1.0] * 5


def test_trace_of_blocks_from_the_sequences_start() -> None:
    """Prompt of 1, blocks of 4: the first has three. Steps 0 1 2 | 2 5 3 are 0 1 2 | 0 2 1."""
    config = EstimatorConfig(kind="trace")
    found = make_views(SEQUENCE, config, 4, 0, "sequence")
    assert found.hidden.tolist() == bits("111111 011011 001010")
    assert found.scored.tolist() == bits("100100 010000 001010")
    assert count_views(SEQUENCE, config, 4, "sequence") == 3


def test_trace_of_a_canvas() -> None:
    """Nothing is shared: five steps that fixed something are five views, in their order."""
    found = make_views(SEQUENCE, EstimatorConfig(kind="trace"), None, 0)
    assert found.hidden.tolist() == bits("111111 011111 001111 000011 000010")
    assert found.scored.tolist() == bits("100000 010000 001100 000000 000010")


@pytest.mark.parametrize(
    "bad",
    [Sequence((7,), (10, 11), 2), Sequence((7,), (10, 11), 2, step_map=(0,))],
)
def test_trace_without_a_whole_step_map(bad: Sequence) -> None:
    with pytest.raises(ValueError, match="step"):
        make_views(bad, EstimatorConfig(kind="trace"), None, 0)


@pytest.fixture
def fixed_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """t = 1/4 hides 0 and 3; t = 1/2 hides 0, 1, 2 and 3; nobody hides 4 and 5."""

    def draw(*_: object) -> tuple[Tensor, Tensor]:
        return torch.tensor(bits("100100 111100")), torch.tensor([0.25, 0.5])

    monkeypatch.setattr(views, "independent_masks", draw)


@pytest.mark.usefixtures("fixed_masks")
def test_uncoupled_normalised_is_the_mean_of_what_a_token_got() -> None:
    found = make_views(SEQUENCE, EstimatorConfig(kind="uncoupled"), None, 0)
    assert found.hidden.tolist() == bits("111111 100100 111100")
    third, half = 1 / 3, 1 / 2
    expected = [
        [third, half, half, third, 1, 1],
        [third, 0, 0, third, 0, 0],
        [third, half, half, third, 0, 0],
    ]
    torch.testing.assert_close(found.weight, torch.tensor(expected))


@pytest.mark.usefixtures("fixed_masks")
def test_uncoupled_parity_divides_by_the_ratio() -> None:
    found = make_views(SEQUENCE, EstimatorConfig(kind="uncoupled", mode="parity"), None, 0)
    # Two masks count for one pair: all is divided by 2; then 1 / (1/4) and 1 / (1/2).
    expected = [[0.5] * 6, [2, 0, 0, 2, 0, 0], [1, 1, 1, 1, 0, 0]]
    torch.testing.assert_close(found.weight, torch.tensor(expected))


def test_elbo_weighs_every_block_by_its_own_count() -> None:
    found = make_views(SEQUENCE, EstimatorConfig(kind="elbo", num_samples=40), 4, 3)
    for hidden, weight in zip(found.hidden, found.weight, strict=True):
        for part in (slice(0, 4), slice(4, 6)):  # a block of four and the short last one
            size, count = len(hidden[part]), int(hidden[part].sum())
            assert 1 <= count <= size
            assert weight[part].tolist() == pytest.approx([size / count / 40] * size)
    assert {int(h[:4].sum()) for h in found.hidden} == {1, 2, 3, 4}
    assert len(found.hidden.unique(dim=0)) > 10


def test_elbo_of_blocks_from_the_sequences_start() -> None:
    """Prompt of 7, blocks of 4: one token beside the given ones, a whole block, one token."""
    sequence = Sequence((7,) * 7, SEQUENCE.completion_ids, 6)
    config = EstimatorConfig(kind="elbo", num_samples=40)
    found = make_views(sequence, config, 4, 3, "sequence")
    for hidden, weight in zip(found.hidden, found.weight, strict=True):
        assert hidden[0] and hidden[5]  # a block of one: always hidden
        count = int(hidden[1:5].sum())
        assert weight.tolist() == pytest.approx([1 / 40] + [4 / count / 40] * 4 + [1 / 40])
    assert {int(h[1:5].sum()) for h in found.hidden} == {1, 2, 3, 4}


def sum_of(found: Views, value: dict[tuple[bool, ...], list[float]]) -> float:
    total = 0.0
    for hidden, scored, weight in zip(found.hidden, found.scored, found.weight, strict=True):
        row = value[tuple(hidden.tolist())]
        total += sum(float(w) * row[i] for i, w in enumerate(weight) if scored[i])
    return total


def test_elbo_is_the_mean_over_all_orders() -> None:
    """A made-up model of three tokens; all 6 orders written out."""
    gen = torch.Generator().manual_seed(1)
    patterns = list(itertools.product([False, True], repeat=3))
    value = {p: (-3 * torch.rand(3, generator=gen)).tolist() for p in patterns}
    orders = list(itertools.permutations(range(3)))
    exact = 0.0
    for order in orders:
        for turn, place in enumerate(order):
            hidden = tuple(i in order[turn:] for i in range(3))
            exact += value[hidden][place] / len(orders)
    sequence, config = Sequence((7,), (10, 11, 12), 3), EstimatorConfig(kind="elbo", num_samples=2)
    draws = [sum_of(make_views(sequence, config, None, s), value) for s in range(4000)]
    error = torch.tensor(draws).std() / math.sqrt(len(draws))
    assert sum(draws) / len(draws) == pytest.approx(exact, abs=4 * float(error))
    assert float(error) < 0.03


@pytest.mark.parametrize("block_size", [None, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_view_is_a_name_and_every_cost_is_known(kind: str, block_size: int | None) -> None:
    config = EstimatorConfig(kind=kind)  # type: ignore[arg-type]
    one, same, other = (make_views(SEQUENCE, config, block_size, seed) for seed in (1, 1, 2))
    assert torch.equal(one.hidden, same.hidden) and torch.equal(one.weight, same.weight)
    drawn = kind in ("coupled", "uncoupled", "elbo")
    assert torch.equal(one.hidden, other.hidden) is not drawn
    assert len(one.hidden) == count_views(SEQUENCE, config, block_size)
    assert not (one.scored & ~one.hidden).any() and not one.scored[:, 5].any()
    rows = build_rows(
        [SEQUENCE],
        [one.hidden],
        mask_token_id=0,
        block_size=block_size,
        logit_shift=False,
        scored=[one.scored],
    )
    assert rows.input_ids.numel() == row_tokens(SEQUENCE, len(one.hidden), block_size)
    assert len(rows.targets) == int(one.scored.sum())


@pytest.mark.parametrize("kind", ["coupled", "full_mask", "trace"])
@pytest.mark.parametrize("block_size", [None, 2])
def test_weights_of_a_token_sum_to_one(kind: str, block_size: int | None) -> None:
    """If masks did not matter, the estimate would be the log-probability itself."""
    found = make_views(SEQUENCE, EstimatorConfig(kind=kind), block_size, 5)  # type: ignore[arg-type]
    total = (found.weight * found.scored).sum(0)
    assert total.tolist() == pytest.approx([1, 1, 1, 1, 1, 0])


def test_ratios_and_counts_of_the_draws() -> None:
    masks, ratios = independent_masks(4000, (0.2, 0.8), 3, seed=1)
    assert masks.float().mean(1).tolist() == pytest.approx(ratios.tolist(), abs=0.03)
    assert len(set(ratios.tolist())) == 3 and float(ratios.min()) >= 0.2
    counts = (
        counted_masks(torch.zeros(8, dtype=torch.int64), 4000, seed=1)[0]
        .sum(1)
        .bincount(minlength=9)
    )
    assert counts[0] == 0 and int(counts[1:].min()) > 400 and int(counts.max()) < 600


def test_undecided_masks_are_shown_to_bidirectional_models_only() -> None:
    sequence = Sequence((7,), (10, 11), 2, undecided=3)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for block_size, ids in ((None, [7, 0, 0, 0, 0, 0]), (2, [7, 0, 0])):
        rows = build_rows(
            [sequence], [mask], mask_token_id=0, block_size=block_size, logit_shift=False
        )
        assert rows.input_ids.tolist() == [ids]
        assert row_tokens(sequence, 1, block_size) == len(ids)
        assert rows.targets.tolist() == [10, 11]


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "trace", "mode": "parity"},
        {"kind": "elbo", "num_samples": 0},
        {"kind": "uncoupled", "num_masks": 0},
    ],
)
def test_impossible(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(reversed(bad))):
        EstimatorConfig(**bad)  # type: ignore[arg-type]

"""Which tokens are hidden: scripted draws by hand, and rates of the real ones."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.seeding import derive_seed
from diffusion.masking import corrupt_blocks, corrupt_canvas, coupled_masks, generator

Script = Callable[..., None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Replaces `torch.rand` by the given tensors, in order."""

    def use(*draws: list[list[float]]) -> None:
        waiting = [torch.tensor(draw) for draw in draws]

        def rand(*shape: int, generator: torch.Generator) -> Tensor:
            value = waiting.pop(0)
            assert tuple(value.shape) == shape
            return value

        monkeypatch.setattr(torch, "rand", rand)

    return use


def blocks_of(rows: int, blocks: int, size: int) -> Tensor:
    return torch.arange(blocks).repeat_interleave(size).expand(rows, -1)


def everything(segment: Tensor) -> Tensor:
    return torch.ones_like(segment, dtype=torch.bool)


# Block-wise clipped noise


def test_levels_clip_and_forced_mask_by_hand(script: Script) -> None:
    # Levels 0.1 -> clipped to 1/4, and 0.5. Block 0: no noise below 0.25, so the smallest (0.26,
    # third) is hidden by force. Block 1: 0.2 and 0.49 are below 0.5; 0.5 itself is not.
    script([[0.1, 0.5]], [[0.30, 0.90, 0.26, 0.40, 0.60, 0.20, 0.50, 0.49]])
    segment = blocks_of(1, 2, 4)
    drawn = corrupt_blocks(segment, everything(segment), 4, generator(0))
    assert drawn.masked.int().tolist() == [[0, 0, 1, 0, 0, 1, 0, 1]]
    assert drawn.weight.tolist() == [[4.0] * 4 + [2.0] * 4]  # 1 / level of the block
    assert drawn.fallback_rate == 0.5  # one block of two


def test_warmup_scales_the_level_and_drops_the_weight(script: Script) -> None:
    # u_max 0.6: levels 0.9 * 0.6 = 0.54 and 0.1 * 0.6 = 0.06 -> 0.25.
    script([[0.9, 0.1]], [[0.53, 0.55, 0.99, 0.10, 0.24, 0.26, 0.30, 0.80]])
    segment = blocks_of(1, 2, 4)
    drawn = corrupt_blocks(segment, everything(segment), 4, generator(0), u_max=0.6, weighted=False)
    assert drawn.masked.int().tolist() == [[1, 0, 0, 1, 1, 0, 0, 0]]
    assert drawn.weight.tolist() == [[1.0] * 8]
    assert drawn.fallback_rate == 0.0


def test_prompts_and_pads_are_never_hidden(script: Script) -> None:
    # Block 0 is a prompt: untouched and not counted. Block 1 is half a prompt whose noise is the
    # smallest: the force goes to the smallest of the two tokens that may be hidden.
    script([[1.0, 0.0]], [[0.01, 0.01, 0.01, 0.01, 0.02, 0.03, 0.80, 0.70]])
    segment = blocks_of(1, 2, 4)
    corruptible = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    drawn = corrupt_blocks(segment, corruptible, 4, generator(0))
    assert drawn.masked.int().tolist() == [[0, 0, 0, 0, 0, 0, 0, 1]]
    assert drawn.fallback_rate == 1.0


def test_nothing_to_hide() -> None:
    segment = blocks_of(2, 3, 4)
    drawn = corrupt_blocks(segment, ~everything(segment), 4, generator(0))
    assert not drawn.masked.any()
    assert drawn.fallback_rate == 0.0


def test_block_of_one_is_always_hidden_at_weight_one() -> None:
    segment = torch.arange(50).expand(3, 50)
    drawn = corrupt_blocks(segment, everything(segment), 1, generator(1))
    assert drawn.masked.all()
    assert torch.equal(drawn.weight, torch.ones(3, 50))


def test_fallback_rate_after_clipping() -> None:
    # 1/4 of levels are clipped to 1/4:  1/4 * (3/4)^4               = 0.0791
    # the others:  integral of (1-u)^4 from 1/4 to 1 = (3/4)^5 / 5   = 0.0475
    segment = blocks_of(400, 100, 4)
    drawn = corrupt_blocks(segment, everything(segment), 4, generator(2))
    assert drawn.fallback_rate == pytest.approx(0.1266, abs=0.006)  # 3.6 sigma of 40 000 blocks


def test_unclipped_levels_have_no_signal_in_a_fifth_of_draws() -> None:
    # A nominal block size of a million lets the clip go: 1 / (4 + 1) of levels hide nothing.
    segment = blocks_of(400, 100, 4)
    drawn = corrupt_blocks(segment, everything(segment), 10**6, generator(3))
    assert drawn.fallback_rate == pytest.approx(0.2, abs=0.007)


def test_every_block_has_signal() -> None:
    segment = blocks_of(50, 20, 4)
    drawn = corrupt_blocks(segment, everything(segment), 4, generator(4))
    assert drawn.masked.view(50, 20, 4).any(-1).all()


def test_forced_position_is_uniform() -> None:
    # Levels of a billionth: all 20 000 masks are forced, one a block; 5000 each, sigma 61.
    segment = blocks_of(200, 100, 4)
    drawn = corrupt_blocks(segment, everything(segment), 10**9, generator(5), u_max=0.0)
    assert drawn.fallback_rate == 1.0
    counts = drawn.masked.view(-1, 4).sum(0)
    assert int(counts.sum()) == 20_000
    assert all(abs(count - 5000) < 250 for count in counts.tolist())


def test_one_level_per_block_not_per_token() -> None:
    """Defect 5: thresholds per token make every mask ratio a Bernoulli(0.5)."""
    segment = blocks_of(300, 4, 32)
    drawn = corrupt_blocks(segment, everything(segment), 32, generator(6))
    weight = drawn.weight.view(300, 4, 32)
    assert torch.equal(weight, weight[..., :1].expand_as(weight))
    ratio = drawn.masked.view(300, 4, 32).float().mean(-1)
    # Uniform levels spread the ratio with sigma 0.29; Bernoulli(0.5) over 32 tokens with 0.09.
    assert 0.27 < float(ratio.std()) < 0.32
    assert float((ratio - 1 / weight[..., 0]).abs().mean()) < 0.08  # the ratio follows the level
    assert len(set(weight[0, :, 0].tolist())) == 4  # and every block has its own


def test_same_seed_same_corruption() -> None:
    segment = blocks_of(2, 5, 4)

    def draw(seed: int) -> Tensor:
        return corrupt_blocks(segment, everything(segment), 4, generator(seed)).masked

    assert torch.equal(draw(7), draw(7))
    assert not torch.equal(draw(7), draw(8))


def test_canvas_has_one_level_per_row(script: Script) -> None:
    # Row 0: level 0.5. Row 1: level 0.01 -> clipped to 1/4; nothing below: the smallest by force.
    script([[0.5], [0.01]], [[0.4, 0.6, 0.1, 0.5], [0.9, 0.3, 0.5, 0.7]])
    drawn = corrupt_canvas(torch.ones(2, 4, dtype=torch.bool), generator(0))
    assert drawn.masked.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert drawn.weight.tolist() == [[2.0] * 4, [4.0] * 4]
    assert drawn.fallback_rate == 0.5


# Coupled masks


@pytest.mark.parametrize("length", [1, 2, 7, 256])
def test_every_token_is_hidden_exactly_once_a_pair(length: int) -> None:
    masks, ratios = coupled_masks(length, (0.2, 0.8), 3, seed=11)
    assert masks.shape == (6, length) and ratios.shape == (6,)
    assert (masks.view(3, 2, length).int().sum(1) == 1).all()
    assert torch.allclose(ratios.view(3, 2).sum(1), torch.ones(3))


def test_ratio_stays_in_its_range_and_fills_it() -> None:
    first = torch.stack([coupled_masks(1, (0.2, 0.8), 1, seed)[1][0] for seed in range(2000)])
    assert 0.2 <= float(first.min()) < 0.21 and 0.79 < float(first.max()) <= 0.8
    assert float(first.mean()) == pytest.approx(0.5, abs=0.016)  # sigma 0.0039


def test_mask_follows_its_ratio() -> None:
    for seed in range(5):
        masks, ratios = coupled_masks(10_000, (0.2, 0.8), 1, seed)
        assert masks.float().mean(1).tolist() == pytest.approx(ratios.tolist(), abs=0.02)


def test_no_pairs() -> None:
    masks, ratios = coupled_masks(5, (0.2, 0.8), 0, seed=1)
    assert masks.shape == (0, 5) and ratios.shape == (0,)


def test_same_seed_same_masks() -> None:
    for ours, theirs in zip(
        coupled_masks(40, (0.2, 0.8), 2, 5), coupled_masks(40, (0.2, 0.8), 2, 5), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_more_pairs_keep_the_first() -> None:
    one, two = coupled_masks(40, (0.2, 0.8), 1, 5)[0], coupled_masks(40, (0.2, 0.8), 2, 5)[0]
    assert torch.equal(one, two[:2])
    assert not torch.equal(two[:2], two[2:])


def test_masks_come_from_names() -> None:
    """Defect 2: one t and one mask for ever, or seeds that come round after 4096."""
    names = [
        (step, problem, sample, iteration)
        for step in range(5)
        for problem in ("p/0", "p/1")
        for sample in range(3)
        for iteration in range(2)
    ]
    drawn = [coupled_masks(64, (0.2, 0.8), 1, derive_seed(0, "mask", *name)) for name in names]
    assert len({float(ratios[0]) for _, ratios in drawn}) == len(names)
    assert len({tuple(masks[0].tolist()) for masks, _ in drawn}) == len(names)
    again = coupled_masks(64, (0.2, 0.8), 1, derive_seed(0, "mask", *names[7]))
    assert torch.equal(again[0], drawn[7][0])


def test_positions_of_a_mask_are_independent() -> None:
    """With t fixed at a half all 8 masks of 3 tokens are equally likely: 500 of 4000, sigma 21."""
    seen = Counter(
        tuple(coupled_masks(3, (0.5, 0.5), 1, seed)[0][0].int().tolist()) for seed in range(4000)
    )
    assert len(seen) == 8
    assert all(abs(count - 500) < 90 for count in seen.values())

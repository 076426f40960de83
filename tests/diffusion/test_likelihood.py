"""Both estimators on a fake scorer, with the arithmetic in comments."""

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

import diffusion.views as views
from diffusion.attention import BlockOrigin
from diffusion.layout import Sequence, TokenRows, build_rows
from diffusion.likelihood import estimate_logps, forward_tokens
from diffusion.masking import coupled_masks
from diffusion.views import EstimatorConfig, count_views

Mode = Literal["normalised", "parity"]


@dataclass(frozen=True)
class Spec:
    """A `Denoising`; the fields of `models.spec.DiffusionSpec`."""

    mask_token_id: int = 0
    logit_shift: bool = False
    attention: Literal["causal", "bidirectional", "block_causal"] = "block_causal"
    block_size: int | None = 2
    block_origin: BlockOrigin = "prompt"


SPEC = Spec()
SEQUENCE = Sequence(prompt_ids=(7,), completion_ids=(10, 11, 12, 13), supervised=3)


def counting(rows: TokenRows) -> Tensor:
    """-1, -2, -3, ... in the order of `select`."""
    return -torch.arange(1.0, len(rows.select) + 1)


def by_token(rows: TokenRows) -> Tensor:
    """A log-probability that depends on the target alone."""
    return -rows.targets.float() / 10


@pytest.fixture
def fixed_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pair 0 hides tokens 0 and 3 at t = 1/4; pair 1 hides 2 and 3 at t = 1/2."""
    masks = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    ratios = torch.tensor([0.25, 0.75, 0.5, 0.5])

    def draw(length: int, ratio_range: object, num_pairs: int, seed: int) -> tuple[Tensor, Tensor]:
        assert length == 4
        return masks[: 2 * num_pairs], ratios[: 2 * num_pairs]

    monkeypatch.setattr(views, "coupled_masks", draw)


# Scored in order: the full mask gives a = -1, -2, -3 (token 3 is the tail: not scored);
# pair 0 gives b_0 = -4 | b_1 = -5, b_2 = -6; pair 1 gives b_2 = -7 | b_0 = -8, b_1 = -9.
@pytest.mark.usefixtures("fixed_masks")
@pytest.mark.parametrize(
    ("mode", "num_pairs", "expected"),
    [
        ("normalised", 0, [-1.0, -2.0, -3.0]),  # the full-mask (d1) estimator
        ("parity", 0, [-1.0, -2.0, -3.0]),
        # (-1 - 4)/2, (-2 - 5)/2, (-3 - 6)/2
        ("normalised", 1, [-2.5, -3.5, -4.5]),
        # (-1 - 4/.25)/2, (-2 - 5/.75)/2, (-3 - 6/.75)/2
        ("parity", 1, [-8.5, -13 / 3, -5.5]),
        # (-1 - 4 - 8)/3, (-2 - 5 - 9)/3, (-3 - 6 - 7)/3
        ("normalised", 2, [-13 / 3, -16 / 3, -16 / 3]),
        # (-1 - 16 - 8/.5)/3, (-2 - 5/.75 - 9/.5)/3, (-3 - 8 - 7/.5)/3
        ("parity", 2, [-11.0, -80 / 9, -25 / 3]),
    ],
)
def test_estimators_by_hand(mode: Mode, num_pairs: int, expected: list[float]) -> None:
    config = EstimatorConfig(mode=mode, num_pairs=num_pairs)
    found = estimate_logps(counting, SPEC, [SEQUENCE], [0], config)
    assert found.shape == (1, 3)
    assert found[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("num_pairs", [0, 1, 2, 3])
def test_normalised_is_a_log_probability(num_pairs: int) -> None:
    """If masks do not matter, the mean over evaluations is the log-probability itself."""
    config = EstimatorConfig(num_pairs=num_pairs)
    for seed in range(20):
        found = estimate_logps(by_token, SPEC, [SEQUENCE], [seed], config)
        assert found[0].tolist() == pytest.approx([-1.0, -1.1, -1.2])


def test_parity_inflates_by_a_half_on_average() -> None:
    # t * (1/t) + (1 - t) * 1/(1 - t) = 2, so E[(a + b/r)/2] = 1.5 a; at most (1 + 1/0.2)/2 = 3.
    config = EstimatorConfig(mode="parity")
    sequence = Sequence((7,), (10,) * 40, 40)
    found = estimate_logps(by_token, SPEC, [sequence] * 300, list(range(300)), config)
    assert float(found.mean()) == pytest.approx(-1.5, abs=0.02)
    assert -3.0 <= float(found.min()) < -2.9


def test_unequal_lengths_are_padded_with_zeros() -> None:
    short = Sequence((7, 8), (14, 15), 1)
    found = estimate_logps(by_token, SPEC, [SEQUENCE, short], [1, 2], EstimatorConfig())
    assert found.tolist() == [pytest.approx([-1.0, -1.1, -1.2]), pytest.approx([-1.4, 0, 0])]


def hidden_of(rows: TokenRows, row: int) -> list[bool]:
    return (rows.input_ids[row] == SPEC.mask_token_id).tolist()


def test_every_completion_has_its_own_masks() -> None:
    """Defect 3: one t and one mask for the whole batch. And masks do not depend on the batch."""
    seen: list[TokenRows] = []

    def score(rows: TokenRows) -> Tensor:
        seen.append(rows)
        return by_token(rows)

    long = Sequence((7,), tuple(range(10, 42)), 32)
    estimate_logps(score, SPEC, [long] * 4, [1, 2, 3, 1], EstimatorConfig())
    estimate_logps(score, SPEC, [long], [3], EstimatorConfig())
    batch, alone = seen
    hidden = [hidden_of(batch, row) for row in range(4)]
    assert hidden[0] != hidden[1] != hidden[2] != hidden[0]
    assert hidden[3] == hidden[0]  # the same name, the same masks
    assert hidden_of(alone, 0) == hidden[2]
    # The first view hides everything; each pair hides every token once more.
    views = torch.tensor(hidden[2][-96:]).view(3, 32)
    assert views[0].all() and (views[1] ^ views[2]).all()
    assert torch.equal(views[1:], coupled_masks(32, (0.2, 0.8), 1, seed=3)[0])


def test_the_tail_is_context_only() -> None:
    scored: list[int] = []

    def score(rows: TokenRows) -> Tensor:
        scored.extend(rows.targets.tolist())
        return by_token(rows)

    estimate_logps(score, SPEC, [SEQUENCE], [0], EstimatorConfig(num_pairs=2))
    assert sorted(scored) == [10] * 3 + [11] * 3 + [12] * 3  # 13 stands behind the EOS


def test_gradients_reach_the_scorer() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    found = estimate_logps(
        lambda rows: by_token(rows) * weight, SPEC, [SEQUENCE], [0], EstimatorConfig()
    )
    found.sum().backward()
    assert weight.grad is not None and float(weight.grad) == pytest.approx(-3.3)


@pytest.mark.parametrize("block_size", [2, None])
@pytest.mark.parametrize("num_pairs", [0, 1, 2])
def test_forward_tokens_counts_what_is_built(block_size: int | None, num_pairs: int) -> None:
    attention: Literal["bidirectional", "block_causal"] = (
        "block_causal" if block_size else "bidirectional"
    )
    spec = Spec(block_size=block_size, attention=attention)
    config = EstimatorConfig(num_pairs=num_pairs)
    masks = torch.ones(count_views(SEQUENCE, config, block_size), 4, dtype=torch.bool)
    rows = build_rows(
        [SEQUENCE], [masks], mask_token_id=0, block_size=block_size, logit_shift=False
    )
    assert forward_tokens(spec, SEQUENCE, config) == rows.input_ids.numel()


@pytest.mark.parametrize(
    "bad",
    [{"num_pairs": -1}, {"mask_ratio_min": 0.0}, {"mask_ratio_max": 1.0}, {"mask_ratio_min": 0.9}],
)
def test_impossible_estimator(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        EstimatorConfig(**bad)

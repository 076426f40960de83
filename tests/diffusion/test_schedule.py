"""Levels and weights of the forward process, worked out by hand."""

import pytest
import torch

from diffusion.schedule import clipped_ratio, elbo_weight, warmup_u_max


@pytest.mark.parametrize(
    ("step", "u_max"),
    [
        (0, 0.001),  # u_init
        (1, 0.001 + 0.999 * 0.25),  # 0.25075
        (2, 0.5005),
        (3, 0.75025),
        (4, 1.0),  # over: t ~ U(0, 1) from here on
        (1000, 1.0),
    ],
)
def test_warmup_by_hand(step: int, u_max: float) -> None:
    assert warmup_u_max(step, warmup_steps=4) == pytest.approx(u_max, abs=1e-12)


def test_warmup_starts_where_it_is_told() -> None:
    assert warmup_u_max(5, warmup_steps=10, u_init=0.2) == pytest.approx(0.6)  # .2 + .8 / 2


def test_no_warmup() -> None:
    assert warmup_u_max(0, warmup_steps=0) == 1.0


def test_clip_is_one_token_of_a_block() -> None:
    u = torch.tensor([0.0, 0.1, 0.25, 0.3, 1.0])
    assert clipped_ratio(u, 4).tolist() == pytest.approx([0.25, 0.25, 0.25, 0.3, 1.0])
    # A block of one token is always hidden: block size 1 is a next-token model.
    assert clipped_ratio(u, 1).tolist() == [1.0] * 5


def test_weight_is_one_over_the_level() -> None:
    assert elbo_weight(torch.tensor([0.25, 0.5, 1.0])).tolist() == [4.0, 2.0, 1.0]


def test_loss_of_a_constant_model_is_its_loss_per_token() -> None:
    """E[w * masked] = 1 at every level: the ELBO of a model that loses c on each token is c L."""
    u = torch.linspace(0.01, 1, 50)
    assert torch.allclose(elbo_weight(u) * u, torch.ones(50))

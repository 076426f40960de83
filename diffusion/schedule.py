"""Mask ratios and their weights. Not the drawing of masks: that is `diffusion.masking`.

Linear schedule throughout: u(t) = t (ALGORITHMS section 1).
"""

from torch import Tensor


def warmup_u_max(step: int, warmup_steps: int, u_init: float = 1e-3) -> float:
    """Upper end of the mask-ratio draw at `step` (Stable-DiffCoder, section 3.2).

    u_max = u_init + (1 - u_init) * step / warmup_steps, and 1 from `warmup_steps` on.
    """
    if step >= warmup_steps:
        return 1.0
    return u_init + (1.0 - u_init) * step / warmup_steps


def clipped_ratio(u: Tensor, block_size: int) -> Tensor:
    """Block-wise clipped noise: min(1, max(u, 1 / block_size)), any shape (section 3.3).

    Below one token a block there is mostly nothing to learn from: a block of 4 draws no mask at
    all in 1 / (4 + 1) = 20 % of uniform levels.
    """
    return u.clamp(min=1.0 / block_size, max=1.0)


def elbo_weight(u: Tensor) -> Tensor:
    """w(t) = 1 / u(t): each masked token's share of the negative ELBO. Same shape as `u`."""
    return 1.0 / u

"""The entropy sink (DiffuCoder): how sure a model is of masked places, by how far off they are.

Masked models are surest beside what is already there: over the distance, confidence falls like an
L lying down. Not a forward pass: `models.certainty` makes the logits.
"""

import torch
from torch import Tensor

from diffusion.sampling import target_distribution


def certainty(logits_NV: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Probability of the likeliest token and entropy in nats, float32 [N] each.

    Of the plain model, at temperature 1, that never answers with the mask token.
    """
    probs = target_distribution(logits_NV, 1.0, 1.0, 0, mask_token_id)
    return probs.amax(-1), torch.special.entr(probs).sum(-1)


def distance_from_first_mask(hidden_VL: Tensor, block_L: Tensor) -> Tensor:
    """Places between each place and the leftmost hidden one of its block: int64 [V, L].

    `hidden_VL` bool says what each of V views of a completion hides, `block_L` int64 which block
    each place is in, counted from 0. What is returned for places that are not hidden means nothing.
    """
    views, length = hidden_VL.shape
    place = torch.arange(length, device=hidden_VL.device).expand(views, -1)
    hidden_place = place.masked_fill(~hidden_VL, length)
    block = block_L.expand(views, -1)
    first = torch.full_like(place, length).scatter_reduce(1, block, hidden_place, "amin")
    return place - first.gather(1, block)

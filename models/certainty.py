"""How sure a model was in the first passes of a decode: of every masked place, not the chosen ones.

Not decoding: passes are shown again from the step map, in the layout that the `trace` likelihood
uses, so every place has the context that it had then.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusion.layout import Sequence, build_rows
from diffusion.sink import certainty, distance_from_first_mask
from diffusion.views import EstimatorConfig, completion_blocks, make_views
from models.decoding import LOGIT_NUMBERS
from models.denoiser import Denoiser


@dataclass(frozen=True)
class MaskedPlaces:
    """What the first passes of one completion saw, one entry [N] per pass and masked place.

    step: the pass, counted from 0 in every block. place: tokens from the prompt. distance: places
    from the leftmost masked one of its block. confidence, entropy: of the plain model, see
    `diffusion.sink.certainty`.
    """

    step: Tensor
    place: Tensor
    distance: Tensor
    confidence: Tensor
    entropy: Tensor

    def rows(self) -> Iterator[tuple[int, int, int, float, float]]:
        """One tuple per masked place, the fields in order."""
        columns = (self.step, self.place, self.distance, self.confidence, self.entropy)
        return zip(*(column.tolist() for column in columns), strict=True)


@torch.no_grad()
def first_passes(denoiser: Denoiser, sequence: Sequence, passes: int) -> MaskedPlaces:
    """The masked places of one decoded completion in its first `passes` passes (of each block).

    Raises:
        ValueError: the sequence has no step map.
    """
    spec, device = denoiser.spec, next(denoiser.parameters()).device
    denoiser.eval()
    trace = EstimatorConfig(kind="trace")
    views = make_views(sequence, trace, spec.block_size, 0, spec.block_origin)
    hidden = views.hidden[:passes]
    rows = build_rows(
        [replace(sequence, supervised=len(sequence.completion_ids))],
        [hidden],
        mask_token_id=spec.mask_token_id,
        block_size=spec.block_size,
        logit_shift=spec.logit_shift,
        block_origin=spec.block_origin,
    ).to(device)
    states = denoiser.hidden(rows.input_ids, rows.position_ids, rows.attention_mask)
    states = states.reshape(-1, states.shape[-1])[rows.select]
    model_config: Any = denoiser.model.config
    size = max(1, LOGIT_NUMBERS // int(model_config.vocab_size))
    found = [certainty(denoiser.logits(part), spec.mask_token_id) for part in states.split(size)]
    confidence, entropy = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    step, place = hidden.nonzero(as_tuple=True)
    block = completion_blocks(sequence, spec.block_size, spec.block_origin)
    distance = distance_from_first_mask(hidden, block)[hidden]
    return MaskedPlaces(step, place, distance, confidence, entropy)

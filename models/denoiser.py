"""A stock transformers causal LM, used as a denoiser. Not a model definition: there is none here.

The 4-D boolean attention mask decides who sees whom, so the stock class needs no change; logits
are computed only where they are asked for, never as [rows, length, vocabulary].
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion.layout import TokenRows
from models.spec import DiffusionSpec

# Tokens whose logits exist at one time while training: bounds the memory of the last layer.
SCORE_CHUNK = 4096


class Denoiser(nn.Module):
    """Wraps `model` (a stock `...ForCausalLM`) with the facts in `spec`."""

    def __init__(self, model: nn.Module, spec: DiffusionSpec) -> None:
        super().__init__()
        self.model = model
        self.spec = spec

    def forward(self, rows: TokenRows) -> Tensor:
        """Log-probabilities float32 [N] of `rows.targets` at `rows.select` (a `TokenScorer`)."""
        hidden = self.hidden(rows.input_ids, rows.position_ids, rows.attention_mask)
        chosen = hidden.reshape(-1, hidden.shape[-1])[rows.select]
        if len(chosen) <= SCORE_CHUNK:
            return self._logps(chosen, rows.targets)
        # Recomputed in backward: only one chunk's [chunk, V] logits are alive at a time.
        parts = [
            checkpoint(self._logps, h, t, use_reentrant=False)
            for h, t in zip(chosen.split(SCORE_CHUNK), rows.targets.split(SCORE_CHUNK), strict=True)
        ]
        return torch.cat(parts)

    def hidden(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: Any = None
    ) -> Tensor:
        """Last hidden states [B, S, D]; `attention_mask` bool [B, 1, S, keys]."""
        return self.model.model(  # type: ignore[operator]
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.model.lm_head(hidden)  # type: ignore[operator]

    def _logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(self.logits(hidden).float(), targets, reduction="none")

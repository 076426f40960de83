"""A stock transformers causal LM, used as a denoiser. Not a model definition: there is none here.

The 4-D boolean attention mask decides who sees whom, so the stock class needs no change; logits
are computed only where they are asked for, never as [rows, length, vocabulary].
"""

from typing import Any

from torch import Tensor, nn

from diffusion.layout import TokenRows
from models.head import TargetHead
from models.spec import DiffusionSpec


class Denoiser(nn.Module):
    """Wraps `model` (a stock `...ForCausalLM`) with the facts in `spec`."""

    def __init__(self, model: nn.Module, spec: DiffusionSpec) -> None:
        super().__init__()
        model.lm_head = TargetHead.over(model.lm_head)  # type: ignore[arg-type]
        self.model = model
        self.spec = spec

    def forward(self, rows: TokenRows) -> Tensor:
        """Log-probabilities float32 [N] of `rows.targets` at `rows.select` (a `TokenScorer`)."""
        hidden = self.hidden(rows.input_ids, rows.position_ids, rows.attention_mask)
        chosen = hidden.reshape(-1, hidden.shape[-1])[rows.select]
        return self.model.lm_head(chosen, rows.targets)  # type: ignore[operator]

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

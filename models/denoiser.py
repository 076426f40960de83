"""A stock transformers causal LM, used as a denoiser. Not a model definition: there is none here.

The attention mask that is handed in decides who sees whom, so the stock class needs no change;
logits are computed only where they are asked for, never as [rows, length, vocabulary].
"""

from typing import Any

from torch import Tensor, nn

from diffusion.layout import TokenRows
from models.attention import TILE, Backend, install, mask_arguments
from models.head import TargetHead
from models.spec import DiffusionSpec


class Denoiser(nn.Module):
    """Wraps `model` (a stock `...ForCausalLM`) with the facts in `spec`."""

    def __init__(self, model: nn.Module, spec: DiffusionSpec) -> None:
        super().__init__()
        model.lm_head = TargetHead.over(model.lm_head)  # type: ignore[arg-type]
        self.model = model
        self.spec = spec
        self.backend: Backend = "sdpa"

    def use(self, backend: Backend) -> "Denoiser":
        """Score rows with this attention back-end from now on; returns itself."""
        self.backend = backend
        install(self.model, backend)
        return self

    def forward(self, rows: TokenRows) -> Tensor:
        """Log-probabilities float32 [N] of `rows.targets` at `rows.select` (a `TokenScorer`)."""
        if self.backend == "flex":
            rows = rows.padded(TILE)
        masks = mask_arguments(self.backend, rows.pattern)
        hidden = self.hidden(rows.input_ids, rows.position_ids, **masks)
        chosen = hidden.reshape(-1, hidden.shape[-1])[rows.select]
        return self.model.lm_head(chosen, rows.targets)  # type: ignore[operator]

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Any,
        cache: Any = None,
        **masks: Any,
    ) -> Tensor:
        """Last hidden states [B, S, D].

        Args:
            attention_mask: bool [B, 1, S, keys], with any back-end; or, with `masks`, what
                `mask_arguments` made for the one in use.
        """
        return self.model.model(  # type: ignore[operator]
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **masks,
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.model.lm_head(hidden)  # type: ignore[operator]

"""The last layer as a question: how likely is this token here? Never a [positions, V] tensor.

Not a loss and not a sampler (`Denoiser.logits` still gives whole rows to the decoder). Forward and
backward walk the vocabulary in slices: memory is bounded by a budget whatever the number of
positions, each slice of the weight's gradient is one matrix product (so bfloat16 sums stay in the
product's float32 accumulator), and the logits are computed again in backward instead of kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Logits alive at one time. On a CPU 8 MiB of float32, which stays in its last cache (a fifth faster
# than 32 MiB); elsewhere 128 MiB, for wide products. Slices are never narrower than MIN_SLICE.
CPU_BUDGET = 2**21
LOGIT_BUDGET = 2**25
MIN_SLICE = 256


class TargetHead(nn.Linear):
    """An output layer that can also answer for single targets.

    It *is* the checkpoint's `lm_head` (the same parameters under the same name), so tied embeddings
    stay tied, and hooks that gather a sharded weight (ZeRO-3) fire as for any other layer.
    """

    @classmethod
    def over(cls, linear: nn.Linear) -> "TargetHead":
        """The same layer as a `TargetHead`: shares `linear`'s parameters."""
        if isinstance(linear, cls):
            return linear
        head = cls(1, 1, bias=linear.bias is not None, device="meta")
        head.in_features, head.out_features = linear.in_features, linear.out_features
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits [..., V] of `hidden` [..., D]; or, with `targets` int64 [N] and `hidden` [N, D],
        the targets' log-probabilities [N] (float32, or float64 of float64)."""
        if targets is None:
            return super().forward(hidden)
        kind = hidden.device.type
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(kind):  # as autocast treats a linear layer
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return _TargetLogps.apply(hidden, weight, bias, targets)


class _TargetLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[targets], slice by slice of the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        total = torch.full(
            targets.shape, -torch.inf, dtype=_exact(hidden.dtype), device=hidden.device
        )
        chosen = torch.zeros_like(total)
        room = _Room(hidden, weight, bias)
        for start, stop in _slices(targets, len(weight)):
            logits = room.logits(start, stop)
            here, column = _inside(targets, start, stop)
            chosen[here] = logits[here, column]
            highest = logits.amax(-1)
            summed = logits.sub_(highest[:, None]).exp_().sum(-1).log_().add_(highest)
            total = torch.logaddexp(total, summed)
        ctx.save_for_backward(hidden, weight, bias, targets, total)
        return chosen - total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, total = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden, dtype=total.dtype) if wanted[0] else None
        grad_weight = torch.empty_like(weight) if wanted[1] else None
        grad_bias = torch.empty_like(bias) if bias is not None and wanted[2] else None
        room = _Room(hidden, weight, bias)
        for start, stop in _slices(targets, len(weight)):
            # d logp / d logits = onehot - softmax, times the token's own gradient.
            slope = room.logits(start, stop).sub_(total[:, None]).exp_().mul_(-grad[:, None])
            here, column = _inside(targets, start, stop)
            slope[here, column] += grad[here]
            if grad_bias is not None:
                grad_bias[start:stop] = slope.sum(0)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden += slope @ weight[start:stop]
            if grad_weight is not None:
                torch.mm(slope.T, hidden, out=grad_weight[start:stop])
        out = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return out, grad_weight, grad_bias, None


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Room:
    """One piece of memory for the logits of all slices, which take turns in it.

    Allocated anew, every slice would be fresh pages, or holes in the heap, of several MiB.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._layer = hidden, weight, bias
        self._memory = hidden.new_empty(0, dtype=_exact(hidden.dtype))

    def logits(self, start: int, stop: int) -> Tensor:
        """Logits [N, stop - start] of a slice; the next call writes over them."""
        hidden, weight, bias = self._layer
        shape = len(hidden), stop - start
        if self._memory.numel() < shape[0] * shape[1]:
            self._memory = self._memory.new_empty(shape[0] * shape[1])
        logits = self._memory[: shape[0] * shape[1]].view(shape)
        part = None if bias is None else bias[start:stop]
        if logits.dtype != hidden.dtype:
            return logits.copy_(nn.functional.linear(hidden, weight[start:stop], part))
        torch.mm(hidden, weight[start:stop].T, out=logits)
        return logits if part is None else logits.add_(part)


def _slices(targets: Tensor, vocabulary: int) -> Iterator[tuple[int, int]]:
    budget = CPU_BUDGET if targets.device.type == "cpu" else LOGIT_BUDGET
    width = max(MIN_SLICE, budget // max(len(targets), 1))
    for start in range(0, vocabulary, width):
        yield start, min(start + width, vocabulary)


def _inside(targets: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a slice (int64 places), and their columns in it."""
    here = ((targets >= start) & (targets < stop)).nonzero()[:, 0]
    return here, targets[here] - start

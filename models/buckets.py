"""How an engine hands out its parameters: in what portions, under which names. Not how they travel
(`workers.wire`).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from models.lora import stock_name


def split_buckets(
    parameters: Iterable[tuple[str, nn.Parameter]], max_bytes: int
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Cut the parameters, in their order, into lists of at most `max_bytes` (one may exceed it)."""
    bucket: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, value in parameters:
        # A ZeRO-3 parameter is empty between uses; DeepSpeed keeps its real size here.
        elements = value.ds_numel if hasattr(value, "ds_numel") else value.numel()
        bytes_here = elements * value.element_size()
        if bucket and size + bytes_here > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, value))
        size += bytes_here
    if bucket:
        yield bucket


def export_name(name: str) -> str:
    """The HF name of a denoiser's parameter: without the wrapper's `model.` prefix and peft's."""
    return stock_name(name.removeprefix("model."))


def export_tensor(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on the CPU that no later step can change."""
    return value.detach().to(device="cpu", dtype=dtype or value.dtype, copy=True)

"""A frozen module that lives on the host and visits the device. Not for modules that are trained.

The optimizer's state is offloaded by DeepSpeed (`engine.offload_optimizer`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """`module` on `device` while the block runs; what is there already is not copied.

    Nothing is copied back, because nothing may change: its own numbers stay where they live, and
    the device's copies are let go at the end. Collect its results before.
    """
    parts = [*module.parameters(), *module.buffers()]
    homes = [part.data for part in parts]
    try:
        for part in parts:
            part.data = _brought(part.data, device)
        yield module
    finally:
        for part, home in zip(parts, homes, strict=True):
            part.data = home


def _brought(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device, non_blocking=True)

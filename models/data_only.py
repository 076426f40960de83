"""Reading DeepSpeed's checkpoint files, which are pickles, without running anything in them.

Our own files need none of this: they are read with `weights_only=True` or are safetensors.
"""

import contextlib
import os
from collections.abc import Iterator

import torch

_SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def data_only() -> Iterator[None]:
    """While it lasts, no file that DeepSpeed reads can run code (it asks for plain unpickling).

    `torch.load` then takes tensors, plain values and three classes of DeepSpeed's, and raises
    UnpicklingError at anything else.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed announces its choice
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ[_SWITCH]
        if before is not None:
            os.environ[_SWITCH] = before

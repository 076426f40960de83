"""DeepSpeed shards of N ranks made whole: for M ranks, or for an export. Not the engine.

`resharded` is DeepSpeed's universal checkpoint, under a temporary name and without its chatter.
`read_policy` reads parameters only, in one process, with no torch.distributed.
"""

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError
from models.buckets import export_name
from models.data_only import data_only
from models.engine import TORCH_FILE, EngineConfig
from models.engine_meta import read_meta
from models.lora import LoraConfig, merged_state

TAG = "engine"
SHARDS = "*_optim_states.pt"
REPLICA = "mp_rank_00_model_states.pt"
# What torch and DeepSpeed raise for files that are damaged or do not belong together.
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    UnpicklingError,
    AssertionError,
)


def is_replicated(folder: Path) -> bool:
    """Whether rank 0 wrote everything (ZeRO 0): any number of ranks can read it."""
    return not any(folder.glob(SHARDS))


def check_engine(folder: Path, config: EngineConfig, ranks: int) -> str | None:
    """Whether a run of this engine can go on from `folder`: a remark, if that takes a conversion.

    Raises:
        UserError: another kind, ZeRO stage, precision or other adapters.
    """
    ours: dict[str, Any] = {"kind": config.kind, "precision": config.precision}
    ours["lora"] = config.adapters
    if config.kind == "deepspeed":
        ours["zero_stage"] = config.zero_stage
    saved = read_meta(folder, ours).get("ranks", 1)
    if saved == ranks:
        return None
    converted = "" if is_replicated(folder / TAG) else " (its shards are converted first)"
    return f"saved by {saved} learner ranks, goes on with {ranks}{converted}"


@contextlib.contextmanager
def resharded(folder: Path, rank: int) -> Iterator[Path]:
    """The shards in `folder` as one universal checkpoint beside them, gone at the end.

    Collective: rank 0 converts, the others wait. All ranks must see the same file system.

    Raises:
        UserError: no room or no right to write, or shards that do not fit together; on every rank.
    """
    whole = folder.with_name(f".{folder.name}.universal")
    problem = _convert(folder, whole) if rank == 0 else None
    try:
        said: list[str | None] = [problem]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(said, src=0)
        if said[0] is not None:
            raise UserError(said[0])
        yield whole
        if dist.get_world_size() > 1:
            dist.barrier()
    finally:
        if rank == 0:
            shutil.rmtree(whole, ignore_errors=True)
            whole.with_name("latest_universal").unlink(missing_ok=True)


def _convert(folder: Path, whole: Path) -> str | None:
    """Write the universal checkpoint; what went wrong, if anything (the others must hear it)."""
    from deepspeed.checkpoint.ds_to_universal import main

    shutil.rmtree(whole, ignore_errors=True)
    arguments = Namespace(
        input_folder=str(folder),
        output_folder=str(whole),
        num_extract_workers=1,  # more would be processes forked from one with threads
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with _silence(), data_only():
            main(arguments)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:160]
        return (
            f"{folder}: cannot be made whole for another number of ranks ({reason}); set "
            "cluster.learner.ranks back"
        )
    return None


def whole_weights(folder: Path) -> dict[str, Tensor]:
    """All parameters of a checkpoint by the module's names.

    Below ZeRO-3 as the forward pass uses them; ZeRO-3, which divides them, gives float32 (bf16:
    the optimizer's masters of those that are trained).
    """
    with _silence(), data_only():
        if (folder / REPLICA).is_file():
            state = torch.load(folder / REPLICA, map_location="cpu", weights_only=True, mmap=True)
            return dict(state["module"])
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))


def read_policy(folder: Path) -> dict[str, Tensor]:
    """The parameters in an engine's folder as `state_buckets` would give them: HF names, tied once.

    One process and no torch.distributed, however many ranks wrote the folder.

    Raises:
        UserError: no engine's folder, or damaged.
    """
    meta = read_meta(folder)
    try:
        if meta["kind"] == "torch":
            found = torch.load(folder / TORCH_FILE, map_location="cpu", weights_only=True)["module"]
        else:
            found = whole_weights(folder / TAG)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{folder}: cannot be read ({reason})") from error
    dtype = torch.bfloat16 if meta["precision"] == "bf16" else torch.float32
    tied = {name: (value.data_ptr(), value.shape) for name, value in found.items()}
    first: dict[Any, str] = {}
    for name, place in tied.items():
        first.setdefault(place, name)
    state = {name: found[name].to(dtype) for name in first.values()}
    if meta.get("lora") is not None:
        state = merged_state(state, LoraConfig(**meta["lora"]))
    return {export_name(name): value for name, value in state.items()}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """DeepSpeed prints its progress; tqdm draws its bars on stderr."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield

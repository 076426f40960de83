"""`unmask export`: any saved step as a Hugging Face folder. One process, whatever saved it.

No workers are started: DeepSpeed's shards are put together from their files.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError
from common.integrity import find_damage
from common.progress import Progress
from models.checkpoint import save_checkpoint
from models.reshard import read_policy
from models.spec import DiffusionSpec
from models.tokenizer import load_tokenizer
from rl.checkpoint import Checkpoints, is_complete
from rl.origin import DESCRIPTION

EXPORT_MARK = "training_step.json"
STAGES = 4


def export_step(run: Path, step: int | None, out: Path, progress: Progress) -> Path:
    """Write step `step` of a run (None: the last saved) to `out`; returns the checkpoint used.

    Written under another name and renamed: `out` is whole or absent.

    Raises:
        UserError: `out` exists, no such step, a damaged checkpoint, no room.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; remove it or write elsewhere")
    checkpoint = _find(run, step)
    progress.stage("export", STAGES)
    if (damage := find_damage(checkpoint)) is not None:
        raise UserError(f"{checkpoint} is damaged ({damage}); export another step")
    progress.update(1)
    state = read_policy(checkpoint / "policy")
    progress.update(2)
    described = checkpoint / DESCRIPTION
    model = _model(described, state)
    progress.update(3)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        spec = DiffusionSpec.load(described)
        save_checkpoint(partial, model, load_tokenizer(described), spec, state)
        mark_step(partial, int(checkpoint.name.rpartition("_")[2]))
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress.update(STAGES)
    return checkpoint


def mark_step(folder: Path, step: int) -> None:
    """Say in an exported folder which step it holds."""
    (folder / EXPORT_MARK).write_text(json.dumps({"step": step}) + "\n")


def exported_step(folder: Path) -> int | None:
    """Which step an exported folder holds; None if it is not there, or not whole."""
    mark = folder / EXPORT_MARK
    return int(json.loads(mark.read_text())["step"]) if mark.is_file() else None


def _find(run: Path, step: int | None) -> Path:
    checkpoints = Checkpoints(run)
    if is_complete(run) and step is None:
        return run
    found = checkpoints.latest() if step is None else checkpoints.folder / f"global_step_{step}"
    if found is None or not is_complete(found):
        saved = ", ".join(path.name.rpartition("_")[2] for path in checkpoints.saved())
        there = f"saved steps: {saved}" if saved else "nothing is saved there"
        wanted = "" if step is None else f" of step {step}"
        raise UserError(f"{run}: no checkpoint{wanted}; {there}")
    return found


def _model(described: Path, state: dict[str, Tensor]) -> nn.Module:
    """The model without a second copy of its weights."""
    config = AutoConfig.from_pretrained(described, local_files_only=True)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    names = {name for name, _ in model.named_parameters()}
    if names != state.keys():
        odd = sorted(names ^ state.keys())
        raise UserError(
            f"{described.parent}: its weights are not those of its config.json ({odd[0]} and "
            f"{len(odd) - 1} other names differ); export another step"
        )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    return model

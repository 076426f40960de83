"""Reading and writing checkpoints: a Hugging Face folder plus `diffusion.json`.

Public folders (`models.families`) are brought in with `import_checkpoint`, or mapped while loading.

Not training state (`models.engine` saves that). A saved folder loads in stock transformers with
`AutoModelForCausalLM`, no remote code.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from common.errors import UserError
from models.denoiser import Denoiser
from models.public import ImportOptions, Plan, load_public, plan_import, public_plan
from models.spec import SPEC_FILE, DiffusionSpec
from models.stops import check_stop_ids, stop_ids
from models.tokenizer import check_tokenizer, load_tokenizer

# Bars of a second's work would stand between the user and the one line that an error is.
hf_logging.disable_progress_bar()

# Largest file of weights: small enough to copy and to resume copying.
SHARD = "5GB"

# What transformers raises for a folder or a config that it does not take.
REFUSALS = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)


@dataclass(frozen=True)
class Checkpoint:
    """A model that can denoise, with its tokenizer."""

    denoiser: Denoiser
    tokenizer: PreTrainedTokenizerFast
    folder: Path

    @property
    def spec(self) -> DiffusionSpec:
        """What the logits mean."""
        return self.denoiser.spec


def load_checkpoint(
    folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Checkpoint:
    """Load model, tokenizer and `diffusion.json`; a public folder is mapped on the way.

    Raises:
        UserError: no such folder, no diffusion.json, weights that do not fit config.json, or a
            tokenizer or stop tokens that do not fit the model.
    """
    folder = Path(folder)
    check_checkpoint(folder)
    plan = public_plan(folder)
    if plan is not None:
        model = load_public(plan, dtype).to(device)
        return Checkpoint(Denoiser(model, plan.spec), plan.tokenizer, folder)
    spec = DiffusionSpec.load(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
        )
    except REFUSALS as error:
        raise UserError(f"{folder}: cannot load the weights: {_line(error)}") from error
    if report["missing_keys"]:  # transformers would go on with random numbers in their place
        names = sorted(report["missing_keys"])
        raise UserError(
            f"{folder}: the weights lack {names[0]} ({len(names)} missing); "
            "they do not belong to this config.json, or were not written to the end"
        )
    tokenizer = load_tokenizer(folder)
    size, mask = model.config.vocab_size, spec.mask_token_id
    check_tokenizer(tokenizer, size, mask, folder)
    check_stop_ids(stop_ids(model, tokenizer), size, mask, folder)
    return Checkpoint(Denoiser(model.to(device), spec), tokenizer, folder)


def import_checkpoint(source: Path, out: Path, options: ImportOptions) -> Plan:
    """Write a public folder as one of ours; says what was understood.

    Written under another name and renamed: `out` is whole or absent.

    Raises:
        UserError: `out` exists, or as `plan_import` and `load_public`.
    """
    check_checkpoint(source)
    if (source / SPEC_FILE).exists():
        raise UserError(f"{source}: has a {SPEC_FILE} already; use it as it is")
    if out.exists():
        raise UserError(f"{out}: exists already; remove it or write elsewhere")
    plan = plan_import(source, options)
    model = load_public(plan)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_checkpoint(partial, model, plan.tokenizer, plan.spec)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return plan


def check_checkpoint(folder: Path) -> None:
    """UserError if `folder` cannot be a checkpoint; loads nothing."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json there; model.path must be a checkpoint folder, "
            "for example runs/demo/stages/sft"
        )
    # With peft installed transformers would load another model that this file names.
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: has an adapter_config.json; merge the adapters into the weights first "
            "(peft: merge_and_unload) and remove it"
        )


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    spec: DiffusionSpec,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder that stock transformers loads; `state` (HF names) replaces the own weights."""
    folder.mkdir(parents=True, exist_ok=True)
    # With accelerate (peft brings it) transformers imports DeepSpeed here: see deepspeed_engine.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    model.save_pretrained(  # type: ignore[operator]
        folder,
        state_dict=None if state is None else dict(state),
        max_shard_size=SHARD,
    )
    tokenizer.save_pretrained(folder)
    spec.save(folder)


def new_model(architecture: Mapping[str, object], seed: int) -> nn.Module:
    """A freshly initialised stock model; `architecture` is a transformers config with model_type.

    The seed is set in a forked generator scope: the caller's global randomness is untouched.

    Raises:
        UserError: a key or value that this kind of model does not have.
    """
    values = dict(architecture)
    model_type = str(values.pop("model_type"))
    try:
        # transformers keeps keys it does not know, and builds the default beside them.
        known = AutoConfig.for_model(model_type)
        unknown = [key for key in values if not hasattr(known, key) and key != "rope_theta"]
        if unknown:
            raise UserError(f"architecture.{unknown[0]}: {model_type} has no such key; correct it")
        # A token that is not named is said to be none, else the class has a default.
        tokens = {f"{kind}_token_id": None for kind in ("bos", "eos", "pad")}
        config = AutoConfig.for_model(model_type, **tokens | values)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except REFUSALS as error:
        raise UserError(f"architecture: {_line(error)[:300]}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())

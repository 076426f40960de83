"""Pretraining, stage after stage: `python -m pretrain.train --config F a.b=c`.

Files and order only; what a stage does is `pretrain.stages`. Under torchrun or deepspeed the
ranks share the rows (RANK, WORLD_SIZE); alone it is one process.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from common.config import dump_config, load_config
from common.errors import UserError
from common.exits import exit_codes
from common.metrics import Metrics, Sink, open_metrics
from common.progress import Progress, SilentProgress, open_progress
from common.seeding import derive_seed
from models.attention import check_attention, choose_attention
from models.checkpoint import load_checkpoint, new_model, save_checkpoint
from models.denoiser import Denoiser
from models.engine import Engine, make_engine
from models.lora import check_lora
from models.tokenizer import train_tokenizer
from pretrain.config import PretrainConfig
from pretrain.data import Example, RowStream, encode_examples
from pretrain.sources import load_examples
from pretrain.stages import StageResult, StageSection, run_stage

_STAGE_FILE = "stage.json"


def stage_folder(run_folder: Path, stage: str) -> Path:
    """Where a finished stage's checkpoint lies."""
    return run_folder / "stages" / stage


def stage_record(folder: Path) -> dict[str, Any]:
    """`fingerprint`, `seconds` and the rest of what a finished stage's folder tells; else {}.

    Raises:
        UserError: a damaged record.
    """
    path = folder / _STAGE_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
        return {
            **record,
            "fingerprint": str(record["fingerprint"]),
            "seconds": float(record["seconds"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged ({error}); remove {folder} to train the stage again"
        ) from error


class Pretraining:
    """All stages with their rows, read and tokenized. Nothing is written before `run`.

    Raises:
        UserError: bad data or settings.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self._rank = int(os.environ.get("RANK", "0"))
        self._world = int(os.environ.get("WORLD_SIZE", "1"))
        if config.threads:
            torch.set_num_threads(config.threads)
        _check_ranks(config, self._world)
        _check_engine(config)
        seed, data_seed = config.run.seed, config.run.data_seed
        examples = {s.name: load_examples(s.data, s.count, data_seed) for s in config.stages}
        self._tokenizer, self._start = _tokenizer_and_start(config, examples)
        if self._start is None:
            with torch.device("meta"):  # a bad architecture is found now, at no cost
                _start_model(config, None, self._tokenizer)
        self._streams = [_stream(s, examples[s.name], self._tokenizer, seed) for s in config.stages]
        self._marks = [_fingerprint(config, n, examples) for n in range(len(config.stages))]

    def run(self, sink: Sink, progress: Progress) -> list[Path]:
        """Run every stage that is not finished yet; returns the stages' checkpoint folders.

        A stage is reused if its folder was written by the same settings (its own and those of
        the stages before it) and seed.
        """
        folders, previous = [], self._start
        engine: Engine | None = None
        for stage, stream, mark in zip(self.config.stages, self._streams, self._marks, strict=True):
            folder = stage_folder(self.config.run.folder, stage.name)
            made = stage_record(folder).get("fingerprint") if self.config.resume == "auto" else None
            if made == mark:
                progress.say(f"stage {stage.name}: finished before, reused ({folder})")
            else:
                model = _start_model(self.config, previous, self._tokenizer)
                job = _StageJob(stage, self.config, model, self._tokenizer, folder, mark)
                engine = job.run(stream, sink, progress, self._rank, self._world)
            folders.append(folder)
            previous = folder
        if engine is not None:
            engine.close()  # only now: the ranks' group serves all stages and cannot be made twice
        return folders


class _StageJob:
    """One stage with what it needs to be trained and written."""

    def __init__(
        self,
        stage: StageSection,
        config: PretrainConfig,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        folder: Path,
        fingerprint: str,
    ) -> None:
        self.stage, self.config, self.model = stage, config, model
        self.tokenizer, self.folder, self.fingerprint = tokenizer, folder, fingerprint
        self.spec = stage.spec(int(tokenizer.mask_token_id))

    def run(
        self, stream: RowStream, sink: Sink, progress: Progress, rank: int, world: int
    ) -> Engine:
        """Train, then write the checkpoint under a temporary name and rename it."""
        stage = self.stage
        settings = self.config.engine
        backend = choose_attention(
            settings.attention, self.spec.attention, settings.precision, self.model.config
        )
        denoiser = Denoiser(self.model, self.spec).use(backend)
        optim = stage.optim.for_steps(stage.steps)
        engine = make_engine(denoiser, settings, optim, rank, world)
        progress.stage(stage.name, stage.steps)

        def on_step(step: int, metrics: Mapping[str, float]) -> None:
            sink.log(metrics, step=step + 1, stage=stage.name)
            progress.update(step + 1, loss=metrics["pretrain/loss"])

        seed = derive_seed(self.config.run.seed, "stage", stage.name)
        result = run_stage(stage, engine, stream, self.spec.mask_token_id, seed, on_step)
        state = _gather(engine)
        if rank == 0:
            self._write(state, result)
        engine.sum_over_ranks({"written": 1.0})  # all wait: the next stage reads the folder
        return engine

    def _write(self, state: dict[str, Tensor], result: StageResult) -> None:
        partial = self.folder.with_name(f".{self.folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_checkpoint(partial, self.model, self.tokenizer, self.spec, state)
        record = {"stage": self.stage.name, "fingerprint": self.fingerprint, **asdict(result)}
        (partial / _STAGE_FILE).write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(self.folder, ignore_errors=True)
        partial.rename(self.folder)


def _check_ranks(config: PretrainConfig, world: int) -> None:
    for stage in config.stages:
        micro_batches = stage.rows_per_step // stage.rows_per_micro_batch
        if micro_batches % world:
            raise UserError(
                f"stages.{stage.name}: {micro_batches} micro-batches a step do not divide among "
                f"{world} ranks; change rows_per_step or rows_per_micro_batch"
            )


def _check_engine(config: PretrainConfig) -> None:
    engine = config.engine
    check_lora(engine.lora)
    for stage in config.stages:
        visible = stage.spec(mask_token_id=0).attention  # whatever the mask token will be
        try:
            check_attention(engine.attention, visible, engine.precision)
        except UserError as error:
            raise UserError(f"stages.{stage.name}: {error}") from error


def _tokenizer_and_start(
    config: PretrainConfig, examples: dict[str, list[Example]]
) -> tuple[PreTrainedTokenizerFast, Path | None]:
    if config.start is not None:
        start = load_checkpoint(config.start)
        if start.tokenizer.mask_token_id is None:
            mask = start.spec.mask_token_id
            start.tokenizer.mask_token = start.tokenizer.convert_ids_to_tokens(mask)
        return start.tokenizer, config.start
    texts = (f"{e.prompt}\n{e.text}" for stage in config.stages for e in examples[stage.name])
    return train_tokenizer(texts, config.tokenizer.vocab_size), None


def _stream(
    stage: StageSection, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, seed: int
) -> RowStream:
    block_size = stage.block_size if stage.objective == "block" else 1
    origin = stage.block_origin
    try:
        documents = encode_examples(
            examples,
            tokenizer,
            block_size,
            stage.row_length,
            seed,
            canvas=stage.canvas,
            block_origin=origin,
        )
    except UserError as error:
        raise UserError(f"stages.{stage.name} ({stage.data}): {error}") from error
    rows = (stage.row_length, block_size, stage.rows_per_step)
    return RowStream(documents, *rows, derive_seed(seed, "rows", stage.name), origin)


def _start_model(
    config: PretrainConfig, previous: Path | None, tokenizer: PreTrainedTokenizerFast
) -> nn.Module:
    if previous is not None:
        return load_checkpoint(previous).denoiser.model
    architecture = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        **config.architecture,
    }
    return new_model(architecture, derive_seed(config.run.seed, "init") % 2**31)


def _gather(engine: Engine) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for bucket in engine.state_buckets():
        state |= bucket
    return state


def _fingerprint(config: PretrainConfig, number: int, examples: dict[str, list[Example]]) -> str:
    """Names everything that a stage's weights depend on."""
    values = config.model_dump(mode="json")
    kept = {key: values[key] for key in ("architecture", "start", "tokenizer", "engine")}
    # The tokenizer is trained on the text of all stages, so their data belongs to it: the text
    # itself, because a file may change under its name.
    data = [(e.prompt, e.text) for stage in config.stages for e in examples[stage.name]]
    named = [kept, values["run"]["seed"], values["stages"][: number + 1], data]
    text = json.dumps(named, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c, any key")] = None,
    config: Annotated[Path, typer.Option(help="YAML")] = Path("configs/pretrain/tiny_cpu.yaml"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved config")] = False,
) -> None:
    """Make a model: AR, then block diffusion, then SFT.

    Example: unmask pretrain --config configs/pretrain/tiny_cpu.yaml run.seed=1
    """
    with exit_codes("interrupted; finished stages are kept and will be reused"):
        settings = load_config(PretrainConfig, config, overrides or [])
        if dry_run:
            sys.stdout.write(dump_config(settings))
            return
        _run(settings)


def _run(config: PretrainConfig) -> None:
    pretraining = Pretraining(config)
    if int(os.environ.get("RANK", "0")) != 0:
        pretraining.run(Metrics([]), SilentProgress())
        return
    folder = config.run.folder
    with (
        open_progress() as progress,
        open_metrics(folder, config.metrics, progress.say, config.model_dump(mode="json")) as sink,
    ):
        for stage in pretraining.run(sink, progress):
            progress.say(str(stage))


if __name__ == "__main__":
    typer.run(main)

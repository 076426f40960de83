"""`make demo`: pretrain the stages, evaluate each, train by RL, evaluate, write the report.

Only the order, what can be reused, and where the seconds and the memory went; every step is what
`unmask pretrain`, `train`, `evaluate` and `report` do by themselves. A stage is reused if it was
finished with the same settings; `--fresh` starts anew.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic, time
from typing import Annotated, Any

import psutil
import typer
from pydantic import Field
from rich.console import Console

from common.config import Section, dump_config, load_config
from common.errors import UserError
from common.exits import exit_codes
from common.files import private_folder
from common.memory import PeakMemory
from common.metrics import METRICS_FILE, open_metrics, read_metrics
from common.progress import Progress, open_progress
from common.records import Problem
from models.checkpoint import load_tokenizer
from pretrain.config import PretrainConfig
from pretrain.train import Pretraining, stage_folder, stage_record
from rewards.compose import RewardConfig
from rl.config import load_train_config
from rl.data import take_problems
from rl.evaluate import evaluate_checkpoint
from rl.problems.compose import document_head
from rl.report import PIPELINE_FILE, stage_table, write_report
from rl.results import FOLDER as EVALUATIONS
from rl.results import read_result, summarise, write_result
from rl.train import prepare

RL = "rl"


class DemoRun(Section):
    """Where everything goes, and the seed of everything drawn."""

    folder: str = "runs/demo"
    seed: int = 0


class Part(Section):
    """One half of the pipeline: its own config file, and overrides of it."""

    config: str
    overrides: tuple[str, ...] = ()


class EvaluateConfig(Section):
    """The held-out problems: `count` of `source`; `samples` completions each beside the greedy one.

    Reward, decoding and prompt limit are those of the RL half. The stages in `base` have only seen
    plain code: they are asked as their corpus asks, with a comment, and answer without a fence.
    """

    source: str = "embedded:test"
    count: int = Field(default=320, ge=1)
    samples: int = Field(default=1, ge=0)
    ks: tuple[int, ...] = ()
    base: tuple[str, ...] = ()


class DemoConfig(Section):
    """All of `configs/demo.yaml`."""

    run: DemoRun = DemoRun()
    pretrain: Part
    rl: Part
    evaluate: EvaluateConfig = EvaluateConfig()


class Demo:
    """One pipeline in one run folder. Everything bad in the configs is found by the constructor."""

    def __init__(self, config: DemoConfig) -> None:
        run = config.run
        self.config, self.folder, self.seed = config, Path(run.folder), run.seed
        common = [f"run.folder={run.folder}", f"run.seed={run.seed}"]
        self.pretraining = load_config(
            PretrainConfig,
            Path(config.pretrain.config),
            [*config.pretrain.overrides, *common, "resume=auto"],
        )
        self.last_stage = stage_folder(self.folder, self.pretraining.stages[-1].name)
        own = [*common, "run.resume=auto", f"model.path={self.last_stage}"]
        rl_file = Path(config.rl.config)
        self.training = load_train_config(rl_file, [*config.rl.overrides, *own])
        self.problems = take_problems(
            config.evaluate.source, config.evaluate.count, self.training.data.seed
        )
        self.notes: dict[str, Any] = {}
        self._worked = 0.0  # seconds of this process in phases that were not reused

    def run(self, progress: Progress, fresh: bool) -> dict[str, Any]:
        """The whole pipeline; returns the contents of `report.json`.

        Raises:
            UserError: bad input. InfrastructureError: a worker failed.
        """
        self._make_room(progress, fresh)
        self.notes = _read_json(self.folder / PIPELINE_FILE)
        with PeakMemory() as memory:
            try:
                self._pretrain(progress)
                for stage in self.pretraining.stages:
                    checkpoint = stage_folder(self.folder, stage.name)
                    self._evaluate(stage.name, checkpoint, progress)
                self._evaluate(RL, self._train(progress), progress)
            finally:
                if self._worked > 0:  # a run that reuses everything says nothing of the pipeline
                    self._note_memory(memory)
        if self._worked > 0:  # imports, problems, report: what no phase counts
            self._spent("other", max(0.0, time() - psutil.Process().create_time() - self._worked))
        return write_report(self.folder)

    def _make_room(self, progress: Progress, fresh: bool) -> None:
        """A run of another seed is set aside, and this seed's is fetched back if there is one."""
        old = _read_json(self.folder / PIPELINE_FILE).get("seed", self.seed)
        aside, back = (
            self.folder.with_name(f"{self.folder.name}-seed{s}") for s in (old, self.seed)
        )
        if old != self.seed:
            shutil.rmtree(aside, ignore_errors=True)
            self.folder.rename(aside)
            progress.say(f"the run with seed {old} is kept in {aside}")
        if back.is_dir() and not self.folder.exists():
            back.rename(self.folder)
        if fresh and self.folder.exists():
            self._discard()
        private_folder(self.folder)

    def _discard(self) -> None:
        if not (self.folder / PIPELINE_FILE).is_file() and any(self.folder.iterdir()):
            raise UserError(
                f"run.folder={self.folder}: not made by `make demo`, so --fresh will not delete "
                "it; remove it yourself or choose another folder"
            )
        shutil.rmtree(self.folder)

    def _pretrain(self, progress: Progress) -> None:
        folders = {s.name: stage_folder(self.folder, s.name) for s in self.pretraining.stages}
        before = {name: _mark(folder) for name, folder in folders.items()}
        (self.folder / "pretrain.yaml").write_text(dump_config(self.pretraining))
        self._note(seed=self.seed, stages=[*folders, RL])
        began = monotonic()
        try:
            job = Pretraining(self.pretraining)
            with open_metrics(self.folder, self.pretraining.metrics, progress.say) as sink:
                job.run(sink, progress)
        finally:
            spent = monotonic() - began
            after = {name: _mark(folder) for name, folder in folders.items()}
            reused = [name for name in folders if after[name] and after[name] == before[name]]
            if any(before[name] and name not in reused for name in folders):  # settings changed
                self._spent("pretrain", None)
                spent += sum(self._stage_seconds(name) for name in reused)
            if len(reused) < len(folders):
                self._worked += monotonic() - began
                self._spent("pretrain", spent)

    def _train(self, progress: Progress) -> Path:
        mark = self._rl_mark()
        export, resumed = self.folder / "rl" / "hf", self.notes.get("rl_mark") == mark
        if not resumed and (self.folder / "rl").exists():
            progress.say("rl: its settings or its start changed, so it starts anew")
        if not resumed:
            shutil.rmtree(self.folder / "rl", ignore_errors=True)
            _forget(self.folder / METRICS_FILE, RL)
            self._note(rl_mark=mark, rl_done=False)
            self._spent(RL, None)
        if self.notes.get("rl_done") and export.is_dir():
            progress.say(f"stage {RL}: finished before, reused ({export})")
            return export
        with (
            self._timed(RL),
            open_metrics(self.folder, self.training.metrics, progress.say) as sink,
        ):
            prepare(self.training).run(sink, progress)
        self._note(rl_done=True)
        return export

    def _evaluate(self, stage: str, checkpoint: Path, progress: Progress) -> None:
        settings = self.config.evaluate
        # Stages differ in block size, so it is the checkpoint's own.
        decoding = replace(self.training.rollout.decoding, block_size=None, steps_per_block=None)
        seconds = self.notes["seconds"][RL] if stage == RL else self._stage_seconds(stage)
        weights = self.notes["rl_mark"] if stage == RL else _mark(checkpoint)
        mark = _digest(weights, settings.model_dump(mode="json"), repr(decoding), self.seed)
        path = self.folder / EVALUATIONS / f"{stage}.json"
        if path.is_file() and read_result(path).fingerprint == mark:
            progress.say(f"evaluation of {stage}: done before, reused")
            return
        total = len(self.problems) * (1 + settings.samples)
        progress.stage(f"evaluate {stage}", total)
        began = monotonic()
        self._spent(f"evaluate {stage}", None)
        with self._timed(f"evaluate {stage}"):
            problems, reward = self._as_asked(stage)
            evaluation = evaluate_checkpoint(
                checkpoint,
                problems,
                decoding,
                reward,
                samples=settings.samples,
                ks=settings.ks,
                seed=self.seed,
                on_progress=lambda done, _: progress.update(done),
            )
        result = summarise(
            evaluation,
            load_tokenizer(checkpoint),
            stage=stage,
            checkpoint=checkpoint,
            temperature=decoding.temperature,
            samples_per_problem=settings.samples,
            seconds=seconds,
            evaluate_seconds=monotonic() - began,
            seed=self.seed,
            fingerprint=mark,
        )
        write_result(self.folder, result)
        progress.say(f"{stage}: greedy pass@1 {100 * result.greedy.value:.1f} %")

    def _as_asked(self, stage: str) -> tuple[list[Problem], RewardConfig]:
        """The held-out problems and the judge, in the form that a stage was taught."""
        reward = self.training.scoring
        if stage not in self.config.evaluate.base:
            return self.problems, reward
        problems = [replace(p, prompt=document_head(str(p.prompt))) for p in self.problems]
        plain = {"code_block": "whole", "code_needs_format": False}
        return problems, reward.model_copy(update=plain)

    def _rl_mark(self) -> str:
        """Names everything that the RL stage's weights depend on."""
        values = self.training.model_dump(mode="json")
        kept = {key: value for key, value in values.items() if key not in ("metrics", "run")}
        return _digest(kept, self.seed, _mark(self.last_stage))

    def _stage_seconds(self, stage: str) -> float:
        return stage_record(stage_folder(self.folder, stage))["seconds"]

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Adds the seconds spent, also if interrupted: a resumed phase is the sum of its parts."""
        began = monotonic()
        try:
            yield
        finally:
            seconds = monotonic() - began
            self._worked += seconds
            self._spent(phase, seconds)

    def _spent(self, phase: str, seconds: float | None) -> None:
        """Add seconds to a phase; None starts its count anew."""
        phases = dict(self.notes.get("seconds", {}))
        if seconds is None:
            phases.pop(phase, None)
        else:
            phases[phase] = round(phases.get(phase, 0.0) + seconds, 2)
        self._note(seconds=phases, seconds_total=round(sum(phases.values()), 2))

    def _note_memory(self, memory: PeakMemory) -> None:
        peak = max(memory.gib, self.notes.get("peak_rss_gib", 0.0))
        self._note(peak_rss_gib=round(peak, 3), memory_is=memory.meaning)

    def _note(self, **values: Any) -> None:
        """Remember in `pipeline.json`, which the next `make demo` and the report read."""
        self.notes |= values
        path = self.folder / PIPELINE_FILE
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.notes, indent=2) + "\n")
        os.replace(partial, path)


def _mark(checkpoint: Path) -> str:
    return str(stage_record(checkpoint).get("fingerprint", ""))


def _digest(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: damaged ({error}); start anew with FRESH=1") from error
    return dict(values)


def _forget(path: Path, stage: str) -> None:
    """Drop a stage's records: it is about to be trained anew."""
    kept = [record for record in read_metrics(path) if record.get("stage") != stage]
    if path.is_file():
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))


def run_demo(
    config: Path, overrides: Sequence[str] = (), *, fresh: bool = False, console: Console
) -> dict[str, Any]:
    """Run the pipeline of a config file and print its table; returns `report.json`'s contents."""
    demo = Demo(load_config(DemoConfig, config, overrides))
    with open_progress(console) as progress:
        values = demo.run(progress, fresh)
    console.print(stage_table(values))
    memory, minutes = values["peak_rss_gib"], values["seconds_total"] / 60
    console.print(f"{minutes:.1f} minutes, {memory:.2f} GiB at most", highlight=False)
    console.print(f"report: {demo.folder / 'report.html'}", highlight=False, soft_wrap=True)
    return values


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a.b=c, any key of the file")
    ] = None,
    config: Annotated[Path, typer.Option(help="YAML file")] = Path("configs/demo.yaml"),
    seed: Annotated[
        int | None, typer.Option(help="of everything drawn; overrides run.seed")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="discard finished stages")] = False,
) -> None:
    """Pretrain, evaluate, train by RL and report: the whole of Unmask at laptop size."""
    seeds = [] if seed is None else [f"run.seed={seed}"]
    console = Console()
    with exit_codes("interrupted; the same command goes on from here"):
        run_demo(config, [*(overrides or []), *seeds], fresh=fresh, console=console)


if __name__ == "__main__":
    typer.run(main)

"""RL training: `python -m rl.train --config F a.b=c`, or `unmask train`. Files and checks only.

Everything a user can have got wrong is looked at before the first worker starts or anything is
written; what a step does is `rl.loop`.
"""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from common.config import dump_config
from common.errors import UserError
from common.exits import exit_codes
from common.files import private_folder
from common.metrics import Sink, open_metrics
from common.progress import Progress, open_progress
from common.records import Problem
from models.attention import check_attention
from models.lora import check_lora
from models.outline import Outline, load_outline
from models.reshard import check_engine
from models.tokenizer import encode_prompt
from rewards.compose import verify_rewards
from rl.checkpoint import Checkpoints, RunState, read_state
from rl.config import TrainConfig, load_train_config
from rl.data import ProblemStream, check_prompt_lengths, take_problems
from rl.evaluate import check_decoding, greedy
from rl.export import exported_step, mark_step
from rl.ledger import LEDGER_FILE, Ledger
from rl.loop import Loop
from rl.origin import Origin
from rl.protocol import Cluster, LoopPlan
from rl.saving import Saver
from workers.rollout import rollout_dtype

STAGE = "rl"


@dataclass(frozen=True)
class Job:
    """A checked run: what `prepare` found, and where it goes on from (`resume_from` None: anew)."""

    config: TrainConfig
    stream: ProblemStream
    test: list[Problem]
    state: RunState
    resume_from: Path | None
    origin: Origin
    remarks: tuple[str, ...] = ()  # what a resume found: damage passed over, changed settings

    @property
    def export_folder(self) -> Path:
        """The trained model as a Hugging Face folder."""
        return self.config.run.path / "rl" / "hf"

    @property
    def finished(self) -> bool:
        """Every step is done and exported."""
        step = self.state.step
        return step >= self.config.train.steps and exported_step(self.export_folder) == step

    def say_finished(self, progress: Progress) -> None:
        """A resume that has nothing to do must not look like one that trained."""
        progress.say(
            f"{self.config.run.path}: all {self.config.train.steps} steps are done, nothing to do; "
            "raise train.steps to go on"
        )

    def run(self, sink: Sink, progress: Progress) -> RunState:
        """Start the workers, train to the last step, export, end the workers.

        Ctrl-C and SIGTERM leave a resumable run and are passed on.

        Raises:
            UserError: bad input that only a worker could see.
            InfrastructureError: a worker failed or did not answer in time.
        """
        if self.finished:
            self.say_finished(progress)
            return self.state
        with closing(make_cluster(self.config, progress.say)) as cluster:
            return self.run_on(cluster, sink, progress)

    def run_on(self, cluster: Cluster, sink: Sink, progress: Progress) -> RunState:
        """The same with workers that the caller started and closes."""
        _write_config(self.config)
        for remark in self.remarks:
            progress.say(remark)
        steps = self.config.train.steps
        progress.stage(STAGE, steps, done=self.state.step)
        with _terminate_as_interrupt():
            if self.resume_from is not None:
                done = f"{self.state.step} of {steps} steps"
                progress.say(f"resuming from {self.resume_from} ({done})")
            return self._loop(cluster, _Monitor(sink, progress)).run()

    def _loop(self, cluster: Cluster, monitor: "_Monitor") -> Loop:
        config = self.config
        plan = LoopPlan(
            steps=config.train.steps,
            eval_decoding=greedy(config.rollout.decoding),
            run_seed=config.run.seed,
            save_every=config.train.save_every,
            eval_every=config.train.eval_every,
            eval_at_start=config.train.eval_at_start,
            max_staleness=config.algorithm.max_staleness,
            stale=config.algorithm.stale,
            take_up=self.resume_from is None or self.origin.takes_up(self.resume_from),
            timeout_s=config.cluster.timeout_s,
        )
        checkpoints = Checkpoints(config.run.path, config.train.keep_last_n, self.origin)
        return Loop(
            cluster,
            self.stream.batch,
            self.test,
            plan,
            Saver(checkpoints, cluster.save, monitor, self.resume_from, plan.timeout_s),
            Ledger(config.run.path / LEDGER_FILE, config.rollout.group_size),
            monitor,
            finish=lambda step: _export(cluster, self.export_folder, step),
        )


class _Monitor:
    """The loop's numbers go to the sinks, its pace to the progress bar."""

    def __init__(self, sink: Sink, progress: Progress) -> None:
        self._sink, self._progress = sink, progress

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if "completions/count" in metrics:
            tokens = metrics["completions/count"] * metrics["completions/length_mean"]
            metrics = {**metrics, "perf/tokens_per_s": tokens / metrics["timing_s/step"]}
        self._sink.log(metrics, step=step, stage=STAGE)
        if "timing_s/step" in metrics:
            shown = {"reward": metrics["reward/mean"]} if "reward/mean" in metrics else {}
            self._progress.update(step, **shown)
        if metrics.get("update/no_signal"):
            self._progress.say(f"step {step}: no group had any spread, so nothing was learned")

    def say(self, text: str) -> None:
        self._progress.say(text)


def prepare(config: TrainConfig) -> Job:
    """Look at everything the run needs; start and write nothing.

    Raises:
        UserError: names the key, row or file and the remedy.
    """
    outline = load_outline(Path(config.model.path))
    check_decoding(outline, config.rollout.decoding, ())
    if config.rollout.decoding.early_exit:
        raise UserError(
            "rollout.decoding.early_exit true keeps nothing of what was decided behind the EOS, "
            "which is context of the likelihood; set it to false (unmask evaluate may use it)"
        )
    engine, local = config.engine, config.cluster.kind == "local"
    check_lora(engine.lora)
    check_attention(engine.attention, outline.spec.attention, engine.precision, here=local)
    verify_rewards(config.scoring)
    train = _problems(config, "train")
    evaluates = config.train.eval_every > 0 or config.train.eval_at_start
    test = _problems(config, "test") if evaluates else []
    stream = ProblemStream(train, config.rollout.prompts_per_step, config.data.seed)
    _check_prompts(config, outline, {config.data.train: train, config.data.test: test})
    origin = Origin.of(config.model_dump(mode="json"), outline, train)
    remarks: list[str] = []
    state = RunState(0, 0, config.run.seed)
    resume_from = Checkpoints(config.run.path).resume_from(config.run.resume, remarks.append)
    if resume_from is not None:
        state = read_state(resume_from, config.run.seed)
        remarks += origin.check(resume_from)
        ranks = config.cluster.learner.ranks
        remark = check_engine(resume_from / "policy", config.engine, ranks)
        remarks += [remark] if remark else []
    return Job(config, stream, test, state, resume_from, origin, tuple(remarks))


def _problems(config: TrainConfig, which: str) -> list[Problem]:
    data = config.data
    source, count = (
        (data.train, data.train_count) if which == "train" else (data.test, data.test_count)
    )
    try:
        return take_problems(source, count, data.seed)
    except UserError as error:
        raise UserError(f"data.{which}: {error}") from error


def _check_prompts(
    config: TrainConfig, outline: Outline, sources: dict[str, list[Problem]]
) -> None:
    dtype = rollout_dtype(config.engine)
    for source, problems in sources.items():
        prompts = [encode_prompt(outline.tokenizer, problem.prompt) for problem in problems]
        try:
            lengths = [len(ids) for ids in prompts]
            check_prompt_lengths(problems, lengths, config.data.prompt_limit, source=source)
        except UserError as error:
            raise UserError(f"data.prompt_limit: {error}") from error
        check_decoding(outline, config.rollout.decoding, prompts, dtype)


def make_cluster(config: TrainConfig, say: Callable[[str], None]) -> Cluster:
    """The workers of `config.cluster.kind`; Ray is imported only if it is used.

    Args:
        say: hears which worker died and what is done about it.
    """
    if config.cluster.kind == "local":
        from workers.local import LocalCluster

        return LocalCluster(config)
    from workers.cluster import RayCluster

    return RayCluster(config, say=say)


def _write_config(config: TrainConfig) -> None:
    path = config.run.path / "config.yaml"
    private_folder(path.parent)
    partial = path.with_suffix(".partial")
    partial.touch(mode=0o600)
    partial.write_text(dump_config(config))
    os.replace(partial, path)


def _export(cluster: Cluster, folder: Path, step: int) -> None:
    """Write the Hugging Face folder under a temporary name, then swap it in."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    cluster.export(partial)
    mark_step(partial, step)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a stopped Ray job, a drained node) does what Ctrl-C does, deferral included."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(number, frame)
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dry_run(config: TrainConfig) -> None:
    """Print the resolved configuration; say on stderr what a real run would miss here."""
    sys.stdout.write(dump_config(config))
    model, data = Path(config.model.path), config.data
    if not (model / "config.json").is_file():
        typer.echo(f"dry run: model.path {model} is not there; a run needs it", err=True)
    try:
        verify_rewards(config.scoring)
    except UserError as error:
        typer.echo(f"dry run: {error}", err=True)
    for key, source in (("train", data.train), ("test", data.test)):
        if Path(source).suffix not in (".jsonl", ".json", ".parquet"):
            continue
        if not Path(source).is_file():
            typer.echo(f"dry run: data.{key} {source} is not there; a run needs it", err=True)
            continue
        try:
            _problems(config, key)
        except UserError as error:
            typer.echo(f"dry run: {error}", err=True)


def _train(job: Job, progress: Progress) -> None:
    """Workers before files: a cluster that is not there leaves nothing behind."""
    if job.finished:
        job.say_finished(progress)
        return
    config = job.config
    values = config.model_dump(mode="json")
    with (
        closing(make_cluster(config, progress.say)) as cluster,
        open_metrics(config.run.path, config.metrics, progress.say, values) as sink,
    ):
        job.run_on(cluster, sink, progress)
        progress.say(str(job.export_folder))


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a.b=c, any key of the file")
    ] = None,
    config: Annotated[Path, typer.Option(help="YAML file")] = Path("configs/rl/tiny_cpu.yaml"),
    address: Annotated[
        str | None, typer.Option(help="join this Ray cluster, host:port (or set RAY_ADDRESS)")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved config")] = False,
) -> None:
    """Train a denoiser with coupled-GRPO; the same command again resumes.

    Example: unmask train --config configs/rl/tiny_cpu.yaml train.steps=100 run.seed=1
    """
    joined = [] if address is None else ["cluster.kind=ray", f"cluster.address={address}"]
    with exit_codes("interrupted; the same command goes on from the last save"):
        settings = load_train_config(config, [*(overrides or []), *joined])
        if dry_run:
            _dry_run(settings)
            return
        job = prepare(settings)
        with open_progress() as progress:
            _train(job, progress)


if __name__ == "__main__":
    typer.run(main)

"""Where numbers go: a line of JSON per record, a line on the console now and then, more on wish.

Not a store and not an average: values come in finished, under the names that README explains.
`metrics.jsonl` and the console are always on. wandb (offline unless told otherwise, no key needed)
and TensorBoard are imported only where a config asks for them.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from common.config import Section
from common.errors import UserError
from common.files import append_line, private_folder

METRICS_FILE = "metrics.jsonl"
HEADLINES = (
    "eval/pass@1",
    "eval/reward",
    "pretrain/loss",
    "pretrain/grad_norm",
    "reward/mean",
    "policy/loss",
    "policy/kl",
    "policy/grad_norm",
    "completions/length_mean",
    "frac_reward_zero_std",
    "perf/tokens_per_s",
)


class MetricsConfig(Section):
    """Optional sinks and how talkative the console is.

    wandb: its own three words (`off` would be a YAML boolean); `offline` writes under the run
        folder and needs no key; `online` needs `wandb login`.
    tensorboard: event files under `<run folder>/tensorboard`.
    console_every_s: at most one line per stage in this many seconds; evaluations always print.
    """

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "unmask"
    tensorboard: bool = False
    console_every_s: float = 60.0


class Sink(Protocol):
    """Takes finished numbers. `values` are flat: name -> number."""

    def log(self, values: Mapping[str, float], *, step: int, stage: str) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends `{"stage", "step", "time", <name>: <number>...}` and flushes, so a reader can follow.

    JSON has no NaN: a value that is not finite is written as null. `time` is seconds since 1970.
    """

    def __init__(self, path: Path) -> None:
        private_folder(path.parent)
        end_last_line(path)
        self._path = path

    def log(self, values: Mapping[str, float], *, step: int, stage: str) -> None:
        record: dict[str, Any] = {"stage": stage, "step": step, "time": round(time.time(), 3)}
        for name, value in values.items():
            number = float(value)
            record[name] = number if math.isfinite(number) else None
        append_line(self._path, json.dumps(record))

    def close(self) -> None:
        """Every line is on its way already."""


class ConsoleSink:
    """One compact line of the headline numbers, at most every `every_s` seconds per stage."""

    def __init__(
        self,
        say: Callable[[str], None] = print,
        every_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._every_s, self._clock = say, every_s, clock
        self._last: dict[str, float] = {}

    def log(self, values: Mapping[str, float], *, step: int, stage: str) -> None:
        evaluation = any(name.startswith("eval/") for name in values)
        now = self._clock()
        recently = now - self._last.get(stage, -math.inf) < self._every_s
        if recently and not evaluation:
            return
        self._last[stage] = now
        shown = [name for name in HEADLINES if name in values]
        text = "  ".join(f"{name} {values[name]:.4g}" for name in shown)
        self._say(f"{stage} step {step}  {text}")

    def close(self) -> None:
        pass


class WandbSink:
    """Weights & Biases. Offline runs are uploaded later with `wandb sync`, if at all."""

    def __init__(
        self, folder: Path, project: str, mode: Literal["offline", "online"], config: Any
    ) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise UserError(
                f"metrics.wandb={mode}: the package wandb is missing; pip install wandb"
            ) from error
        settings = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            mode=mode,
            config=config,
            settings=settings,
        )

    def log(self, values: Mapping[str, float], *, step: int, stage: str) -> None:
        # wandb wants one growing step; each stage counts its own, so it is a value like others.
        record = {f"{stage}/{name}": value for name, value in values.items()}
        self._run.log({f"{stage}/step": step, **record})

    def close(self) -> None:
        self._run.finish()


class TensorboardSink:
    """TensorBoard event files, one tag per stage and name."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ModuleNotFoundError as error:
            raise UserError(
                "metrics.tensorboard=true: the package tensorboard is missing; "
                "pip install tensorboard"
            ) from error
        from tensorboard.compat.proto.event_pb2 import Event

        self._summary, self._event = Summary, Event
        self._writer = EventFileWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], *, step: int, stage: str) -> None:
        points = [
            self._summary.Value(tag=f"{stage}/{name}", simple_value=float(value))
            for name, value in values.items()
        ]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=points))
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()


class Metrics:
    """Hands every record to every sink."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, values: Mapping[str, float], *, step: int, stage: str) -> None:
        for sink in self._sinks:
            sink.log(values, step=step, stage=stage)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


@contextmanager
def open_metrics(
    folder: Path,
    config: MetricsConfig,
    say: Callable[[str], None] = print,
    run_config: Any = None,
) -> Iterator[Metrics]:
    """The sinks of a run folder, closed at the end whatever happens.

    Args:
        say: prints one line for people; give `Progress.say` where a progress bar is on screen.
        run_config: the resolved config as plain values, for sinks that show it.

    Raises:
        UserError: an optional sink is switched on but its package is not installed.
    """
    sinks: list[Sink] = []  # optional ones first: nothing is written if one is missing
    try:
        if config.wandb != "disabled":
            private_folder(folder)
            sinks.append(WandbSink(folder, config.wandb_project, config.wandb, run_config))
        if config.tensorboard:
            sinks.append(TensorboardSink(folder))
        sinks.append(JsonlSink(folder / METRICS_FILE))
        sinks.append(ConsoleSink(say, config.console_every_s))
        yield Metrics(sinks)
    finally:
        Metrics(sinks).close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl` (or another JSONL file), oldest first; [] if there is none.

    A last line that a killed process left unfinished is skipped.

    Raises:
        UserError: any other line is no JSON object; names file and line.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not JSON; delete the line") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: not a JSON object; delete the line")
        records.append(record)
    return records


def series(records: Sequence[Mapping[str, Any]], stage: str, name: str) -> dict[int, float]:
    """step -> value of one metric. A step that was logged again after a resume counts once."""
    found = {
        record["step"]: record[name]
        for record in records
        if record.get("stage") == stage and record.get(name) is not None
    }
    return dict(sorted(found.items()))


def end_last_line(path: Path) -> None:
    """Drop what a killed process left behind the last line end, so that appending stays clean."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):  # else a line that comes just now would be cut
        os.truncate(path, content.rfind(b"\n") + 1)

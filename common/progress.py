"""What people see while they wait: stage, loss or reward, time left. Not a log: see `metrics`.

On a terminal a rich bar; elsewhere (a pipe, a CI log) plain lines, a few per minute.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Progress(Protocol):
    """One bar. A new stage ends the one before."""

    def stage(self, name: str, total: int | None, done: int = 0) -> None:
        """Begin `name` of `total` steps (None: unknown), `done` of them before a resume."""

    def update(self, done: int, **values: float) -> None:
        """`done` steps in all are finished; `values` such as loss=1.2 or reward=0.8 are shown."""

    def say(self, text: str) -> None:
        """One line for people, above the bar."""

    def close(self) -> None:
        """Take the bar off the screen."""


class SilentProgress:
    """Shows nothing: for workers and tests."""

    def stage(self, name: str, total: int | None, done: int = 0) -> None:
        pass

    def update(self, done: int, **values: float) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class BarProgress:
    """A rich bar on a terminal."""

    def __init__(self, console: Console) -> None:
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}", justify="left"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[cyan]{task.fields[values]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._bar.start()

    def stage(self, name: str, total: int | None, done: int = 0) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total, completed=done, values="")

    def update(self, done: int, **values: float) -> None:
        if self._task is None:
            return
        if values:
            self._bar.update(self._task, completed=done, values=_words(values))
        else:
            self._bar.update(self._task, completed=done)

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        self._bar.stop()


class LineProgress:
    """Plain lines, at most one per `every_s` seconds, and one at the end of a stage."""

    def __init__(
        self,
        say: Callable[[str], None] = print,
        every_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._every_s, self._clock = say, every_s, clock
        self._name, self._total, self._first = "", 0, 0
        self._began = self._spoke = clock()

    def stage(self, name: str, total: int | None, done: int = 0) -> None:
        self._name, self._total, self._first = name, total or 0, done
        self._began = self._spoke = self._clock()
        self._say(f"{name}: started")

    def update(self, done: int, **values: float) -> None:
        now = self._clock()
        finished = bool(self._total) and done >= self._total
        if not finished and now - self._spoke < self._every_s:
            return
        self._spoke = now
        steps = f"{done}/{self._total}" if self._total else str(done)
        parts = [f"{self._name}: {steps}", _words(values)]
        if finished:
            parts.append(f"in {_clock_words(now - self._began)}")
        elif self._total and done > self._first:
            pace = (now - self._began) / (done - self._first)
            parts.append(f"{_clock_words(pace * (self._total - done))} left")
        self._say("  ".join(part for part in parts if part))

    def say(self, text: str) -> None:
        self._say(text)

    def close(self) -> None:
        pass


@contextmanager
def open_progress(console: Console | None = None) -> Iterator[Progress]:
    """A bar if `console` is a terminal, plain lines if not; gone at the end whatever happens."""
    console = console or Console(file=sys.stdout)
    progress: Progress
    if console.is_terminal:
        progress = BarProgress(console)
    else:
        progress = LineProgress(lambda text: print(text, file=console.file, flush=True))
    try:
        yield progress
    finally:
        progress.close()


def _words(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())


def _clock_words(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

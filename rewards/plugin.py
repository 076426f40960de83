"""A user's reward function: found by path, called with a time limit, its answer checked.

Contract: `def reward(prompts, completions, **columns)`, sync or async; every argument is a list
with one entry per completion; returns such a list of floats, dicts (key "reward", the rest is
logged) or None (not applicable).
"""

import asyncio
import importlib
import importlib.util
import inspect
import math
import numbers
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import UserError
from rewards.builtin import Outcome, Sample

RewardFunction = Callable[..., Any]


def load_function(path: str) -> RewardFunction:
    """The function behind `path.py:function` or `module:function`.

    Raises:
        UserError: no such file, module or function, or an import that fails.
    """
    source, _, name = path.rpartition(":")
    if not source or not name.isidentifier():
        raise UserError(f"reward path {path!r}: write it as file.py:function or module:function")
    try:
        module = _load_file(path, source) if source.endswith(".py") else _load_module(source)
    except UserError:
        raise
    except BaseException as error:  # whatever the user's module does while it is imported
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}:{last.lineno}"
        raise UserError(
            f"reward path {path!r}: does not import: {type(error).__name__}: {error} ({where})"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward path {path!r}: {source} has no function {name!r}")
    return function


def _load_file(path: str, source: str) -> ModuleType:
    file = Path(source).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"reward path {path!r}: no such file {file}")
    spec = importlib.util.spec_from_file_location(f"unmask_reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"reward path {path!r}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_module(source: str) -> ModuleType:
    return importlib.import_module(source)


class Plugin:
    """One user function with its name, time limit and extra keyword arguments."""

    def __init__(
        self, name: str, function: RewardFunction, timeout_s: float, options: Mapping[str, Any]
    ) -> None:
        self.name = name
        self._function = function
        self._timeout_s = timeout_s
        self._options = dict(options)

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome per sample. If the call fails as a whole, each sample is tried alone."""
        try:
            return self._checked(samples)
        except TimeoutError:
            reason = f"{self.name}: no answer in {self._timeout_s:g} s"
            return [Outcome(None, error=reason) for _ in samples]
        except Exception as error:
            if len(samples) > 1:
                return [outcome for sample in samples for outcome in self([sample])]
            return [Outcome(None, error=self._explain(error, samples[0]))]

    def _explain(self, error: Exception, sample: Sample) -> str:
        trace = "".join(traceback.format_exception(error)).rstrip()
        return f"reward {self.name!r} failed on {sample.name}: {error}\n{trace}"

    def _checked(self, samples: Sequence[Sample]) -> list[Outcome]:
        answer = self._call_in_time(_arguments(samples) | self._options)
        if not isinstance(answer, Sequence) or isinstance(answer, (str, bytes)):
            answer = answer.tolist() if hasattr(answer, "tolist") else answer
        if not isinstance(answer, Sequence):
            raise TypeError(f"returned a {type(answer).__name__}, not a list")
        if len(answer) != len(samples):
            raise ValueError(f"returned {len(answer)} values for {len(samples)} completions")
        return [self._outcome(value, s) for value, s in zip(answer, samples, strict=True)]

    def _outcome(self, value: Any, sample: Sample) -> Outcome:
        try:
            return _as_outcome(value)
        except (TypeError, ValueError) as error:
            return Outcome(None, error=self._explain(error, sample))

    def _call_in_time(self, arguments: Mapping[str, Any]) -> Any:
        box: list[tuple[bool, Any]] = []

        def call() -> None:
            try:
                answer = self._function(**arguments)
                if inspect.isawaitable(answer):
                    answer = asyncio.run(_in_time(answer, self._timeout_s))
                box.append((True, answer))
            except BaseException as error:
                box.append((False, error))

        # A daemon: a function that never returns must not keep the process from ending.
        thread = threading.Thread(target=call, name=f"reward-{self.name}", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if not box:
            raise TimeoutError
        succeeded, answer = box[0]
        if succeeded:
            return answer
        if isinstance(answer, Exception):
            raise answer
        raise RuntimeError(f"raised {type(answer).__name__}") from answer


async def _in_time(awaitable: Any, seconds: float) -> Any:
    return await asyncio.wait_for(awaitable, seconds)


def _arguments(samples: Sequence[Sample]) -> dict[str, Any]:
    columns = {key for sample in samples for key in sample.problem.columns}
    arguments: dict[str, Any] = {
        key: [sample.problem.columns.get(key) for sample in samples] for key in sorted(columns)
    }
    for key in ("problem_id", "tests", "entry_point", "data_source"):
        arguments[key] = [getattr(sample.problem, key) for sample in samples]
    arguments["prompts"] = [sample.problem.prompt for sample in samples]
    arguments["completions"] = [sample.rollout.completion.text for sample in samples]
    return arguments


def _as_outcome(value: Any) -> Outcome:
    if value is None:
        return Outcome(None)
    if isinstance(value, Mapping):
        if "reward" not in value:
            raise ValueError('a dict needs the key "reward"')
        main = value["reward"]
        extras = {str(k): _number(v, str(k)) for k, v in value.items() if k != "reward"}
        return Outcome(None if main is None else _number(main, "reward"), extras)
    return Outcome(_number(value, "reward"))


def _number(value: Any, key: str) -> float:
    if hasattr(value, "item") and not isinstance(value, numbers.Real):
        value = value.item()  # numpy and torch scalars
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{key} is a {type(value).__name__}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{key} is {number}; a reward must be finite")
    return number

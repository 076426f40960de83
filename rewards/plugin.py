"""A user's reward function: called with a time limit, its answer checked. Not found here: `load`.

Contract: `def reward(prompts, completions, **columns)`, sync or async; every argument is a list
with one entry per completion; returns such a list of floats, dicts (key "reward", the rest is
logged) or None (not applicable).
"""

import asyncio
import inspect
import math
import numbers
import threading
import time
import traceback
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from rewards.load import OF_PROBLEM, RewardFunction, asks_for_tests
from rewards.sample import Outcome, Sample

RESERVED_EXTRAS = frozenset({"mean", "seconds"})
"""Names under `rewards/<name>/` in the metrics that are ours."""
_GRACE_S = 1.0


class _Late(Exception):
    """No answer in time. Not a TimeoutError: a function may raise that for reasons of its own."""


class Plugin:
    """One user function with its name, time limit and extra keyword arguments.

    A call runs on a thread, and a thread cannot be killed: one that outlives its limit goes on in
    the background. While it does, further calls are refused at once, so there is never more than
    one left behind.
    """

    parses = False

    def __init__(
        self, name: str, function: RewardFunction, timeout_s: float, options: Mapping[str, Any]
    ) -> None:
        self.name = name
        self.runs_tests = asks_for_tests(function)
        self._function = function
        self._timeout_s = timeout_s
        self._options = dict(options)
        self._left_behind: threading.Thread | None = None

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome per sample.

        If the call fails as a whole, each sample is tried alone; `timeout_s` holds for the first
        call, and once more for all the others together.
        """
        if not samples:
            return []
        try:
            return self._checked(samples, self._timeout_s)
        except _Late as error:
            return [self._failed(error, sample) for sample in samples]
        except Exception as error:
            if len(samples) == 1:
                return [self._failed(error, samples[0])]
        deadline = time.monotonic() + self._timeout_s
        return [self._alone(sample, deadline) for sample in samples]

    def _alone(self, sample: Sample, deadline: float) -> Outcome:
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise _Late(f"the others took all of timeout_s={self._timeout_s:g}")
            return self._checked([sample], left)[0]
        except Exception as error:
            return self._failed(error, sample)

    def _failed(self, error: Exception, sample: Sample) -> Outcome:
        text = f"reward {self.name!r} failed on {sample.name}: {error or type(error).__name__}"
        if not isinstance(error, _Late):
            text += "\n" + "".join(traceback.format_exception(error)).rstrip()
        return Outcome(None, error=text)

    def _checked(self, samples: Sequence[Sample], seconds: float) -> list[Outcome]:
        answer = self._call_in_time(arguments(samples) | self._options, seconds)
        if not isinstance(answer, Sequence) or isinstance(answer, (str, bytes)):
            answer = answer.tolist() if hasattr(answer, "tolist") else answer
        if not isinstance(answer, Sequence) or isinstance(answer, (str, bytes)):
            raise TypeError(f"returned a {type(answer).__name__}, not a list")
        if len(answer) != len(samples):
            raise ValueError(f"returned {len(answer)} values for {len(samples)} completions")
        return [self._outcome(value, s) for value, s in zip(answer, samples, strict=True)]

    def _outcome(self, value: Any, sample: Sample) -> Outcome:
        try:
            return _as_outcome(value)
        except (TypeError, ValueError) as error:
            return self._failed(error, sample)

    def _call_in_time(self, arguments: Mapping[str, Any], seconds: float) -> Any:
        if self._left_behind is not None and self._left_behind.is_alive():
            raise _Late(
                f"not called: an earlier call still runs, past timeout_s={self._timeout_s:g}; give "
                "what it waits for a time limit of its own, or raise timeout_s"
            )
        box: list[tuple[bool, Any]] = []

        def call() -> None:
            try:
                answer = self._function(**arguments)
                if inspect.isawaitable(answer):
                    answer = asyncio.run(_in_time(answer, seconds))
                box.append((True, answer))
            except BaseException as error:
                box.append((False, error))

        # A daemon: a function that never returns must not keep the process from ending.
        thread = threading.Thread(target=call, name=f"reward-{self.name}", daemon=True)
        thread.start()
        # An async function is cancelled when its time is over, which takes a moment.
        thread.join(seconds + _GRACE_S * inspect.iscoroutinefunction(self._function))
        if not box:
            self._left_behind = thread
            raise _Late(f"no answer in {seconds:.3g} s (timeout_s)")
        succeeded, answer = box[0]
        if succeeded:
            return answer
        if isinstance(answer, Exception):
            raise answer
        raise RuntimeError(f"raised {type(answer).__name__}") from answer


async def _in_time(awaitable: Awaitable[Any], seconds: float) -> Any:
    try:
        async with asyncio.timeout(seconds) as limit:
            return await awaitable
    except TimeoutError:
        if limit.expired():
            raise _Late(f"no answer in {seconds:.3g} s (timeout_s)") from None
        raise


def arguments(samples: Sequence[Sample]) -> dict[str, Any]:
    """What a reward function is called with: the names of `load.RESERVED`, and the columns."""
    columns = {key for sample in samples for key in sample.problem.columns}
    found: dict[str, Any] = {
        key: [sample.problem.columns.get(key) for sample in samples] for key in sorted(columns)
    }
    for key in OF_PROBLEM:
        found[key] = [getattr(sample.problem, key) for sample in samples]
    found["prompts"] = [sample.problem.prompt for sample in samples]
    found["completions"] = [sample.rollout.completion.text for sample in samples]
    found["num_tokens"] = [sample.num_tokens for sample in samples]
    found["programs"] = [sample.code for sample in samples]
    tests = [sample.result.tests if sample.result is not None else () for sample in samples]
    found["verdicts"] = [[test.verdict for test in row] for row in tests]
    found["cpu_seconds"] = [[test.cpu_seconds for test in row] for row in tests]
    return found


def _as_outcome(value: Any) -> Outcome:
    if value is None:
        return Outcome(None)
    if isinstance(value, Mapping):
        if "reward" not in value:
            raise ValueError('a dict needs the key "reward"')
        main = value["reward"]
        rest = {str(k): v for k, v in value.items() if k != "reward" and v is not None}
        extras = {key: _number(v, key) for key, v in rest.items()}
        taken = sorted(RESERVED_EXTRAS & extras.keys())
        if taken:
            raise ValueError(f"the key {taken[0]!r} is taken in the metrics; choose another")
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

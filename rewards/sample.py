"""One completion as rewards see it, and what they may answer. Not how it is run or weighed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.records import Problem, Rollout
from sandbox.records import Result


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one reward says of one sample: a number, "does not apply" (None), or an error."""

    value: float | None
    extras: Mapping[str, float] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion with what all rewards share.

    code: the extracted program or None. parses: whether it is syntactically Python (taken for
    granted where the problem asks for another language); None if nobody wanted to know. result:
    the sandbox's; None if the program was not run.
    """

    problem: Problem
    rollout: Rollout
    code: str | None
    parses: bool | None = None
    result: Result | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"problem {self.problem.problem_id!r} sample {self.rollout.sample_index}"

    @property
    def num_tokens(self) -> int:
        """Tokens through the first EOS; what was decoded behind it does not count."""
        return len(self.rollout.completion.token_ids)


Reward = Callable[[Sequence[Sample]], list[Outcome]]

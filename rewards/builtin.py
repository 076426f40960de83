"""The rewards that ship. They look; the sandbox runs and parses.

A built-in is the section of its options, and a function of samples. Formulas: ALGORITHMS section 5
(`code`, `code_format`, from DiffuCoder), and as each class says.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from common.config import Section
from rewards.sample import Outcome, Sample

CACHE_SHARE = 5
"""DAPO punishes over the last fifth: 4096 of 20480 tokens."""

_WORD = re.compile(r"\w+|[^\w\s]")


class Builtin(Section):
    """Base of the built-in rewards; the fields of a subclass are its options.

    length_option: the option that is the run's longest completion in tokens unless it is given.
    """

    runs_tests: ClassVar[bool] = False
    parses: ClassVar[bool] = False
    length_option: ClassVar[str | None] = None

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome per sample, in their order."""
        return [self._outcome(sample) for sample in samples]

    def _outcome(self, sample: Sample) -> Outcome:
        return Outcome(self._value(sample))

    def _value(self, sample: Sample) -> float:
        raise NotImplementedError


class Code(Builtin):
    """Fraction of the tests passed; 0.0 for a program that was not run."""

    runs_tests = True

    def _outcome(self, sample: Sample) -> Outcome:
        result = sample.result
        if result is None:
            return Outcome(0.0)
        if result.status == "ran":
            return Outcome(self._judged(result.passed, result.total))
        reasons = [test.message for test in result.tests if test.verdict == "infra_error"]
        reason = result.message or (reasons[0] if reasons else "no reason given")
        return Outcome(None, error=f"sandbox {result.status} on {sample.name}: {reason}")

    def _judged(self, passed: int, total: int) -> float:
        return passed / total


class CodeBinary(Code):
    """1.0 if every test passed, else 0.0."""

    def _judged(self, passed: int, total: int) -> float:
        return float(passed == total)


class CodeFormat(Builtin):
    """1.0 for a fenced program that parses, 0.5 for one that does not, 0.0 for none.

    Only Python is parsed: in other languages a block in the problem's language is 1.0.
    """

    parses = True

    def _value(self, sample: Sample) -> float:
        if sample.code is None:
            return 0.0
        return 1.0 if sample.parses else 0.5


class SoftOverlong(Builtin):
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13).

    0 up to max_tokens - cache_tokens, from there linear down to -1 at max_tokens, and -1 beyond.
    max_tokens: None takes the run's longest completion. cache_tokens: None is a fifth of it.
    """

    length_option = "max_tokens"

    max_tokens: int | None = Field(default=None, ge=1)
    cache_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "SoftOverlong":
        limit, cache = self.max_tokens, self.cache_tokens
        if limit is not None and cache is not None and cache > limit:
            raise ValueError(f"cache_tokens={cache} exceeds max_tokens={limit}; lower it")
        return self

    def _value(self, sample: Sample) -> float:
        assert self.max_tokens is not None  # the Rewarder refuses one without
        cache = self.cache_tokens or max(1, self.max_tokens // CACHE_SHARE)
        free = self.max_tokens - cache
        return max(-1.0, min(0.0, (free - sample.num_tokens) / cache))


class Repetition(Builtin):
    """max_penalty * (1 - distinct / all) over the n-grams of the text; 0.0 if it is shorter.

    The formula is that of open-r1's repetition penalty (after arXiv 2502.03373, appendix). Its
    words end at spaces; ours are names, numbers and single other characters, so that formatting a
    program differently does not change its score.
    """

    ngram: int = Field(default=8, ge=1)
    max_penalty: float = Field(default=-1.0, le=0.0, allow_inf_nan=False)

    def _value(self, sample: Sample) -> float:
        words = _WORD.findall(sample.rollout.completion.text)
        count = len(words) - self.ngram + 1
        if count < 1:
            return 0.0
        distinct = {tuple(words[i : i + self.ngram]) for i in range(count)}
        return self.max_penalty * (1.0 - len(distinct) / count) + 0.0  # nobody likes a -0


class Length(Builtin):
    """How well the number of tokens n keeps to `target`: 1.0 if it does, never below 0.0.

    prefer: `at_most` 1 up to the target, then linear to 0 at twice the target; `at_least`
    n / target up to 1; `near` the smaller of the two.
    """

    target: int = Field(ge=1)
    prefer: Literal["at_most", "at_least", "near"] = "at_most"

    def _value(self, sample: Sample) -> float:
        share = sample.num_tokens / self.target
        at_least, at_most = min(1.0, share), max(0.0, min(1.0, 2.0 - share))
        if self.prefer == "near":
            return min(at_least, at_most)
        return at_least if self.prefer == "at_least" else at_most


BUILTIN: dict[str, type[Builtin]] = {
    "code": Code,
    "code_binary": CodeBinary,
    "code_format": CodeFormat,
    "soft_overlong": SoftOverlong,
    "repetition": Repetition,
    "length": Length,
}


def build(name: str, options: Mapping[str, Any]) -> Builtin:
    """The built-in reward `name`.

    Raises:
        ValueError: options that it does not have or cannot take, in one line.
    """
    kind = BUILTIN[name]
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        raise ValueError(_one_line(name, kind, error)) from None


def _one_line(name: str, kind: type[Builtin], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(["options", *(str(part) for part in first["loc"])])
    known = ", ".join(kind.model_fields)
    if first["type"] == "extra_forbidden":
        remedy = f"it has {known}" if known else "it takes none; remove it"
        return f"{key}: the built-in reward {name!r} has no such option; {remedy}"
    if first["type"] == "missing":
        return f"{key}: missing; the built-in reward {name!r} needs it"
    text = first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] == "value_error" else f" (got {first['input']!r})"
    return f"{key}: {text}{shown}"

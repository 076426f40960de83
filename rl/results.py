"""What an evaluation leaves on disk: `<run>/evaluations/<stage>.json`. Not the evaluating itself.

The file holds the numbers of the stage table, the verdict on every problem (so that two stages can
be compared in pairs later, without decoding again) and ten completions for people to read.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.files import private_folder
from common.records import Group, Problem, Rollout
from rl.estimates import Estimate, difference, pass_rates, passed

if TYPE_CHECKING:  # reading results must not cost the seconds that torch takes to import
    from transformers import PreTrainedTokenizerFast

    from rl.evaluate import Evaluation

FOLDER = "evaluations"
SAMPLES = 10


@dataclass(frozen=True)
class Sample:
    """One completion to look at. `tokens[i]` was fixed at denoising step `steps[i]`."""

    problem_id: str
    prompt: str
    text: str
    passed: bool
    reward: float | None
    tests: tuple[str, ...]
    verdicts: tuple[str, ...]
    tokens: tuple[str, ...]
    steps: tuple[int, ...]
    error: str | None = None


@dataclass(frozen=True)
class StageResult:
    """One evaluated checkpoint.

    rates: greedy verdict (0 or 1) per problem id. metrics: greedy `completions/*`, `decode/*`,
    `sandbox/*`. seconds: of training the stage; evaluate_seconds: of this evaluation.
    fingerprint: names the weights and the settings of the evaluation; equal means: need not repeat.
    """

    stage: str
    checkpoint: str
    greedy: Estimate
    sampled: Estimate | None
    samples_per_problem: int
    temperature: float
    pass_at_k: Mapping[str, float]
    dropped: int
    seconds: float
    evaluate_seconds: float
    seed: int
    rates: Mapping[str, float]
    metrics: Mapping[str, float]
    fingerprint: str = ""
    samples: tuple[Sample, ...] = field(default=())


def summarise(
    evaluation: "Evaluation",
    tokenizer: "PreTrainedTokenizerFast",
    *,
    stage: str,
    checkpoint: Path,
    temperature: float,
    samples_per_problem: int,
    seconds: float,
    evaluate_seconds: float,
    seed: int,
    fingerprint: str = "",
) -> StageResult:
    """The record of one evaluation; `temperature` is that of its sampled half."""
    return StageResult(
        stage=stage,
        checkpoint=str(checkpoint),
        greedy=evaluation.greedy,
        sampled=evaluation.sampled,
        samples_per_problem=samples_per_problem,
        temperature=temperature,
        pass_at_k={str(k): value for k, value in evaluation.pass_at_k.items()},
        dropped=evaluation.dropped,
        seconds=seconds,
        evaluate_seconds=evaluate_seconds,
        seed=seed,
        rates=pass_rates(evaluation.groups),
        metrics=evaluation.metrics,
        fingerprint=fingerprint,
        samples=pick_samples(evaluation.groups, tokenizer),
    )


def pick_samples(
    groups: Sequence[Group], tokenizer: "PreTrainedTokenizerFast", count: int = SAMPLES
) -> tuple[Sample, ...]:
    """`count` first completions, spread evenly over the problems: not the best ones."""
    stride = max(1, len(groups) // count)
    chosen = [group for group in groups[::stride] if group.rollouts][:count]
    return tuple(make_sample(group.problem, group.rollouts[0], tokenizer) for group in chosen)


def make_sample(problem: Problem, rollout: Rollout, tokenizer: "PreTrainedTokenizerFast") -> Sample:
    """One completion as plain values; the token that ended it is left out of the tokens."""
    completion, score = rollout.completion, rollout.score
    ids = list(completion.token_ids)
    if completion.finish_reason == "eos":
        ids.pop()
    stdin_tests = tuple(f"{test.stdin!r} -> {test.stdout!r}" for test in problem.stdin_tests)
    return Sample(
        problem_id=problem.problem_id,
        prompt=prompt_text(problem),
        text=completion.text,
        passed=passed(rollout),
        reward=None if score is None else score.total,
        tests=problem.tests + stdin_tests,
        verdicts=() if score is None else score.verdicts,
        tokens=tuple(tokenizer.decode([token]) for token in ids),
        steps=completion.step_map[: len(ids)],
        error=None if score is None else score.error,
    )


def prompt_text(problem: Problem) -> str:
    """The prompt for people; chat turns are prefixed with their role."""
    if isinstance(problem.prompt, str):
        return problem.prompt
    return "\n".join(f"{message.role}: {message.content}" for message in problem.prompt)


def write_result(run: Path, result: StageResult) -> Path:
    """Write `<run>/evaluations/<stage>.json`; it appears only when it is complete."""
    path = run / FOLDER / f"{result.stage}.json"
    private_folder(path.parent)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def read_result(path: Path) -> StageResult:
    """Raises UserError if the file is damaged or of another version; names it."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values["greedy"] = Estimate(**values["greedy"])
        values["sampled"] = values["sampled"] and Estimate(**values["sampled"])
        values["samples"] = tuple(_sample(sample) for sample in values["samples"])
        return StageResult(**values)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it and evaluate again") from error


def read_results(run: Path) -> dict[str, StageResult]:
    """Every evaluated stage of a run by name; {} if none was."""
    results = [read_result(path) for path in sorted((run / FOLDER).glob("*.json"))]
    return {result.stage: result for result in results}


def paired(before: StageResult, after: StageResult, seed: int = 0) -> Estimate | None:
    """Greedy pass@1 of `after` minus `before`, resampled as pairs; None without common problems."""
    if not before.rates.keys() & after.rates.keys():
        return None
    return difference(before.rates, after.rates, seed)


def _sample(values: dict[str, Any]) -> Sample:
    lists = {name: tuple(values[name]) for name in ("tests", "verdicts", "tokens", "steps")}
    return Sample(**(values | lists))

"""From rollouts to scores: extract, run, call every reward, weigh, drop what failed.

Not the sandbox (`sandbox.service`), not the rewards themselves (`builtin`, `plugin`).
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal

from pydantic import Field, model_validator

from common.config import Section
from common.errors import InfrastructureError, UserError
from common.records import Group, Problem, Rollout, Score
from rewards.builtin import BUILTIN, NEED_SANDBOX, Outcome, Sample, format_score
from rewards.extract import Which, extract_code
from rewards.plugin import Plugin, load_function
from sandbox.docker import DockerOptions
from sandbox.records import Case, Limits, Result, SandboxError, StdinTest
from sandbox.service import Sandbox

_LOG = logging.getLogger(__name__)
Reward = Callable[[Sequence[Sample]], list[Outcome]]


class RewardSection(Section):
    """One reward: a built-in `name`, or the `path` of a function; `options` are its keywords."""

    name: str | None = None
    path: str | None = None
    weight: float = Field(default=1.0, allow_inf_nan=False)
    timeout_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> "RewardSection":
        if (self.name is None) == (self.path is None):
            raise ValueError("give exactly one of name (a built-in reward) and path (your own)")
        if self.name is not None and self.name not in BUILTIN:
            raise ValueError(f"no built-in reward {self.name!r}; there are {', '.join(BUILTIN)}")
        if self.name is not None and self.options:
            raise ValueError(f"the built-in reward {self.name!r} takes no options")
        return self

    @property
    def label(self) -> str:
        """Its name in logs and in `Score.parts`: the built-in's, or the function's."""
        return self.name or str(self.path).rpartition(":")[2]


class SandboxSection(Section):
    """How programs are run. Seconds are wall clock per test; `workers` null is one per CPU.

    docker: which containers, for `backend: docker`.
    """

    backend: Literal["auto", "namespace", "landlock", "docker", "unsafe"] = "auto"
    workers: int | None = Field(default=None, ge=1, le=64)
    allow_unsafe: bool = False
    seconds: float = Field(default=5.0, ge=0.05, le=3600)
    memory_mib: int = Field(default=512, ge=64, le=65536)
    docker: DockerOptions = DockerOptions()

    @model_validator(mode="after")
    def _fits(self) -> "SandboxSection":
        problem = self.docker.problem(Limits(memory_mib=self.memory_mib))
        if self.backend == "docker" and problem is not None:
            raise ValueError(problem)
        return self


class RewardConfig(Section):
    """The rewards of a run and how they are combined: total = sum of weight * value.

    code_block: which fenced block is the program (`whole`: the text without fences).
    code_needs_format: run the program only if its format reward is 1; else `code` is 0.
    max_failed_share: above this share of failed samples in a call, the run stops.
    """

    functions: tuple[RewardSection, ...] = (
        RewardSection(name="code", weight=2.0),
        RewardSection(name="code_format", weight=0.5),
    )
    code_block: Which = "first"
    code_needs_format: bool = True
    max_failed_share: float = Field(default=0.25, ge=0.0, le=1.0)
    sandbox: SandboxSection = SandboxSection()

    @model_validator(mode="after")
    def _distinct(self) -> "RewardConfig":
        labels = [section.label for section in self.functions]
        if not labels:
            raise ValueError("functions: at least one reward is needed")
        doubles = sorted({label for label in labels if labels.count(label) > 1})
        if doubles:
            raise ValueError(f"functions: two rewards are called {doubles[0]!r}")
        return self


def verify_rewards(config: RewardConfig) -> None:
    """Import every reward and try the sandbox, for `--dry-run`. Raises UserError."""
    Rewarder(config).close()


class Rewarder:
    """Scores groups. Owns a sandbox if a reward runs programs; close it, or use `with`.

    Raises:
        UserError: a reward that does not import, a sandbox this machine cannot give.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._rewards: dict[str, Reward] = {s.label: _make(s) for s in config.functions}
        self._weights = {section.label: section.weight for section in config.functions}
        self._sandbox: Sandbox | None = None
        self.last_metrics: dict[str, float] = {}
        if not any(section.name in NEED_SANDBOX for section in config.functions):
            return
        options = config.sandbox
        try:
            self._sandbox = Sandbox(
                options.backend, options.workers, options.allow_unsafe, options.docker
            )
        except SandboxError as error:
            raise UserError(f"reward.sandbox: {error}") from None

    def __enter__(self) -> "Rewarder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the sandbox's processes."""
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups with every `Rollout.score` filled.

        Identical programs under identical tests are run once. `last_metrics` then holds
        `sandbox/*` and `rewards/failed_share` of this call.

        Raises:
            InfrastructureError: more than `max_failed_share` of the samples failed.
        """
        samples = [self._sample(g.problem, rollout) for g in groups for rollout in g.rollouts]
        samples = self._run_programs(samples)
        outcomes = {name: reward(samples) for name, reward in self._rewards.items()}
        scores = [
            self._compose(sample, {name: outcomes[name][i] for name in outcomes})
            for i, sample in enumerate(samples)
        ]
        self._check_failures(scores)
        remaining = iter(scores)
        return [
            dataclasses.replace(
                group,
                rollouts=tuple(
                    dataclasses.replace(r, score=next(remaining)) for r in group.rollouts
                ),
            )
            for group in groups
        ]

    def _sample(self, problem: Problem, rollout: Rollout) -> Sample:
        code = extract_code(rollout.completion.text, self._config.code_block)
        return Sample(problem, rollout, code, format_score(code))

    def _run_programs(self, samples: list[Sample]) -> list[Sample]:
        if self._sandbox is None:
            self.last_metrics = {}
            return samples
        start = time.monotonic()
        cases: dict[object, Case] = {}
        keys = [self._key(sample) for sample in samples]
        for number, (key, sample) in enumerate(zip(keys, samples, strict=True)):
            if key is not None and key not in cases:
                cases[key] = self._case(str(number), sample)
        results = dict(zip(cases, self._sandbox.run(cases.values()), strict=True))
        self.last_metrics = _sandbox_metrics(list(results.values()), keys, start)
        return [
            sample if key is None else dataclasses.replace(sample, result=results[key])
            for key, sample in zip(keys, samples, strict=True)
        ]

    def _key(self, sample: Sample) -> object:
        """What decides the sandbox's answer; None if the program is not to be run."""
        if sample.code is None or (self._config.code_needs_format and sample.format_score < 1.0):
            return None
        problem = sample.problem
        return (
            sample.code, problem.tests, problem.stdin_tests, problem.setup, problem.entry_point,
        )  # fmt: skip

    def _case(self, case_id: str, sample: Sample) -> Case:
        options, problem = self._config.sandbox, sample.problem
        assert sample.code is not None
        return Case(
            id=case_id,
            code=sample.code,
            tests=problem.tests,
            stdin_tests=tuple(StdinTest(t.stdin, t.stdout) for t in problem.stdin_tests),
            setup=problem.setup,
            entry_point=problem.entry_point,
            limits=Limits(seconds=options.seconds, memory_mib=options.memory_mib),
        )

    def _compose(self, sample: Sample, outcomes: dict[str, Outcome]) -> Score:
        errors = [f"{name}: {o.error}" for name, o in outcomes.items() if o.error is not None]
        parts = {name: outcome.value for name, outcome in outcomes.items()}
        values = [self._weights[name] * v for name, v in parts.items() if v is not None]
        total = sum(values) if values and not errors else None
        result = sample.result
        return Score(
            total=total,
            parts=parts,
            extras={
                f"{name}/{key}": value
                for name, outcome in outcomes.items()
                for key, value in (outcome.extras or {}).items()
            },
            verdicts=tuple(test.verdict for test in result.tests) if result is not None else (),
            error="\n".join(errors) if errors else None,
        )

    def _check_failures(self, scores: Sequence[Score]) -> None:
        errors = [score.error for score in scores if score.error is not None]
        share = len(errors) / len(scores) if scores else 0.0
        self.last_metrics["rewards/failed_share"] = share
        if errors:
            _LOG.warning("%d of %d samples dropped: %s", len(errors), len(scores), errors[0])
        if share > self._config.max_failed_share:
            raise InfrastructureError(
                f"{len(errors)} of {len(scores)} samples could not be scored "
                f"(max_failed_share {self._config.max_failed_share:g}); the first: {errors[0]}"
            )


def _make(section: RewardSection) -> Reward:
    if section.name is not None:
        return BUILTIN[section.name]
    function = load_function(str(section.path))
    return Plugin(section.label, function, section.timeout_s, section.options)


def _sandbox_metrics(
    results: Sequence[Result], keys: Sequence[object], start: float
) -> dict[str, float]:
    tests = [test for result in results for test in result.tests]
    seconds = time.monotonic() - start
    run = sum(key is not None for key in keys)
    return {
        "sandbox/programs": float(len(results)),
        "sandbox/shared": float(run - len(results)),
        "sandbox/tests": float(len(tests)),
        "sandbox/timeouts": float(sum(test.verdict == "timeout" for test in tests)),
        "sandbox/weak_share": sum(test.weak for test in tests) / len(tests) if tests else 0.0,
        "sandbox/infra_errors": float(sum(r.status != "ran" for r in results)),
        "sandbox/seconds": seconds,
    }

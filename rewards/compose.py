"""From rollouts to scores: extract, run, call every reward, weigh, drop what failed.

Not the sandbox (`sandbox.service`), not the rewards themselves (`builtin`, `plugin`).
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import Field, model_validator

from common.config import Section
from common.errors import InfrastructureError, UserError
from common.records import Group, Problem, Rollout, Score, Scored
from rewards.builtin import BUILTIN, Builtin, build
from rewards.extract import Which, extract_code
from rewards.load import check_signature, load_function
from rewards.plugin import Plugin
from rewards.sample import Outcome, Sample
from sandbox.docker import DockerOptions
from sandbox.records import Case, Limits, Result, SandboxError, StdinTest
from sandbox.service import Sandbox

_LOG = logging.getLogger(__name__)


class RewardSection(Section):
    """One reward: a built-in `name`, or the `path` of a function; `options` are its keywords.

    timeout_s: of one call with all samples, for your own; built-ins need none.
    """

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
        if self.name is not None:
            build(self.name, self.options)
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
            raise ValueError(
                f"functions: two rewards are called {doubles[0]!r}; rename your function, or "
                "drop one"
            )
        return self

    def for_length(self, max_tokens: int) -> "RewardConfig":
        """The same for completions of up to `max_tokens`, where an option leaves that open."""
        sections = []
        for section in self.functions:
            option = BUILTIN[section.name].length_option if section.name is not None else None
            if option is not None and section.options.get(option) is None:
                options = {**section.options, option: max_tokens}
                section = section.model_copy(update={"options": options})
            sections.append(section)
        return self.model_copy(update={"functions": tuple(sections)})


def verify_rewards(config: RewardConfig) -> None:
    """Import every reward and try the sandbox, for `--dry-run`. Raises UserError."""
    Rewarder(config).close()


class Rewarder:
    """Scores groups. Owns a sandbox if a reward needs one; close it, or use `with`.

    Raises:
        UserError: a reward that does not import, a sandbox this machine cannot give.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self.rewards: dict[str, Builtin | Plugin] = {s.label: _make(s) for s in config.functions}
        self._weights = {section.label: section.weight for section in config.functions}
        self._runs_tests = any(reward.runs_tests for reward in self.rewards.values())
        self._parses = any(reward.parses for reward in self.rewards.values()) or (
            self._runs_tests and config.code_needs_format
        )
        self._sandbox: Sandbox | None = None
        if not (self._runs_tests or self._parses):
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the sandbox's processes."""
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def score(self, groups: Sequence[Group]) -> Scored:
        """The same groups with every `Rollout.score` filled, and what that took.

        Raises:
            InfrastructureError: more than `max_failed_share` of the samples failed, or the
                sandbox itself did.
        """
        samples, sums = self.prepare(groups)
        outcomes: dict[str, list[Outcome]] = {}
        for name, (answer, seconds) in zip(self.rewards, self._ask(samples), strict=True):
            outcomes[name] = answer
            sums[f"rewards/{name}/seconds"] = seconds
        scores = [
            self.weigh(sample, {name: outcomes[name][i] for name in outcomes})
            for i, sample in enumerate(samples)
        ]
        remaining = iter(scores)
        scored = [
            dataclasses.replace(
                group,
                rollouts=tuple(
                    dataclasses.replace(r, score=next(remaining)) for r in group.rollouts
                ),
            )
            for group in groups
        ]
        check_failures(scored, self._config.max_failed_share)
        return Scored(scored, sums)

    def prepare(self, groups: Sequence[Group]) -> tuple[list[Sample], dict[str, float]]:
        """The samples, parsed and run as far as a reward needs it, and `sandbox/*` sums.

        Equal texts are parsed once; equal programs under equal tests are run once.

        Raises:
            InfrastructureError: the sandbox cannot even parse.
        """
        samples = [self._sample(group.problem, r) for group in groups for r in group.rollouts]
        if self._sandbox is None:
            return samples, {}
        start = time.monotonic()
        if self._parses:
            samples = self._parse(self._sandbox, samples)
        sums: dict[str, float] = {}
        if self._runs_tests:
            samples, sums = self._run(self._sandbox, samples)
        return samples, sums | {"sandbox/seconds": time.monotonic() - start}

    def _sample(self, problem: Problem, rollout: Rollout) -> Sample:
        text = rollout.completion.text
        code = extract_code(text, self._config.code_block, problem.language)
        return Sample(problem, rollout, code)

    def _parse(self, sandbox: Sandbox, samples: list[Sample]) -> list[Sample]:
        python = [s for s in samples if s.problem.language == "python"]
        texts = list(dict.fromkeys(s.code for s in python if s.code is not None))
        try:
            answers = dict(zip(texts, sandbox.parses(texts), strict=True))
        except SandboxError as error:
            raise InfrastructureError(f"reward.sandbox: {error}") from error
        parsed = []
        for sample in samples:
            if sample.code is not None:
                is_python = sample.problem.language == "python"
                parses = answers[sample.code] if is_python else True
                sample = dataclasses.replace(sample, parses=parses)
            parsed.append(sample)
        return parsed

    def _run(
        self, sandbox: Sandbox, samples: list[Sample]
    ) -> tuple[list[Sample], dict[str, float]]:
        asked = [self._case(sample) for sample in samples]
        distinct: dict[Case, Case] = {}
        for number, case in enumerate(asked):
            if case is not None and case not in distinct:
                # An id of its own: it also draws the order in which a weak test's controls run.
                distinct[case] = dataclasses.replace(case, id=str(number))
        results = dict(zip(distinct, sandbox.run(distinct.values()), strict=True))
        run = [
            sample if case is None else dataclasses.replace(sample, result=results[case])
            for case, sample in zip(asked, samples, strict=True)
        ]
        return run, _sandbox_sums(list(results.values()), sum(case is not None for case in asked))

    def _ask(self, samples: Sequence[Sample]) -> list[tuple[list[Outcome], float]]:
        """Every reward's outcomes and seconds, in the order of the rewards.

        Side by side: most of a slow plug-in's time is waiting for somebody else.
        """

        def ask(reward: Builtin | Plugin) -> tuple[list[Outcome], float]:
            start = time.monotonic()
            return reward(samples), time.monotonic() - start

        threads = ThreadPoolExecutor(len(self.rewards), thread_name_prefix="rewards")
        try:
            return list(threads.map(ask, self.rewards.values()))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for a plug-in

    def _case(self, sample: Sample) -> Case | None:
        """What decides the sandbox's answer, still without an id; None if it is not to be run."""
        if sample.code is None or (self._config.code_needs_format and not sample.parses):
            return None
        options, problem = self._config.sandbox, sample.problem
        return Case(
            id="",
            code=sample.code,
            tests=problem.tests,
            stdin_tests=tuple(StdinTest(t.stdin, t.stdout) for t in problem.stdin_tests),
            setup=problem.setup,
            entry_point=problem.entry_point,
            language=problem.language,
            float_tolerance=problem.float_tolerance,
            limits=Limits(seconds=options.seconds, memory_mib=options.memory_mib),
        )

    def weigh(self, sample: Sample, outcomes: Mapping[str, Outcome]) -> Score:
        """What the rewards' outcomes on one sample come to."""
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


def check_failures(groups: Sequence[Group], max_failed_share: float) -> None:
    """Stop a run whose rewards fail, over a whole batch: a part of it may be unlucky.

    Raises:
        InfrastructureError: more than `max_failed_share` of the scored samples have no score.
    """
    scores = [r.score for group in groups for r in group.rollouts if r.score is not None]
    errors = [score.error for score in scores if score.error is not None]
    if errors:
        _LOG.warning("%d of %d samples dropped: %s", len(errors), len(scores), errors[0])
    if errors and len(errors) / len(scores) > max_failed_share:
        raise InfrastructureError(
            f"{len(errors)} of {len(scores)} samples could not be scored "
            f"(max_failed_share {max_failed_share:g}); the first: {errors[0]}"
        )


def _make(section: RewardSection) -> Builtin | Plugin:
    if section.path is not None:
        function = load_function(section.path)
        check_signature(section.path, function, section.options)
        return Plugin(section.label, function, section.timeout_s, section.options)
    where = f"reward.functions: {section.label}"
    try:
        made = build(section.label, section.options)
    except ValueError as error:  # options that fit by themselves, but not the run's length
        raise UserError(f"{where}: {error}") from None
    option = made.length_option
    if option is not None and getattr(made, option) is None:
        raise UserError(f"{where}: options.{option}: missing; no run says how long completions are")
    return made


def _sandbox_sums(results: Sequence[Result], run: int) -> dict[str, float]:
    """`run`: samples that were judged, of which those of equal programs share a result."""
    tests = [test for result in results for test in result.tests]
    return {
        "sandbox/programs": float(len(results)),
        "sandbox/shared": float(run - len(results)),
        "sandbox/tests": float(len(tests)),
        "sandbox/weak_tests": float(sum(test.weak for test in tests)),
        "sandbox/not_judged": float(sum(result.status != "ran" for result in results)),
        "sandbox/cpu_seconds": sum(test.cpu_seconds for test in tests),
    }

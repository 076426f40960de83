"""What crosses a process border: frozen, picklable, no tensors.

A rollout's way: `Problem` -> decoder -> `Completion` -> reward worker -> `Score` -> learner.
Not configuration and not tensors: those have their own rooms.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat prompt."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class StdinTest:
    """Run the program with `stdin`; it passes if it prints `stdout`."""

    stdin: str
    stdout: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One task with its tests.

    `prompt` is plain text, or chat messages for the tokenizer's chat template. `language` is that
    of the answer, by the sandbox's name; other than Python it needs `stdin_tests`, for which
    `float_tolerance` forgives printed numbers that much. `columns` holds the dataset's other
    columns; rewards receive them by name.
    """

    problem_id: str
    prompt: str | tuple[Message, ...]
    tests: tuple[str, ...] = ()
    stdin_tests: tuple[StdinTest, ...] = ()
    setup: str = ""
    entry_point: str | None = None
    data_source: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    language: str = "python"
    float_tolerance: float | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What the decoder returned for one request.

    `token_ids` ends with the first stop token if there is one (`finish_reason` eos); `tail_ids` are
    the tokens that were decoded behind it, or behind the last of gen_length, in the same block:
    context for the likelihood, never supervised, never text.
    `step_map[i]` is the denoising step, counted from 0 over the whole completion, that fixed
    position i, and `confidences[i]` its confidence then; both cover `token_ids + tail_ids`.
    `undecided` counts the masks behind all these that a bidirectional model saw to the end (blocks
    of the canvas that were never reached); a block-causal model sees nothing behind: 0 there.
    `behaviour_logps` are estimates for `token_ids` under the plain model that decoded them, one
    tuple for each of the masks that the request named; empty if it named none.
    """

    token_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["eos", "length"]
    step_map: tuple[int, ...]
    confidences: tuple[float, ...]
    behaviour_logps: tuple[tuple[float, ...], ...] = ()
    undecided: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """The rewards of one completion.

    `total` is the weighted sum, or None if the sample must be dropped (a reward failed: `error`
    says which and why; a failed reward is never a number). `parts[name]` is None where a reward
    does not apply. `verdicts` are the sandbox's, one per test, empty if nothing was run.
    """

    total: float | None
    parts: Mapping[str, float | None] = field(default_factory=dict)
    extras: Mapping[str, float] = field(default_factory=dict)
    verdicts: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of one problem, stamped with the weights that produced it."""

    problem_id: str
    sample_index: int
    prompt_ids: tuple[int, ...]
    completion: Completion
    policy_version: int
    seed: int
    score: Score | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """All completions of one problem in one step. Stays together from decoding to update."""

    problem: Problem
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """What a reward worker returns: the groups with their scores, and what scoring took.

    `sums` are metrics by name that add up over reward workers: counts and seconds, never means.
    """

    groups: list[Group]
    sums: dict[str, float] = field(default_factory=dict)

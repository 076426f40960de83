"""How good a checkpoint is: decode its answers in this process, have them judged, estimate.

Not the estimates (`rl.estimates`) and not the report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.errors import UserError
from common.records import Group, Problem, Rollout
from common.seeding import derive_seed
from models.checkpoint import load_checkpoint
from models.decoding import Decoder, DecodingConfig, Request
from models.outline import Outline, load_outline
from models.tokenizer import encode_prompt
from rewards.compose import RewardConfig, Rewarder
from rl.batch import rollout_metrics
from rl.data import check_prompt_lengths
from rl.estimates import Estimate, dropped, mean_pass_at_k, pass_at_1


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint on one set of problems. `sampled` is None if it was not asked for.

    metrics: `completions/*`, `decode/*` of the greedy groups.
    """

    greedy: Estimate
    sampled: Estimate | None
    pass_at_k: dict[int, float]
    dropped: int
    groups: list[Group]
    sampled_groups: list[Group]
    metrics: dict[str, float]


def greedy(decoding: DecodingConfig) -> DecodingConfig:
    """The same decoding without chance."""
    return replace(decoding, temperature=0.0, top_p=1.0, top_k=0)


def check_decoding(
    outline: Outline,
    decoding: DecodingConfig,
    prompts: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
) -> None:
    """UserError that names a key of `rollout.decoding` if `prompts` cannot be decoded so."""
    try:
        outline.check_decoding(decoding, prompts, dtype)
    except UserError as error:
        raise UserError(f"rollout.{error}") from error


def evaluate_checkpoint(
    folder: Path,
    problems: Sequence[Problem],
    decoding: DecodingConfig,
    reward: RewardConfig,
    *,
    samples: int = 0,
    ks: Sequence[int] = (),
    seed: int = 0,
    prompt_limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Greedy pass@1 of a checkpoint and, with `samples` > 0, pass@1 and pass@k as configured.

    Args:
        decoding: how to sample; the greedy half takes it with temperature 0.
        samples: completions per problem for the sampled half.
        ks: for pass@k; each at most `samples`.
        seed: names the completions' seeds and the bootstrap's.
        prompt_limit: longest prompt in tokens; None does not check.
        on_progress: told (completions done, completions in all).

    Raises:
        UserError: a bad checkpoint, an over-long prompt, decoding that does not fit the two, or
            k > samples.
    """
    if any(k > samples for k in ks):
        raise UserError(f"pass@{max(ks)} needs at least {max(ks)} samples, got samples={samples}")
    outline = load_outline(folder)
    prompts = [encode_prompt(outline.tokenizer, problem.prompt) for problem in problems]
    if prompt_limit is not None:
        check_prompt_lengths(problems, [len(ids) for ids in prompts], prompt_limit)
    check_decoding(outline, decoding, prompts)
    loaded = load_checkpoint(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    decoder = Decoder(loaded.denoiser, loaded.tokenizer)
    done, total = 0, len(problems) * (1 + samples)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    settings = [Setting(greedy(decoding), 1), Setting(decoding, samples)]
    with Rewarder(reward) as rewarder:
        once, often = decode_groups(decoder, problems, prompts, settings, seed, advance)
        certain = rewarder.score(once).groups
        sampled = rewarder.score(often).groups if samples else []
    both = [rollout for group in certain + sampled for rollout in group.rollouts]
    return Evaluation(
        greedy=pass_at_1(certain, seed),
        sampled=pass_at_1(sampled, seed) if sampled else None,
        pass_at_k={k: mean_pass_at_k(sampled, k) for k in ks},
        dropped=sum(dropped(rollout) for rollout in both),
        groups=certain,
        sampled_groups=sampled,
        metrics=rollout_metrics(certain),
    )


@dataclass(frozen=True)
class Setting:
    """`samples` completions of every problem, decoded in this way."""

    decoding: DecodingConfig
    samples: int


def decode_groups(
    decoder: Decoder,
    problems: Sequence[Problem],
    prompts: Sequence[tuple[int, ...]],
    settings: Sequence[Setting],
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[Group]]:
    """Unscored groups of every setting, decoded side by side in one call.

    Seeds by the same names as a rollout worker's, so results are the same; and the same in every
    setting, so that settings differ by what they say alone.
    """
    requests = [
        Request(ids, derive_seed(seed, problem.problem_id, index), setting.decoding)
        for setting in settings
        for problem, ids in zip(problems, prompts, strict=True)
        for index in range(setting.samples)
    ]
    completions = decoder.decode(requests, settings[0].decoding, on_progress)
    made = iter(zip(requests, completions, strict=True))

    def rollout(problem: Problem, index: int) -> Rollout:
        request, completion = next(made)
        return Rollout(
            problem_id=problem.problem_id,
            sample_index=index,
            prompt_ids=request.prompt_ids,
            completion=completion,
            policy_version=0,
            seed=request.seed,
        )

    return [
        [
            Group(problem, tuple(rollout(problem, index) for index in range(setting.samples)))
            for problem in problems
        ]
        for setting in settings
    ]

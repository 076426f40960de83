"""Measure how a checkpoint decodes: order, certainty, pass@k by temperature, quality by speed.

Not the numbers (`rl.analysis`) and not the page. Everything is decoded in one call of the one
decoder and judged as in an evaluation; only the certainty of masked places needs passes of its own.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from common.errors import UserError
from common.progress import Progress
from common.records import Group, Problem
from common.seeding import derive_seed
from diffusion.layout import decoded_sequence
from models.certainty import first_passes
from models.checkpoint import Checkpoint, load_checkpoint
from models.decoding import Decoder, DecodingConfig
from models.outline import Outline, load_outline
from models.spec import DiffusionSpec
from models.tokenizer import encode_prompt
from rewards.compose import RewardConfig, Rewarder
from rl.analysis import (
    SINK_PASSES,
    Analysis,
    Sink,
    SinkPoint,
    at_speed,
    at_temperature,
    cautions,
    changes,
    count_dropped,
    effects,
    random_ar_ness,
    sink_point,
)
from rl.checkpoint import code_version
from rl.data import check_prompt_lengths
from rl.estimates import RESAMPLES
from rl.evaluate import Setting, check_decoding, decode_groups, greedy

SPEEDS = (1, 2, 4)
HOTTEST = 5.0
# Problems judged together: equal programs among their completions are run once.
JUDGED_TOGETHER = 8
_Pairs = dict[int, dict[str, list[tuple[float, float]]]]


@dataclass(frozen=True, kw_only=True)
class AnalysisPlan:
    """What to measure: `samples` completions of every problem at each of `temperatures`.

    ks: of pass@k, each at most `samples`. decoding: the rest of the settings; its temperature,
        threshold and steps_per_block are replaced.

    Raises:
        UserError: one line that names the option.
    """

    temperatures: tuple[float, ...]
    samples: int
    ks: tuple[int, ...]
    seed: int
    decoding: DecodingConfig

    def __post_init__(self) -> None:
        bad = [t for t in self.temperatures if not 0 < t <= HOTTEST]
        if bad:
            raise UserError(
                f"--temperatures {bad[0]:g}: must be above 0 and at most {HOTTEST:g} (at 0 all "
                "samples are one; greedy decoding is measured anyway)"
            )
        if not self.temperatures:
            raise UserError("--temperatures: give at least one, for example 0.2,1.2")
        if self.samples < 1:
            raise UserError(f"--samples {self.samples}: must be at least 1")
        wrong = [k for k in self.ks if not 1 <= k <= self.samples]
        if wrong or not self.ks:
            shown = f"-k {wrong[0]}" if wrong else "-k"
            raise UserError(f"{shown}: pass@k needs 1 <= k <= --samples {self.samples}")

    def one_token_a_pass(self, spec: DiffusionSpec) -> DecodingConfig:
        """The decoding that all settings vary: order is defined where passes fix one token.

        A block size is kept for models whose weights do not decide it.
        """
        block = self.decoding.block_size if spec.attention == "bidirectional" else None
        return replace(
            self.decoding, block_size=block, steps_per_block=None, threshold=None, early_exit=False
        )


def outline_to_analyze(folder: Path, plan: AnalysisPlan) -> Outline:
    """The checkpoint without its weights; UserError if it cannot be analyzed like this."""
    outline = load_outline(folder)
    if outline.spec.attention == "causal":
        raise UserError(
            f"{folder}: an autoregressive checkpoint: left to right by construction (AR-ness 1, "
            "one token a pass); for its pass@k use `unmask evaluate` with --samples and -k"
        )
    check_decoding(outline, plan.one_token_a_pass(outline.spec), [])
    return outline


def analyze_checkpoint(
    folder: Path,
    problems: Sequence[Problem],
    plan: AnalysisPlan,
    reward: RewardConfig,
    progress: Progress,
    *,
    data: str,
    prompt_limit: int,
) -> Analysis:
    """Decode, judge, look, and put the numbers together.

    Raises:
        UserError: a bad checkpoint, an over-long prompt, no reward that runs tests, no sandbox.
    """
    outline = outline_to_analyze(folder, plan)
    base = plan.one_token_a_pass(outline.spec)
    prompts = [encode_prompt(outline.tokenizer, problem.prompt) for problem in problems]
    check_prompt_lengths(problems, [len(ids) for ids in prompts], prompt_limit, source=data)
    check_decoding(outline, base, prompts)
    seconds: dict[str, float] = {}
    with Rewarder(reward) as rewarder:  # first: a large model takes minutes to load
        if not any(part.runs_tests for part in rewarder.rewards.values()):
            raise UserError("reward.functions: none of them runs tests, so nothing can pass")
        loaded = load_checkpoint(folder, device="cuda" if torch.cuda.is_available() else "cpu")
        fast = _passes_by_speed(base.resolve(loaded.spec)[0])
        settings = [
            *(Setting(replace(greedy(base), steps_per_block=steps), 1) for steps in fast.values()),
            *(Setting(replace(base, temperature=t), plan.samples) for t in plan.temperatures),
        ]
        with _timed(seconds, "decode"):
            decoded = _decode(loaded, problems, prompts, settings, plan.seed, progress)
        with _timed(seconds, "judge"):
            judged = _judge(rewarder, decoded, progress)
    with _timed(seconds, "certainty"):
        sink = _sink(loaded, judged[0], plan.seed, progress)
    greedily = dict(zip(fast, judged, strict=False))
    sampled = dict(zip(plan.temperatures, judged[len(fast) :], strict=True))
    return _put_together(loaded, data, plan, greedily, sampled, sink, seconds)


def _passes_by_speed(block: int) -> dict[int, int]:
    """Tokens a pass -> passes per block, of the speeds that a block has room for."""
    return {speed: -(-block // speed) for speed in SPEEDS if speed <= block}


def _put_together(
    loaded: Checkpoint,
    data: str,
    plan: AnalysisPlan,
    greedily: dict[int, list[Group]],
    sampled: dict[float, list[Group]],
    sink: Sink,
    seconds: dict[str, float],
) -> Analysis:
    """The numbers on scored groups, by tokens a pass and by temperature."""
    base, seed, top = plan.one_token_a_pass(loaded.spec), plan.seed, max(plan.ks)
    block = base.resolve(loaded.spec)[0]
    fast, found = _passes_by_speed(block), changes(sampled, top, seed)
    every = [*greedily.values(), *sampled.values()]
    rows = [
        at_temperature(temperature, groups, plan.ks, base.remasking, seed)
        for temperature, groups in sampled.items()
    ]
    chance = random_ar_ness(
        sampled[min(sampled)], block, loaded.spec.block_origin, derive_seed(seed, "random order")
    )
    return Analysis(
        checkpoint=str(loaded.folder),
        data=data,
        commit=code_version(),
        seed=seed,
        problems=len(every[0]),
        samples=plan.samples,
        completions=sum(len(group.rollouts) for groups in every for group in groups),
        dropped=sum(map(count_dropped, every)),
        attention=loaded.spec.attention,
        block_size=block,
        decoding=asdict(base),
        interval=f"95 % percentile bootstrap over problems, {RESAMPLES} resamples",
        temperatures=rows,
        changes=found,
        effects=effects(found, top),
        cautions=cautions(rows, chance, block, base),
        random_order=chance,
        speeds=[
            at_speed(speed, fast[speed], groups, greedily[1], base.remasking, seed)
            for speed, groups in greedily.items()
        ],
        speeds_left_out=[speed for speed in SPEEDS if speed not in fast],
        sink=sink,
        seconds={name: round(value, 1) for name, value in seconds.items()},
    )


def _decode(
    loaded: Checkpoint,
    problems: Sequence[Problem],
    prompts: Sequence[tuple[int, ...]],
    settings: Sequence[Setting],
    seed: int,
    progress: Progress,
) -> list[list[Group]]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress.update(done)

    progress.stage("decode", len(problems) * sum(setting.samples for setting in settings))
    decoder = Decoder(loaded.denoiser, loaded.tokenizer)
    return decode_groups(decoder, problems, prompts, settings, seed, advance)


def _judge(
    rewarder: Rewarder, decoded: Sequence[Sequence[Group]], progress: Progress
) -> list[list[Group]]:
    """The same groups with scores. A problem's completions of all settings go together."""
    problems, scored = len(decoded[0]), [list[Group]() for _ in decoded]
    progress.stage("judge", problems)
    for start in range(0, problems, JUDGED_TOGETHER):
        parts = [groups[start : start + JUDGED_TOGETHER] for groups in decoded]
        answers = iter(rewarder.score([group for part in parts for group in part]).groups)
        for part, target in zip(parts, scored, strict=True):
            target += [next(answers) for _ in part]
        progress.update(min(start + JUDGED_TOGETHER, problems))
    return scored


def _sink(loaded: Checkpoint, groups: Sequence[Group], seed: int, progress: Progress) -> Sink:
    """Certainty about masked places while `groups` (greedy, one token a pass) were decoded."""
    passes: list[_Pairs] = [{} for _ in range(SINK_PASSES)]
    from_prompt: _Pairs = {}
    progress.stage("certainty", len(groups))
    for number, group in enumerate(groups, start=1):
        problem = group.problem.problem_id
        rollout = group.rollouts[0]
        shown = decoded_sequence(rollout.prompt_ids, rollout.completion)
        seen = first_passes(loaded.denoiser, shown, SINK_PASSES)
        for step, place, distance, sure, entropy in seen.rows():
            passes[step].setdefault(distance, {}).setdefault(problem, []).append((sure, entropy))
            if step == 0:
                from_prompt.setdefault(place, {}).setdefault(problem, []).append((sure, entropy))
        progress.update(number)
    return Sink(
        passes=[_points(pairs, seed) for pairs in passes if pairs],
        from_prompt=_points(from_prompt, seed),
    )


def _points(pairs: _Pairs, seed: int) -> list[SinkPoint]:
    return [sink_point(distance, values, seed) for distance, values in sorted(pairs.items())]


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began

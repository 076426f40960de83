"""Which curves the report shows, and what to read from each. How they are drawn is `rl.plots`."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.metrics import series
from rl.page import FigureBlock
from rl.plots import COLOURS, Line, curves, stacked
from sandbox.records import VERDICTS

Records = Sequence[Mapping[str, Any]]
PHASES = ("rollouts", "update", "sync", "save", "evaluate")
ROLES = ("rollout", "reward", "learner")


def figures(records: Records) -> list[FigureBlock]:
    """Every figure in the order of the page."""
    return [
        _reward(records),
        _pass_rate(records),
        _length(records),
        _spread(records),
        _update(records),
        _kl(records),
        *_order(records),
        _timing(records),
        _idle(records),
        _sandbox(records),
        _pretraining_loss(records),
        _noise(records),
    ]


def _reward(records: Records) -> FigureBlock:
    names = [("weighted sum", "reward/mean"), *_rewards(records)]
    lines = [Line(label, series(records, "rl", name), smooth=True) for label, name in names]
    return FigureBlock(
        "Learning",
        "Reward",
        "Mean over the rollouts of a step; thin is raw, bold a running mean. "
        "It should rise, then flatten.",
        curves(lines, "Reward per step"),
    )


def _rewards(records: Records) -> list[tuple[str, str]]:
    names = {name for record in records for name in record if name.startswith("rewards/")}
    return [(n.split("/")[1], n) for n in sorted(names) if n.endswith("/mean")][:3]


def _pass_rate(records: Records) -> FigureBlock:
    held_out = series(records, "rl", "eval/pass@1")
    low, high = (series(records, "rl", f"eval/pass@1_{end}") for end in ("low", "high"))
    known = held_out.keys() <= low.keys() and held_out.keys() <= high.keys()
    band = {step: (low[step], high[step]) for step in held_out} if known else None
    lines = [
        Line("held-out pass@1, greedy", held_out, dots=True, band=band),
        Line("tests passed in rollouts", series(records, "rl", "rewards/code/mean"), smooth=True),
    ]
    return FigureBlock(
        "Learning",
        "Pass rate",
        "Held-out problems with their 95 % interval, and the share of tests that rollouts pass. "
        "If only the rollouts improve, the model is memorising.",
        curves(lines, "Pass rate per step", percent=True, floor=0),
    )


def _length(records: Records) -> FigureBlock:
    lines = [Line("tokens", series(records, "rl", "completions/length_mean"), smooth=True)]
    return FigureBlock(
        "Learning",
        "Completion length",
        "Mean tokens up to the end of text. A steady climb or a collapse means that a reward is "
        "being gamed.",
        curves(lines, "Completion length per step"),
    )


def _spread(records: Records) -> FigureBlock:
    lines = [
        Line("groups without spread", series(records, "rl", "frac_reward_zero_std"), smooth=True),
        Line("cut off at the limit", series(records, "rl", "completions/clipped_ratio"), True),
        Line("different completions", series(records, "rl", "completions/distinct_ratio"), True),
    ]
    return FigureBlock(
        "Learning",
        "Signal",
        "Groups whose completions all earn the same teach nothing and are dropped. "
        "Near 100 % the run has stopped learning.",
        curves(lines, "Share of groups without spread", percent=True, floor=0),
    )


def _update(records: Records) -> FigureBlock:
    lines = [
        Line("gradient norm", series(records, "rl", "policy/grad_norm"), smooth=True),
        Line("clipped ratios", series(records, "rl", "policy/clip_ratio"), smooth=True),
    ]
    return FigureBlock(
        "Learning",
        "Updates",
        "Gradient norm before clipping, and the share of token ratios outside the trust region.",
        curves(lines, "Gradient norm and clip ratio", floor=0),
    )


def _kl(records: Records) -> FigureBlock:
    lines = [Line("KL", series(records, "rl", "policy/kl"), smooth=True)]
    return FigureBlock(
        "Learning",
        "Distance from the reference",
        "k3 estimate of the KL divergence per token. A jump means that the policy is running away.",
        curves(lines, "KL divergence per step"),
    )


def _order(records: Records) -> list[FigureBlock]:
    words = {
        "local": "Share of tokens fixed right after their k left neighbours, in that order. "
        "1 is strictly left to right.",
        "global": "Share of tokens fixed among the k leftmost that were still masked. "
        "1 is strictly left to right at k = 1.",
    }
    return [
        FigureBlock(
            "Order of unmasking",
            f"{kind.capitalize()} AR-ness",
            text,
            curves(
                [
                    Line(f"k = {k}", series(records, "rl", f"decode/ar_{kind}@{k}"))
                    for k in (1, 2, 4, 8)
                ],
                f"{kind} AR-ness per step",
                percent=True,
                floor=0,
            ),
        )
        for kind, text in words.items()
    ]


def _timing(records: Records) -> FigureBlock:
    found = {name for record in records for name in record if name.startswith("timing_s/")}
    names = {name.removeprefix("timing_s/") for name in found}
    names -= {"step", "save_written"}  # the whole, and what training does not wait for
    order = [name for name in PHASES if name in names] + sorted(names - set(PHASES))
    parts = {name: series(records, "rl", f"timing_s/{name}") for name in order}
    return FigureBlock(
        "Where the time goes",
        "Seconds per step",
        "Phases of the training loop, stacked. Rollouts that overlap the update are only waited "
        "for as long as the learner would idle.",
        stacked(parts, "Seconds per phase and step", wide=True),
        wide=True,
    )


def _idle(records: Records) -> FigureBlock:
    roles = [role for role in ROLES if any(f"idle/{role}" in record for record in records)]
    return FigureBlock(
        "Where the time goes",
        "Idle share",
        "Of each role's time in the step. What idles least sets the pace: more of "
        "it helps, more of the others does not. With max_staleness 0 the roles take turns.",
        curves(
            [Line(role, series(records, "rl", f"idle/{role}"), smooth=True) for role in roles],
            "Idle share per role and step",
            percent=True,
            floor=0,
        ),
    )


def _sandbox(records: Records) -> FigureBlock:
    names = {n.removeprefix("sandbox/") for r in records for n in r if n.startswith("sandbox/")}
    order: list[str] = [verdict for verdict in VERDICTS if verdict in names]
    parts = {name: series(records, "rl", f"sandbox/{name}") for name in order}
    green_first = [COLOURS[2], COLOURS[1], *(COLOURS[i] for i in (0, 3, 4, 5, 6, 7))]
    return FigureBlock(
        "Sandbox",
        "Verdicts on the tests of rollouts",
        "Each test is judged in a process of its own; infra_error is the machine's fault and "
        "never counts as a reward.",
        stacked(parts, "Share of verdicts per step", percent=True, wide=True, colours=green_first),
        wide=True,
    )


def _pretraining_loss(records: Records) -> FigureBlock:
    lines = [
        Line(stage, series(records, stage, "pretrain/loss"), smooth=True)
        for stage in _pretraining_stages(records)
    ]
    return FigureBlock(
        "Pretraining",
        "Loss",
        "Weighted cross-entropy per supervised token. The objectives differ: compare a stage "
        "with itself, not with another.",
        curves(lines, "Pretraining loss per step"),
    )


def _noise(records: Records) -> FigureBlock:
    lines = [
        Line(stage, series(records, stage, "pretrain/grad_norm"), smooth=True)
        for stage in _pretraining_stages(records)
    ]
    return FigureBlock(
        "Pretraining",
        "Gradient norm",
        "Before clipping. Spikes that come back point to a learning rate that is too high.",
        curves(lines, "Pretraining gradient norm per step", floor=0),
    )


def _pretraining_stages(records: Records) -> list[str]:
    return list(dict.fromkeys(r["stage"] for r in records if "pretrain/loss" in r))

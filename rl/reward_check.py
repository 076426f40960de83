"""What `unmask reward check` does: rewards on samples, a table, and what looks like a mistake.

The rewards are called as in a run (`rewards.compose`), so what passes here is scored alike there.
Nothing is trained and no model is loaded.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.config import read_value
from common.errors import UserError
from common.records import Score
from rewards.compose import RewardConfig, Rewarder, RewardSection
from rewards.plugin import Plugin
from rewards.sample import Outcome, Reward, Sample
from rl.reward_samples import Samples, count_words, embedded_samples, read_samples

if TYPE_CHECKING:  # it brings torch
    from rl.config import TrainConfig

FAILED = 1
SHOWN_ROWS = 40
LARGE = 10.0
END_MARKS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<eos>", "</s>", "<|end|>", "[PAD]")


@dataclass(frozen=True)
class Asked:
    """One reward's answers: all samples in one call, and (a plug-in) each sample in its own."""

    together: list[Outcome]
    seconds: float
    alone: list[Outcome] | None
    alone_seconds: list[float]


@dataclass(frozen=True)
class Findings:
    """Everything that is shown."""

    labels: list[str]
    asked: dict[str, Asked]
    scores: list[Score]
    weights: dict[str, float]
    sums: dict[str, float]
    warnings: list[str]

    @property
    def failed(self) -> int:
        """Samples that a run would drop."""
        return sum(score.error is not None for score in self.scores)


def check_rewards(
    reward: str | None,
    data: Path | None,
    config: Path | None,
    options: Sequence[str],
    limit: int | None,
    once: bool,
    as_json: bool,
) -> int:
    """Check, print, and return the exit code: 1 if a sample failed, else 0.

    Raises:
        UserError: a reward, option, config or sample that is wrong.
    """
    train = None
    if config is not None:
        from rl.config import load_train_config

        train = load_train_config(config)
    settings = choose_rewards(reward, train, options)
    count_tokens, note = _token_counter(train)
    samples = (
        embedded_samples(limit, count_tokens)
        if data is None
        else read_samples(data, limit, count_tokens)
    )
    per_step = 0 if train is None else train.rollout.group_size * train.rollout.prompts_per_step
    with Rewarder(settings) as rewarder:
        findings = examine(rewarder, settings, samples, per_step, once)
    if as_json:
        print(json.dumps(as_record(findings), indent=1, ensure_ascii=False))
    else:
        show(findings, note, Console())
    return FAILED if findings.failed else 0


def choose_rewards(
    reward: str | None, train: "TrainConfig | None", options: Sequence[str]
) -> RewardConfig:
    """All rewards of a config, or the one that is named (as the config has it, if it does)."""
    base = RewardConfig() if train is None else train.reward
    if reward is None:
        if train is None:
            raise UserError("reward check: name a reward (file.py:function), or give --config")
        if options:
            raise UserError("--option: belongs to one reward; name it, or edit the config")
        sections = base.functions
    else:
        known = base.functions if train is not None else ()
        sections = (_section(reward, known, options),)
    chosen = base.model_copy(update={"functions": sections, "max_failed_share": 1.0})
    return chosen if train is None else chosen.for_length(train.rollout.decoding.gen_length)


def _section(reward: str, known: Sequence[RewardSection], options: Sequence[str]) -> RewardSection:
    values: dict[str, Any] = {"path" if ":" in reward else "name": reward}
    for section in known:
        if reward in (section.name, section.path):
            values = section.model_dump()
    given = dict(values.get("options", {}))
    for text in options:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--option {text!r}: write it as key=value")
        given[key] = read_value(value)
    try:
        return RewardSection(**{**values, "options": given})
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        hint = "" if ":" in reward else "; your own is file.py:function"
        raise UserError(f"reward {reward!r}: {reason}{hint}") from None


def _token_counter(train: "TrainConfig | None") -> tuple[Any, str]:
    """How tokens are counted here, and the line that says so."""
    folder = None if train is None else Path(train.model.path)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return count_words, "tokens are counted as words and signs: no --config with a model there"
    from models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count, f"tokens are those of {folder}"


def examine(
    rewarder: Rewarder,
    settings: RewardConfig,
    samples: Samples,
    per_step: int = 0,
    once: bool = False,
) -> Findings:
    """Call every reward with all samples, and each plug-in again with one sample at a time.

    per_step: samples that a step of the run has; 0 if there is no run.
    once: leave out the second time, for rewards that cost money.
    """
    prepared, sums = rewarder.prepare(samples.groups)
    asked = {name: _ask(reward, prepared, once) for name, reward in rewarder.rewards.items()}
    scores = [
        rewarder.weigh(sample, {name: found.together[i] for name, found in asked.items()})
        for i, sample in enumerate(prepared)
    ]
    warnings = [text for name, found in asked.items() for text in _suspicions(name, found)]
    warnings += _too_slow(asked, settings, per_step)
    warnings += _suspicious_texts(samples)
    if all(sample.code is None for sample in prepared):
        warnings.append(
            f"no completion has a program (code_block: {settings.code_block}); answers without "
            "fences need code_block: whole"
        )
    weights = {section.label: section.weight for section in settings.functions}
    return Findings(samples.labels, asked, scores, weights, sums, warnings)


def _ask(reward: Reward, samples: Sequence[Sample], once: bool) -> Asked:
    start = time.monotonic()
    together = reward(samples)
    seconds = time.monotonic() - start
    if once or not isinstance(reward, Plugin):
        return Asked(together, seconds, None, [])
    alone, times = [], []
    for sample in samples:
        start = time.monotonic()
        alone += reward([sample])
        times.append(time.monotonic() - start)
    return Asked(together, seconds, alone, times)


def _suspicions(name: str, found: Asked) -> list[str]:
    values = _numbers(found.together)
    if not values:
        failed = any(outcome.error for outcome in found.together)
        return [] if failed else [f"{name}: None for every sample: it never applies"]
    warnings = []
    if len(values) > 1 and len(set(values)) == 1:
        warnings.append(
            f"{name}: {values[0]:g} for every sample; a group without spread teaches nothing"
        )
    largest = max(values, key=abs)
    if abs(largest) > LARGE:
        warnings.append(f"{name}: values up to {largest:g} drown other rewards; scale it to 0 .. 1")
    if found.alone is not None:
        changed = sum(
            a.value != b.value and not (a.error or b.error)
            for a, b in zip(found.together, found.alone, strict=True)
        )
        if changed:
            warnings.append(
                f"{name}: {changed} of {len(found.together)} values differ when the sample is alone"
                " in the call: meant, if it compares completions; else it depends on chance, or "
                "returns its values in the wrong order"
            )
    return warnings


def _suspicious_texts(samples: Samples) -> list[str]:
    texts = [r.completion.text for group in samples.groups for r in group.rollouts]
    for mark in END_MARKS:
        for label, text in zip(samples.labels, texts, strict=True):
            if mark in text:
                return [
                    f"{label}: the text contains {mark}; a run cuts a completion at the end of "
                    "text, so rewards never see what follows"
                ]
    return []


def _too_slow(asked: Mapping[str, Asked], settings: RewardConfig, per_step: int) -> list[str]:
    warnings = []
    for section in settings.functions:
        found = asked[section.label]
        expected = found.seconds / len(found.together) * per_step
        if section.path is not None and expected > section.timeout_s:
            warnings.append(
                f"{section.label}: about {expected:.0f} s for the {per_step} samples of a step, "
                f"but timeout_s is {section.timeout_s:g}; make it faster or raise timeout_s"
            )
    return warnings


def summarise(found: Asked) -> dict[str, float | None]:
    """One line of the lower table. Numbers of nothing are None."""
    values = _numbers(found.together)
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.pstdev(values) if values else None,
        "min": min(values, default=None),
        "max": max(values, default=None),
        "none": float(sum(o.value is None and o.error is None for o in found.together)),
        "failed": float(sum(o.error is not None for o in found.together)),
        "ms_per_sample": 1000 * found.seconds / len(found.together),
    }


def as_record(findings: Findings) -> dict[str, Any]:
    """What `--json` prints."""
    rows = []
    for i, (label, score) in enumerate(zip(findings.labels, findings.scores, strict=True)):
        row = {"sample": label, "rewards": dict(score.parts), "total": score.total}
        rows.append(
            row | {"extras": dict(score.extras), "seconds": _seconds(findings, i)}
            | {"verdicts": list(score.verdicts), "error": score.error}
        )  # fmt: skip
    return {
        "rewards": {name: summarise(found) for name, found in findings.asked.items()},
        "sandbox": findings.sums,
        "failed_share": findings.failed / len(findings.scores),
        "warnings": findings.warnings,
        "samples": rows,
    }


def show(findings: Findings, note: str, console: Console) -> None:
    """Two tables, the first error in full, the warnings."""
    console.print(_sample_table(findings))
    hidden = len(findings.scores) - SHOWN_ROWS
    if hidden > 0:
        console.print(f"{hidden} more samples; --json has them all")
    console.print(_summary_table(findings))
    if findings.sums.get("sandbox/programs"):
        counts = {k.removeprefix("sandbox/"): v for k, v in findings.sums.items()}
        console.print(
            f"sandbox: {counts['programs']:.0f} programs, {counts['tests']:.0f} tests in "
            f"{counts['seconds']:.2f} s",
            highlight=False,
        )
    console.print(note, style="dim", highlight=False)
    errors = [score.error for score in findings.scores if score.error is not None]
    if errors:
        console.print(f"\n{len(errors)} of {len(findings.scores)} samples failed; the first:")
        console.print(errors[0], markup=False, highlight=False)
    for warning in findings.warnings:
        console.print("warning:", style="yellow", end=" ")
        console.print(warning, markup=False, highlight=False)


def _sample_table(findings: Findings) -> Table:
    """A row per sample; columns that would be empty are left out."""
    scores, several = findings.scores[:SHOWN_ROWS], len(findings.asked) > 1
    seconds = [_seconds(findings, i) for i in range(len(scores))]
    columns = [("sample", findings.labels[: len(scores)])]
    for name in findings.asked:
        columns.append((name, [_text(score.parts[name]) for score in scores]))
    if several:
        columns.append(("total", [_text(score.total) for score in scores]))
    columns.append(("extras", [_extras(score.extras, several) for score in scores]))
    columns.append(("s", ["" if value is None else f"{value:.3f}" for value in seconds]))
    columns.append(("error", [(score.error or "").partition("\n")[0] for score in scores]))
    columns = [(head, cells) for head, cells in columns if any(cells)]
    table = Table(header_style="bold")
    for head, _ in columns:
        words = head in ("sample", "extras", "error")
        table.add_column(head, justify="left" if words else "right", overflow="fold")
    for cells in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*map(Text, cells))  # a plain string could hold markup
    return table


def _summary_table(findings: Findings) -> Table:
    table = Table(header_style="bold")
    table.add_column("reward")
    heads = ("weight", "mean", "std", "min", "max", "none", "failed", "ms/sample")
    for head in heads:
        table.add_column(head, justify="right")
    for name, found in findings.asked.items():
        values = summarise(found)
        total = len(found.together)
        counts = [f"{values[key]:.0f} of {total}" for key in ("none", "failed")]
        table.add_row(
            name,
            f"{findings.weights[name]:g}",
            *(_text(values[key]) for key in ("mean", "std", "min", "max")),
            *counts,
            f"{values['ms_per_sample']:.1f}",
        )
    return table


def _seconds(findings: Findings, index: int) -> float | None:
    """Of the plug-ins' calls with this sample alone; None if none was called so."""
    times = [a.alone_seconds[index] for a in findings.asked.values() if a.alone is not None]
    return sum(times) if times else None


def _numbers(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.value for outcome in outcomes if outcome.value is not None]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _extras(extras: Mapping[str, float], several: bool) -> str:
    named = extras.items()
    return ", ".join(f"{k if several else k.partition('/')[2]} {v:.4g}" for k, v in named)

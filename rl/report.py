"""`report.html` and `report.json` of a run folder, finished or not. Measures nothing itself.

Everything shown was written by others: `metrics.jsonl` (curves), `evaluations/*.json`
(`rl.results`), `pipeline.json` (seconds and memory of `rl.demo`), `config.yaml`. The page is one
file without scripts or links to elsewhere, and says what is missing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from common.errors import UserError
from common.metrics import METRICS_FILE, read_metrics, series
from rl import page
from rl.figures import figures
from rl.page import clock, percent
from rl.results import StageResult, paired, read_results

PIPELINE_FILE = "pipeline.json"
PIPELINE = ("ar", "block", "sft", "rl")
STAGE_WORDS = {
    "ar": "next-token pretraining",
    "block": "adapted to block diffusion",
    "sft": "fine-tuned on pairs",
    "rl": "coupled-GRPO",
}
REWARD = "reward/mean"
NOT_RUN = "not run yet"


@dataclass(frozen=True)
class Run:
    """All that a run folder says about itself."""

    folder: Path
    records: list[dict[str, Any]]
    results: dict[str, StageResult]
    pipeline: dict[str, Any]
    configs: dict[str, str]

    @property
    def stages(self) -> list[str]:
        """Evaluated stages and those expected of a pipeline, in the order they are run."""
        expected = self.pipeline.get("stages") or (PIPELINE if self.results else ())
        found = [name for name in self.results if name not in expected]
        return [*expected, *found]


def read_run(folder: Path) -> Run:
    """Raises UserError if `folder` is no run folder, or one of its files is damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; `unmask train` and `make demo` make them")
    pipeline_file = folder / PIPELINE_FILE
    try:
        pipeline = json.loads(pipeline_file.read_text()) if pipeline_file.is_file() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{pipeline_file}: damaged: {error}; delete it") from error
    configs = {path.name: path.read_text() for path in sorted(folder.glob("*.yaml"))}
    records, results = read_metrics(folder / METRICS_FILE), read_results(folder)
    if not records and not results:
        raise UserError(
            f"{folder}: neither {METRICS_FILE} nor evaluations/ there; is it a run folder?"
        )
    return Run(folder, records, results, pipeline, configs)


def summary(run: Run) -> dict[str, Any]:
    """The contents of `report.json`. Stages without an evaluation are named in `missing`."""
    done = [name for name in run.stages if name in run.results]
    reward = series(run.records, "rl", REWARD)
    values = {
        "stages": {name: _stage_row(run.results[name]) for name in done},
        "rl_minus_sft": _difference(run),
        "reward": list(reward.values()),
        "seconds_total": run.pipeline.get("seconds_total", _span(run.records)),
        "peak_rss_gib": run.pipeline.get("peak_rss_gib"),
        "seed": run.pipeline.get("seed", _configured_seed(run)),
        "missing": [name for name in run.stages if name not in run.results],
        "seconds": run.pipeline.get("seconds", {}),
        "memory_is": run.pipeline.get("memory_is"),
        "evaluations": _evaluations(run.records),
    }
    return page.plain(values)


def write_report(folder: Path) -> dict[str, Any]:
    """Write `report.html` and `report.json` into a run folder; returns the latter's contents.

    Raises:
        UserError: no run folder, or a damaged file in it.
    """
    run = read_run(folder)
    values = summary(run)
    page.write_whole(folder / "report.json", json.dumps(values, indent=2) + "\n")
    page.write_whole(folder / "report.html", render(run, values))
    return values


def render(run: Run, values: Mapping[str, Any]) -> str:
    """The page."""
    last = _last_with_samples(run)
    return page.render(
        "report.html.j2",
        name=run.folder.resolve().name,
        values=values,
        stages=[_stage_view(run, name) for name in run.stages],
        sections=page.sections(figures(run.records)),
        facts=_facts(run, values),
        samples=[_sample_view(sample) for sample in last.samples] if last else [],
        samples_of=last.stage if last else None,
        configs=run.configs,
        verdicts=_verdicts(run),
    )


def stage_table(values: Mapping[str, Any]) -> Table:
    """`report.json`'s stage table for the console."""
    table = Table(title=None, header_style="bold")
    table.add_column("stage")
    for head in ("greedy pass@1", "95 % interval", "sampled", "problems", "training"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, row in values["stages"].items():
        low, high = row["ci95"]
        table.add_row(
            name,
            percent(row["pass@1"]),
            f"{100 * low:.1f} .. {100 * high:.1f}",
            percent(row["pass@1_sampled"]),
            str(row["n"]),
            clock(row["seconds"]),
        )
    for name in values["missing"]:
        table.add_row(name, NOT_RUN, "", "", "", "", style="dim")
    difference = values["rl_minus_sft"]
    if difference:
        low, high = difference["ci95"]
        points = f"{100 * difference['difference']:+.1f} points"
        table.add_section()
        table.add_row(
            "rl - sft", points, f"{100 * low:+.1f} .. {100 * high:+.1f}", "", "paired", ""
        )
    return table


def _stage_row(result: StageResult) -> dict[str, Any]:
    sampled = result.sampled
    return {
        "pass@1": result.greedy.value,
        "pass@1_sampled": sampled.value if sampled else None,
        "ci95": [result.greedy.low, result.greedy.high],
        "n": result.greedy.n,
        "seconds": result.seconds,
        "ci95_sampled": [sampled.low, sampled.high] if sampled else None,
        "samples_per_problem": result.samples_per_problem,
        "temperature": result.temperature,
        "pass_at_k": dict(result.pass_at_k),
        "dropped": result.dropped,
        "evaluate_seconds": result.evaluate_seconds,
    }


def _difference(run: Run) -> dict[str, Any] | None:
    if "rl" not in run.results or "sft" not in run.results:
        return None
    estimate = paired(run.results["sft"], run.results["rl"])
    if estimate is None:
        return None
    return {
        "difference": estimate.value,
        "ci95": [estimate.low, estimate.high],
        "n": estimate.n,
    }


def _evaluations(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """pass@1 as it was measured while RL trained, one entry per evaluation."""
    found = series(records, "rl", "eval/pass@1")
    lows, highs = (series(records, "rl", f"eval/pass@1_{end}") for end in ("low", "high"))
    return [
        {"step": step, "pass@1": value, "ci95": [lows.get(step), highs.get(step)]}
        for step, value in found.items()
    ]


def _span(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds from the first record to the last: an unfinished or RL-only run has no better."""
    times = [record["time"] for record in records if "time" in record]
    return round(max(times) - min(times), 1) if times else None


def _configured_seed(run: Run) -> int | None:
    if "config.yaml" not in run.configs:
        return None
    try:
        return int(yaml.safe_load(run.configs["config.yaml"])["run"]["seed"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        path = run.folder / "config.yaml"
        raise UserError(f"{path}: no run.seed in it ({' '.join(str(error).split())})") from error


def _stage_view(run: Run, name: str) -> dict[str, Any]:
    """One line of the stage table; `result` is None where the stage is missing."""
    return {
        "name": name,
        "words": STAGE_WORDS.get(name, ""),
        "result": run.results.get(name),
        "trained": any(record.get("stage") == name for record in run.records),
    }


def _facts(run: Run, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The large numbers at the top, those that are known."""
    seconds, memory = values["seconds_total"], values["peak_rss_gib"]
    rewards = values["reward"]
    facts: list[tuple[str, str | None]] = [
        ("RL steps", str(len(rewards)) if rewards else None),
        ("wall time", clock(seconds) if seconds is not None else None),
        ("peak memory", f"{memory:.2f} GiB" if memory is not None else None),
        ("seed", str(values["seed"]) if values["seed"] is not None else None),
    ]
    return [(label, text) for label, text in facts if text is not None]


def _last_with_samples(run: Run) -> StageResult | None:
    shown = [run.results[name] for name in run.stages if name in run.results]
    return next((result for result in reversed(shown) if result.samples), None)


def _sample_view(sample: Any) -> dict[str, Any]:
    """A sample with each token's share of the way through denoising (0 first .. 1 last)."""
    last = max(sample.steps, default=0) or 1
    tokens = list(zip(sample.tokens, sample.steps, strict=False))
    verdicts = [*sample.verdicts, *["not run"] * (len(sample.tests) - len(sample.verdicts))]
    return {
        "sample": sample,
        "tokens": [
            {"text": text, "step": step, "share": round(step / last, 3)} for text, step in tokens
        ],
        "tests": list(zip(sample.tests, verdicts, strict=False)),
        "passed": sum(verdict == "pass" for verdict in sample.verdicts),
    }


def _verdicts(run: Run) -> dict[str, Any]:
    """Shares of sandbox verdicts per evaluated stage: rows are stages, columns verdicts."""
    rows = {
        name: {
            key.removeprefix("sandbox/"): value
            for key, value in run.results[name].metrics.items()
            if key.startswith("sandbox/")
        }
        for name in run.stages
        if name in run.results
    }
    columns = sorted({verdict for row in rows.values() for verdict in row})
    columns.sort(key=lambda verdict: verdict != "pass")
    return {"columns": columns, "rows": {name: row for name, row in rows.items() if row}}

"""What `unmask evaluate`, `analyze`, `generate`, `import`, `problems export` do; see `rl.cli`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console

from common.errors import UserError
from common.progress import open_progress
from common.records import Problem
from common.seeding import derive_seed
from models.checkpoint import import_checkpoint, load_checkpoint, load_tokenizer
from models.decoding import Decoder
from models.outline import load_outline
from models.public import ImportOptions
from models.request import DecodingConfig, Request
from models.tokenizer import encode_prompt
from rl.analysis_page import (
    HTML_FILE,
    JSON_FILE,
    effect_lines,
    speed_table,
    temperature_table,
    write_analysis,
)
from rl.analyze import AnalysisPlan, analyze_checkpoint, outline_to_analyze
from rl.config import load_train_config
from rl.data import EMBEDDED, load_problems, take_problems
from rl.evaluate import evaluate_checkpoint
from rl.page import percent
from rl.problems.export import export_split
from rl.problems.splits import SplitName
from rl.results import prompt_text, summarise, write_result
from rl.screen import Screen


@dataclass(frozen=True)
class GenerateOptions:
    """How `unmask generate` decodes and shows."""

    gen_length: int
    temperature: float
    samples: int
    seed: int
    cache_mib: int
    show_steps: bool


@dataclass(frozen=True)
class AnalyzeOptions:
    """What `unmask analyze` measures and where it writes; `temperatures` as they were typed."""

    data: str | None
    problems: int
    temperatures: str
    ks: Sequence[int]
    samples: int
    seed: int
    out: Path


def evaluate_model(
    model: Path,
    config: Path,
    overrides: Sequence[str],
    samples: int,
    ks: Sequence[int],
    seed: int,
    run: Path | None,
    stage: str,
) -> None:
    """Evaluate a checkpoint, print its line and, with `run`, keep it for that run's report."""
    settings = load_train_config(config, [*overrides, f"model.path={model}"])
    data = settings.data
    problems = take_problems(data.test, data.test_count, data.seed)
    decoding = settings.rollout.decoding
    began = time.monotonic()
    with open_progress() as progress:
        progress.stage("evaluate", len(problems) * (1 + samples))
        evaluation = evaluate_checkpoint(
            model,
            problems,
            decoding,
            settings.scoring,
            samples=samples,
            ks=ks,
            seed=seed,
            prompt_limit=data.prompt_limit,
            on_progress=lambda done, _: progress.update(done),
        )
    result = summarise(
        evaluation,
        load_tokenizer(model),
        stage=stage,
        checkpoint=model,
        temperature=decoding.temperature,
        samples_per_problem=samples,
        seconds=0.0,
        evaluate_seconds=time.monotonic() - began,
        seed=seed,
    )
    greedy = result.greedy
    interval = f"95 % {percent(greedy.low)} .. {percent(greedy.high)}"
    print(f"greedy pass@1  {percent(greedy.value)}  ({interval}, n = {greedy.n})")
    if result.sampled is not None:
        print(f"sampled pass@1 {percent(result.sampled.value)}  (temperature {result.temperature})")
    for k, value in result.pass_at_k.items():
        print(f"sampled pass@{k} {percent(value)}")
    if result.dropped:
        print(f"{result.dropped} completions could not be judged and are left out")
    if run is not None:
        print(f"kept in {write_result(run, result)}; `unmask report {run}` shows it")


def analyze_model(
    model: Path, config: Path, overrides: Sequence[str], options: AnalyzeOptions
) -> None:
    """Analyze a checkpoint, print its tables and write `analysis.json` and `.html` into `out`."""
    settings = load_train_config(config, [*overrides, f"model.path={model}"])
    plan = AnalysisPlan(
        temperatures=_temperatures(options.temperatures),
        samples=options.samples,
        ks=tuple(sorted(set(options.ks))) or tuple(range(1, min(options.samples, 10) + 1)),
        seed=options.seed,
        decoding=settings.rollout.decoding,
    )
    outline_to_analyze(model, plan)
    out = options.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    source = options.data or settings.data.test
    problems = take_problems(source, options.problems, settings.data.seed)
    with open_progress() as progress:
        found = analyze_checkpoint(
            model,
            problems,
            plan,
            settings.scoring,
            progress,
            data=source,
            prompt_limit=settings.data.prompt_limit,
        )
    write_analysis(out, found)
    console = Console()
    console.print(temperature_table(found))
    console.print(speed_table(found))
    for line in effect_lines(found):
        console.print(line, highlight=False)
    if found.dropped:
        console.print(f"{found.dropped} completions could not be judged and are left out")
    console.print(
        f"analysis: {out / HTML_FILE}, {out / JSON_FILE}", highlight=False, soft_wrap=True
    )


def _temperatures(text: str) -> tuple[float, ...]:
    """Numbers between commas, smallest first, each once."""
    try:
        return tuple(sorted({float(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise UserError(
            f"--temperatures {text!r}: must be numbers between commas, for example 0.2,0.6,1.2"
        ) from None


def generate_text(
    model: Path, prompt: str | None, problem: int | None, options: GenerateOptions
) -> None:
    """Print completions of a prompt as their blocks finish."""
    task = _task(prompt, problem)
    outline = load_outline(model)
    prompt_ids = encode_prompt(outline.tokenizer, task.prompt)
    block = outline.spec.block_size or 1
    length = -(-options.gen_length // block) * block
    if length != options.gen_length:
        said = f"--gen-length {options.gen_length} rounded up to {length}: blocks of {block}"
        Console(stderr=True).print(said, highlight=False)
    config = DecodingConfig(
        gen_length=length, temperature=options.temperature, cache_mib=options.cache_mib
    )
    outline.check_decoding(config, [prompt_ids])
    loaded = load_checkpoint(model)
    requests = [
        Request(prompt_ids, derive_seed(options.seed, task.problem_id, index))
        for index in range(options.samples)
    ]
    console = Console()
    console.print(prompt_text(task), style="dim", markup=False, highlight=False)
    screen = Screen(console, loaded.tokenizer, options.samples, options.show_steps)
    with screen:
        decoder = Decoder(loaded.denoiser, loaded.tokenizer)
        completions = decoder.decode(requests, config, watch=screen.show)
    screen.finish(completions)


def import_folder(
    source: Path, out: Path, family: str | None, block_size: int | None, mask_token: str | None
) -> None:
    """Write a public checkpoint as one of ours and say what was understood."""
    options = ImportOptions(family=family, block_size=block_size, mask_token=mask_token)
    plan = import_checkpoint(source, out, options)
    spec = plan.spec
    blocks = ""
    if spec.attention == "block_causal":
        blocks = f", block_size {spec.block_size} from the {spec.block_origin}'s "
        blocks += "end" if spec.block_origin == "prompt" else "start"
    print(f"{out}: {plan.family.name}, stock {plan.family.stock}, {spec.attention}{blocks}")
    print(f"logit shift {'yes' if spec.logit_shift else 'no'}; mask token "
          f"{plan.tokenizer.mask_token} ({spec.mask_token_id}), {plan.mask_origin}")  # fmt: skip
    stops = plan.tokenizer.convert_ids_to_tokens(list(plan.stops))
    print(f"ends at {', '.join(str(token) for token in stops)}")
    if not plan.family.adapted:
        print(f"an AR model, to be adapted: unmask pretrain start={out}")


def export_problems(split: str, path: Path, seed: int, count: int) -> None:
    """Write a split as JSONL. Raises UserError for a split that is none."""
    names: dict[str, SplitName] = {name: name for name in get_args(SplitName)}
    if split not in names:
        raise UserError(f"--split {split}: no such split; choose one of {', '.join(names)}")
    written = export_split(names[split], path, seed, count)
    print(f"{path}: {written} records of {split}")


def _task(prompt: str | None, problem: int | None) -> Problem:
    if problem is None:
        return Problem(problem_id="prompt", prompt=prompt or "")
    return load_problems(f"{EMBEDDED}test", seed=0, count=problem + 1)[problem]

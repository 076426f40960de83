"""The command `unmask`. Options and help only: each command imports its room when it is called.

So `unmask --help` answers at once, without torch. Exit codes: 0, 2 for bad input, 3 for a broken
machine, 130 for Ctrl-C; 1 if a line of `doctor` fails, a sample of `reward check`, a run that
`audit` reads does not add up, or one that `plan` was asked about does not fit.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from common.errors import UserError
from common.exits import exit_codes
from rl.cli_operate import app as operate_app
from rl.cli_operate import example

# Idle OpenMP threads sleep: spinning, they halt every other program on a busy machine. OpenMP reads
# this when torch is loaded, so here is the place.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="unmask",
    help="RL post-training for code diffusion language models, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
problems_app = typer.Typer(help="The embedded problem set.", no_args_is_help=True)
reward_app = typer.Typer(help="Reward functions.", no_args_is_help=True)
app.add_typer(operate_app)
app.add_typer(problems_app, name="problems")
app.add_typer(reward_app, name="reward")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="a.b=c", help="any key of the config")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="check and print the resolved config, start nothing")
]
RL_CONFIG = Path("configs/rl/tiny_cpu.yaml")


@app.command(
    epilog=example(
        "unmask pretrain --config configs/pretrain/tiny_cpu.yaml",
        "unmask pretrain run.seed=1 run.folder=runs/mine",
    )
)
def pretrain(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option(help="YAML file")] = Path(
        "configs/pretrain/tiny_cpu.yaml"
    ),
    dry_run: DryRun = False,
) -> None:
    """Make a model: AR, then block diffusion, then SFT. Finished stages are reused."""
    from pretrain.train import main as run

    with exit_codes("interrupted; the same command goes on from the last finished stage"):
        run(overrides=overrides, config=config, dry_run=dry_run)


@app.command(
    epilog=example(
        "unmask train --config configs/rl/tiny_cpu.yaml train.steps=100",
        "unmask train --config configs/rl/diffucoder_7b.yaml --dry-run",
        "unmask train --address 10.0.0.1:6379 run.name=mine",
    )
)
def train(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option(help="YAML file")] = RL_CONFIG,
    address: Annotated[
        str | None, typer.Option(help="join this Ray cluster, host:port (or set RAY_ADDRESS)")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train a denoiser with coupled-GRPO. The same command again resumes."""
    from rl.train import main as run

    with exit_codes("interrupted; the same command goes on from the last save"):
        run(overrides=overrides, config=config, address=address, dry_run=dry_run)


@app.command(
    epilog=example(
        "unmask plan --config configs/rl/diffucoder_7b.yaml --gpus 8 --gpu-mem 80",
        "unmask plan --config my.yaml --gpus 4 --gpu h200 --gpu-mem 141 --model there/config.json",
    )
)
def plan(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option(help="YAML file")] = RL_CONFIG,
    gpus: Annotated[int, typer.Option(min=0, help="in all; 0: everything on CPUs")] = 0,
    gpu_mem: Annotated[float, typer.Option(min=1, help="GiB of each GPU")] = 80,
    gpu: Annotated[str, typer.Option(help="for samples/s: a100, h100, h200 or b200")] = "h100",
    model: Annotated[
        Path | None, typer.Option(help="folder or config.json, instead of model.path")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead")] = False,
) -> None:
    """Does a training run fit? Bytes per role and samples/s, worked out; starts nothing.

    Needs the model's config.json only. Exits 1 if it does not fit, and says what to change.
    Samples/s is an estimate from FLOPs and bytes at stated shares of a GPU's peak.
    """
    from rl.plan_page import Machine, plan_run

    with exit_codes():
        machine = Machine(gpus, gpu_mem, gpu)
        raise typer.Exit(plan_run(config, overrides or [], model, machine, as_json))


@app.command(
    epilog=example(
        "unmask evaluate runs/demo/rl/hf --samples 4",
        "unmask evaluate runs/demo/stages/sft --run runs/demo --stage sft",
        "unmask evaluate my_model data.test=problems.jsonl rollout.decoding.gen_length=256",
    )
)
def evaluate(
    model: Annotated[Path, typer.Argument(help="checkpoint folder (with diffusion.json)")],
    overrides: Overrides = None,
    config: Annotated[
        Path, typer.Option(help="RL config: its test data, reward and decoding are used")
    ] = RL_CONFIG,
    samples: Annotated[int, typer.Option(min=0, help="sampled completions per problem")] = 0,
    k: Annotated[list[int] | None, typer.Option("-k", help="pass@k, needs k samples")] = None,
    seed: Annotated[int, typer.Option(help="of the completions")] = 0,
    run: Annotated[Path | None, typer.Option(help="add the result to this run's report")] = None,
    stage: Annotated[str, typer.Option(help="the result's name in the report")] = "rl",
) -> None:
    """pass@1 of a checkpoint on held-out problems: greedy, and sampled with --samples."""
    from rl.commands import evaluate_model

    with exit_codes():
        evaluate_model(model, config, overrides or [], samples, k or [], seed, run, stage)


@app.command(
    epilog=example(
        "unmask analyze --checkpoint runs/demo/rl/hf",
        "unmask analyze --checkpoint my_model --data problems.jsonl --problems 200 --out analysis",
        "unmask analyze --checkpoint my_model --temperatures 0.2,1.2 --samples 20 -k 1 -k 20",
        "unmask analyze --checkpoint my_model rollout.decoding.order_temperature=0.0001",
    )
)
def analyze(
    checkpoint: Annotated[Path, typer.Option(help="checkpoint folder (with diffusion.json)")],
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSONL or Parquet file, Hub data set, or embedded:<split>; "
            "without it the test data of --config"
        ),
    ] = None,
    config: Annotated[
        Path, typer.Option(help="RL config: its reward and its decoding are used")
    ] = RL_CONFIG,
    problems: Annotated[int, typer.Option(min=1, help="how many problems, the first ones")] = 64,
    samples: Annotated[
        int, typer.Option(min=1, help="completions per problem and temperature")
    ] = 10,
    temperatures: Annotated[
        str, typer.Option(metavar="T,T,...", help="above 0, at most 5")
    ] = "0.2,0.4,0.6,0.8,1.0,1.2,1.4,1.6",
    k: Annotated[
        list[int] | None, typer.Option("-k", help="pass@k; 1 to 10 as far as the samples go")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the completions")] = 0,
    out: Annotated[
        Path, typer.Option(help="folder for analysis.html and analysis.json; replaced there")
    ] = Path("runs/analysis"),
) -> None:
    """How a checkpoint decodes: order, certainty, pass@k by temperature, quality by speed.

    AR-ness (how left-to-right the order was), pass@k and distinct texts at every
    temperature, the entropy sink, greedy pass@1 at 1, 2 and 4 tokens a pass, with
    95 % intervals, and whether DiffuCoder's effects of temperature are there.
    """
    from rl.commands import AnalyzeOptions, analyze_model

    with exit_codes():
        options = AnalyzeOptions(data, problems, temperatures, k or [], samples, seed, out)
        analyze_model(checkpoint, config, overrides or [], options)


@app.command(
    epilog=example(
        'unmask generate runs/demo/rl/hf "keep the even numbers, then sum"',
        "unmask generate runs/demo/rl/hf --problem 3 --show-steps",
    )
)
def generate(
    model: Annotated[Path, typer.Argument(help="checkpoint folder (with diffusion.json)")],
    prompt: Annotated[str | None, typer.Argument(help="text; or give --problem")] = None,
    problem: Annotated[
        int | None, typer.Option(min=0, help="this problem of the embedded test split")
    ] = None,
    gen_length: Annotated[int, typer.Option(min=1, help="most tokens to generate")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="how many completions")] = 1,
    seed: Annotated[int, typer.Option(help="of the completions")] = 0,
    cache_mib: Annotated[int, typer.Option(min=1, help="most memory for keys and values")] = 8192,
    show_steps: Annotated[
        bool, typer.Option("--show-steps", help="watch the unmasking pass by pass, on a terminal")
    ] = False,
) -> None:
    """Complete a prompt: text as blocks finish, then coloured by the order of unmasking."""
    from rl.commands import GenerateOptions, generate_text

    with exit_codes():
        if (prompt is None) == (problem is None):
            raise UserError("generate: give either a prompt or --problem N")
        options = GenerateOptions(gen_length, temperature, samples, seed, cache_mib, show_steps)
        generate_text(model, prompt, problem, options)


@app.command(
    name="import",
    epilog=example(
        "unmask import models/DiffuCoder-7B-cpGRPO models/diffucoder",
        "unmask import models/SDAR-4B-Chat models/sdar --block-size 4",
        "unmask import models/Qwen2.5-Coder-0.5B models/start",
        "unmask import models/my-llama models/start --mask-token '<|reserved_special_token_7|>'",
    ),
)
def import_(
    source: Annotated[Path, typer.Argument(help="downloaded folder (config.json, safetensors)")],
    out: Annotated[Path, typer.Argument(help="checkpoint folder to write")],
    family: Annotated[
        str | None,
        typer.Option(
            help="where config.json does not tell: dream, sdar, llada, stable-diffcoder, or an AR "
            "model (qwen2, qwen3, llama)"
        ),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="where config.json does not say it (SDAR)")
    ] = None,
    mask_token: Annotated[
        str | None,
        typer.Option(
            help="text of a token to use as the mask; without it the checkpoint's own; for an AR "
            "model a reserved token, else an unused row of the embedding, else a new one"
        ),
    ] = None,
) -> None:
    """Bring in a public checkpoint as a stock one with diffusion.json; runs no remote code."""
    from rl.commands import import_folder

    with exit_codes():
        import_folder(source, out, family, block_size, mask_token)


@app.command(
    name="export",
    epilog=example(
        "unmask export --run runs/demo my_model", "unmask export --run runs/demo --step 150 step150"
    ),
)
def export_model(
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to write")],
    run: Annotated[
        Path, typer.Option(help="run folder, or one of its rl/global_step_N folders")
    ] = Path("runs/demo"),
    step: Annotated[
        int | None, typer.Option(min=0, help="a saved step; without it the last")
    ] = None,
) -> None:
    """A saved step of a run as a folder for stock transformers. Starts no workers."""
    from common.progress import open_progress
    from rl.export import export_step

    with exit_codes():
        with open_progress() as progress:
            used = export_step(run, step, out, progress)
        print(f"{out}: from {used}")


@app.command(epilog=example("unmask report", "unmask report runs/mine"))
def report(
    run: Annotated[Path, typer.Argument(help="run folder, finished or not")] = Path("runs/demo"),
) -> None:
    """Write report.html and report.json of a run, and print its table."""
    from rich.console import Console

    from rl.report import stage_table, write_report

    console = Console()
    with exit_codes():
        values = write_report(run)
        console.print(stage_table(values))
        console.print(f"report: {run / 'report.html'}", highlight=False, soft_wrap=True)


@app.command(epilog=example("unmask doctor"))
def doctor() -> None:
    """What this machine has and lacks, with a remedy for each failing line."""
    from rich.console import Console

    from rl.doctor import examine, show

    with exit_codes():
        raise typer.Exit(show(examine(), Console()))


@problems_app.command(
    epilog=example(
        "unmask problems export test.jsonl",
        "unmask problems export sft.jsonl --split sft --count 5000 --seed 1",
    )
)
def export(
    path: Annotated[Path, typer.Argument(help="JSONL file to write")],
    split: Annotated[str, typer.Option(help="pretrain, sft, rl or test")] = "test",
    count: Annotated[int, typer.Option(min=1, help="how many records")] = 320,
    seed: Annotated[int, typer.Option(help="draws constants, wordings and inputs")] = 0,
) -> None:
    """Write a split of the embedded problem set as JSONL, the format that `data.train` reads."""
    from rl.commands import export_problems

    with exit_codes():
        export_problems(split, path, seed, count)


@reward_app.command(
    epilog=example(
        "unmask reward check my_rewards.py:no_loops",
        "unmask reward check examples/rewards/lint.py:lint --data sample.jsonl --json",
        "unmask reward check repetition --option ngram=4 --data sample.jsonl --limit 20",
        "unmask reward check --config configs/rl/tiny_cpu.yaml",
    )
)
def check(
    reward: Annotated[
        str | None,
        typer.Argument(
            help="file.py:function, module:function or a built-in; "
            "without it, every reward of --config"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSONL with prompt, completion (or completions: a list), and what the rewards "
            "want of tests, entry_point and columns of your own; without it, good, wrong and "
            "malformed answers to embedded problems"
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="RL config: its reward section and its tokenizer are used")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="a=b", help="of the reward")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="problems (lines) to use")] = None,
    once: Annotated[
        bool, typer.Option("--once", help="do not call plug-ins a second time, sample by sample")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead")] = False,
) -> None:
    """Try rewards on samples before a run: values, extras, times, errors, likely mistakes.

    Exits 1 if a sample failed (a run would drop it), 2 for bad input, else 0; warnings change
    nothing.
    """
    from rl.reward_check import check_rewards

    with exit_codes():
        code = check_rewards(reward, data, config, option or [], limit, once, as_json)
        raise typer.Exit(code)


@reward_app.callback()
def _reward() -> None:
    """Reward functions: those that ship and yours."""


@problems_app.callback()
def _problems() -> None:
    """The embedded problem set: generated from a seed, nothing to download."""


def main() -> None:
    """The console script."""
    # Ours says how far it is; a bar per loaded file would tear it.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()


if __name__ == "__main__":
    main()

"""How fast completions are decoded, beside the published generate loops, in one run.

`python benchmarks/rollout.py [--json] [--cases block_exact,...] [--model runs/demo/rl/hf]`

The reference is written straight from the published loops (LLaDA's `generate`, Dream's
`diffusion_generate`, the block loops of SDAR and Stable-DiffCoder): a fixed batch, the whole canvas
in every pass, logits of the whole vocabulary at every position, float64 probabilities, run to
gen_length. Same weights, prompts and threads; the text must be the same. Not a test of quality, but
for `threshold` (the demo's model) and `caches` (configs/pretrain/bidirectional_cpu.yaml).
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder

import matplotlib  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.lib.record import Row, better, report, row  # noqa: E402
from common.records import Group, Rollout  # noqa: E402
from models.checkpoint import load_checkpoint, new_model  # noqa: E402
from models.decoding import Decoder  # noqa: E402
from models.denoiser import Denoiser  # noqa: E402
from models.request import DecodingConfig, Request  # noqa: E402
from models.spec import DiffusionSpec  # noqa: E402
from models.tokenizer import encode_prompt  # noqa: E402
from rewards.compose import Rewarder  # noqa: E402
from rl.config import load_train_config  # noqa: E402
from rl.data import load_problems  # noqa: E402
from rl.estimates import difference, pass_at_1, pass_rates  # noqa: E402

PAD, EOS, MASK = 0, 1, 2
PUBLIC_VOCABULARY = 151_936


class Words:
    """What the decoder asks of a tokenizer, for random weights: there is no text."""

    eos_token_id = EOS

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return " ".join(map(str, ids))


@torch.no_grad()
def published_loop(
    denoiser: Denoiser, prompts: list[tuple[int, ...]], gen_length: int, block: int, steps: int
) -> list[list[int]]:
    """Greedy, low-confidence remasking; every row to gen_length. Returns tokens [R][gen_length]."""
    spec, longest = denoiser.spec, max(map(len, prompts))
    pad = torch.tensor([longest - len(p) for p in prompts])
    ids = torch.tensor(
        [[PAD] * (longest - len(p)) + list(p) + [MASK] * gen_length for p in prompts]
    )
    ids[:, longest:] = spec.mask_token_id
    place = torch.arange(ids.shape[1])
    positions = (place[None] - pad[:, None]).clamp(min=0)
    allowed = (place[None, :] >= pad[:, None])[:, None, :]
    if spec.attention == "block_causal":
        number = torch.div(place - longest, block, rounding_mode="floor")
        allowed = allowed & (number[None, :] <= number[:, None])[None]
    allowed = (allowed | torch.eye(ids.shape[1], dtype=torch.bool))[:, None]
    for start in range(longest, ids.shape[1], block):
        for step in range(steps):
            logits = denoiser.model(ids, attention_mask=allowed, position_ids=positions).logits
            masked = ids == spec.mask_token_id
            masked[:, start + block :] = False
            logits[..., spec.mask_token_id] = float("-inf")
            found = logits.argmax(-1)
            probs = logits.to(torch.float64).softmax(-1)
            sure = probs.gather(-1, found[..., None])[..., 0].masked_fill(~masked, float("-inf"))
            count = -(-int(masked[0].sum()) // (steps - step))
            best = sure.topk(count, dim=-1).indices
            ids.scatter_(1, best, found.gather(1, best))
    return ids[:, longest:].tolist()


def until_eos(ids: list[int]) -> list[int]:
    """What a published loop leaves to its caller."""
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


def timed(work: Callable[[], Any], rounds: int = 1) -> tuple[float, Any]:
    """Seconds of the fastest round, and the last result."""
    best, result = float("inf"), None
    for _ in range(rounds):
        began = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - began)
    return best, result


def random_model(attention: str, vocabulary: int, hidden: int = 64, layers: int = 2) -> Denoiser:
    """Random weights: large ones, so that logits lie apart."""
    architecture = {
        "model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "initializer_range": 0.1,
        "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip
    block = 4 if attention == "block_causal" else None
    spec = DiffusionSpec(
        mask_token_id=MASK, logit_shift=False, attention=attention, block_size=block
    )  # type: ignore[arg-type]
    return Denoiser(new_model(architecture, 0).eval(), spec)


def random_prompts(count: int, longest: int, seed: int = 0) -> list[tuple[int, ...]]:
    gen = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 2, longest + 1, (count,), generator=gen).tolist()
    return [tuple(torch.randint(3, 500, (n,), generator=gen).tolist()) for n in lengths]


def block_exact(options: argparse.Namespace) -> list[Row]:
    """Block model, block 4, natural EOS lengths, greedy: the demo's model on its test problems."""
    loaded = load_checkpoint(options.model)
    problems = load_problems("embedded:test", seed=0, count=options.requests)
    prompts = [encode_prompt(loaded.tokenizer, problem.prompt) for problem in problems]
    config = DecodingConfig(gen_length=options.gen_length, temperature=0.0)
    decoder = Decoder(loaded.denoiser, loaded.tokenizer)
    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]
    decoder.decode(requests[:2], config)
    seconds, found = timed(lambda: decoder.decode(requests, config), rounds=3)
    slow, theirs = timed(lambda: published_loop(loaded.denoiser, prompts, options.gen_length, 4, 4))
    same = sum(
        list(ours.token_ids) == until_eos(ids) for ours, ids in zip(found, theirs, strict=True)
    )
    count = len(prompts)
    tokens = sum(len(completion.token_ids) for completion in found)
    return [
        better("block_exact", "completions", "1/s", count / seconds, count / slow),
        better("block_exact", "tokens", "1/s", tokens / seconds, tokens / slow),
        better("block_exact", "same_tokens", "completions", same, count),
    ]


def bidirectional(options: argparse.Namespace) -> list[Row]:
    """One token a step over the whole canvas, V = 151 936; the caches with blocks of 32."""
    denoiser = random_model("bidirectional", PUBLIC_VOCABULARY)
    decoder = Decoder(denoiser, Words())  # type: ignore[arg-type]
    prompts = random_prompts(1, 64)
    requests = [Request(prompt, 0) for prompt in prompts]
    length = options.canvas
    exact = DecodingConfig(gen_length=length, temperature=0.0)
    slow, theirs = timed(lambda: published_loop(denoiser, prompts, length, length, length))
    seconds, found = timed(lambda: decoder.decode(requests, exact))
    same = float(list(found[0].token_ids) == until_eos(theirs[0]))
    table = [
        better("bidirectional_exact", "time", "s", seconds, slow, lower=True),
        better("bidirectional_exact", "same_tokens", "share", same, 1),
    ]
    for cache in ("prefix", "dual"):
        config = replace(exact, block_size=32, cache=cache)
        seconds, _ = timed(lambda config=config: decoder.decode(requests, config))
        table.append(
            better(f"bidirectional_cached_{cache}", "time", "s", seconds, slow, lower=True)
        )
    return table


def continuous_batching(options: argparse.Namespace) -> list[Row]:
    """Ragged lengths through 16 slots, against batches of 16 that wait for their longest row."""
    decoder = Decoder(random_model("block_causal", 512, hidden=128, layers=4), Words())  # type: ignore[arg-type]
    gen = torch.Generator().manual_seed(1)
    count, slots = 2 * options.requests, 16
    # Most are short, some are long, as natural lengths are: exponential, mean 48, at most 256.
    lengths = torch.empty(count).exponential_(1 / 48, generator=gen).clamp(4, 256)
    call = DecodingConfig(gen_length=4, temperature=0.0, max_rows=slots)
    requests = [
        Request(prompt, n, replace(call, gen_length=int(length) // 4 * 4))
        for n, (prompt, length) in enumerate(
            zip(random_prompts(count, 64), lengths.tolist(), strict=True)
        )
    ]
    longest = DecodingConfig(gen_length=256, temperature=0.0, max_rows=slots)

    def static(padded: bool) -> list[Any]:
        found = []
        for start in range(0, count, slots):
            part = requests[start : start + slots]
            if padded:  # every row stays in the batch until the longest is done
                top = max(r.decoding.gen_length for r in part if r.decoding)
                part = [replace(r, decoding=replace(longest, gen_length=top)) for r in part]
            found += decoder.decode(part, call)
        return found

    decoder.decode(requests[:slots], call)
    seconds, _ = timed(lambda: decoder.decode(requests, call), rounds=3)
    waiting, _ = timed(lambda: static(True), rounds=3)
    shrinking, _ = timed(lambda: static(False), rounds=3)
    return [
        better("continuous_batching", "time", "s", seconds, waiting, lower=True),
        better("continuous_batching_shrinking", "time", "s", seconds, shrinking, lower=True),
    ]


class Judged:
    """Greedy answers of a checkpoint to held-out problems, timed, and judged in the sandbox."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.loaded = load_checkpoint(folder)
        self.decoder = Decoder(self.loaded.denoiser, self.loaded.tokenizer)
        self.scoring = load_train_config(options.config, [f"model.path={folder}"]).scoring
        self.problems = load_problems("embedded:test", seed=0, count=options.problems)
        self.requests = [
            Request(encode_prompt(self.loaded.tokenizer, problem.prompt), 0)
            for problem in self.problems
        ]

    def decode(self, config: DecodingConfig) -> tuple[float, list[Group]]:
        """Seconds of decoding alone, and the judged groups."""
        self.decoder.decode(self.requests[:2], config)
        seconds, found = timed(lambda: self.decoder.decode(self.requests, config))
        groups = [
            Group(problem, (Rollout(problem.problem_id, 0, request.prompt_ids, completion, 0, 0),))
            for problem, request, completion in zip(
                self.problems, self.requests, found, strict=True
            )
        ]
        with Rewarder(self.scoring) as rewarder:
            return seconds, rewarder.score(groups).groups


def pass_row(case: str, ours: list[Group], reference: list[Group]) -> Row:
    """pass@1 with its interval, and the difference, resampled in pairs."""
    one, other = pass_at_1(ours), pass_at_1(reference)
    paired = difference(pass_rates(reference), pass_rates(ours))
    ratio = one.value / max(other.value, 1e-9)
    return row(case, "pass@1", "share", one.value, other.value, ratio) | {
        "interval": [round(one.low, 4), round(one.high, 4)],
        "minus_reference": [round(v, 4) for v in (paired.value, paired.low, paired.high)],
    }


def tokens_of(groups: list[Group]) -> int:
    return sum(len(rollout.completion.token_ids) for g in groups for rollout in g.rollouts)


def threshold_curve(options: argparse.Namespace) -> list[Row]:
    """Tokens per pass and pass@1 of the demo's model; the reference is one token a pass."""
    judged = Judged(options.model, options)
    table: list[Row] = []
    one: tuple[float, list[Group]] | None = None
    for threshold in (None, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0):
        config = DecodingConfig(gen_length=64, temperature=0.0, threshold=threshold)
        _, groups = judged.decode(config)
        maps = [r.completion.step_map for group in groups for r in group.rollouts]
        rate = sum(map(len, maps)) / sum(max(steps) + 1 for steps in maps)
        one = one or (rate, groups)
        case = f"threshold_{threshold}"
        table += [
            better(case, "tokens_per_pass", "tokens", rate, one[0]),
            pass_row(case, groups, one[1]),
        ]
    return table


def approximate_caches(options: argparse.Namespace) -> list[Row]:
    """What Fast-dLLM's caches cost a trained bidirectional model; the reference has no cache."""
    judged = Judged(options.bidirectional, options)
    table: list[Row] = []
    for block in (8, 32):
        exact: tuple[float, list[Group]] | None = None
        for cache in ("exact", "prefix", "dual"):
            config = DecodingConfig(gen_length=64, block_size=block, temperature=0.0, cache=cache)  # type: ignore[arg-type]
            seconds, groups = judged.decode(config)
            speed = tokens_of(groups) / seconds
            exact = exact or (speed, groups)
            case = f"cache_{cache}_block_{block}"
            table += [
                better(case, "tokens", "1/s", speed, exact[0]),
                pass_row(case, groups, exact[1]),
            ]
    return table


def plot_thresholds(table: list[Row], path: Path) -> None:
    """Tokens per pass against pass@1, a point per threshold with its interval; kind by suffix."""
    curve = {(r["case"], r["metric"]): r for r in table if r["case"].startswith("threshold_")}
    names = [case for case, metric in curve if metric == "pass@1" and not case.endswith("None")]
    speed = [curve[name, "tokens_per_pass"]["ours"] for name in names]
    passed = [curve[name, "pass@1"] for name in names]
    value = [100 * r["ours"] for r in passed]
    below = [v - 100 * r["interval"][0] for v, r in zip(value, passed, strict=True)]
    above = [100 * r["interval"][1] - v for v, r in zip(value, passed, strict=True)]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "thresholds"}):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.errorbar(
            speed, value, [below, above], color="#2a6fbb", ecolor="#b5cde6", marker="o", capsize=3
        )
        for name, x, y in zip(names, speed, value, strict=True):
            label = name.removeprefix("threshold_")
            axes.annotate(label, (x, y), (6, 4), textcoords="offset points")
        axes.set(xlabel="tokens per pass", ylabel="greedy pass@1, %", xlim=(0.9, max(speed) + 0.3))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


CASES: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "block_exact": block_exact,
    "bidirectional": bidirectional,
    "continuous_batching": continuous_batching,
    "threshold": threshold_curve,
    "caches": approximate_caches,
}
# Cases that need a trained model: the option that names it, and what makes one.
NEED_MODEL = {
    "block_exact": ("model", "`make demo`"),
    "threshold": ("model", "`make demo`"),
    "caches": ("bidirectional", "configs/pretrain/bidirectional_cpu.yaml"),
}


def main() -> None:
    """Print a table, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--model", type=Path, default=Path("runs/demo/rl/hf"))
    folder = Path("runs/bidirectional/stages/sft")
    parser.add_argument("--bidirectional", type=Path, default=folder, help="model of `caches`")
    parser.add_argument("--config", type=Path, default=Path("configs/rl/tiny_cpu.yaml"))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--gen-length", type=int, default=256, help="of block_exact")
    parser.add_argument("--canvas", type=int, default=256, help="tokens and passes, bidirectional")
    parser.add_argument("--problems", type=int, default=320, help="of threshold and caches")
    parser.add_argument("--plot", type=Path, help="draw the threshold curve: .svg or .png")
    options = parser.parse_args()
    table: list[Row] = []
    absent = {}
    for name in options.cases.split(","):
        option, made_by = NEED_MODEL.get(name, ("", ""))
        if option and not (getattr(options, option) / "diffusion.json").is_file():
            folder = getattr(options, option)
            absent[name] = f"no model in {folder}; {made_by} makes one, or --{option}"
            continue
        table += CASES[name](options)
    if options.plot and "threshold" in options.cases.split(",") and "threshold" not in absent:
        plot_thresholds(table, options.plot)
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    report("rollout", table, options.json, machine=machine, absent=absent)


if __name__ == "__main__":
    main()

"""The coupled likelihood, forward and backward, beside three full passes with full logits.

`python benchmarks/likelihood.py [--json] [--layers 2] [--width 256] [--rounds 3]`

Two completions of 256 tokens behind prompts of 200, V = 151 936, a small random Qwen2, float32. The
reference is written anew in the form of apple/ml-diffucoder: per completion three canvases (all
masked, a mask, its complement), logits at every position, then log-softmax and gather. Each side
runs in processes of its own, one for time and one for memory: that process's peak above the model,
and the same less the parameters' gradients, which both must hold. There glibc gives freed memory
back at once, so that the peak is what is in use and not what the heap has kept.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.lib.record import Row, better, report  # noqa: E402
from diffusion.layout import Sequence, TokenRows  # noqa: E402
from diffusion.likelihood import estimate_logps  # noqa: E402
from diffusion.masking import coupled_masks, generator  # noqa: E402
from diffusion.views import EstimatorConfig  # noqa: E402
from models.checkpoint import new_model  # noqa: E402
from models.denoiser import Denoiser  # noqa: E402
from models.spec import DiffusionSpec  # noqa: E402

VOCABULARY, PROMPT, COMPLETION, ROWS, MASK = 151_936, 200, 256, 2, 0
SPEC = DiffusionSpec(
    mask_token_id=MASK, logit_shift=True, attention="bidirectional", block_size=None
)


def make_model(layers: int, width: int) -> nn.Module:
    """A stock model with random weights."""
    architecture = {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "tie_word_embeddings": False,
    }
    return new_model(architecture, 0)


def sequences() -> list[Sequence]:
    """Two random completions."""
    ids = torch.randint(1, VOCABULARY, (ROWS, PROMPT + COMPLETION), generator=generator(1)).tolist()
    return [Sequence(tuple(row[:PROMPT]), tuple(row[PROMPT:]), COMPLETION) for row in ids]


def reference(model: nn.Module) -> Tensor:
    """Three full passes, full logits: float32 [ROWS, COMPLETION]."""
    batch = sequences()
    ids = torch.tensor([s.prompt_ids + s.completion_ids for s in batch])
    pairs = torch.stack([coupled_masks(COMPLETION, (0.2, 0.8), 1, seed)[0] for seed in range(ROWS)])
    total = torch.zeros(ROWS, COMPLETION)
    visible = torch.ones(ROWS, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    for hidden in (torch.ones_like(pairs[:, 0]), pairs[:, 0], pairs[:, 1]):
        noisy = ids.clone()
        noisy[:, PROMPT:] = noisy[:, PROMPT:].masked_fill(hidden, MASK)
        logits = model(noisy, attention_mask=visible).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)[:, -COMPLETION:]
        logps = logits.float().log_softmax(-1).gather(-1, ids[:, PROMPT:, None])[..., 0]
        total = total + logps * hidden
    return total / 2


def ours(model: nn.Module) -> Tensor:
    """The same estimate by `diffusion.likelihood`."""
    return estimate_logps(
        Denoiser(model, SPEC), SPEC, sequences(), list(range(ROWS)), EstimatorConfig()
    )


def inside_the_model(model: nn.Module) -> float:
    """Seconds of one `ours` that are spent in the model's own forward and backward."""
    denoiser, spent = Denoiser(model, SPEC), [0.0]

    def score(rows: TokenRows) -> Tensor:
        start = time.perf_counter()
        out = denoiser(rows)
        spent[0] += time.perf_counter() - start
        return out

    start = time.perf_counter()
    estimate = estimate_logps(score, SPEC, sequences(), list(range(ROWS)), EstimatorConfig())
    forward = time.perf_counter() - start
    estimate.sum().backward()
    whole = time.perf_counter() - start
    return (forward - spent[0]) / whole


def peak_mib() -> float:
    """Most memory that this process ever had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(side: str, layers: int, width: int, rounds: int) -> None:
    """Measure one side in this process and print one JSON object."""
    model = make_model(layers, width)
    run = {"ours": ours, "reference": reference}[side]
    before, seconds, values = peak_mib(), [], torch.zeros(0)
    for _ in range(rounds):
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        values = run(model)
        values.sum().backward()
        seconds.append(time.perf_counter() - start)
    peak = peak_mib() - before
    # Gradients are as large as the model whatever computes them.
    gradients = sum(value.numel() * value.element_size() for value in model.parameters()) / 2**20
    outside = inside_the_model(model) if side == "ours" else 0.0
    found = {
        "seconds": statistics.median(seconds),
        "mib": peak,
        "net": peak - gradients,
        "outside": outside,
    }
    print(json.dumps(found | {"sum": float(values.detach().sum())}))


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """`child` twice, in processes of its own: seconds of the first, memory of the second."""
    timed = in_child(side, options, options.rounds, {})
    weighed = in_child(side, options, 1, {"MALLOC_MMAP_THRESHOLD_": "65536"})
    return timed | {key: weighed[key] for key in ("mib", "net")}


def in_child(
    side: str, options: argparse.Namespace, rounds: int, environment: dict[str, str]
) -> dict[str, float]:
    """What `child` prints."""
    sizes = [str(options.layers), str(options.width), str(rounds)]
    done = subprocess.run(
        [sys.executable, __file__, "--child", side, *sizes],
        capture_output=True,
        text=True,
        check=True,
        timeout=1800,
        env=os.environ | environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(options: argparse.Namespace) -> list[Row]:
    """DESIGN's rows; `ratio` above 1 means that ours is better."""
    mine, theirs = measure("ours", options), measure("reference", options)
    if abs(mine["sum"] / theirs["sum"] - 1) > 1e-4:
        raise SystemExit(f"the two sides disagree: {mine['sum']} and {theirs['sum']}")
    rows = []
    for case, metric, unit, key in (
        ("coupled_time", "forward_backward", "s", "seconds"),
        ("coupled_memory", "peak_above_model", "MiB", "mib"),
        ("coupled_memory", "less_gradients", "MiB", "net"),
    ):
        rows.append(better(case, metric, unit, mine[key], theirs[key], lower=True))
    share = 100 * mine["outside"]
    rows.append(better("estimator_overhead", "share", "%", share, 3.0, lower=True))
    return rows


def main() -> None:
    """Print a table, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], *(int(n) for n in options.child[1:]))
        return
    rows = table(options)
    threads = f"{torch.get_num_threads()} threads"
    report("likelihood", rows, options.json, machine=threads, note=f"V = {VOCABULARY}")


if __name__ == "__main__":
    main()

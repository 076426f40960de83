"""How fast one GPU decodes and learns, at the shapes of the released 7B and 8B models.

`python benchmarks/gpu.py [--json] [--out FILE] [--budget 540]`; `--shapes tiny` runs anywhere.

Random weights in bfloat16, built on the device. A rollout is `models.decoding` as in RL (sampled,
top-p). An update is the coupled estimate of a batch, forward and backward with gradient
checkpointing into bfloat16 gradients; a score is the same without gradients. AdamW's float32 state
(12 bytes a parameter) does not fit beside a 7B on one GPU: the optimizer step, and the
communication that sharding it takes, are left out.

MFU counts what the mathematics needs: 6 FLOPs per weight of a layer and token, 6 per weight of the
head and scored token, 12 * layers * width per pair of tokens that see each other. Recomputation and
padding are work that it does not count. Imports torch, transformers, diffusion and models only.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder

import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks.lib.gpu_shapes import EOS, SHAPES, Shape, build, pass_flops, random_ids  # noqa: E402
from benchmarks.lib.record import record  # noqa: E402
from diffusion.layout import Sequence as Tokens  # noqa: E402
from diffusion.layout import TokenRows  # noqa: E402
from diffusion.likelihood import estimate_logps  # noqa: E402
from diffusion.views import EstimatorConfig  # noqa: E402
from models.decoding import Decoder  # noqa: E402
from models.denoiser import Denoiser  # noqa: E402
from models.request import DecodingConfig, Request  # noqa: E402

Row = dict[str, Any]
# Dense bfloat16 FLOP/s of the data sheets (SXM), by what the driver calls the device.
PEAKS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12}
# Tokens/s on one GPU to beat, and whose they are.
END_TO_END = (47.0, "DiffuCoder's RL end to end, 8 H100, derived")
DECODING = (3700.0, "SDAR-4B decoding, one H200, batch 128")
ITERATIONS = 2  # mu of both recipes: passes over a batch of rollouts


RELEASED, TINY = ["diffucoder_7b", "stable_diffcoder_8b"], ["tiny_bidirectional", "tiny_block"]
BACKENDS = ["sdpa", "flex", "flash_attention_2"]


class Words:
    """What the decoder asks of a tokenizer, for random weights: there is no text."""

    eos_token_id = EOS

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return " ".join(map(str, ids))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float | None:
    """Most memory since the last reset, GiB; None where it is not counted."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


@dataclass
class Bench:
    """Rows as they come; nothing that goes wrong in one of them may cost the others."""

    device: torch.device
    budget: float
    rounds: int
    out: Path | None
    began: float = field(default_factory=lambda: time.monotonic())
    rows: list[Row] = field(default_factory=list)
    failed: bool = False

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def add(self, values: Row) -> None:
        """Keep a row, show it, and write all of them: a run that is killed leaves what it had."""
        blank = {"ours": None, "reference": None, "ratio": None, "note": ""}
        row = {**blank, **values}
        if row["ours"] is not None and row["reference"]:
            row["ratio"] = row["ours"] / row["reference"]
        for key in ("ours", "reference", "ratio"):
            row[key] = None if row[key] is None else float(f"{row[key]:.4g}")
        self.rows.append(row)
        print(line(row), file=sys.stderr, flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(found_so_far(self)) + "\n")

    def sizes(self, name: Row, batches: Sequence[int], work: Callable[[int], None]) -> None:
        """`work(batch)` for growing batches, until time or memory ends; both are rows."""
        last = 0.0
        for number, batch in enumerate(batches):
            here = {**name, "batch": batch, "metric": "tokens", "unit": "1/s"}
            # No batch is dearer than in proportion to its size.
            ahead = last * batch / batches[number - 1] if number else 0.0
            if ahead > self.left() or self.left() <= 0:
                self.add({**here, "note": f"left out: {self.left():.0f} s of --budget are left"})
                return
            start = time.monotonic()
            try:
                work(batch)
            except torch.OutOfMemoryError:
                self.add({**here, "note": "out of memory"})
                return
            except Exception as error:  # said, and the exit code tells: the other rows still count
                traceback.print_exc()
                first = (str(error).splitlines() or [""])[0][:160]
                self.add({**here, "note": f"failed: {type(error).__name__}: {first}"})
                self.failed = True
                return
            finally:
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            last = time.monotonic() - start

    def seconds(self, work: Callable[[], object], rounds: int) -> float:
        """Median of `rounds`, after the peak of memory was reset."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        found = []
        for _ in range(rounds):
            wait(self.device)
            start = time.perf_counter()
            work()
            wait(self.device)
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def best(self, case: str) -> float | None:
        """Most tokens/s of a case, over batches and back-ends."""
        found = [r["ours"] for r in self.rows if r["case"] == case and r["metric"] == "tokens"]
        return max((value for value in found if value is not None), default=None)


def rollout(bench: Bench, name: str, shape: Shape, model: Denoiser, batches: list[int]) -> None:
    """Tokens/s of whole completions, by kind of decoding and batch."""
    decoder = Decoder(model, Words())  # type: ignore[arg-type]
    model.use("sdpa").eval()
    for kind, config in shape.decoding.items():
        case = {"case": f"{name} rollout {kind}", "attention": "sdpa"}

        def work(batch: int, config: DecodingConfig = config, case: Row = case) -> None:
            ids = random_ids(shape, batch)
            requests = [Request(tuple(row[: shape.prompt]), n) for n, row in enumerate(ids)]
            config = replace(config, max_rows=batch)
            block, steps = config.resolve(shape.spec)
            decoder.decode(requests, replace(config, gen_length=block, steps_per_block=1))  # warm
            done: list[Any] = []
            seconds = bench.seconds(lambda: done.extend(decoder.decode(requests, config)), 1)
            tokens = sum(len(one.token_ids) + len(one.tail_ids) for one in done)
            note = ""
            if shape.spec.attention == "bidirectional" and block == shape.completion:
                # Timed with many tokens a pass; published and configured is one.
                tokens, note = batch * steps, f"one token a pass, derived from {steps} passes"
            here = {**case, "batch": batch, "note": note}
            like = name == "stable_diffcoder_8b" and batch >= 128
            speed = {"metric": "tokens", "unit": "1/s", "ours": tokens / seconds}
            bench.add({**here, **speed, "reference": DECODING[0] if like else None})
            bench.add({**here, "metric": "peak", "unit": "GiB", "ours": peak_gib(bench.device)})

        bench.sizes(case, batches, work)


def update(
    bench: Bench, name: str, shape: Shape, model: Denoiser, batches: list[int], backend: str
) -> None:
    """Completion tokens/s of the coupled estimate, with and without its gradient."""
    peak = next((v for k, v in PEAKS.items() if k in device_name(bench.device)), None)
    for kind, trains in (("score", False), ("update", True)):
        case = {"case": f"{name} {kind}", "attention": backend}

        def work(batch: int, case: Row = case, trains: bool = trains) -> None:
            model.use(backend).train(trains)  # type: ignore[arg-type]
            ids = random_ids(shape, batch)
            cut, length = shape.prompt, shape.completion
            texts = [Tokens(tuple(row[:cut]), tuple(row[cut:]), length) for row in ids]
            flops = [0.0]

            def score(rows: TokenRows) -> torch.Tensor:
                rows = rows.to(bench.device)
                flops[0] = flops[0] or pass_flops(model.model.config, rows)
                return model(rows)

            def step() -> None:
                model.zero_grad(set_to_none=True)
                with torch.set_grad_enabled(trains):
                    seeds = list(range(batch))
                    logps = estimate_logps(score, shape.spec, texts, seeds, EstimatorConfig())
                if trains:
                    (-logps.mean()).backward()

            try:
                step()  # compiles, and counts the FLOPs
                seconds = bench.seconds(step, bench.rounds)
            finally:
                model.zero_grad(set_to_none=True)
            here, tokens = {**case, "batch": batch}, batch * length
            bench.add({**here, "metric": "tokens", "unit": "1/s", "ours": tokens / seconds})
            needed = (3 if trains else 1) * flops[0] / seconds
            bench.add({**here, "metric": "useful", "unit": "TFLOP/s", "ours": needed / 1e12})
            share = None if peak is None else 100 * needed / peak
            bench.add({**here, "metric": "mfu", "unit": "%", "ours": share})
            bench.add({**here, "metric": "peak", "unit": "GiB", "ours": peak_gib(bench.device)})

        bench.sizes(case, batches, work)


def end_to_end(bench: Bench, name: str, shape: Shape) -> None:
    """One GPU that does all of a step in turn: rollout, old and reference scores, updates."""
    score, learn = bench.best(f"{name} score"), bench.best(f"{name} update")
    for kind in shape.decoding:
        decoded = bench.best(f"{name} rollout {kind}")
        if decoded is None or score is None or learn is None:
            continue
        passes = ITERATIONS / learn + (2 * ITERATIONS - 1) / score
        like = name == "diffucoder_7b" and kind == "exact"
        row = {"case": f"{name} step {kind}", "attention": "best", "batch": "best"}
        row |= {"metric": "tokens", "unit": "1/s", "ours": 1 / (1 / decoded + passes)}
        row |= {"note": "derived; without optimizer, rewards, communication"}
        bench.add({**row, "reference": END_TO_END[0] if like else None})


def misfit(device: torch.device, shape: Shape, backend: str) -> str:
    """Why this machine and this model cannot train with a back-end; empty if they can."""
    if backend == "sdpa":
        return ""
    if backend == "flash_attention_2" and shape.spec.attention != "bidirectional":
        return "absent: for bidirectional models only"
    if backend == "flash_attention_2" and find_spec("flash_attn") is None:
        return "absent: flash-attn is not installed"
    return "" if device.type == "cuda" else "absent: trains on a GPU only"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def found_so_far(bench: Bench) -> dict[str, Any]:
    """The common format of the benchmarks."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    machine = f"{device_name(bench.device)}, {versions}"
    return record("gpu", machine, bench.rows)


def line(row: Row) -> str:
    """A row of the table."""
    ours, reference, ratio = (cell(row[key]) for key in ("ours", "reference", "ratio"))
    names = f"{row['case']:42}{row['batch']!s:>6} {row['attention']:18}{row['metric']:8}"
    return f"{names}{row['unit']:8}{ours:>10}{reference:>11}{ratio:>9}  {row['note']}".rstrip()


def cell(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:g}"


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Reads names with commas between them."""

    def read(text: str) -> list[str]:
        names = TINY if text == "tiny" else text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{min(unknown)} is none of {', '.join(known)}")
        return names

    return read


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--json", action="store_true")
    add("--out", type=Path, help="write the JSON here too, after every row")
    add("--shapes", "--shape", type=some_of(SHAPES), default=RELEASED, help="with commas, or tiny")
    add("--parts", type=some_of(["update", "rollout"]), default=["update", "rollout"])
    add("--attention", type=some_of(BACKENDS), default=BACKENDS, help="of updates")
    add("--rollout-batches", type=numbers, default=[8, 32, 128])
    add("--update-batches", type=numbers, default=[4, 16, 48])
    add("--rounds", type=int, default=2, help="of an update, after one to warm up")
    add("--budget", type=float, default=540.0, help="seconds in all")
    return parser.parse_args()


def main() -> int:
    """Measure; the table, or with --json one object. 1 if a row failed."""
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not set(options.shapes) <= set(TINY):
        print("gpu: no CUDA device here, nothing measured; `--shapes tiny` runs on a CPU")
        return 0
    bench = Bench(device, options.budget, options.rounds, options.out)
    for number, name in enumerate(options.shapes, start=1):
        shape = SHAPES[name]
        bench.budget = options.budget * number / len(options.shapes)  # a share each
        model = build(shape, device)
        if "update" in options.parts:
            for backend in options.attention:
                reason = misfit(device, shape, backend)
                if reason:
                    case = {"case": f"{name} update", "attention": backend, "batch": "-"}
                    bench.add({**case, "metric": "tokens", "unit": "1/s", "note": reason})
                else:
                    update(bench, name, shape, model, options.update_batches, backend)
        if "rollout" in options.parts:
            rollout(bench, name, shape, model, options.rollout_batches)
        end_to_end(bench, name, shape)
        del model
        gc.collect()
    show(bench, options.json)
    return int(bench.failed)


def show(bench: Bench, as_json: bool) -> None:
    """Everything at the end, on stdout."""
    found = found_so_far(bench)
    if as_json:
        print(json.dumps(found))
        return
    print(f"gpu on {found['machine']}, commit {found['commit']}")
    heads = {name: name for name in ("case", "batch", "attention", "metric", "unit")}
    print(line({**heads, "ours": "ours", "reference": "reference", "ratio": "ratio", "note": ""}))
    for row in bench.rows:
        print(line(row))
    for value, whose in (END_TO_END, DECODING):
        print(f"reference {value:g} tokens/s on one GPU: {whose}")


if __name__ == "__main__":
    sys.exit(main())

"""`benchmarks/gpu.py` where there is no GPU: imports, counting, what goes wrong in a row."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.lib.gpu_shapes import SHAPES, build, pass_flops, random_ids
from diffusion.layout import Sequence, TokenRows
from diffusion.likelihood import estimate_logps
from diffusion.views import EstimatorConfig

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# A GPU machine has torch and transformers, and nothing else of what we need elsewhere.
BARE = """
import runpy, sys
# As python has it: importing them fails, and whoever asks first (accelerate does) hears no.
sys.modules.update(dict.fromkeys({absent}))
sys.argv = ["benchmarks/gpu.py"] + sys.argv[1:]
sys.path.insert(0, "to be replaced, as python does for a script")
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""
# (transformers itself tries pydantic where it is installed: ours comes through common.config.)
ABSENT = {"ray", "deepspeed", "accelerate", "peft", "omegaconf", "common.config"}
ABSENT |= {"rl", "pretrain", "workers", "rewards", "sandbox"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BARE.format(absent=sorted(ABSENT)), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.slow
def test_all_of_it_on_a_bare_machine(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = run("--shapes", "tiny", "--json", "--out", str(out), "--rollout-batches", "1,2",
               "--update-batches", "1,2", "--rounds", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads(out.read_text())
    assert found.keys() == {"name", "machine", "commit", "rows"}
    rows = found["rows"]
    tokens = {(r["case"], r["batch"]): r["ours"] for r in rows if r["metric"] == "tokens"}
    for shape in ("tiny_bidirectional", "tiny_block"):
        kinds = [f"rollout {kind}" for kind in SHAPES[shape].decoding] + ["score", "update"]
        assert all(tokens[f"{shape} {kind}", batch] > 0 for kind in kinds for batch in (1, 2))
        best = [f"{shape} step {kind}" for kind in SHAPES[shape].decoding]
        assert all(tokens[case, "best"] > 0 for case in best)
    notes = [r["note"] for r in rows if r["attention"] in ("flex", "flash_attention_2")]
    assert len(notes) == 4 and all(note.startswith("absent: ") for note in notes)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 0
    assert "no CUDA device here" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny_bidirectional", "tiny_block"])
def test_flops_are_those_of_the_operations(name: str) -> None:
    """A forward pass without padding, counted by torch, where every pair of tokens is computed."""
    shape = SHAPES[name]
    model = build(shape, CPU)
    texts = [Sequence(tuple(row[:9]), tuple(row[9:]), 16) for row in random_ids(shape, 2)]
    seen: list[TokenRows] = []

    def score(rows: TokenRows) -> torch.Tensor:
        seen.append(rows)
        return model(rows)

    math = sdpa_kernel(SDPBackend.MATH)  # the fused kernel of a CPU is not counted
    with torch.no_grad(), math, FlopCounterMode(display=False) as counter:
        estimate_logps(score, shape.spec, texts, [0, 1], EstimatorConfig())
    (rows,) = seen
    found = pass_flops(model.model.config, rows)
    pairs = rows.input_ids.numel() * rows.input_ids.shape[1]
    unseen = pairs - int(rows.attention_mask.sum())
    assert (unseen == 0) is (name == "tiny_bidirectional")
    heads, layers = 4 * 16, 2
    assert counter.get_total_flops() == found + 4 * unseen * heads * layers


def test_flops_leave_padding_out() -> None:
    shape = SHAPES["tiny_block"]
    config = build(shape, CPU).model.config
    long, short = ([Sequence((7,) * p, (8,) * c, c)] for p, c in ((9, 16), (4, 7)))
    counts = []

    def count(rows: TokenRows) -> torch.Tensor:
        counts.append(pass_flops(config, rows))
        return torch.zeros(len(rows.targets))

    for texts in (long, short, long + short):
        estimate_logps(count, shape.spec, texts, [0] * len(texts), EstimatorConfig())
    assert counts[2] == counts[0] + counts[1]


def test_random_weights_keep_rotary_frequencies_exact() -> None:
    model = build(SHAPES["tiny_block"], CPU).model
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def bench_of(budget: float = 60.0) -> gpu.Bench:
    return gpu.Bench(CPU, budget, rounds=1, out=None)


CASE = {"case": "c", "attention": "sdpa"}


def test_memory_that_ends_is_a_row_and_ends_the_case() -> None:
    bench, seen = bench_of(), []

    def work(batch: int) -> None:
        seen.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    bench.sizes(CASE, [1, 2, 4, 8], work)
    assert seen == [1, 2, 4]
    assert [(r["batch"], r["note"]) for r in bench.rows] == [(4, "out of memory")]
    assert not bench.failed


def test_an_error_is_a_row_and_an_exit_code(capsys: Any) -> None:
    bench = bench_of()

    def work(batch: int) -> None:
        raise RuntimeError("no kernel image\nsecond line")

    bench.sizes(CASE, [1, 2], work)
    assert [r["note"] for r in bench.rows] == ["failed: RuntimeError: no kernel image"]
    assert bench.failed
    assert "Traceback" in capsys.readouterr().err


def test_time_that_will_not_do_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    bench, seen = gpu.Bench(CPU, 100.0, rounds=1, out=None), []

    def work(batch: int) -> None:
        seen.append(batch)
        clock[0] += 5.0 * batch

    bench.sizes(CASE, [1, 8, 16], work)  # 5 s, 40 s; 55 s are left and 80 s would be needed
    assert seen == [1, 8]
    assert bench.rows[0]["note"] == "left out: 55 s of --budget are left"


def test_the_step_of_a_run_by_hand() -> None:
    """Of a second a token: decoded 1/40, two updates 1/20 each, three scores 1/60 each."""
    bench, shape = bench_of(), SHAPES["tiny_block"]
    row = {"attention": "sdpa", "batch": 1, "metric": "tokens", "unit": "1/s"}
    for case, speed in (("rollout 4 passes a block", 40), ("update", 20), ("score", 60)):
        for slower in (speed / 2, speed, None):
            bench.add({**row, "case": f"x {case}", "ours": slower})
    gpu.end_to_end(bench, "x", shape)
    (found,) = [r for r in bench.rows if r["case"].startswith("x step")]
    assert found["case"] == "x step 4 passes a block"
    assert found["ours"] == pytest.approx(1 / (1 / 40 + 2 / 20 + 3 / 60), rel=1e-3)

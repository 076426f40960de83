"""What a save costs training, and what it costs in all, beside `torch.save` on the same bytes.

`python benchmarks/checkpoint.py [--json] [--mib 256] [--folder DIR]`

`--mib` is the size of the parameters in float32; with Adam's two moments the state is three times
that. The engines are the ones that train, on one rank; N ranks would each have an Nth of it.
Not a test of exactness (tests/rl/test_resume.py).
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder

from benchmarks.lib.record import Row, better, report  # noqa: E402
from common.integrity import find_damage, flush  # noqa: E402
from diffusion.layout import TokenRows  # noqa: E402
from models.engine import Engine, EngineConfig, OptimConfig, make_engine  # noqa: E402
from models.state_files import StateFiles  # noqa: E402
from rl.checkpoint import Checkpoints, RunState  # noqa: E402

ROUNDS = 5
WIDTH = 1024
ENGINES = {
    "torch": EngineConfig(kind="torch"),
    "zero 0": EngineConfig(zero_stage=0),
    "zero 1": EngineConfig(zero_stage=1),
    "zero 3": EngineConfig(zero_stage=3),
}


class Weights(nn.Module):
    """So many MiB of matrices; its log-probabilities are their first column."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        layers = max(1, mib * 2**20 // (4 * WIDTH * WIDTH))
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))

    def forward(self, rows: TokenRows) -> Tensor:
        value = rows.targets.float().expand(1, WIDTH) / WIDTH
        scores: Tensor = self.model(value)[0, :1]
        return scores


def trained(config: EngineConfig, mib: int) -> Engine:
    """An engine that has made one step, so that the moments are there."""
    engine = make_engine(Weights(mib), config, OptimConfig(lr=1e-4, total_steps=10))
    one = torch.ones(1, 1, dtype=torch.long)
    rows = TokenRows(one, one, torch.ones(1, 1, 1, 1, dtype=torch.bool), one[0] * 0, one[0])
    engine.backward(engine.score(rows).sum(), last=True)
    engine.step()
    return engine


def plain(path: Path, state: object) -> float:
    """Seconds of `torch.save` and fsync."""
    began = time.perf_counter()
    torch.save(state, path)
    flush(path)
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def measure(engine: Engine, folder: Path, mib: int) -> dict[str, float]:
    """Median seconds: `pause` until training may go on, `written` until all is on disk, `verify`,
    and `plain` for three lists of tensors as large as the state. They take turns.
    """
    checkpoints = Checkpoints(folder, keep_last_n=1)
    state = [[torch.rand(WIDTH, WIDTH) for _ in range(mib // 4)] for _ in range(3)]
    times: dict[str, list[float]] = {"pause": [], "written": [], "verify": [], "plain": []}

    def write(into: Path) -> Any:
        files = StateFiles()
        engine.snapshot(into / "policy", files)
        return files.write_beside()

    for step in range(ROUNDS + 1):
        began = time.perf_counter()
        future = checkpoints.begin(RunState(step, step, 0), write)
        times["pause"].append(time.perf_counter() - began)
        saved = future.result(600)
        times["written"].append(time.perf_counter() - began)
        began = time.perf_counter()
        if (damage := find_damage(saved)) is not None:
            raise RuntimeError(damage)
        times["verify"].append(time.perf_counter() - began)
        times["plain"].append(plain(folder / "plain.pt", state))
    shutil.rmtree(folder)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def rows_of(mib: int, folder: Path) -> list[Row]:
    """One row per engine and time."""
    rows = []
    for case, config in ENGINES.items():
        times = measure(trained(config, mib), folder / "run", mib)
        reference = times.pop("plain")
        rows += [
            better(case, name, "s", seconds, reference, lower=True)
            for name, seconds in times.items()
        ]
    return rows


def main() -> None:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = rows_of(options.mib, Path(folder))
    note = f"state of 3 x {options.mib} MiB; the reference is torch.save and fsync"
    report("checkpoint", rows, options.json, note=note)


if __name__ == "__main__":
    main()

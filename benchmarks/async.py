"""What running ahead buys and costs: step time and pass@1 at max_staleness 1 and 2 beside 0.

`python benchmarks/async.py [--json] [--cases simulated,demo] [--steps 190] [--seeds 0,1,2]`

simulated: the main loop and its threads as they are, with sleeps instead of rollouts, scoring,
    updates and weights: roles that share no core. `over_bound` compares with the slowest role.
demo: `unmask train` on the demo's SFT model (--model), equal steps and so equal samples; step time
    is the median without the first three. pass@1 is greedy, after the last step. `uncorrected` is
    staleness 1 without importance weights. On two cores the roles share what there is.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder

from benchmarks.lib.record import Row, better, report  # noqa: E402
from common.futures import in_thread  # noqa: E402
from common.metrics import read_metrics  # noqa: E402
from common.progress import SilentProgress  # noqa: E402
from common.records import Completion, Group, Problem, Rollout, Score, Scored  # noqa: E402
from rl.config import TrainConfig, load_train_config  # noqa: E402
from rl.protocol import Hear, nobody  # noqa: E402
from rl.train import prepare  # noqa: E402
from workers.local import LocalCluster  # noqa: E402

VARIANTS: dict[str, tuple[int, list[str]]] = {
    "staleness_1": (1, []),
    "staleness_2": (2, []),
    "uncorrected": (1, ["algorithm.importance_cap=null"]),
}
WARM_UP = 3
# Seconds of a simulated step: about what the demo's model takes, in its proportions.
GENERATE, SCORE, UPDATE, SYNC = 0.20, 0.05, 0.16, 0.02
SPREAD = 0.3  # of log(seconds) from batch to batch: the longest completion decides


class SleepingCluster(LocalCluster):
    """A cluster whose rollout, reward and learner roles only take time. One pool of each."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self._generating, self._scoring = threading.Lock(), threading.Lock()
        self.generated: list[float] = []

    def roll_out(
        self, problems: Sequence[Problem], seed: int, hear: Hear = nobody
    ) -> Future[Scored]:
        """As long as its seed says, then scoring; each role does one batch at a time."""

        def work() -> Scored:
            seconds = GENERATE * random.Random(seed).lognormvariate(0.0, SPREAD)
            with self._generating:
                version = self._version
                time.sleep(seconds)
                self.generated.append(seconds)
            groups = [_group(problem, seed, version) for problem in problems]
            hear("generated", groups)
            with self._scoring:
                time.sleep(SCORE)
            hear("scored", groups)
            return Scored(groups)

        return in_thread(work, "rollouts")

    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Nothing is learned."""
        time.sleep(UPDATE)
        return {}

    def sync_weights(self, step: int) -> int:
        """Another version of the same weights."""
        time.sleep(SYNC)
        self._version += 1
        return self._version


def _group(problem: Problem, seed: int, version: int) -> Group:
    completion = Completion((1,), (), "", "eos", (0,), (1.0,))
    name = problem.problem_id
    rollouts = (
        Rollout(name, index, (1,), completion, version, seed, Score(float(index)))
        for index in range(2)
    )
    return Group(problem, tuple(rollouts))


class Notes:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def log(self, values: Mapping[str, float], *, step: int, stage: str) -> None:
        self.records.append(dict(values))

    def close(self) -> None:
        pass


def overrides(options: argparse.Namespace, folder: Path, staleness: int, seed: int) -> list[str]:
    """A run of its own folder that saves and evaluates at its end only."""
    return [
        f"run.folder={folder}",
        f"run.seed={seed}",
        "run.resume=never",
        f"model.path={options.model}",
        f"train.steps={options.steps}",
        "train.save_every=0",
        f"algorithm.max_staleness={staleness}",
        *options.overrides,
    ]


def step_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """Median seconds of a step, without the first ones."""
    found = [record["timing_s/step"] for record in records if "timing_s/step" in record]
    return statistics.median(found[min(WARM_UP, len(found) - 1) :])


def simulated(options: argparse.Namespace) -> list[Row]:
    """Staleness 1 and 2 beside 0, and beside the slowest role."""
    seconds: dict[int, float] = {}
    bound = 0.0
    for staleness in (0, 1, 2):
        with tempfile.TemporaryDirectory() as folder:
            chosen = overrides(options, Path(folder), staleness, seed=0)
            chosen += ["train.eval_every=0", "cluster.kind=local", "cluster.learner.ranks=1"]
            chosen += ["engine.kind=torch"]
            config = load_train_config(options.config, chosen)
            cluster, notes = SleepingCluster(config), Notes()
            try:
                prepare(config).run_on(cluster, notes, SilentProgress())
            finally:
                cluster.close()
        # The mean: a batch that took long must not be forgotten.
        spans = [r["timing_s/step"] for r in notes.records if "timing_s/step" in r]
        seconds[staleness] = statistics.fmean(spans)
        bound = max(statistics.fmean(cluster.generated), SCORE, UPDATE + SYNC)
    rows = []
    for staleness in (1, 2):
        case = f"simulated_{staleness}"
        rows.append(better(case, "step_time", "s", seconds[staleness], seconds[0], lower=True))
        rows.append(better(case, "over_bound", "s", seconds[staleness], bound, lower=True))
    return rows


def train(
    options: argparse.Namespace, staleness: int, seed: int, *more: str
) -> list[dict[str, Any]]:
    """The metrics of one `unmask train`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = overrides(options, Path(folder), staleness, seed)
        chosen += [f"train.eval_every={options.steps}", *more]
        done = subprocess.run(
            [sys.executable, "-m", "rl.train", "--config", str(options.config), *chosen],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=options.timeout,
        )
        if done.returncode:
            raise SystemExit(f"staleness {staleness}: {done.stderr.strip()[-2000:]}")
        return read_metrics(Path(folder) / "metrics.jsonl")


def pass_at_1(records: Sequence[Mapping[str, Any]]) -> float:
    """Of the last evaluation, in percent."""
    return 100 * [record["eval/pass@1"] for record in records if "eval/pass@1" in record][-1]


def demo(options: argparse.Namespace) -> list[Row]:
    """The demo's model at equal samples, a row for each seed."""
    rows = []
    for seed in (int(seed) for seed in options.seeds.split(",")):
        base = train(options, 0, seed)
        for name in options.variants.split(","):
            staleness, more = VARIANTS[name]
            records = train(options, staleness, seed, *more)
            case = f"demo_{name}_seed{seed}"
            spans = step_seconds(records), step_seconds(base)
            rows.append(better(case, "step_time", "s", *spans, lower=True))
            rows.append(better(case, "pass@1", "%", pass_at_1(records), pass_at_1(base)))
    return rows


CASES = {"simulated": simulated, "demo": demo}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; SystemExit for what cannot work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cases", default="simulated,demo")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "rl" / "tiny_cpu.yaml")
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "demo" / "stages" / "sft")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of the demo case")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds of one run")
    parser.add_argument("overrides", nargs="*", help="a.b=c, for every run")
    options = parser.parse_args(arguments)
    unknown = set(options.cases.split(",")) - CASES.keys()
    if unknown:
        parser.error(f"--cases {','.join(sorted(unknown))}: there are {','.join(CASES)}")
    unknown = set(options.variants.split(",")) - VARIANTS.keys()
    if unknown:
        parser.error(f"--variants {','.join(sorted(unknown))}: there are {','.join(VARIANTS)}")
    if not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model} is not there: `make demo` leaves one")
    options.model = options.model.resolve()
    return options


def main() -> None:
    """Print a table, or with --json one object."""
    options = parse()
    rows = [line for case in options.cases.split(",") for line in CASES[case](options)]
    report("async", rows, options.json, note=f"{options.steps} steps")


if __name__ == "__main__":
    main()

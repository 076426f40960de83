"""How far one driver goes: real loop, crews, ledger and Ray actors around workers that only sleep.

`python benchmarks/scaling.py [--json] [--workers 1,2,4,8,16,32,64] [--staleness 1]`

A rollout worker sleeps `--seconds` per completion, +-20 % from group to group; there is one reward
worker for four of them, 1 to 16. Every worker is an actor process of its own, on this machine: what
they cost it beside the sleep (random completions, pickling, Ray) counts against us, though on a
cluster it would be elsewhere. Batches grow with the workers, two groups each.

`throughput`: rollouts/s, and if workers did nothing but sleep; the ratio is the efficiency.
`piece` (case "crew of N"): the books alone, at more workers than fit here.
`actor call`: CPU of one, with and without our futures. `catalogue of N buckets`: CPU of telling one
reader where N buckets lie (the shelf's, the publisher's, its own); the reference is one bucket.
`driver`: CPU of the driver's whole process per rollout, all threads, Ray's too; the reference is
the goal. `memory` (case "N steps"): of the driver, without the object store's pages; mean of its
last tenth of steps, and of the second tenth.

Not here: model passes, sandboxes, weights (rollout.py, sandbox.py, weights.py).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder

import psutil  # noqa: E402
import torch  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402

from benchmarks.lib.record import Row, lines, report, row  # noqa: E402
from benchmarks.lib.simulated import (  # noqa: E402
    CatalogueReader,
    HandWorker,
    Simulated,
    SleepingLearner,
    SleepingReward,
    SleepingRollout,
)
from common.metrics import METRICS_FILE, JsonlSink  # noqa: E402
from common.records import Problem  # noqa: E402
from models.decoding import DecodingConfig  # noqa: E402
from rl.checkpoint import Checkpoints  # noqa: E402
from rl.config import TrainConfig  # noqa: E402
from rl.ledger import LEDGER_FILE, Ledger  # noqa: E402
from rl.loop import Loop  # noqa: E402
from rl.protocol import LoopPlan  # noqa: E402
from rl.saving import Saver  # noqa: E402
from workers.cluster import RayCluster  # noqa: E402
from workers.crew import Crew  # noqa: E402
from workers.health import CrashWatch, Limits  # noqa: E402
from workers.launcher import Launcher  # noqa: E402
from workers.nodes import connect  # noqa: E402
from workers.placement import Remote, launch, ray, wait  # noqa: E402
from workers.ray_weights import WEIGHTS, RayWeightStore  # noqa: E402
from workers.shelf import WeightShelf  # noqa: E402
from workers.weights import INITIAL_VERSION, KEEP_VERSIONS  # noqa: E402
from workers.wire import Bucket, Piece  # noqa: E402

GROUP_SIZE = 8
GROUPS_EACH = 2  # of a rollout worker, per step
ROLLOUTS_PER_REWARD = 4
WARM_UP = 2  # steps
DRIVER_GOAL_MS = 1.0
TIMEOUT_S = 600.0


class SleepingLauncher(Launcher):
    """Starts sleepers in the place of all three roles."""

    def __init__(self, simulated: Simulated, *args: Any) -> None:
        super().__init__(*args)
        self._simulated = simulated

    def _sleeper(self, kind: type, name: str, incarnation: int) -> Remote:
        return Remote(self.actor(name, partial(kind, self._simulated), incarnation=incarnation))

    def rollout(self, name: str, incarnation: int) -> Remote:
        return self._sleeper(SleepingRollout, name, incarnation)

    def reward(self, name: str, incarnation: int) -> Remote:
        return self._sleeper(SleepingReward, name, incarnation)

    def ranks(self, incarnation: int) -> list[Remote]:
        return [self._sleeper(SleepingLearner, "learner-0", incarnation)]


@dataclass
class Mark:
    """The driver at the end of a step. cpu_s: of its process so far. slept_s: for the step.

    own: bytes of its memory without what is shared: pages of the object store are bounded by Ray.
    """

    at: float
    cpu_s: float
    slept_s: float
    rollouts: float
    own: float


@dataclass
class Stopwatch:
    """The loop's monitor: writes metrics as a run does, and marks the time."""

    sink: JsonlSink
    marks: list[Mark] = field(default_factory=list)
    process: psutil.Process = field(default_factory=psutil.Process)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.sink.log(metrics, step=step, stage="rl")
        if "simulated/slept_s" in metrics:
            slept, count = metrics["simulated/slept_s"], metrics["completions/count"]
            found = self.process.memory_info()
            own = found.rss - found.shared
            self.marks.append(Mark(time.monotonic(), time.process_time(), slept, count, own))

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)


def run_config(folder: Path, rollout: int, reward: int, options: argparse.Namespace) -> TrainConfig:
    """Of a run with so many workers."""
    actor = {"num_cpus": 0.0}
    values = {
        "run": {"name": "scaling", "folder": str(folder)},
        "model": {"path": str(folder / "no-model")},
        "data": {"train": "embedded:rl", "test": "embedded:test"},
        "rollout": {
            "group_size": GROUP_SIZE,
            "prompts_per_step": GROUPS_EACH * rollout,
            "decoding": {"gen_length": options.tokens},
        },
        "reward": {"functions": [{"name": "code", "weight": 2.0}]},
        "optim": {"lr": 1e-5},
        "train": {"steps": 1},
        "algorithm": {"max_staleness": options.staleness},
        "cluster": {
            "kind": "ray",
            "rollout": actor | {"min": rollout, "max": rollout},
            "reward": actor | {"min": reward, "max": reward},
            "learner": actor,
            "timeout_s": TIMEOUT_S,
        },
    }
    return TypeAdapter(TrainConfig).validate_json(json.dumps(values))


def batch_of(prompts: int, step: int) -> list[Problem]:
    """Problems with a page of text and some tests."""
    tests = tuple(f"assert solve({n}) == {n}" for n in range(5))
    return [Problem(f"{step}/{i}", "Write a function. " * 40, tests) for i in range(prompts)]


def run(rollout: int, reward: int, steps: int, simulated: Simulated, options: Any) -> list[Mark]:
    """Marks of all steps of one run."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        config = run_config(Path(name), rollout, reward, options)
        folder = config.run.path
        folder.mkdir(parents=True, exist_ok=True)
        monitor = Stopwatch(JsonlSink(folder / METRICS_FILE))
        launcher = partial(SleepingLauncher, simulated)
        with closing(RayCluster(config, say=monitor.say, launcher=launcher)) as cluster:
            plan = LoopPlan(
                steps=steps,
                eval_decoding=DecodingConfig(gen_length=options.tokens),
                max_staleness=options.staleness,
                timeout_s=TIMEOUT_S,
            )
            loop = Loop(
                cluster,
                partial(batch_of, config.rollout.prompts_per_step),
                [],
                plan,
                Saver(Checkpoints(folder, 1), cluster.save, monitor, None, TIMEOUT_S),
                Ledger(folder / LEDGER_FILE, GROUP_SIZE),
                monitor,
                finish=lambda step: None,
            )
            loop.run()
        return monitor.marks


def scale(rollout: int, simulated: Simulated, options: argparse.Namespace) -> list[Row]:
    """Throughput and the driver's time with so many rollout workers."""
    reward = max(1, rollout // ROLLOUTS_PER_REWARD)
    # Each step counted has as much of it done ahead as is done of its successors meanwhile.
    count = WARM_UP + options.steps
    marks = run(rollout, reward, count + options.staleness, simulated, options)[WARM_UP - 1 : count]
    case = f"{rollout} rollout, {reward} reward"
    seconds = marks[-1].at - marks[0].at
    rollouts = sum(mark.rollouts for mark in marks[1:])
    slept = sum(mark.slept_s for mark in marks[1:])
    ideal = rollouts * rollout / slept
    return [
        loaded(case, "throughput", "1/s", rollouts / seconds, ideal, rollouts / seconds / ideal),
        driver_row(case, marks),
    ]


def driver_row(case: str, marks: Sequence[Mark]) -> Row:
    """CPU per rollout between the first mark and the last."""
    rollouts = sum(mark.rollouts for mark in marks[1:])
    each = 1e3 * (marks[-1].cpu_s - marks[0].cpu_s) / rollouts
    return loaded(case, "driver", "ms", each, DRIVER_GOAL_MS, DRIVER_GOAL_MS / each)


def memory(simulated: Simulated, options: argparse.Namespace) -> list[Row]:
    """Whether the driver grows over many steps, which sleep little."""
    fast = Simulated(simulated.rollout_s / 50, 0.0, 0.0, simulated.tokens)
    marks = run(options.long_workers, 2, options.long_steps, fast, options)
    tenth = max(1, len(marks) // 10)
    first, last = (
        fmean(mark.own for mark in part) / 2**20
        for part in (marks[tenth : 2 * tenth], marks[-tenth:])
    )
    case = f"{options.long_steps} steps"
    return [loaded(case, "memory", "MiB", last, first, first / last), driver_row(case, marks)]


def crew_turns(size: int) -> list[Row]:
    """The driver's books alone: CPU of handing out a piece and taking its answer, one at a time.

    A crew of workers without processes; a turn for every answer is the most turns there can be.
    The reference is a crew of one.
    """
    cost = {count: piece_ms(count) for count in (1, size)}
    return [loaded(f"crew of {size}", "piece", "ms", cost[size], cost[1], cost[1] / cost[size])]


def piece_ms(size: int, pieces: int = 2000) -> float:
    """CPU milliseconds of one piece's way through a crew of `size` busy workers."""
    workers: list[HandWorker] = []

    def start(name: str, incarnation: int) -> HandWorker:
        workers.append(HandWorker())
        return workers[-1]

    limits = Limits(5.0, 60.0, TIMEOUT_S)
    crew = Crew("rollout", start, size, limits, CrashWatch(3, 60.0), print)
    done = crew.submit([("generate", (number,)) for number in range(pieces + size)])
    while not all(worker.pending for worker in workers):
        crew.turn()
    began = time.thread_time()
    for number in range(pieces):
        workers[number % size].answer()
        crew.turn()
    seconds = time.thread_time() - began
    assert not done.done()  # everybody was busy to the end
    return 1e3 * seconds / pieces


def ray_costs(options: argparse.Namespace) -> list[Row]:
    """What Ray takes for one call of an actor, and for telling a reader where weights lie."""
    connect(None, 2, 0)
    try:
        with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
            small, large = (catalogue_ms(Path(folder), n) for n in (1, options.buckets))
            case = f"catalogue of {options.buckets} buckets"
            rows = [
                loaded(case, who, "ms", large[who], small[who], small[who] / max(large[who], 1e-3))
                for who in ("shelf", "owner", "reader")
            ]
            return [call_row(Path(folder), options.calls), *rows]
    finally:
        ray.shutdown()


def call_row(folder: Path, count: int) -> Row:
    """CPU of the driver's process for one call and its answer, through our futures and without."""
    nothing = partial(SleepingReward, Simulated(0.0, 0.0, 0.0, 1))
    actor = launch("callee", folder / "c", nothing, run="scaling", num_cpus=0.0, local=True)
    wait([actor.call("close")], TIMEOUT_S)
    began = time.process_time()
    for future in [Remote(actor).call("close") for _ in range(count)]:
        future.result(TIMEOUT_S)
    middle = time.process_time()
    ray.get([actor.handle.call.remote("close") for _ in range(count)], timeout=TIMEOUT_S)
    ended = time.process_time()
    ours, bare = 1e3 * (middle - began) / count, 1e3 * (ended - middle) / count
    return loaded("actor call", "driver", "ms", ours, bare, bare / ours)


def catalogue_ms(folder: Path, buckets: int, readers: int = 4, reads: int = 10) -> dict[str, float]:
    """CPU milliseconds of one reader's question: the shelf's, the owner's (here: ours), its own.

    The buckets are tiny: what is counted is references, not bytes.
    """
    run = f"scaling-{buckets}"
    start = partial(launch, run=run, num_cpus=0.0, local=True)
    log = folder / "shelf.log"
    shelf = start(WEIGHTS, log, partial(WeightShelf, KEEP_VERSIONS, INITIAL_VERSION))
    wait([shelf.call("newest")], TIMEOUT_S)
    store = RayWeightStore(run, log, TIMEOUT_S)
    store.publish(1, (Bucket((Piece(f"w{n}", (4,), 0, torch.ones(4)),)) for n in range(buckets)))
    actors = [
        start(f"reader-{n}", folder / f"reader-{n}.log", partial(CatalogueReader, store))
        for n in range(readers)
    ]
    beats = wait([actor.beat() for actor in (shelf, *actors)], TIMEOUT_S)
    processes = [psutil.Process(beat.pid) for beat in beats]

    def cpu_s() -> list[float]:
        return [sum(p.cpu_times()[:2]) for p in (*processes, psutil.Process())]

    before = cpu_s()
    for _ in range(reads):
        wait([actor.call("read") for actor in actors], TIMEOUT_S)
    time.sleep(2)  # references are let go of behind our back
    served, *own, owner = (1e3 * (b - a) / reads for a, b in zip(before, cpu_s(), strict=True))
    return {"shelf": served / readers, "owner": owner / readers, "reader": fmean(own)}


def loaded(*values: Any) -> Row:
    """A row, with the machine's load at the end of its case."""
    return row(*values, load=round(os.getloadavg()[0], 1))


def main() -> None:
    """Print a table, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--workers", type=numbers, default="1,2,4,8,16,32,64", help="of rollout")
    parser.add_argument("--steps", type=int, default=4, help="measured ones of each case")
    parser.add_argument("--long-steps", type=int, default=500, help="0 leaves the case out")
    parser.add_argument("--long-workers", type=int, default=8, help="rollout workers of that case")
    parser.add_argument("--crew", type=int, default=1000, help="workers without processes")
    parser.add_argument("--calls", type=int, default=2000, help="of an actor that does nothing")
    parser.add_argument("--buckets", type=int, default=2087, help="of a version: 70 B in bfloat16")
    parser.add_argument("--seconds", type=float, default=0.25, help="of a worker, per completion")
    parser.add_argument("--reward-seconds", type=float, default=0.02, help="per completion")
    parser.add_argument("--update-seconds", type=float, default=0.2, help="per step")
    parser.add_argument("--tokens", type=int, default=256, help="of a completion")
    parser.add_argument("--staleness", type=int, default=1, help="0: rollouts wait for the learner")
    options = parser.parse_args()
    simulated = Simulated(
        options.seconds, options.reward_seconds, options.update_seconds, options.tokens
    )
    torch.set_num_threads(1)
    cases: list[Callable[[], list[Row]]] = [
        partial(crew_turns, options.crew),
        partial(ray_costs, options),
        *(partial(scale, count, simulated, options) for count in options.workers),
    ]
    if options.long_steps:
        cases.append(partial(memory, simulated, options))
    rows = [one for case in cases for one in told(case)]
    report("scaling", rows, options.json, note="load: at the end of a case")


def numbers(text: str) -> list[int]:
    """Of a list with commas; an empty one leaves the cases out."""
    return [int(part) for part in text.split(",") if part]


def told(case: Callable[[], list[Row]]) -> list[Row]:
    """Its rows, also to stderr at once: all cases take minutes, and a later one may fail."""
    began = time.monotonic()
    rows = case()
    for one in rows:
        print(lines([one])[1], file=sys.stderr)
    print(f"took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()

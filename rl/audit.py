"""The proof that no sample was lost or used twice, from `ledger.jsonl` and `metrics.jsonl`.

Not a repair: it reads two files of a run folder, running or finished, and says what does not add
up. `unmask audit` prints it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.metrics import METRICS_FILE, read_metrics
from rl.ledger import LEDGER_FILE

Sample = tuple[str, int]
STAGES = ("generated", "scored", "settled")
# metrics.jsonl has its times in milliseconds, written at another moment than the ledger's.
ROUNDING_S = 0.002


@dataclass(frozen=True)
class Audit:
    """What the two files say.

    steps: settled without a gap from the first. planned, trained, recomputed (too old, and so
    rolled out once more), dropped: samples of these steps. in_flight: steps that are planned and
    not yet settled. lives: each begin's step and cause. superseded: entries that a later life made
    void. violations: lines for people.
    """

    steps: int
    planned: int
    trained: int
    recomputed: int
    dropped: dict[str, int]
    in_flight: list[int]
    lives: list[dict[str, Any]]
    superseded: int
    violations: list[str] = field(default_factory=list)


def audit(run: Path) -> Audit:
    """Check a run folder.

    Raises:
        UserError: there is no ledger, or a line of it (or of the metrics) cannot be read.
    """
    path = run / LEDGER_FILE
    metrics = read_metrics(run / METRICS_FILE)  # first: the run may go on meanwhile
    entries = read_metrics(path)
    if not entries:
        raise UserError(f"{path}: no entries; give the folder of a run that `unmask train` made")
    try:
        return _audit(path, entries, metrics)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: an entry cannot be read ({error!r})") from error


def _audit(path: Path, entries: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> Audit:
    lives = [entry for entry in entries if entry["event"] == "begin"]
    kept = [e for e in entries if e["event"] != "begin" and not _superseded(e, lives)]
    by_step: dict[int, list[dict[str, Any]]] = {}
    for entry in kept:
        by_step.setdefault(entry["step"], []).append(entry)
    settled = [s for s, found in by_step.items() if any(e["event"] == "settled" for e in found)]
    done = max(settled, default=-1) + 1
    violations = _numbering(lives)
    trained, dropped, planned, recomputed = Counter[int](), Counter[str](), 0, 0
    first = min((life["step"] for life in lives), default=0)  # another run's steps came before
    for step in range(first, done):
        found = by_step.get(step, [])
        violations += [f"step {step}: {text}" for text in _step(found)]
        planned += sum(len(e["problems"]) * e["group_size"] for e in found if _is(e, "planned"))
        recomputed += _recomputed(found)
        for entry in (e for e in found if _is(e, "settled")):
            trained[step] += len(_listed(entry["trained"]))
            for reason, samples in entry["dropped"].items():
                dropped[reason] += len(_listed(samples))
    violations += _against_metrics(by_step, lives, metrics, range(first, done))
    return Audit(
        steps=max(0, done - first),
        planned=planned,
        trained=trained.total(),
        recomputed=recomputed,
        dropped=dict(sorted(dropped.items())),
        in_flight=sorted(step for step in by_step if step >= done),
        lives=[{key: life[key] for key in ("life", "step", "cause", "time")} for life in lives],
        superseded=len(entries) - len(lives) - len(kept),
        violations=violations,
    )


def _is(entry: dict[str, Any], event: str) -> bool:
    return bool(entry["event"] == event)


def _superseded(entry: dict[str, Any], lives: Sequence[dict[str, Any]]) -> bool:
    """A later life began at or before this entry's step."""
    return any(x["life"] > entry["life"] and x["step"] <= entry["step"] for x in lives)


def _numbering(lives: Sequence[dict[str, Any]]) -> list[str]:
    found = [life["life"] for life in lives]
    expected = list(range(1, len(found) + 1))
    return [] if found == expected else [f"lives are numbered {found}, not {expected}"]


def _step(entries: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with one step: every planned sample once in each stage, and no other."""
    plans = [entry for entry in entries if _is(entry, "planned")]
    if len(plans) != 1:
        return [f"planned {len(plans)} times"]
    plan = plans[0]
    wanted = Counter((p, i) for p in plan["problems"] for i in range(plan["group_size"]))
    wrong = [f"{p} {i} planned {n} times" for (p, i), n in wanted.items() if n > 1]
    for stage in STAGES:
        found: Counter[Sample] = Counter()
        for entry in (e for e in entries if _is(e, stage)):
            found.update(_samples_of(entry))
        for problem, index in sorted({*wanted, *found}):
            times = found[problem, index]
            if (problem, index) not in wanted:
                wrong.append(f"{problem} sample {index} {stage} but never planned")
            elif times != 1:
                wrong.append(f"{problem} sample {index} {stage} {times} times")
    again = Counter(s for e in entries if _is(e, "recomputed") for s in _listed(e["samples"]))
    wrong += [f"{p} sample {i} recomputed but never planned" for p, i in sorted(again - wanted)]
    return wrong


def _samples_of(entry: dict[str, Any]) -> list[Sample]:
    if not _is(entry, "settled"):
        return _listed(entry["samples"])
    dropped = [sample for samples in entry["dropped"].values() for sample in _listed(samples)]
    return _listed(entry["trained"]) + dropped


def _recomputed(entries: Sequence[dict[str, Any]]) -> int:
    return sum(len(_listed(entry["samples"])) for entry in entries if _is(entry, "recomputed"))


def _listed(groups: Iterable[tuple[str, list[int]]]) -> list[Sample]:
    return [(problem, index) for problem, indices in groups for index in indices]


def _against_metrics(
    by_step: dict[int, list[dict[str, Any]]],
    lives: Sequence[dict[str, Any]],
    metrics: Sequence[dict[str, Any]],
    done: range,
) -> list[str]:
    """The counts that the learner and the loop logged must be the ledger's.

    The very last step may lack its record: a process can die between the two lines.
    """
    began = {life["life"]: life["time"] - ROUNDING_S for life in lives}
    records = {
        record["step"] - 1: record
        for record in metrics
        if record.get("stage") == "rl" and "timing_s/update" in record
    }
    wrong = []
    for step in done:
        entries = [e for e in by_step.get(step, []) if _is(e, "settled")]
        if len(entries) != 1:
            continue  # said already
        again = _recomputed(by_step[step])
        record = records.get(step)
        if record is None or record["time"] < began[entries[0]["life"]]:
            if step + 1 < done.stop:
                wrong.append(f"step {step}: settled, but metrics.jsonl has no record of it")
            continue
        wrong += [f"step {step}: {text}" for text in _counts(entries[0], again, record)]
    last = max(began.values(), default=0.0)
    wrong += [
        f"step {step}: metrics.jsonl has a record, but it was never settled"
        for step, record in records.items()
        if step >= done.stop and record["time"] >= last
    ]
    return wrong


def _counts(entry: dict[str, Any], recomputed: int, record: dict[str, Any]) -> list[str]:
    dropped = {reason: len(_listed(found)) for reason, found in entry["dropped"].items()}
    trained = len(_listed(entry["trained"]))
    pairs = {
        "batch/samples": trained + dropped.get("skipped", 0),
        "completions/count": trained + sum(dropped.values()),
        "async/dropped_stale": dropped.get("stale", 0),
        "async/recomputed_stale": recomputed,
    }
    return [
        f"metrics.jsonl says {name} {record[name]:g}, the ledger {count}"
        for name, count in pairs.items()
        if name in record and record[name] != count
    ]

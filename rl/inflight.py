"""Batches that were scored but not yet trained on, as a file of a checkpoint. Not the deque.

JSON, never pickle: what a program wrote must not become code. Problems are not stored: a batch's
problems follow from its step, and a file whose problems are other ones is not used.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from common.errors import UserError
from common.records import Group, Problem, Rollout, Scored

INFLIGHT_FILE = "inflight.json"
Batches = Mapping[int, Scored]
Flight = tuple[Sequence[Problem], Future[Scored]]
_ROLLOUTS: TypeAdapter[list[list[Rollout]]] = TypeAdapter(list[list[Rollout]])


def write_batches(folder: Path, batches: Batches) -> None:
    """Write the scored batches by their step. Numbers keep every bit."""
    record = {
        str(step): {
            "groups": [[asdict(rollout) for rollout in group.rollouts] for group in scored.groups],
            "sums": scored.sums,
        }
        for step, scored in batches.items()
    }
    (folder / INFLIGHT_FILE).write_text(json.dumps(record) + "\n")


def read_batches(folder: Path, batch: Callable[[int], Sequence[Problem]]) -> dict[int, Scored]:
    """What `write_batches` wrote, with the problems of `batch(step)` put back.

    A batch of other problems (the data changed) is left out: it will be rolled out anew.

    Raises:
        UserError: missing or damaged.
    """
    path = folder / INFLIGHT_FILE
    try:
        record = json.loads(path.read_text())
        found = {int(step): _read(values, batch(int(step))) for step, values in record.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: damaged ({reason}); resume from an earlier step") from error
    return {step: scored for step, scored in found.items() if scored is not None}


def ready(flights: Iterable[Flight], first: int) -> dict[int, Scored]:
    """Those of the batches in flight that are scored; the first is that of step `first`."""
    return {
        step: future.result()
        for step, (_, future) in enumerate(flights, start=first)
        if future.done() and future.exception() is None
    }


def taken_up(
    batches: Batches, batch: Callable[[int], Sequence[Problem]], steps: range
) -> list[Flight]:
    """The batches of `steps` that are there, up to the first that is not, as if just scored."""
    flights = []
    for step in itertools.takewhile(batches.__contains__, steps):
        future = Future[Scored]()
        future.set_result(batches[step])
        flights.append((batch(step), future))
    return flights


def _read(values: Mapping[str, Any], problems: Sequence[Problem]) -> Scored | None:
    groups = _ROLLOUTS.validate_python(values["groups"], strict=False)
    if [{rollout.problem_id for rollout in group} for group in groups] != [
        {problem.problem_id} for problem in problems
    ]:
        return None
    pairs = zip(problems, groups, strict=True)
    return Scored([Group(p, tuple(rollouts)) for p, rollouts in pairs], dict(values["sums"]))

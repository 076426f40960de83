"""What `unmask audit`, `status` and `scale` do; options: `rl.cli`. Not how they find it out."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.errors import UserError
from rl.audit import Audit, audit

SHOWN = 20


def audit_run(run: Path, as_json: bool) -> int:
    """Print what the ledger of a run folder proves; 1 if something does not add up.

    Raises:
        UserError: no ledger there, or one that cannot be read.
    """
    found = audit(run)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        _show(found, Console())
    return 1 if found.violations else 0


def _show(found: Audit, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    dropped = ", ".join(f"{count} {reason}" for reason, count in found.dropped.items())
    say(f"{found.steps} steps, {found.planned} samples: {found.trained} trained")
    say(f"dropped: {dropped or 'none'}")
    for life in found.lives[1:]:
        say(f"life {life['life']} began at step {life['step']}: {life['cause']}")
    if found.recomputed:
        say(f"{found.recomputed} were too old and rolled out once more")
    if found.superseded:
        say(f"{found.superseded} entries are of earlier lives and count no more")
    if found.in_flight:
        say(f"in flight: step {', '.join(map(str, found.in_flight))}")
    for text in found.violations[:SHOWN]:
        say(f"violation: {text}")
    if len(found.violations) > SHOWN:
        say(f"... and {len(found.violations) - SHOWN} more")
    if not found.violations:
        say("every sample was generated, scored and settled exactly once")


def show_status(run: str, address: str | None, as_json: bool) -> None:
    """Print the status of a run that is going on.

    Raises:
        UserError: no cluster at the address, or no such run on it.
    """
    from workers.operator import RunControl  # Ray takes a second to import

    status = RunControl(run, address).status()
    if as_json:
        print(json.dumps(status))
    else:
        _show_run(status, Console())


def _show_run(status: dict[str, Any], console: Console) -> None:
    step, eta = status["step"], status["eta_s"]
    left = "" if eta is None else f", about {_duration(eta)} left"
    where = "before its first step" if step is None else f"step {step} of {status['steps']}"
    title = f"{status['run']}: {where}, policy version {status['policy_version']}{left}"
    table = Table(title=title, title_justify="left")
    for name in ("worker", "state", "pid", "node", "version", "completed", "heartbeat"):
        table.add_column(name)
    for actor in status["actors"]:
        heard = actor["last_heartbeat_s"]
        cells = (actor[key] for key in ("id", "state", "pid", "node", "policy_version"))
        texts = ["-" if cell is None else str(cell) for cell in cells]
        ago = "-" if heard is None else f"{heard:.1f} s ago"
        table.add_row(*texts, str(actor["completed"]), ago)
    console.print(table)
    idle = ", ".join(f"{role} {share:.0%}" for role, share in status["idle"].items())
    queues = ", ".join(
        f"{role} {queue['waiting']} waiting, {queue['under_way']} under way"
        for role, queue in status["queues"].items()
    )
    for text in (
        f"idle: {idle}",
        f"pieces of work: {queues}",
        f"failures survived: {status['failures']}, work handed out again: {status['reissued']}",
    ):
        console.print(text, highlight=False, soft_wrap=True)
    if status["age_s"] > 30:
        console.print(f"the run has said nothing for {_duration(status['age_s'])}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def scale_run(sizes: Sequence[str], run: str, address: str | None) -> None:
    """Ask a run for other numbers of workers and print what it did.

    Raises:
        UserError: not role=n, no such run, or more than its cluster holds.
    """
    wanted: dict[str, int] = {}
    for text in sizes:
        role, _, number = text.partition("=")
        if not (role and number.isdigit()):
            raise UserError(f"scale: {text!r}; write role=number, for example rollout=6")
        wanted[role] = int(number)
    from workers.operator import RunControl  # Ray takes a second to import

    print(RunControl(run, address).scale(wanted))

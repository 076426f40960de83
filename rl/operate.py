"""What `unmask audit` does; options: `rl.cli`. Not the checks themselves (`rl.audit`)."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

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

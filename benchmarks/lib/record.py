"""What every benchmark prints with --json. Standard library only: a GPU machine has little else."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """The commit of this checkout, shortened; nothing without git or outside a checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def record(name: str, machine: str, rows: Sequence[Any], **more: Any) -> dict[str, Any]:
    """One object: which benchmark, where, of which code, and its rows."""
    return {"name": name, "machine": machine, "commit": commit(), "rows": list(rows), **more}

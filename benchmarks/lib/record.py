"""What a benchmark says: rows, and around them a table or one JSON object. Not the measuring.

Standard library only: a GPU machine has little else.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NAMES, FIGURES = ("case", "metric", "unit"), ("ours", "reference", "ratio")
Row = dict[str, Any]


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


def row(
    case: str, metric: str, unit: str, ours: float, reference: float, ratio: float, **more: Any
) -> Row:
    """DESIGN's row, figures to four digits; `ratio` above 1 means that ours is better."""
    figures = zip(FIGURES, (ours, reference, ratio), strict=True)
    rounded = {name: float(f"{value:.4g}") for name, value in figures}
    return {"case": case, "metric": metric, "unit": unit, **rounded, **more}


def better(
    case: str, metric: str, unit: str, ours: float, reference: float, lower: bool = False
) -> Row:
    """The row of two figures of one kind; `lower`: less is better."""
    above, below = (reference, ours) if lower else (ours, reference)
    return row(case, metric, unit, ours, reference, above / below if below else float("nan"))


def lines(rows: Sequence[Row]) -> list[str]:
    """A heading and the rows, in columns; what else a row holds is said after them."""
    heads = {name: name for name in NAMES + FIGURES}
    cells = [{name: str(one[name]) for name in heads} for one in (heads, *rows)]
    width = {name: max(len(one[name]) for one in cells) for name in heads}
    rest: list[Mapping[str, Any]] = [{}, *rows]
    return [
        "  ".join(
            [one[name].ljust(width[name]) for name in NAMES]
            + [one[name].rjust(width[name]) for name in FIGURES]
            + [f"{key} {value}" for key, value in more.items() if key not in heads]
        )
        for one, more in zip(cells, rest, strict=True)
    ]


def report(
    name: str,
    rows: Sequence[Row],
    as_json: bool,
    *,
    machine: str = "",
    note: str = "",
    absent: Mapping[str, str] | None = None,
    **more: Any,
) -> None:
    """To stdout.

    Args:
        machine: what matters of it beside its kind and its cores.
        note: on the first line of the table.
        absent: cases that this machine could not measure, and why.
    """
    here = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores{machine and ', '}{machine}"
    absent = absent or {}
    found = record(name, here, rows, absent=absent, **more)
    if as_json:
        print(json.dumps(found))
        return
    print(f"{name} on {here}, commit {found['commit']}{note and '; '}{note}")
    print("\n".join(lines(rows)))
    for case, reason in absent.items():
        print(f"{case}: absent, {reason}")

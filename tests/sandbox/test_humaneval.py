"""Agreement with plain execution on HumanEval's 164 reference solutions, when the data is there."""

import gzip
import json
from pathlib import Path

import pytest

from sandbox.records import Case, Limits
from sandbox.service import Sandbox

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "HumanEval.jsonl.gz"
LIMITS = Limits(seconds=30.0)

pytestmark = pytest.mark.skipif(not DATA.is_file(), reason=f"needs {DATA}")


def cases(body: str | None = None) -> list[Case]:
    with gzip.open(DATA, "rt") as lines:
        records = [json.loads(line) for line in lines]
    return [
        Case(
            id=r["task_id"],
            code=r["prompt"] + (r["canonical_solution"] if body is None else body),
            tests=(f"{r['test']}\ncheck({r['entry_point']})",),
            entry_point=r["entry_point"],
            limits=LIMITS,
        )
        for r in records
    ]


def test_reference_solutions_pass():
    with Sandbox() as sandbox:
        results = sandbox.run(cases())
    assert [r.to_json() for r in results if r.pass_rate < 1] == []
    assert len(results) == 164
    assert [r.id for r in results if any(t.weak for t in r.tests)] == []


def test_solutions_that_return_nothing_or_lie_fail():
    lie = "    return type('Any', (), {'__eq__': lambda s, o: True, '__hash__': lambda s: 0})()\n"
    with Sandbox() as sandbox:
        for body in ("    return None\n", lie, "    raise SystemExit(0)\n"):
            results = sandbox.run(cases(body))
            assert [r.id for r in results if r.passed] == []

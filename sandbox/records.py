"""What goes into the sandbox and what comes out. Not how it is run.

The JSON form of these records is the contract of `python -m sandbox`. `Case.entry_point` and
`float_tolerance` are optional additions: which name is the candidate's even if a builtin bears it
too; how near a printed number must be.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sandbox.languages import LANGUAGES

Verdict = Literal[
    "pass", "fail", "timeout", "oom", "output_limit", "crash", "exited", "infra_error"
]
Status = Literal["ran", "infra_error", "invalid_case"]
VERDICTS: tuple[Verdict, ...] = (
    "pass", "fail", "timeout", "oom", "output_limit", "crash", "exited", "infra_error"
)  # fmt: skip

_RANGES: dict[str, tuple[float, float]] = {
    "seconds": (0.05, 3600),
    "memory_mib": (64, 65536),
    "processes": (1, 4096),
    "output_kib": (1, 1 << 20),
    "disk_mib": (1, 65536),
}


class SandboxError(Exception):
    """The sandbox cannot be had as asked. One line: what is missing and what to do."""


class InvalidCase(ValueError):
    """A case that says nothing judgeable; the message becomes the `invalid_case` record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one test may use: wall-clock seconds, memory, processes, output, files.

    memory_mib bounds the address space of each process and the memory of all together. Where no
    control groups can be had, the sum is looked at ten times a second, not held every moment.
    disk_mib and output_kib are for the whole test.

    Raises:
        InvalidCase: a limit that is no number or out of its range.
    """

    seconds: float = 5.0
    memory_mib: int = 512
    processes: int = 16
    output_kib: int = 8192
    disk_mib: int = 16

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            kinds = (int, float) if name == "seconds" else (int,)
            if type(value) not in kinds or not math.isfinite(value):
                kind = "a number" if name == "seconds" else "a whole number"
                raise InvalidCase(f"limits.{name}: {value!r} must be {kind}")
            if not low <= value <= high:
                raise InvalidCase(f"limits.{name}: {value} is not between {low} and {high}")


@dataclass(frozen=True, slots=True)
class StdinTest:
    """Run the program with `stdin`; it passes if it prints `stdout` and exits with 0."""

    stdin: str
    stdout: str


def is_tolerance(value: Any) -> bool:
    """Whether `Case.float_tolerance` may be `value`: a number above 0 and below 1."""
    return type(value) in (int, float) and 0 < value < 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One program and the tests to judge it by: `tests` (asserts) or `stdin_tests`.

    `setup` is run before the program and before each test; in other languages than Python it is
    text before the program's. `entry_point` names the function under test; without it the judge
    takes the free names of the tests. `float_tolerance` forgives numbers in the output that much,
    see `comparison.same_token`.
    """

    id: str
    code: str
    tests: tuple[str, ...] = ()
    stdin_tests: tuple[StdinTest, ...] = ()
    setup: str = ""
    entry_point: str | None = None
    language: str = "python"
    limits: Limits = field(default_factory=Limits)
    float_tolerance: float | None = None

    def problem(self) -> str | None:
        """Why this case cannot be judged, or None."""
        if self.language not in LANGUAGES:
            return f"language {self.language!r} is not known; use one of {', '.join(LANGUAGES)}"
        if self.tests and self.language != "python":
            return f"tests are Python asserts; give stdin_tests for language {self.language!r}"
        if self.tests and self.stdin_tests:
            return "has both tests and stdin_tests; give one kind"
        if not self.tests and not self.stdin_tests:
            return "has no tests"
        if self.float_tolerance is not None:
            return self._tolerance_problem()
        return None

    def _tolerance_problem(self) -> str | None:
        value = self.float_tolerance
        if not is_tolerance(value):
            return f"float_tolerance: {value!r} must be a number above 0 and below 1"
        return None if self.stdin_tests else "float_tolerance: is for stdin_tests only"


@dataclass(frozen=True, slots=True)
class TestResult:
    """One test's verdict; `message` has at most a few hundred characters.

    seconds: wall clock. cpu_seconds: of the candidate's process and what it waited for, with the
    loading of the program. weak: test and program shared a process, because the test passes what
    cannot cross between two; a control had to fail, but the program could see what was expected.
    """

    __test__ = False  # the name is the contract's; pytest must not collect it

    verdict: Verdict
    seconds: float
    message: str = ""
    cpu_seconds: float = 0.0
    weak: bool = False

    def to_json(self) -> dict[str, Any]:
        """The record of the contract; `weak` only where it is true."""
        record = asdict(self)
        if not self.weak:
            del record["weak"]
        return record


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one case. Every test counts in `total`; only `pass` counts in `passed`."""

    id: str
    status: Status
    tests: tuple[TestResult, ...] = ()
    seconds: float = 0.0
    backend: str = ""
    message: str = ""

    @property
    def passed(self) -> int:
        """Number of tests with the verdict `pass`."""
        return sum(test.verdict == "pass" for test in self.tests)

    @property
    def total(self) -> int:
        """Number of tests."""
        return len(self.tests)

    @property
    def pass_rate(self) -> float:
        """passed / total; 0.0 for a case that was not run (look at `status` first)."""
        return self.passed / self.total if self.tests else 0.0

    def to_json(self) -> dict[str, Any]:
        """The record of the contract; `message` only when there is one."""
        record: dict[str, Any] = {
            "id": self.id,
            "status": self.status,
            "passed": self.passed,
            "total": self.total,
            "pass_rate": self.pass_rate,
            "tests": [test.to_json() for test in self.tests],
            "seconds": self.seconds,
            "backend": self.backend,
        }
        return record | ({"message": self.message} if self.message else {})


def case_from_json(record: Any) -> Case:
    """A `Case` from one decoded line.

    Raises:
        InvalidCase: a missing or unknown key, a wrong type, a limit out of range.
    """
    if not isinstance(record, dict):
        raise InvalidCase("the line must hold a JSON object")
    known = {
        "id", "language", "code", "setup", "tests", "stdin_tests", "limits", "entry_point",
        "float_tolerance",
    }  # fmt: skip
    unknown = sorted(set(record) - known)
    if unknown:
        raise InvalidCase(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    limits = record.get("limits") or {}
    if not isinstance(limits, dict) or set(limits) - set(_RANGES):
        raise InvalidCase(f"limits: an object with keys of {', '.join(_RANGES)}")
    entry_point = record.get("entry_point")
    return Case(
        id=_text(record, "id"),
        code=_text(record, "code"),
        setup=_text(record, "setup", ""),
        language=_text(record, "language", "python"),
        entry_point=None if entry_point is None else _text(record, "entry_point"),
        tests=tuple(_strings(record.get("tests"), "tests")),
        stdin_tests=tuple(_stdin_test(item) for item in _list(record, "stdin_tests")),
        limits=Limits(**limits),
        float_tolerance=record.get("float_tolerance"),
    )


def _text(record: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = record.get(key, default)
    if not isinstance(value, str):
        raise InvalidCase(f"{key}: must be a string")
    return value


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    value = record.get(key) or []
    if not isinstance(value, list):
        raise InvalidCase(f"{key}: must be a list")
    return value


def _strings(value: Any, key: str) -> list[str]:
    items = _list({key: value}, key)
    if not all(isinstance(item, str) for item in items):
        raise InvalidCase(f"{key}: must be a list of strings")
    return items


def _stdin_test(item: Any) -> StdinTest:
    if not isinstance(item, dict) or set(item) != {"stdin", "stdout"}:
        raise InvalidCase("stdin_tests: each must be an object with stdin and stdout")
    return StdinTest(_text(item, "stdin"), _text(item, "stdout"))

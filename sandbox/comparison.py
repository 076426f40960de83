"""Whether a program printed what was expected. Text against text; nothing is evaluated.

Lines are compared without their trailing whitespace, and there must be as many of them; empty
lines at the end do not count.
"""

import math
import re

_SPACES = re.compile(r"(\s+)")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_MAX_DIGITS = 400  # longer tokens are compared as text: no float has more to say


def same_output(printed: str, expected: str, tolerance: float | None = None) -> bool:
    """Whether the lines are equal; with `tolerance`, numbers in them only nearly (`same_token`)."""
    theirs, ours = _lines(printed), _lines(expected)
    if tolerance is None or len(theirs) != len(ours):
        return theirs == ours
    return all(
        left == right or _same_line(left, right, tolerance)
        for left, right in zip(theirs, ours, strict=True)
    )


def same_token(printed: str, expected: str, tolerance: float) -> bool:
    """Equal as text, or both finite decimal numbers with |p - e| <= tolerance * max(1, |e|).

    What is no plain decimal number (nan, inf, hexadecimal, 1_000, other alphabets' digits) or
    overflows is equal as text only.
    """
    if printed == expected:
        return True
    numbers = _number(printed), _number(expected)
    if numbers[0] is None or numbers[1] is None:
        return False
    return abs(numbers[0] - numbers[1]) <= tolerance * max(1.0, abs(numbers[1]))


def _number(token: str) -> float | None:
    if len(token) > _MAX_DIGITS or _DECIMAL.fullmatch(token) is None:
        return None
    value = float(token)
    return value if math.isfinite(value) else None


def _same_line(printed: str, expected: str, tolerance: float) -> bool:
    # The gaps are tokens too, equal as text: only trailing whitespace is forgiven.
    theirs, ours = _SPACES.split(printed), _SPACES.split(expected)
    return len(theirs) == len(ours) and all(
        same_token(left, right, tolerance) for left, right in zip(theirs, ours, strict=True)
    )


def _lines(text: str) -> list[str]:
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip().split("\n")

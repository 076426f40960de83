"""Inputs to try a function on: fixed probes with the edge cases, and seeded draws of each kind.

The probes also decide which chains are sound and which compute the same function, so they are
varied enough to tell operations apart. Not the choice of a problem's tests (`cases`).
"""

import random
from typing import Any

from rl.problems.ops import Kind

WORDS = (
    "apple", "Banana", "cat", "door", "Echo", "fig", "grape", "Hat", "ink", "jam", "KITE", "level",
    "Moon", "noon", "Oak", "pear", "radar", "sky", "Tea", "umbra", "wow", "zebra",
)  # fmt: skip

PROBES: dict[Kind, tuple[Any, ...]] = {
    "list": (
        [], [5], [-3], [0], [2, 2, 2], [1, 2, 3, 4, 5, 6], [6, 5, 3, 2], [-4, 7, -1, 0],
        [9, -9, 4, 4, 1], [3, -6, 12, 8, 3], [10, 15, 20, 7], [-2, -8, -5], [1, 3, 1, 3, 8, 8],
        [7, 14, 2, 21, 4], [0, 0, 6], [-1, 1], [8, 1, 6, -7, 5, 3], [4, 9, 16, 5, 11, 9],
        [5, 12, 12, -10, 18], [-9, -6, -3, 2, 10],
    ),
    "int": (0, 1, -1, 2, 5, 7, -7, 10, -12, 12, 15, 30, 48, -35, 99, 100, 63, 121, -208, 345, 1000),
    "str": (
        "", "a", "Z", "level", "Hello World", "banana", "XYZ", "sky", "a b c", "Apple pie",
        "noon", "An Old Hat", "tea at noon", "wow wow", "Echo", "big RED fox", "radar", "Aa",
        "umbra moon", "cat", "abracadabra",
    ),
}  # fmt: skip

EDGES: dict[Kind, tuple[Any, ...]] = {
    "list": ([], [5], [-3], [2, 2, 2], [-4, 7, -1, 0]),
    "int": (0, 1, -1, -12),
    "str": ("", "a", "level", "Hello World"),
}
"""The probes that every reader expects to see tested: empty, single, negative, repeated."""


def draw_input(kind: Kind, rng: random.Random) -> Any:
    """A small value of this kind; lists have 1 to 7 numbers, texts 1 to 3 words."""
    if kind == "int":
        return rng.randint(-60, 150)
    if kind == "str":
        return _draw_text(rng)
    values = [rng.randint(-9, 20) for _ in range(rng.randint(1, 7))]
    shape = rng.random()
    if shape < 0.15:
        return sorted(values)
    if shape < 0.4:
        return rng.choices(values, k=len(values))
    return values


def _draw_text(rng: random.Random) -> str:
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 3)))
    if rng.random() < 0.15:
        half = text[: rng.randint(1, 4)]
        return half + half[::-1]
    return text

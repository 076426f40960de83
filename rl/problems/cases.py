"""The tests of a problem: inputs chosen so that near misses fail, outputs from trusted callables.

A test proves little if the answer to another question passes it, so the inputs are picked greedily
against a list of rivals: the identity, parts of the chain, the ops in another order, each op
swapped for each other op of its type, and constants off by one. Not a sandbox: nothing here
executes program text.
"""

import random
from collections.abc import Sequence
from itertools import permutations
from typing import Any

from rl.problems.compose import Chain, run_ops
from rl.problems.inputs import EDGES, PROBES, draw_input
from rl.problems.ops import OPS, Op

MIN_CASES = 6
MAX_CASES = 8
NUM_DRAWS = 24
"""Seeded inputs beside the fixed probes from which the cases are chosen."""

Steps = tuple[tuple[Op, int], ...]


def essential_rivals(chain: Chain) -> list[Steps]:
    """The obvious wrong programs: the identity, proper parts of the chain, other orders."""
    steps: Steps = tuple(zip(chain.ops, chain.ks, strict=True))
    rivals: list[Steps] = [()]
    for size in range(1, len(steps) + 1):
        rivals += [part for part in permutations(steps, size) if part != steps]
    return [rival for rival in rivals if _fits(rival, chain)]


def near_rivals(chain: Chain) -> list[Steps]:
    """One op swapped for another of the same type, or one constant off by one."""
    steps: Steps = tuple(zip(chain.ops, chain.ks, strict=True))
    rivals: list[Steps] = []
    for i, (op, k) in enumerate(steps):
        for other in OPS:
            if other is not op and (other.takes, other.gives) == (op.takes, op.gives):
                rivals.append((*steps[:i], (other, k or 3), *steps[i + 1 :]))
        if op.constants:
            rivals += [(*steps[:i], (op, k + step), *steps[i + 1 :]) for step in (-1, 1)]
    return rivals


def _fits(steps: Steps, chain: Chain) -> bool:
    kind = chain.takes
    for op, _ in steps:
        if op.takes != kind:
            return False
        kind = op.gives
    return True


def choose_inputs(chain: Chain, rng: random.Random) -> list[Any]:
    """6 to 8 distinct inputs: two edge cases first, then whatever refutes most rivals.

    Every essential rival that differs from the chain on the candidates is refuted; near rivals
    and variety of outputs (3 distinct ones where the candidates have them) come after.
    """
    pool = _candidates(chain, rng)
    outputs = [chain.run(value) for value in pool]
    weighted = [(rival, 100) for rival in essential_rivals(chain)]
    weighted += [(rival, 2) for rival in near_rivals(chain)]
    rivals: list[tuple[set[int], int]] = []
    for rival, weight in weighted:
        refuting = {i for i, value in enumerate(pool) if run_ops(rival, value) != outputs[i]}
        if refuting:
            rivals.append((refuting, weight))
    edges = [0, rng.randrange(1, len(EDGES[chain.takes]))]
    fewest = MAX_CASES if chain.gives == "bool" else MIN_CASES  # a guess is right half the time
    return [pool[i] for i in _greedy([repr(v) for v in outputs], rivals, edges, fewest)]


def _candidates(chain: Chain, rng: random.Random) -> list[Any]:
    """Distinct inputs: edge cases, the other probes shuffled, seeded draws."""
    probes = list(PROBES[chain.takes])
    rng.shuffle(probes)
    draws = [draw_input(chain.takes, rng) for _ in range(NUM_DRAWS)]
    return list({repr(v): v for v in (*EDGES[chain.takes], *draws, *probes)}.values())


def _greedy(
    outputs: Sequence[str],
    rivals: Sequence[tuple[set[int], int]],
    first: Sequence[int],
    fewest: int,
) -> list[int]:
    """Extend `first` (indices into `outputs`) by the candidate that gains most, one at a time.

    Stops at `fewest` once every rival is refuted, at MAX_CASES in any case. A rival is worth a
    twentieth after each refutation: first all are refuted once, then again, so that a near miss
    fails several tests and not just one.
    """
    chosen = list(first)
    while len(chosen) < MAX_CASES:
        times = [sum(i in refuting for i in chosen) for refuting, _ in rivals]
        if len(chosen) >= fewest and all(times):
            break
        seen = {outputs[i] for i in chosen}
        gains = [1.0 + 50 * (len(seen) < 3) if output not in seen else 0.0 for output in outputs]
        for (refuting, weight), refuted in zip(rivals, times, strict=True):
            for i in refuting:
                gains[i] += weight * 0.05**refuted
        rest = [i for i in range(len(outputs)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: gains[i]))
    return chosen


def make_tests(chain: Chain, seed: int) -> tuple[str, ...]:
    """The asserts of one problem, e.g. `assert f([1, 2]) == 2`."""
    rng = random.Random(seed)
    return tuple(
        f"assert f({value!r}) == {chain.run(value)!r}" for value in choose_inputs(chain, rng)
    )

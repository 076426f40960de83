"""Who may see which composition: four disjoint splits, and the records of each.

Compositions of two ops are dealt to `pretrain`, `sft`, `rl` and `test` once and for all, whatever
the seed: the seed of a run draws constants, wordings and inputs, so no seed of one split can leak
into another. Compositions that compute the same function, or are the same ops in another order,
are dealt together. Only single ops (the vocabulary) are shared, by `pretrain` and `sft` alone.

Not files (`export`). Reference solutions are handed out only for `pretrain` and `sft`, and by
`solve_problems` to tests and benchmarks; the `Problem` of a split never carries one.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from common.errors import UserError
from common.records import Problem
from common.seeding import derive_seed
from rl.problems.cases import make_tests
from rl.problems.compose import (
    Chain,
    Composition,
    Signature,
    draw_chain,
    is_sound,
    signature,
    typed_chains,
)
from rl.problems.ops import BY_NAME, OPS

SplitName = Literal["pretrain", "sft", "rl", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

SPLIT_SHARES: dict[SplitName, float] = {"pretrain": 0.15, "sft": 0.15, "rl": 0.38, "test": 0.32}
SPLIT_SALT = 0
"""Part of the data set's identity, like the table of ops: changing it deals anew."""
SINGLE_SHARE: dict[SplitName, float] = {"pretrain": 0.3, "sft": 0.3, "rl": 0.0, "test": 0.0}
"""Share of a split's records that are single ops."""
FRESH_TRIES = 30
"""Draws spent on a prompt that the split does not hold yet."""


@dataclass(frozen=True, slots=True)
class Solved:
    """A problem with its reference answer: for tests and benchmarks, never for `rl` training."""

    problem: Problem
    chain: Chain

    @property
    def completion(self) -> str:
        return self.chain.completion()


@cache
def sound_compositions(length: int) -> tuple[Composition, ...]:
    """Every composition of this length that has sound constants, in table order."""
    return tuple(names for names in typed_chains(length) if _has_sound_constants(names))


def _has_sound_constants(names: Composition) -> bool:
    return any(is_sound(names, _fixed_constants(names, turn)) for turn in range(3))


def _fixed_constants(names: Composition, turn: int) -> tuple[int, ...]:
    """The same constants for every composition of as many constant-bearing ops."""
    ks, used = [], 0
    for name in names:
        constants = BY_NAME[name].constants
        ks.append((3, 4, 3)[(used + turn) % 3] if constants else 0)
        used += bool(constants)
    return tuple(ks)


@cache
def split_of(length: int = 2) -> dict[Composition, SplitName]:
    """The split of every sound composition of `length` >= 2 ops.

    Classes of equivalent compositions come in hashed order; each goes to the split that is
    furthest behind its share of the (place, op) pairs in it, so that every op is met in every
    place in every split as far as its compositions reach.
    """
    compositions = sound_compositions(length)
    total = Counter(slot for names in compositions for slot in enumerate(names))
    held = {split: Counter[tuple[int, str]]() for split in SPLITS}
    home: dict[Composition, SplitName] = {}
    classes = _equivalent(compositions)
    for members in sorted(classes, key=lambda c: derive_seed(SPLIT_SALT, "split", *min(c))):
        slots = Counter(slot for names in members for slot in enumerate(names))
        lack = {
            split: sum(SPLIT_SHARES[split] * total[slot] - held[split][slot] for slot in slots)
            for split in SPLITS
        }
        split = max(SPLITS, key=lambda name: lack[name])
        held[split].update(slots)
        home.update(dict.fromkeys(members, split))
    return home


def _equivalent(compositions: tuple[Composition, ...]) -> list[list[Composition]]:
    """Classes of compositions that are the same ops reordered or the same function (transitive)."""
    parent = {names: names for names in compositions}

    def root(names: Composition) -> Composition:
        while parent[names] != names:
            names = parent[names]
        return names

    first: dict[object, Composition] = {}
    for names in compositions:
        for key in (tuple(sorted(names)), *_signatures(names)):
            parent[root(names)] = root(first.setdefault(key, names))
    classes: dict[Composition, list[Composition]] = {}
    for names in compositions:
        classes.setdefault(root(names), []).append(names)
    return list(classes.values())


def _signatures(names: Composition) -> Iterator[tuple[int, Signature]]:
    for turn in range(2):
        ks = _fixed_constants(names, turn)
        if is_sound(names, ks):
            yield turn, signature([(BY_NAME[n], k) for n, k in zip(names, ks, strict=True)])


def compositions_of(split: SplitName, length: int = 2) -> tuple[Composition, ...]:
    """The compositions a split may use; length 1 means single ops (`pretrain` and `sft` only)."""
    if length == 1:
        return tuple((op.name,) for op in OPS) if SINGLE_SHARE[split] > 0 else ()
    return tuple(names for names, home in split_of(length).items() if home == split)


def build_chains(split: SplitName, seed: int, count: int) -> list[Chain]:
    """`count` chains of a split: compositions in seeded rounds, so each is used equally often.

    Prompts are distinct in `rl` and `test` (UserError if there are not as many); the smaller
    vocabulary of single ops repeats itself in `pretrain` and `sft` once it is exhausted.
    """
    if count < 1:
        raise UserError(f"embedded:{split}: the count is {count}, it must be at least 1")
    rng = random.Random(derive_seed(seed, "problems", split))
    singles = _rounds(compositions_of(split, 1), rng)
    pairs = _rounds(compositions_of(split, 2), rng)
    seen: set[str] = set()
    chains: list[Chain] = []
    while len(chains) < count:
        source = singles if rng.random() < SINGLE_SHARE[split] else pairs
        chain = _fresh_chain(source, seen, rng)
        if chain.prompt() in seen and SINGLE_SHARE[split] == 0:
            raise UserError(
                f"embedded:{split} has about {len(chains)} distinct problems, "
                f"{count} were asked for: lower the count"
            )
        seen.add(chain.prompt())
        chains.append(chain)
    return chains


def _rounds(compositions: tuple[Composition, ...], rng: random.Random) -> Iterator[Composition]:
    while compositions:
        yield from rng.sample(compositions, len(compositions))


def _fresh_chain(source: Iterator[Composition], seen: set[str], rng: random.Random) -> Chain:
    chain = draw_chain(next(source), rng)
    for attempt in range(FRESH_TRIES):
        if chain.prompt() not in seen:
            break
        names = chain.composition if attempt < FRESH_TRIES // 2 else next(source)
        chain = draw_chain(names, rng)
    return chain


def solve_problems(split: SplitName, seed: int, count: int) -> list[Solved]:
    """The problems of a split with their reference answers."""
    return [
        Solved(_problem(split, seed, index, chain), chain)
        for index, chain in enumerate(build_chains(split, seed, count))
    ]


def build_problems(split: SplitName, seed: int, count: int) -> list[Problem]:
    """`count` problems of a split with tests and without answers.

    Pure: equal arguments give equal problems on every machine, and a smaller `count` a prefix.
    """
    return [solved.problem for solved in solve_problems(split, seed, count)]


def _problem(split: SplitName, seed: int, index: int, chain: Chain) -> Problem:
    return Problem(
        problem_id=f"embedded/{split}/{index:04d}",
        prompt=chain.prompt(),
        tests=make_tests(chain, derive_seed(seed, "tests", split, index)),
        entry_point="f",
        data_source=f"unmask-embedded/{chain.takes}-{chain.gives}",
        columns={"composition": "+".join(chain.composition)},
    )


def pretrain_documents(seed: int, count: int) -> list[str]:
    """Plain code for the AR and block stages: a comment in words, then the function."""
    return [chain.document() for chain in build_chains("pretrain", seed, count)]


def sft_pairs(seed: int, count: int) -> list[tuple[str, str]]:
    """(prompt, completion) pairs for supervised fine-tuning."""
    return [(chain.prompt(), chain.completion()) for chain in build_chains("sft", seed, count)]

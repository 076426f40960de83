"""Chains of operations: their words, their code, their meaning, and which chains are worth asking.

A `Chain` is a composition (tuple of op names, the identity that the splits go by) plus the
constants and wordings of one problem. Not the tests of a problem (`cases`) and not the splits.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rl.problems.inputs import PROBES
from rl.problems.ops import ARGUMENT, BY_NAME, OPS, Kind, Op

Composition = tuple[str, ...]
Signature = tuple[str, ...]
"""The outputs on the fixed probes, as literals: equal signatures mean the same function."""

SINGLE_CONSTANTS = range(1, 82)
"""Constants tried when asking if one op alone could do a chain's work (9 * 9 = 81)."""


@dataclass(frozen=True, slots=True)
class Chain:
    """One to three ops with their constants and wordings. `ks[i]` is 0 where op i has none."""

    composition: Composition
    ks: tuple[int, ...]
    wordings: tuple[int, ...]

    @property
    def ops(self) -> tuple[Op, ...]:
        return tuple(BY_NAME[name] for name in self.composition)

    @property
    def takes(self) -> Kind:
        return self.ops[0].takes

    @property
    def gives(self) -> Kind:
        return self.ops[-1].gives

    def run(self, value: Any) -> Any:
        """The trusted meaning, from the ops' callables, never from the code text."""
        return run_ops(tuple(zip(self.ops, self.ks, strict=True)), value)

    def words(self) -> str:
        """`keep the even numbers, then return the sum`."""
        parts: list[str] = []
        for op, k, wording in zip(self.ops, self.ks, self.wordings, strict=True):
            text = op.words[wording].format(k=k)
            if text.startswith(("the ", "whether ")):
                text = ("take " if len(parts) + 1 < len(self.ops) else "return ") + text
            parts.append(text)
        return ", then ".join(parts)

    def prompt(self) -> str:
        """`Write f(xs): keep the even numbers, then return the sum.`"""
        return f"Write f({ARGUMENT[self.takes]}): {self.words()}."

    def code(self) -> str:
        """The reference function: one statement per op, the last one in the `return`."""
        lines = [f"def f({ARGUMENT[self.takes]}):"]
        for op, k in zip(self.ops[:-1], self.ks, strict=False):
            lines.append(f"    {ARGUMENT[op.gives]} = {op.code.format(k=k)}")
        lines.append(f"    return {self.ops[-1].code.format(k=self.ks[-1])}")
        return "\n".join(lines)

    def completion(self) -> str:
        """The reference answer to `prompt`: the function in a fenced block, nothing around it."""
        return f"```python\n{self.code()}\n```"

    def document(self) -> str:
        """One document of plain code for the pretraining corpus."""
        return f"{document_head(self.prompt())}\n{self.code()}\n"


def document_head(prompt: str) -> str:
    """The comment that opens the document of a prompt: what a model that never saw a prompt knows.

    `Write f(xs): sort the list.` becomes `# sort the list`.
    """
    return "# " + prompt.split("): ", maxsplit=1)[1].removesuffix(".")


def run_ops(steps: Sequence[tuple[Op, int]], value: Any) -> Any:
    """Apply `(op, constant)` steps in order with the trusted callables."""
    for op, k in steps:
        value = op.run(value, k)
    return value


def typed_chains(length: int) -> Iterator[Composition]:
    """Every composition of `length` ops whose kinds fit, sound or not, in table order."""
    if length == 1:
        yield from ((op.name,) for op in OPS)
        return
    for head in typed_chains(length - 1):
        kind = BY_NAME[head[-1]].gives
        yield from ((*head, op.name) for op in OPS if op.takes == kind)


def signature(steps: Sequence[tuple[Op, int]]) -> Signature:
    """What the steps compute on the fixed probes of their kind."""
    probes = PROBES[steps[0][0].takes]
    return tuple(repr(run_ops(steps, value)) for value in probes)


@cache
def trivial_signatures(takes: Kind) -> frozenset[Signature]:
    """What the identity and each single op, under any constant, compute on values of a kind."""
    known = {tuple(repr(value) for value in PROBES[takes])}
    for op in OPS:
        if op.takes == takes:
            ks = SINGLE_CONSTANTS if op.constants else (0,)
            known.update(signature([(op, k)]) for k in ks)
    return frozenset(known)


def is_sound(composition: Composition, ks: Sequence[int]) -> bool:
    """Whether the chain is worth asking under these constants.

    A chain of two or more is not if it is constant on the probes, or equal there to the identity
    or to some single op ("sort the list, then return the sum"): a shortcut would pass its tests,
    and it would be an op that other splits teach.
    """
    if len(composition) == 1:
        return True
    steps = [(BY_NAME[name], k) for name, k in zip(composition, ks, strict=True)]
    outputs = signature(steps)
    needed = 2 if steps[-1][0].gives == "bool" else 3
    return len(set(outputs)) >= needed and outputs not in trivial_signatures(steps[0][0].takes)


def draw_constants(composition: Composition, rng: random.Random) -> tuple[int, ...]:
    """One constant per op that has one, 0 for the others."""
    ops = (BY_NAME[name] for name in composition)
    return tuple(rng.choice(op.constants) if op.constants else 0 for op in ops)


def draw_chain(composition: Composition, rng: random.Random) -> Chain:
    """A sound chain of this composition with drawn constants and wordings.

    Raises ValueError if 200 draws of constants were all unsound: ask `rl.problems.splits` for
    compositions, it lists only those that have sound constants.
    """
    for _ in range(200):
        ks = draw_constants(composition, rng)
        if is_sound(composition, ks):
            wordings = tuple(rng.randrange(len(BY_NAME[name].words)) for name in composition)
            return Chain(composition, ks, wordings)
    raise ValueError(f"no sound constants for {composition}")

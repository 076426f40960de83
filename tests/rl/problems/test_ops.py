"""The table of operations: code text and trusted callables agree, words are unambiguous."""

from collections import Counter
from typing import Any

import pytest

from rl.problems.inputs import EDGES, PROBES
from rl.problems.ops import ARGUMENT, BY_NAME, OPS, Op

HAND = [
    ("keep_odd", [-3, -2, 0, 5], 0, [-3, 5]),
    ("keep_greater", [3, 4, -9, 10], 3, [4, 10]),
    ("keep_less", [3, 4, -9, 10], 4, [3, -9]),
    ("drop_multiples", [0, 3, -6, 7], 3, [7]),
    ("remainder_each", [-1, 7, 5], 5, [4, 2, 0]),
    ("keep_last", [1, 2, 3], 2, [2, 3]),
    ("keep_last", [1], 4, [1]),
    ("every_second", [1, 2, 3, 4], 0, [1, 3]),
    ("unique", [2, 1, 2, 1, 3], 0, [2, 1, 3]),
    ("largest", [], 0, 0),
    ("smallest", [4, -2], 0, -2),
    ("last", [], 0, 0),
    ("count_even", [0, -2, 3], 0, 2),
    ("remainder", -7, 4, 1),
    ("digit_sum", -208, 0, 10),
    ("digit_count", 0, 0, 1),
    ("digits", -120, 0, [1, 2, 0]),
    ("to_text", -5, 0, "-5"),
    ("word_lengths", "a  bc ", 0, [1, 2]),
    ("drop_vowels", "An Oak", 0, "n k"),
    ("last_letters", "abc", 2, "bc"),
    ("repeat", "ab", 3, "ababab"),
    ("count_a", "banAna", 0, 2),
    ("is_sorted", [1, 1, 2], 0, True),
    ("is_sorted", [2, 1], 0, False),
    ("contains", [1, 4], 4, True),
    ("is_palindrome", "", 0, True),
    ("is_palindrome", "Aa", 0, False),
]


@pytest.mark.parametrize(("name", "value", "k", "expected"), HAND)
def test_hand_computed(name: str, value: Any, k: int, expected: Any) -> None:
    assert BY_NAME[name].run(value, k) == expected


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_code_text_agrees_with_the_trusted_callable(op: Op) -> None:
    for k in op.constants or (0,):
        code = compile(op.code.format(k=k), op.name, "eval")
        for value in (*EDGES[op.takes], *PROBES[op.takes]):
            # The name must be a global: comprehensions inside `eval` do not see its locals.
            result = eval(code, {ARGUMENT[op.takes]: value})
            assert result == op.run(value, k)
            assert type(result) is type(op.run(value, k))


def test_callables_do_not_change_their_argument() -> None:
    for op in OPS:
        if op.takes == "list":
            value = [3, -1, 2, 2]
            op.run(value, 2)
            assert value == [3, -1, 2, 2]


def test_there_are_enough_ops_with_distinct_names_and_codes() -> None:
    assert len(OPS) >= 45
    assert len(BY_NAME) == len(OPS)
    assert len({op.code for op in OPS if op.takes == "list"}) == sum(
        op.takes == "list" for op in OPS
    )


def test_words_name_one_op_each_and_the_constant() -> None:
    counts = Counter((op.takes, words) for op in OPS for words in op.words)
    assert max(counts.values()) == 1
    for op in OPS:
        assert len(op.words) >= 2
        assert all(("{k}" in words) == bool(op.constants) for words in op.words)


def test_probes_tell_all_ops_apart() -> None:
    """Otherwise the dealing of splits would take two ops for one."""
    for k in (3, 4):
        outputs = Counter(
            (op.takes, tuple(repr(op.run(value, k)) for value in PROBES[op.takes])) for op in OPS
        )
        assert max(outputs.values()) == 1


def test_constant_and_placeholder_must_go_together() -> None:
    with pytest.raises(ValueError, match="op bad"):
        Op("list-map", "list", "list", "bad", "xs[{k}:]", ("skip {k}",), lambda v, k: v[k:])

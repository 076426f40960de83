"""Chains: words, code, meaning, and which are worth asking."""

import random

import pytest

from rl.problems.compose import Chain, draw_chain, is_sound, typed_chains
from rl.problems.inputs import PROBES
from rl.problems.ops import BY_NAME
from rl.problems.splits import sound_compositions


def test_prompt_code_and_document_of_one_chain() -> None:
    chain = Chain(("keep_greater", "sum"), (3, 0), (0, 1))
    assert chain.prompt() == (
        "Write f(xs): keep the numbers greater than 3, then return the total."
    )
    assert chain.completion() == (
        "```python\ndef f(xs):\n    xs = [x for x in xs if x > 3]\n    return sum(xs)\n```"
    )
    assert chain.document() == (
        "# keep the numbers greater than 3, then return the total\n"
        "def f(xs):\n    xs = [x for x in xs if x > 3]\n    return sum(xs)\n"
    )
    assert chain.run([1, 5, 3, 4]) == 9


def test_the_variable_changes_name_with_the_kind() -> None:
    chain = Chain(("word_lengths", "sum", "is_even"), (0, 0, 0), (0, 0, 0))
    assert chain.code() == (
        "def f(s):\n    xs = [len(w) for w in s.split()]\n    n = sum(xs)\n    return n % 2 == 0"
    )
    assert chain.words() == (
        "list the word lengths, then take the sum, then return whether the number is even"
    )
    assert chain.run("big red fox") is False


def test_single_op_has_no_then() -> None:
    assert Chain(("reverse_list",), (0,), (0,)).prompt() == "Write f(xs): reverse the list."


@pytest.mark.parametrize(
    ("composition", "ks"),
    [
        (("sort_up", "sum"), (0, 0)),  # the first op changes nothing
        (("reverse_list", "reverse_list"), (0, 0)),  # the identity
        (("add_each", "add_each"), (9, 9)),  # add 18 to each
        (("keep_even", "keep_odd"), (0, 0)),  # always empty
        (("keep_even", "length"), (0, 0)),  # count_even
        (("multiply_each", "keep_even"), (4, 0)),  # under this constant only
    ],
)
def test_shortcuts_are_unsound(composition: tuple[str, ...], ks: tuple[int, ...]) -> None:
    assert not is_sound(composition, ks)


def test_honest_chains_are_sound() -> None:
    assert is_sound(("keep_even", "sum"), (0, 0))
    assert is_sound(("multiply_each", "keep_even"), (3, 0))
    assert is_sound(("add", "is_multiple"), (2, 3))


def test_kinds_fit_and_bool_ends_a_chain() -> None:
    pairs = list(typed_chains(2))
    assert len(set(pairs)) == len(pairs)
    for first, second in pairs:
        assert BY_NAME[first].gives == BY_NAME[second].takes
        assert BY_NAME[first].gives != "bool"


def test_every_reference_program_agrees_with_the_trusted_meaning() -> None:
    rng = random.Random(0)
    for composition in (*sound_compositions(1), *sound_compositions(2)):
        chain = draw_chain(composition, rng)
        space: dict[str, object] = {}
        exec(chain.code(), space)
        function = space["f"]
        assert callable(function)
        for value in PROBES[chain.takes]:
            assert function(value) == chain.run(value), chain.code()


def test_prompts_and_answers_are_short() -> None:
    rng = random.Random(1)
    chains = [draw_chain(composition, rng) for composition in sound_compositions(2)]
    assert max(len(chain.prompt().split()) for chain in chains) <= 25
    assert max(len(chain.code().splitlines()) for chain in chains) == 3


def test_no_sound_constants_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sound constants"):
        draw_chain(("sort_up", "sum"), random.Random(0))

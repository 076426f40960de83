"""Four disjoint splits, the same on every machine."""

import hashlib
import random
from itertools import combinations
from typing import get_args

import pytest

from common.errors import UserError
from common.records import Problem
from rl.problems.compose import Composition, draw_chain, run_ops
from rl.problems.inputs import PROBES
from rl.problems.ops import BY_NAME, OPS
from rl.problems.splits import (
    SPLIT_SHARES,
    SPLITS,
    SplitName,
    build_chains,
    build_problems,
    compositions_of,
    pretrain_documents,
    sft_pairs,
    solve_problems,
    sound_compositions,
    split_of,
)


def used(split: SplitName, seed: int, count: int) -> set[Composition]:
    return {chain.composition for chain in build_chains(split, seed, count)}


def test_shares_add_up() -> None:
    assert set(SPLIT_SHARES) == set(SPLITS) == set(get_args(SplitName))
    assert sum(SPLIT_SHARES.values()) == pytest.approx(1)


def test_pairs_are_pairwise_disjoint_and_complete() -> None:
    sets = {split: set(compositions_of(split)) for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not sets[one] & sets[other]
    assert set().union(*sets.values()) == set(sound_compositions(2))
    for split, share in SPLIT_SHARES.items():
        assert len(sets[split]) / len(split_of()) == pytest.approx(share, abs=0.03)


def test_records_of_any_seed_stay_inside_their_split() -> None:
    """The held-out compositions, and the RL ones, occur in no other split whatever the seed."""
    made = {
        split: used(split, 0, 1500) | used(split, 1, 1500) for split in ("pretrain", "sft", "rl")
    }
    made["test"] = used("test", 0, 400) | used("test", 7, 400)
    singles = {names for split in ("pretrain", "sft") for names in made[split] if len(names) == 1}
    assert singles == {(op.name,) for op in OPS}
    for one, other in combinations(made, 2):
        shared = made[one] & made[other]
        assert shared <= (singles if (one, other) == ("pretrain", "sft") else set())
    assert len(made["test"]) >= 300
    assert all(len(names) == 2 for split in ("rl", "test") for names in made[split])


def test_no_test_prompt_or_program_is_trained_on() -> None:
    held_out = build_chains("test", 0, 400)
    prompts = {chain.words() for chain in held_out}
    codes = {chain.code() for chain in held_out}
    for split in ("pretrain", "sft", "rl"):
        for chain in build_chains(split, 0, 2000):
            assert chain.words() not in prompts
            assert chain.code() not in codes


def test_other_order_and_same_function_share_a_split() -> None:
    home = split_of()
    for first, second in home:
        if (second, first) in home:
            assert home[second, first] == home[first, second]
    # Under every constant: adding to each, then the largest = the largest, then adding.
    assert home["add_each", "reverse_list"] == home["reverse_list", "add_each"]
    assert home["square_each", "first"] == home["first", "square"]
    assert home["negate_each", "sum"] == home["sum", "negate"]


def test_no_pair_is_a_single_op() -> None:
    for split in ("rl", "test"):
        for chain in build_chains(split, 3, 200):
            probes = PROBES[chain.takes]
            wanted = [chain.run(value) for value in probes]
            for op in OPS:
                if (op.takes, op.gives) == (chain.takes, chain.gives):
                    for k in op.constants or (0,):
                        assert [run_ops([(op, k)], value) for value in probes] != wanted


def test_training_splits_show_every_op_in_each_place() -> None:
    seen = {
        slot
        for split in ("pretrain", "sft")
        for names in compositions_of(split)
        for slot in enumerate(names)
    }
    possible = {slot for names in split_of() for slot in enumerate(names)}
    # An op that begins only a few compositions (`negate`) may have them all in rl and test.
    assert len(possible - seen) <= 2


def test_enough_distinct_test_problems() -> None:
    problems = build_problems("test", 0, 320)
    assert len({problem.prompt for problem in problems}) == 320
    assert len({problem.problem_id for problem in problems}) == 320
    assert len({problem.columns["composition"] for problem in problems}) >= 300


def test_a_problem_record() -> None:
    solved = solve_problems("rl", 2, 3)[2]
    problem = solved.problem
    assert isinstance(problem, Problem)
    assert problem.problem_id == "embedded/rl/0002"
    assert problem.entry_point == "f"
    assert problem.data_source == f"unmask-embedded/{solved.chain.takes}-{solved.chain.gives}"
    assert problem.columns == {"composition": "+".join(solved.chain.composition)}
    assert problem.prompt == solved.chain.prompt()
    assert not problem.stdin_tests and not problem.setup


def test_problems_carry_no_reference() -> None:
    for solved in solve_problems("rl", 0, 50):
        record = repr(solved.problem)
        assert "return " not in record.replace(solved.chain.prompt(), "")
        assert "def f" not in record


def test_same_arguments_same_records_and_a_smaller_count_is_a_prefix() -> None:
    assert build_problems("rl", 5, 40) == build_problems("rl", 5, 40)
    assert build_problems("rl", 5, 40)[:25] == build_problems("rl", 5, 25)
    assert build_problems("rl", 5, 40) != build_problems("rl", 6, 40)
    random.seed(1)
    first = sft_pairs(0, 30)
    random.seed(2)
    assert sft_pairs(0, 30) == first
    state = random.getstate()
    pretrain_documents(0, 30)
    assert random.getstate() == state


def test_split_is_pinned() -> None:
    """A change of ops, salt or shares deals anew: old checkpoints may then have seen test problems.

    If that is wanted, say so in the CHANGELOG and pin the new digest.
    """
    lines = sorted(f"{'+'.join(names)} {split}" for names, split in split_of().items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest[:16] == "c26782faddbc6279"


def test_corpus_has_thousands_of_distinct_documents() -> None:
    documents = pretrain_documents(0, 4000)
    assert len(set(documents)) > 2500
    assert all(text.startswith("# ") and "\ndef f(" in text for text in documents)


def test_sft_pairs_are_prompt_and_fenced_code() -> None:
    for prompt, completion in sft_pairs(1, 200):
        assert prompt.startswith("Write f(") and "\n" not in prompt
        assert completion.startswith("```python\ndef f(") and completion.endswith("\n```")


def test_rounds_use_compositions_equally() -> None:
    pairs = compositions_of("rl")
    chains = build_chains("rl", 0, len(pairs))
    assert {chain.composition for chain in chains} == set(pairs)


@pytest.mark.parametrize("count", [0, -3])
def test_count_must_be_positive(count: int) -> None:
    with pytest.raises(UserError, match=f"embedded:rl: the count is {count}"):
        build_problems("rl", 0, count)


def test_more_than_there_are_is_an_error() -> None:
    with pytest.raises(UserError, match="embedded:test has about .* lower the count"):
        build_chains("test", 0, 100_000)


def test_three_ops_compose_too() -> None:
    """Not used by default, but the machinery must hold for longer chains."""
    rng = random.Random(0)
    chain = draw_chain(("keep_even", "multiply_each", "sum"), rng)
    k = chain.ks[1]
    assert chain.run([1, 2, 4]) == 6 * k
    assert BY_NAME["sum"].gives == chain.gives == "int"

"""A seed is a pure function of its names, of their order and their types."""

from itertools import combinations

from common.seeding import derive_seed


def test_the_value_is_pinned() -> None:
    # Changing it would silently change every run that is resumed with a newer checkout.
    assert derive_seed(0, "mask", 1, "p", 2, 3) == derive_seed(0, "mask", 1, "p", 2, 3)
    assert derive_seed(0) == 8979387897141269210


def test_names_order_and_types_matter() -> None:
    seeds = [
        derive_seed(0, "a", "b"),
        derive_seed(0, "b", "a"),
        derive_seed(0, "ab"),
        derive_seed(0, "a", 1),
        derive_seed(0, "a", "1"),
        derive_seed(1, "a", "b"),
        derive_seed(0, "a", "b", ""),
    ]
    assert all(one != other for one, other in combinations(seeds, 2))


def test_63_bits_that_fill_their_range() -> None:
    seeds = [derive_seed(0, "x", i) for i in range(2000)]
    assert len(set(seeds)) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert 850 < ones < 1150, bit

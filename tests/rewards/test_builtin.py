"""The formulas, worked out by hand; what stands behind EOS; options in one line."""

import pytest

from rewards.builtin import BUILTIN, build


def value(sample, name, **options):
    outcome = build(name, options)([sample])[0]
    assert outcome.error is None
    return outcome.value


def test_code_is_the_fraction_of_all_tests(sample, result):
    ran = sample(result=result("pass", "fail", "timeout", "pass"))
    assert value(ran, "code") == 0.5
    assert value(ran, "code_binary") == 0.0
    assert value(sample(result=result("pass", "pass")), "code_binary") == 1.0
    assert value(sample(), "code") == value(sample(), "code_binary") == 0.0


def test_an_infrastructure_error_is_no_number(sample, result):
    lost = sample(result=result("pass", "infra_error", status="infra_error"), index=3)
    for name in ("code", "code_binary"):
        outcome = build(name, {})([lost])[0]
        assert outcome.value is None
        assert "'p' sample 3" in outcome.error and "why" in outcome.error


def test_format(sample):
    assert value(sample(code="x = 1", parses=True), "code_format") == 1.0
    assert value(sample(code="x = = 1", parses=False), "code_format") == 0.5
    assert value(sample(code=None), "code_format") == 0.0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (120, -1.0)],
)
def test_soft_overlong(sample, tokens, expected):
    options = {"max_tokens": 100, "cache_tokens": 20}
    assert value(sample(tokens=tokens), "soft_overlong", **options) == pytest.approx(expected)
    # A fifth of max_tokens is the default.
    assert value(sample(tokens=tokens), "soft_overlong", max_tokens=100) == pytest.approx(expected)


def test_soft_overlong_with_the_numbers_of_the_paper(sample):
    options = {"max_tokens": 20480, "cache_tokens": 4096}
    lengths = [16384, 16384 + 1024, 16384 + 2048, 20480, 20481]
    values = [value(sample(tokens=n), "soft_overlong", **options) for n in lengths]
    assert values == [0.0, -0.25, -0.5, -1.0, -1.0]


def test_soft_overlong_of_a_tiny_limit(sample):
    """A fifth of 3 tokens is none: the cache is one token then."""
    values = [value(sample(tokens=n), "soft_overlong", max_tokens=3) for n in (1, 2, 3)]
    assert values == [0.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("text", "ngram", "expected"),
    [
        ("a b a b a b", 2, -0.6),  # ab ba ab ba ab: 2 of 5 are distinct
        ("a b c d", 2, 0.0),
        ("a a a a a", 1, -0.8),  # 1 of 5
        ("a a a a a", 5, 0.0),  # one 5-gram
        ("a a a a a", 6, 0.0),  # shorter than one
        ("", 3, 0.0),
        ("x=x\nx=x", 3, -0.25),  # x=x =xx xx= x=x: 3 of 4
        ("x = x   x = x", 3, -0.25),  # spaces make no difference
        ("a A a A", 2, pytest.approx(-1 / 3)),  # case does
    ],
)
def test_repetition(sample, text, ngram, expected):
    assert value(sample(text), "repetition", ngram=ngram) == expected


def test_repetition_is_scaled_by_its_penalty(sample):
    text = "a b a b a b"
    assert value(sample(text), "repetition", ngram=2, max_penalty=-0.5) == -0.3
    assert value(sample(text), "repetition", ngram=2, max_penalty=0) == 0.0


@pytest.mark.parametrize(
    ("prefer", "expected"),
    [
        ("at_most", [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]),
        ("at_least", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("near", [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]),
    ],
)
def test_length(sample, prefer, expected):
    lengths = [0, 5, 10, 15, 20, 30]
    found = [value(sample(tokens=n), "length", target=10, prefer=prefer) for n in lengths]
    assert found == expected


def test_at_most_is_the_default_of_length(sample):
    assert value(sample(tokens=15), "length", target=10) == 0.5


OPTIONS = {
    "soft_overlong": {"max_tokens": 10},
    "repetition": {"ngram": 1},
    "length": {"target": 10},
}


@pytest.mark.parametrize("name", BUILTIN)
def test_what_was_decoded_behind_eos_never_counts(sample, result, name):
    """The same text and tokens, with and without a long tail in the last block."""
    facts = {"tokens": 10, "code": "x", "parses": True, "result": result("pass", "fail")}
    alone, tailed = sample("a a", **facts), sample("a a", tail=500, **facts)
    reward = build(name, OPTIONS.get(name, {}))
    assert reward([alone]) == reward([tailed])
    assert reward([alone, tailed])[0].value is not None


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("code", {"scale": 2}, ("options.scale", "'code'", "it takes none")),
        ("repetition", {"ngrams": 2}, ("options.ngrams", "'repetition'", "ngram, max_penalty")),
        ("repetition", {"ngram": 0}, ("options.ngram", "greater than or equal to 1", "got 0")),
        ("repetition", {"ngram": "3"}, ("options.ngram", "integer", "got '3'")),
        ("repetition", {"max_penalty": 1.0}, ("options.max_penalty", "less than or equal to 0")),
        ("length", {}, ("options.target", "missing", "'length' needs it")),
        ("length", {"target": 9, "prefer": "short"}, ("options.prefer", "at_most", "got 'short'")),
        (
            "soft_overlong",
            {"max_tokens": 10, "cache_tokens": 11},
            ("options: cache_tokens=11 exceeds max_tokens=10", "lower it"),
        ),
    ],
)
def test_bad_options_are_one_line(name, options, parts):
    with pytest.raises(ValueError) as caught:
        build(name, options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message

"""What counts as the expected output: by hand, and by Hypothesis."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.comparison import same_output, same_token


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("8\n", "8", True),
        ("8", "8\n\n\n", True),
        ("8  \t\r\n9\r\n", "8\n9", True),
        ("", "\n \n", True),
        (" 8", "8", False),
        ("8\n\n9", "8\n9", False),  # a line more
        ("8 9", "8\n9", False),
        ("8  9", "8 9", False),
        ("8.0", "8", False),
        ("Yes", "yes", False),
        ("8\n9", "8", False),
        ("", "0", False),
        ("a\x0cb", "a\nb", False),  # only a newline ends a line
    ],
)
def test_lines(printed, expected, same):
    assert same_output(printed, expected) is same
    assert same_output(printed, expected, 1e-9) is (same or printed == "8.0")


@pytest.mark.parametrize(
    ("printed", "expected", "tolerance", "same"),
    [
        ("0.3333333", "0.33333333", 1e-6, True),
        ("0.333", "0.33333333", 1e-6, False),
        ("1000001", "1000000", 1e-6, True),  # relative above 1 ...
        ("1000002", "1000000", 1e-6, False),
        ("0.0000005", "0", 1e-6, True),  # ... absolute below
        ("0.000002", "0", 1e-6, False),
        ("1e3", "1000", 1e-6, True),
        ("1000.", "+1000", 1e-6, True),
        ("-.5", "-0.5", 1e-6, True),
        ("-0", "0", 1e-6, True),
        ("nan", "nan", 1e-6, True),  # as text
        ("NaN", "nan", 0.5, False),
        ("inf", "Infinity", 0.5, False),
        ("1e999", "1e998", 0.5, False),  # overflow is no number
        ("1e999", "5", 0.5, False),
        ("0x10", "16", 0.5, False),
        ("1_000", "1000", 0.5, False),
        ("1,000", "1000", 0.5, False),
        ("٣", "3", 0.5, False),
        ("1e", "1", 0.5, False),
        (".", "0", 0.5, False),
        ("", "0", 0.5, False),
        ("1" * 401, "1" * 400 + "2", 0.5, False),
        ("1)", "1.0)", 0.5, False),
    ],
)
def test_tokens_by_hand(printed, expected, tolerance, same):
    assert same_token(printed, expected, tolerance) is same


def test_tolerance_keeps_the_rest_strict():
    assert same_output("x = 1.0000001\n2", "x = 1\n2.0", 1e-6)
    assert not same_output("x =  1.0000001\n2", "x = 1\n2.0", 1e-6)
    assert not same_output("1.0000001", "1")
    assert not same_output("1\n2\n3", "1\n2", 1e-6)
    assert not same_output("1 2 3", "1 2", 1e-6)


@given(st.text())
def test_every_text_equals_itself_and_ignores_what_trails(text):
    assert same_output(text, text) and same_output(text, text, 0.5)
    assert same_output(text + " \n\t\n", text)


@given(st.lists(st.text(alphabet="ab \t\r"), min_size=1), st.lists(st.text(alphabet="ab \t\r")))
def test_lines_are_equal_only_if_their_content_is(left, right):
    def content(lines):
        stripped = [line.rstrip() for line in lines]
        while stripped and not stripped[-1]:
            stripped.pop()
        return stripped

    assert same_output("\n".join(left), "\n".join(right)) is (content(left) == content(right))


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([1e-9, 1e-6, 1e-2]))
def test_a_float_equals_its_decimal_forms(value, tolerance):
    assert same_token(repr(value), f"{value:.17e}", tolerance)
    far = value + 3 * tolerance * max(1.0, abs(value))
    if math.isfinite(far):
        assert not same_token(repr(far), repr(value), tolerance)


@given(st.text(), st.text(), st.floats(min_value=1e-12, max_value=0.5))
def test_no_text_makes_it_raise(printed, expected, tolerance):
    assert same_output(printed, expected, tolerance) in (True, False)

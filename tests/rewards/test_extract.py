"""Which text is the program. Defect 12 of ALGORITHMS section 4: no newline after the last fence."""

import pytest

from rewards.extract import blocks_of, extract_code

ONE = "Here:\n```python\nx = 1\n```\nDone."
TWO = "```python\nx = 1\n```\n```py\ny = 2\n```"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (ONE, "x = 1\n"),
        ("```python\nx = 1\n```", "x = 1\n"),  # truncated by EOS
        ("```\nx = 1\n```", "x = 1\n"),
        ("```Python \r\nx = 1\r\n```\r\n", "x = 1\n"),
        ("```bash\nls\n```\n```python\nx = 1\n```", "x = 1\n"),
        ("```python\n```", ""),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        ("```python\nx = 1", None),  # never closed
        ("x = 1", None),
        ("say ```python x``` inline", None),
        ("```rust\nfn main() {}\n```", None),
        ("", None),
    ],
)
def test_first_block(text, code):
    assert extract_code(text) == code


def test_which_block():
    assert [extract_code(TWO, which) for which in ("first", "last", "only")] == [
        "x = 1\n", "y = 2\n", None
    ]  # fmt: skip
    assert extract_code(ONE, "only") == "x = 1\n"
    assert extract_code("x = 1", "whole") == "x = 1"
    assert extract_code(" \n", "whole") is None


def test_many_fences_take_linear_time():
    blocks_of("```python\n" * 20_000 + "x", "python")
    assert len(blocks_of("```\nx\n```\n" * 5_000, "python")) == 5_000

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
        ("```python title=a.py\nx = 1\n```", "x = 1\n"),  # the first word is the language
        ("```bash\nls\n```\n```python\nx = 1\n```", "x = 1\n"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        ("```python\nx = 1\n``` \t", "x = 1\n"),
        ("```python\nx = 1\n```and so on\ny = 2\n```", "x = 1\n```and so on\ny = 2\n"),
        ("```rust\nfn main() {}\n```", None),
        ("say ```python x``` inline", None),
        ("``python\nx = 1\n``", None),
        ("x = 1", None),
        ("", None),
    ],
)
def test_first_block(text, code):
    assert extract_code(text) == code


@pytest.mark.parametrize(
    "text",
    [
        "```python\nx = 1",  # cut off
        "```python\nx = 1\n``",
        "```python\nx = 1\n``` python",  # a closing fence has no language
        "```python\nx = 1\n~~~",  # nor another character
        "````python\nx = 1\n```",  # nor fewer of them
        "```python",
        "```",
    ],
)
def test_an_unclosed_block_is_no_block(text):
    assert [extract_code(text, which) for which in ("first", "last", "only")] == [None] * 3


def test_an_unclosed_block_swallows_what_follows_but_not_what_was_before():
    assert extract_code("```bash\nls\n```python\nx = 1\n") is None
    assert extract_code(ONE + "\n```python\ny = 2", "last") == "x = 1\n"


@pytest.mark.parametrize("blank", ["", "\n", "  \n\t\n"])
def test_a_blank_program_is_none(blank):
    assert extract_code(f"```python\n{blank}```") is None
    assert extract_code(blank, "whole") is None
    # It is still the first, and still one too many.
    text = f"```python\n{blank}```\n{ONE}"
    assert [extract_code(text, w) for w in ("first", "last", "only")] == [None, "x = 1\n", None]


def test_longer_fences_hold_shorter_ones():
    text = "````python\ns = '''\n```python\nx\n```\n'''\n````"
    assert extract_code(text) == "s = '''\n```python\nx\n```\n'''\n"
    assert extract_code("```python\nx = 1\n`````") == "x = 1\n"  # closed by more is closed
    # Without the longer fence the inner one closes the block, as everywhere in Markdown.
    assert extract_code("```python\ns = '''\n```\n'''\n```") == "s = '''\n"


def test_fences_inside_another_languages_block_are_its_text():
    text = "````markdown\n```python\nx = 1\n```\n````\n```python\ny = 2\n```"
    assert blocks_of(text, "python") == ["y = 2\n"]


def test_tildes():
    assert extract_code("~~~python\nx = 1\n~~~") == "x = 1\n"
    assert extract_code("~~~ py `a`\nx = '```'\n```\n~~~~") == "x = '```'\n```\n"
    assert extract_code("~~~\nx = 1\n```") is None


def test_indented_fences():
    text = "1. So:\n   ```python\n   def f():\n       return 1\n   ```"
    assert extract_code(text) == "def f():\n    return 1\n"
    # Less indented lines lose what they have; more would be a code block without fences.
    assert extract_code("  ```python\n x = 1\ny = 2\n  ```") == "x = 1\ny = 2\n"
    assert extract_code("    ```python\n    x = 1\n    ```") is None
    assert extract_code("```python\nif x:\n    ```\n```") == "if x:\n    ```\n"
    assert extract_code("\t```python\nx = 1\n```") is None


def test_which_block():
    assert [extract_code(TWO, which) for which in ("first", "last", "only")] == [
        "x = 1\n", "y = 2\n", None
    ]  # fmt: skip
    assert extract_code(ONE, "only") == "x = 1\n"
    assert extract_code("```bash\nls\n```\n" + ONE, "only") == "x = 1\n"
    assert extract_code("x = 1", "whole") == "x = 1"
    assert extract_code(ONE, "whole") == ONE


def test_mixed_line_ends():
    assert extract_code("```python\r\nx = 1\ny = 2\r\n```\r\nz") == "x = 1\ny = 2\n"
    # A lone carriage return ends no line: Python would read it as one, Markdown here does not.
    assert extract_code("```python\rx = 1\r```") is None


def test_many_fences_take_linear_time():
    blocks_of("```python\n" * 20_000 + "x", "python")
    blocks_of("`" * 200_000 + "\n" + " " * 200_000, "python")
    assert len(blocks_of("```\nx\n```\n" * 5_000, "python")) == 5_000

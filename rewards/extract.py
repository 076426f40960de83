"""The program inside a completion's text. It finds fences; it does not judge what is in them."""

import re
from typing import Literal

Which = Literal["first", "last", "only", "whole"]

_PYTHON = {"", "python", "py", "python3"}
# The closing fence ends the text where EOS truncated it: no newline behind it then
# (ALGORITHMS section 4, defect 12).
_FENCED = re.compile(r"^```([^\n`]*)\n(.*?)^```[ \t]*(?=\n|\Z)", re.DOTALL | re.MULTILINE)


def python_blocks(text: str) -> list[str]:
    """Contents of the closed fenced blocks whose info string is python or empty, in order."""
    return [
        match.group(2)
        for match in _FENCED.finditer(text.replace("\r\n", "\n"))
        if match.group(1).strip().lower() in _PYTHON
    ]


def extract_code(text: str, which: Which = "first") -> str | None:
    """The program in `text`, or None if there is none.

    which: `first` or `last` python block; `only` demands exactly one; `whole` takes the text as
    it is, for models that answer without fences.
    """
    if which == "whole":
        return text if text.strip() else None
    blocks = python_blocks(text)
    if not blocks or (which == "only" and len(blocks) > 1):
        return None
    return blocks[-1 if which == "last" else 0]

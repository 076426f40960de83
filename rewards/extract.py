"""The program inside a completion's text. It finds fences; it does not judge what is in them."""

import re
from typing import Literal

from rewards.languages import language_named

Which = Literal["first", "last", "only", "whole"]

_OPENING = re.compile(r"```([^`]*)$")
# Alone on its line; where EOS truncated the text there is no newline behind it (ALGORITHMS
# section 4, defect 12).
_CLOSING = re.compile(r"```[ \t]*$")


def blocks_of(text: str, language: str) -> list[str]:
    """Contents of the closed fenced blocks whose info string is `language` or empty, in order."""
    blocks: list[str] = []
    info: str | None = None  # of the block we are in
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if info is None:
            opening = _OPENING.match(line)
            info, lines = (opening.group(1).strip().lower() if opening else None), []
        elif _CLOSING.match(line):
            if not info or language_named(info) == language:
                blocks.append("".join(f"{kept}\n" for kept in lines))
            info = None
        else:
            lines.append(line)
    return blocks


def extract_code(text: str, which: Which = "first", language: str = "python") -> str | None:
    """The program in `text`, or None if there is none.

    which: `first` or `last` block in `language`; `only` demands exactly one; `whole` takes the
    text as it is, for models that answer without fences.
    """
    if which == "whole":
        return text if text.strip() else None
    blocks = blocks_of(text, language)
    if not blocks or (which == "only" and len(blocks) > 1):
        return None
    return blocks[-1 if which == "last" else 0]

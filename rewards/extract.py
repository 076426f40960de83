"""The program inside a completion's text. It finds fences; it does not judge what is in them.

Fences are CommonMark's (section 4.5): three or more backticks or tildes, indented by three spaces
at most, closed by a line of at least as many of the same. Unlike there, a block that is never
closed is no block: the completion was cut off, or forgot how to end.
"""

import re
from typing import Literal

from rewards.languages import language_named

Which = Literal["first", "last", "only", "whole"]

# The info string behind backticks may not contain one: that would be inline code.
_OPENING = re.compile(r"( {0,3})(?:(`{3,})([^`]*)|(~{3,})(.*))$")
# Alone on its line; where EOS truncated the text there is no newline behind it (ALGORITHMS
# section 4, defect 12).
_CLOSING = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*$")


def blocks_of(text: str, language: str) -> list[str]:
    """Contents of the closed fenced blocks that name `language` or none, in order."""
    blocks: list[str] = []
    fence: str | None = None  # of the block we are in
    indent, name, lines = 0, "", list[str]()
    for line in text.replace("\r\n", "\n").split("\n"):
        if fence is None:
            opening = _OPENING.match(line)
            if opening is not None:
                fence = opening[2] or opening[4]
                indent, name, lines = len(opening[1]), _name(opening), []
        elif (closing := _CLOSING.match(line)) is not None and closing[1].startswith(fence):
            if not name or language_named(name) == language:
                blocks.append("".join(f"{kept}\n" for kept in lines))
            fence = None
        else:
            lines.append(_dedent(line, indent))
    return blocks


def _name(opening: re.Match[str]) -> str:
    words = (opening[3] or opening[5] or "").split()
    return words[0] if words else ""


def _dedent(line: str, indent: int) -> str:
    """Without up to `indent` leading spaces: a fence that is indented indents its content too."""
    return line[min(indent, len(line) - len(line.lstrip(" "))) :]


def extract_code(text: str, which: Which = "first", language: str = "python") -> str | None:
    """The program in `text`, or None if there is none.

    which: `first` or `last` block in `language`; `only` demands exactly one; `whole` takes the
    text as it is, for models that answer without fences. A blank program is none.
    """
    if which == "whole":
        return text if text.strip() else None
    blocks = blocks_of(text, language)
    if not blocks or (which == "only" and len(blocks) > 1):
        return None
    code = blocks[-1 if which == "last" else 0]
    return code if code.strip() else None

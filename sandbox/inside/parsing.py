"""Whether texts are Python, asked of the parser in a process that it may take down. Runs nothing.

A text can make the parser take all memory or overflow its stack: so this happens in a confined
process like a candidate's. One byte per text is written as soon as it is known; the text whose
byte is missing when the process ends is the one that ended it.
"""

import ast
import os
import warnings
from collections.abc import Sequence

YES, NO = b"1", b"0"


def serve(texts: Sequence[str], answers: int) -> None:
    """Write YES or NO for each text to the descriptor `answers`."""
    warnings.simplefilter("ignore")  # of invalid escapes and the like: they are no errors
    for text in texts:
        os.write(answers, YES if _parses(text) else NO)


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False  # ValueError: NUL bytes, lone surrogates
    return True

"""How a command ends: bad input 2, a broken machine 3, Ctrl-C 130, each with a line for people.

Not a place to catch what should crash: any other exception keeps its traceback.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import InfrastructureError, UserError

BAD_INPUT, INFRASTRUCTURE, INTERRUPTED = 2, 3, 130


@contextmanager
def exit_codes(interrupted: str = "interrupted") -> Iterator[None]:
    """Turn the two expected errors and Ctrl-C into one line on stderr and an exit code.

    Args:
        interrupted: what to say on Ctrl-C, for example how to go on.
    """
    try:
        yield
    except UserError as error:
        _say(str(error))
        sys.exit(BAD_INPUT)
    except InfrastructureError as error:
        _say(str(error))
        root = root_cause(error)
        if root is not error:
            _say(f"root cause: {type(root).__name__}: {root}")
        sys.exit(INFRASTRUCTURE)
    except KeyboardInterrupt:
        _say(interrupted)
        sys.exit(INTERRUPTED)


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain of `raise ... from ...`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _say(text: str) -> None:
    print(f"unmask: {text}", file=sys.stderr, flush=True)

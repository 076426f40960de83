"""One process for candidate and test, where a test passes what cannot cross between two.

What it reports can be forged by a program that reads this process's memory. The worker therefore
runs the test and controls with other expectations, tells nobody which is which, and believes a
pass only if the controls fail. Not the choice of the controls (`mutate`), not the verdict.
"""

import ast
import builtins
import os
from typing import Any, NoReturn

from sandbox.inside import mutate, names
from sandbox.inside.candidate import exit_code, load

PASSED, FAILED = b"p", b"f"
_MESSAGE_BYTES = 300


def serve(payload: dict[str, Any], report: int) -> NoReturn:
    """Run payload["test"] after the program; write nonce, PASSED or FAILED, and a message.

    A process that ends without that has no verdict but its end.
    """
    write, leave = os.write, os._exit  # before the candidate can replace them
    nonce = payload["nonce"].encode()
    try:
        _run(payload)
    except SystemExit as error:
        leave(exit_code(error))
    except BaseException as error:
        write(report, nonce + FAILED + _summary(error))
    else:
        write(report, nonce + PASSED)
    leave(0)


def _run(payload: dict[str, Any]) -> None:
    test = ast.parse(payload["test"], "<test>")
    code = compile(test, "<test>", "exec")
    own_builtins = dict(vars(builtins))
    program = load(payload["setup"], "test")
    scope = dict(program)
    sources = [ast.parse(payload["setup"]), test]
    wanted, supplied = names.resolve(sources, payload["entry_point"], scope)
    exec(compile(payload["code"], "<solution>", "exec"), program)
    scope |= supplied
    scope |= {name: program[name] for name in wanted if name in program}
    scope |= {"__builtins__": own_builtins, mutate.OTHER: mutate.other}
    exec(code, scope)


def _summary(error: BaseException) -> bytes:
    kind = type(error).__name__
    try:
        text = f"{kind}: {error}"
    except Exception:  # the candidate's own __str__ may do anything
        text = kind
    return text.encode("utf-8", "backslashreplace")[:_MESSAGE_BYTES]

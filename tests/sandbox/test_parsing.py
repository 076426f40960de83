"""`Sandbox.parses`: the parser's verdict, whatever the text does to the parser."""

import ast
import contextlib
import json
import os

import pytest

from sandbox import parsing
from sandbox.parsing import BATCH, MAX_CHARS, parse_texts

TEXTS = {
    "": True,
    "x = 1\n": True,
    "def f(x):\n    return x\n": True,
    "x = '\\d'": True,  # a SyntaxWarning is no error
    "if 0:\n": False,
    "def f(:": False,
    "x = 1\\": False,
    "x = '\ud800'": False,
    "x = 1\x00": False,
    "\ufeffx = 1": False,
    "#" * MAX_CHARS: True,
    "#" * (MAX_CHARS + 1): False,
    "(" * 300 + ")" * 300: False,
    "(" * 16000 + ")" * 16000: False,
    "x = " + "-" * 32000 + "1": False,
    "f(" * 8000 + "1": False,
    "{" * 32000: False,
    "async def f():\n    await g()\n": True,
    "match x:\n    case [1, *_]:\n        pass\n": True,
    "print 'python 2'": False,
}


def test_each_text_gets_the_parsers_answer(sandbox):
    assert dict(zip(TEXTS, sandbox.parses(list(TEXTS)), strict=True)) == TEXTS


def test_agrees_with_the_parser_over_several_batches(sandbox):
    texts = [f"x = {'(' * (n % 5)}{n}{')' * (n % 3)}" for n in range(3 * BATCH + 1)]
    plainly = []
    for text in texts:
        plainly.append(True)
        with contextlib.suppress(SyntaxError):
            ast.parse(text)
            continue
        plainly[-1] = False
    assert sandbox.parses(texts) == plainly
    assert 0 < sum(plainly) < len(plainly)


def test_no_texts_no_process(sandbox):
    assert sandbox.parses([]) == []


class Stub:
    """A zygote whose parser's process dies, or hangs, at the texts that say so."""

    def __init__(self) -> None:
        self.starts = 0
        self._held: list[int] = []

    def run(self, role, limits, descriptors):
        assert role == "parse"
        self.starts += 1
        job, answers = descriptors
        for text in json.loads(os.pread(job, 1 << 20, 0)):
            if text == "hangs":
                self._held.append(os.dup(answers))
            if text in ("dies", "hangs"):
                return
            os.write(answers, b"1" if text == "good" else b"0")

    def kill(self):
        for descriptor in self._held:
            os.close(descriptor)
        self._held.clear()

    def wait(self):
        assert not self._held


@pytest.mark.parametrize("killer", ["dies", "hangs"])
def test_a_text_that_ends_the_parser_costs_no_other(killer, monkeypatch):
    monkeypatch.setattr(parsing, "_SECONDS", 0.2)
    texts = ["good", killer, "bad", "good", killer, killer, "good"]
    stub = Stub()
    assert parse_texts(lambda: stub, texts) == [text == "good" for text in texts]
    assert stub.starts == 4

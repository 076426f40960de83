"""What a person sees of a decode, on a terminal and in a pipe."""

import io

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.records import Completion
from models.decoding import Snapshot
from rl import screen
from rl.screen import MASK, Screen, coloured

EOS, HIDDEN = 1, 2
SNAPSHOTS = [
    Snapshot(0, (HIDDEN, 4, HIDDEN, HIDDEN), 0, 4),
    Snapshot(0, (3, 4, HIDDEN, HIDDEN), 2, 4),
    Snapshot(0, (3, 4, HIDDEN, EOS), 2, 3),
    Snapshot(0, (3, 4, 5, EOS), 4, 3),
]
DONE = Completion((3, 4, 5, EOS), (), "abc", "eos", (1, 0, 3, 2), (1.0,) * 4)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Single characters: no spaces between pieces."""
    words = {"<pad>": 0, "<eos>": EOS, "<mask>": HIDDEN, "a": 3, "b": 4, "c": 5}
    whole = Tokenizer(models.BPE(words, []))
    whole.decoder = decoders.Fuse()
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, eos_token="<eos>", mask_token="<mask>", pad_token="<pad>"
    )


def test_colours_follow_the_order() -> None:
    text = coloured(["a", "b", "c"], (2, 0, 1))
    assert text.plain == "abc"
    assert [str(span.style) for span in text.spans] == ["#f0834f", "#5b9bec", "#a68f9e"]
    assert coloured([], ()).plain == ""


def test_control_characters_give_the_terminal_no_orders() -> None:
    pieces = ["\x1b]0;owned\x07", "\x1b[2J", "a\tb\n", "\r\x9b2J\x7f"]
    assert coloured(pieces, (0, 1, 2, 3)).plain == "␛]0;owned␇␛[2Ja\tb\n␍\ufffd2J␡"


def test_the_screen_shows_them_as_pictures(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "\x1b[31m")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None)
    with Screen(console, tokenizer, 1, show_steps=False) as shown:
        shown.show(Snapshot(0, (3, 4), 2, 2))
    assert "␛[31m␛[31m" in out.getvalue() and "\x1b[31m" not in out.getvalue()


def test_a_pipe_gets_text_as_blocks_finish(tokenizer: PreTrainedTokenizerFast) -> None:
    out = io.StringIO()
    seen = []
    with Screen(Console(file=out), tokenizer, 1, show_steps=True) as shown:
        for snapshot in SNAPSHOTS:
            shown.show(snapshot)
            seen.append(out.getvalue())
    shown.finish([DONE])
    assert seen == ["", "ab", "ab", "abc"]
    assert out.getvalue() == "abc\n"


def test_several_completions_in_a_pipe_do_not_mix(tokenizer: PreTrainedTokenizerFast) -> None:
    out = io.StringIO()
    with Screen(Console(file=out), tokenizer, 2, show_steps=False) as shown:
        for number in (0, 1):
            shown.show(Snapshot(number, (3, 4), 2, 2))
    assert out.getvalue() == ""
    shown.finish([DONE, DONE])
    assert out.getvalue() == "abc\nabc\n"


@pytest.mark.parametrize(
    ("show_steps", "views"),
    [
        (True, [f"{MASK}b{MASK}{MASK}", f"ab{MASK}{MASK}", f"ab{MASK}", "abc"]),
        (False, ["", "ab", "ab", "abc"]),
    ],
)
def test_a_terminal_shows_every_pass_if_asked(
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    show_steps: bool,
    views: list[str],
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(screen.time, "sleep", slept.append)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=40)
    found = []
    with Screen(console, tokenizer, 1, show_steps) as shown:
        for snapshot in SNAPSHOTS:
            shown.show(snapshot)
            found.append(shown._texts[0].plain)
    assert found == views
    assert len(slept) == (4 if show_steps else 0)
    shown.finish([DONE])
    assert all(piece in out.getvalue() for piece in "abc")

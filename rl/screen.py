"""Completions on a terminal while they are decoded. Not the decoding: it is shown snapshots.

On a terminal the text grows block by block, or pass by pass with the places that are still masked,
and ends coloured by the order of unmasking. Into a file or a pipe one completion is streamed block
by block as plain text; several are written when all are done.
"""

import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from common.records import Completion
from models.decoding import Snapshot

MASK = "░"
FRAMES_PER_S = 20
# Where a character's bytes are not all there yet.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# A model's text must not give orders to the terminal: control characters as pictures of them.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), ord(INCOMPLETE))


class Screen:
    """Shows `samples` completions.

    Args:
        show_steps: every pass is a frame, slow enough to be watched; only on a terminal.
    """

    def __init__(
        self, console: Console, tokenizer: PreTrainedTokenizerFast, samples: int, show_steps: bool
    ) -> None:
        self._console, self._tokenizer = console, tokenizer
        self._texts = [Text() for _ in range(samples)]
        self._show_steps = show_steps
        self._streamed = ""
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> "Screen":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, snapshot: Snapshot) -> None:
        """One request after one pass (`Decoder.decode(watch=...)`)."""
        if not self._console.is_terminal:
            if len(self._texts) == 1:
                self._stream(snapshot)
            return
        ids = snapshot.ids if self._show_steps else snapshot.ids[: snapshot.final]
        text = Text()
        for place, token in enumerate(ids[: snapshot.text]):
            known = token != self._tokenizer.mask_token_id
            piece = str(self._tokenizer.decode([token])) if known else MASK
            piece = piece.translate(PICTURES)
            text.append(piece, style="" if place < snapshot.final else "bold" if known else "dim")
        self._texts[snapshot.request] = text
        self._live.update(Group(*self._texts), refresh=True)
        if self._show_steps:
            time.sleep(1 / FRAMES_PER_S / len(self._texts))

    def finish(self, completions: Sequence[Completion]) -> None:
        """All are done: what is left to print."""
        for completion in completions:
            if self._streamed or not self._console.is_terminal:
                rest = completion.text[len(self._streamed) :]
                self._console.out(rest, highlight=False)
                continue
            ended = int(completion.finish_reason == "eos")
            ids = completion.token_ids[: len(completion.token_ids) - ended]
            pieces = [str(self._tokenizer.decode([token])) for token in ids]
            self._console.print(coloured(pieces, completion.step_map))

    def _stream(self, snapshot: Snapshot) -> None:
        ids = snapshot.ids[: min(snapshot.final, snapshot.text)]
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True)).rstrip(INCOMPLETE)
        if len(text) > len(self._streamed):
            self._console.out(text[len(self._streamed) :], end="", highlight=False)
            self._console.file.flush()
            self._streamed = text


def coloured(pieces: Sequence[str], steps: Sequence[int]) -> Text:
    """Tokens from blue (unmasked first) to orange (last)."""
    last = max(steps[: len(pieces)], default=0) or 1
    text = Text()
    for piece, step in zip(pieces, steps, strict=False):
        share = step / last
        colour = "#" + "".join(
            f"{round(a + (b - a) * share):02x}"
            for a, b in zip((91, 155, 236), (240, 131, 79), strict=True)
        )
        text.append(piece.translate(PICTURES), style=colour)
    return text

"""Documents and packed rows: text in, tensors out. Not their corruption (`diffusion.masking`).

A document is a prompt (may be empty: plain code) and a text to learn. Blocks are counted by the
same rule (`diffusion.attention.first_place`) that decoding uses: from the end of the prompt, or
from the document's start.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from common.seeding import derive_seed
from diffusion.attention import BlockOrigin, block_index, first_place
from models.tokenizer import encode_prompt

MAX_EXTRA_EOS = 3


@dataclass(frozen=True, slots=True)
class Example:
    """Text to learn. With a prompt only `text` is supervised and ever hidden."""

    text: str
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids of one example; the first `prompt_length` are its prompt."""

    ids: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True)
class PackedRows:
    """Rows of packed documents, all int64 [B, L] but the bools.

    document: number within the row. position: counted from the document's start. block: counted
    from the first that holds text to learn. segment: number of the block within the row, unique
    over documents. supervised: tokens to learn (not prompts, not pads). valid: not padding.
    """

    tokens: Tensor
    document: Tensor
    position: Tensor
    block: Tensor
    segment: Tensor
    supervised: Tensor
    valid: Tensor

    def rows(self, start: int, stop: int) -> "PackedRows":
        """Rows [start, stop) as views."""
        return PackedRows(*(getattr(self, f)[start:stop] for f in self.__dataclass_fields__))


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    row_length: int,
    seed: int,
    canvas: int | None = None,
    block_origin: BlockOrigin = "prompt",
) -> list[Document]:
    """Tokenize, and end every text with EOS tokens up to a block boundary.

    One EOS ends the text; 0 to 3 more, drawn by name for texts with a prompt, teach that what
    follows an end is an end (Stable-DiffCoder appends 1 to 4); the block is then filled with EOS,
    because decoding always works on whole blocks.

    With a `canvas` a text with a prompt is filled with EOS up to that many tokens instead
    (LLaDA's SFT): a bidirectional model sees how much room there is, and must not take it for the
    length of the text.

    Raises:
        UserError: an example longer than a row, or than the canvas, by number.
    """
    eos = int(tokenizer.eos_token_id)
    documents = []
    for number, example in enumerate(examples):
        prompt = encode_prompt(tokenizer, example.prompt) if example.prompt else ()
        text = tokenizer.encode(example.text, add_special_tokens=False)
        if prompt and canvas is not None:
            ends = canvas - len(text)
            if ends < 1:
                raise UserError(
                    f"example {number} has {len(text)} tokens and an end to learn, but canvas is "
                    f"{canvas}; raise stages.canvas or drop the example"
                )
        else:
            draw = random.Random(derive_seed(seed, "eos", number))
            ends = 1 + (draw.randint(0, MAX_EXTRA_EOS) if prompt else 0)
            first = first_place(len(prompt), block_size, block_origin)
            ends += -(len(prompt) - first + len(text) + ends) % block_size
        ids = (*prompt, *text, *[eos] * ends)
        if len(ids) > row_length:
            raise UserError(
                f"example {number} has {len(ids)} tokens, but row_length is {row_length}; "
                "raise stages.row_length or drop the example"
            )
        documents.append(Document(ids, len(prompt)))
    return documents


def pack(documents: Sequence[Document], row_length: int) -> list[list[Document]]:
    """First-fit packing, in order: each row's documents, in at most `row_length` tokens."""
    rows: list[list[Document]] = []
    room: list[int] = []
    first_open = 0
    for document in documents:
        size = len(document.ids)
        spot = next((i for i in range(first_open, len(rows)) if room[i] >= size), None)
        if spot is None:
            rows.append([])
            room.append(row_length)
            spot = len(rows) - 1
        rows[spot].append(document)
        room[spot] -= size
        # Only the newest rows stay open: first-fit over all of them would be quadratic.
        first_open = max(first_open, len(rows) - 16)
    return rows


def to_tensors(
    rows: Sequence[Sequence[Document]],
    row_length: int,
    block_size: int,
    block_origin: BlockOrigin = "prompt",
) -> PackedRows:
    """Lay packed documents out as tensors, padded with zeros on the right."""
    shape = (len(rows), row_length)
    fields = {
        name: torch.zeros(shape, dtype=torch.int64)
        for name in ("tokens", "document", "position", "block", "segment")
    }
    flags = {name: torch.zeros(shape, dtype=torch.bool) for name in ("supervised", "valid")}
    for number, documents in enumerate(rows):
        start, segment = 0, 0
        for index, document in enumerate(documents):
            span = slice(start, start + len(document.ids))
            position = torch.arange(len(document.ids))
            first = first_place(document.prompt_length, block_size, block_origin)
            block = block_index(position, first, block_size)
            fields["tokens"][number, span] = torch.tensor(document.ids)
            fields["document"][number, span] = index
            fields["position"][number, span] = position
            fields["block"][number, span] = block
            fields["segment"][number, span] = segment + block - block[0]
            flags["supervised"][number, span] = position >= document.prompt_length
            flags["valid"][number, span] = True
            start = span.stop
            segment += int(block[-1] - block[0]) + 1
        fields["segment"][number, start:] = segment
    return PackedRows(**fields, **flags)


class RowStream:
    """Batches of packed rows, epoch after epoch: a pure function of (seed, step)."""

    def __init__(
        self,
        documents: Sequence[Document],
        row_length: int,
        block_size: int,
        batch: int,
        seed: int,
        block_origin: BlockOrigin = "prompt",
    ) -> None:
        """Raises UserError if there is nothing to learn from."""
        if not documents:
            raise UserError("the training data is empty; check stages.data and stages.count")
        self._documents = documents
        self._row_length = row_length
        self._blocks = (block_size, block_origin)
        self._batch = batch
        self._seed = seed

    def batches(self, steps: int) -> Iterator[PackedRows]:
        """`steps` batches of `batch` rows. Documents are reshuffled and repacked every epoch."""
        pending: list[list[Document]] = []
        epoch = 0
        for _ in range(steps):
            while len(pending) < self._batch:
                shuffled = list(self._documents)
                random.Random(derive_seed(self._seed, "epoch", epoch)).shuffle(shuffled)
                pending += pack(shuffled, self._row_length)
                epoch += 1
            yield to_tensors(pending[: self._batch], self._row_length, *self._blocks)
            pending = pending[self._batch :]

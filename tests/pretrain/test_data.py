"""Documents, packing and streams: by hand where small, by property where drawn."""

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from pretrain.data import (
    Document,
    Example,
    PackedRows,
    RowStream,
    encode_examples,
    pack,
    to_tensors,
)

EOS = 1


def document(length: int, prompt: int = 0, first: int = 10) -> Document:
    return Document(tuple(range(first, first + length)), prompt)


# EOS rule


def ends(ids: Iterable[int]) -> int:
    """EOS tokens at the end."""
    count = 0
    for token in reversed(tuple(ids)):
        if token != EOS:
            break
        count += 1
    return count


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("text", ["a", "ab", "abc", "abcd", "abcde"])
def test_plain_text_gets_one_eos_and_is_filled_to_a_block(
    tokenizer: PreTrainedTokenizerFast, block_size: int, text: str
) -> None:
    (found,) = encode_examples([Example(text)], tokenizer, block_size, 32, seed=0)
    size = len(tokenizer.encode(text))
    assert found.prompt_length == 0
    assert found.ids[:size] == tuple(tokenizer.encode(text))
    # a + EOS -> 3 more EOS fill a block of 4; abc + EOS fits; abcd needs a new block.
    assert len(found.ids) == -(-(size + 1) // block_size) * block_size
    assert ends(found.ids) == len(found.ids) - size


def test_completions_get_one_to_four_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """Uniform by name: 100 each of 400, sigma 9."""
    examples = [Example("ab", prompt="x")] * 400
    found = encode_examples(examples, tokenizer, 1, 32, seed=0)
    counts = Counter(ends(d.ids) for d in found)
    assert set(counts) == {1, 2, 3, 4}
    assert all(abs(count - 100) < 40 for count in counts.values())


@pytest.mark.parametrize("prompt", ["x", "xy", "xyz"])
def test_completions_fill_blocks_counted_from_the_prompts_end(
    tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    for found in encode_examples([Example("abcde", prompt)] * 20, tokenizer, 4, 64, seed=0):
        assert found.prompt_length == len(prompt) + 1  # and its newline
        assert (len(found.ids) - found.prompt_length) % 4 == 0
        # 5 tokens and 1..3 EOS fill two blocks; a fourth EOS begins a third.
        assert ends(found.ids) in (3, 7)


def test_a_canvas_is_filled_to_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of a completion alone: plain text has no canvas, and ends once."""
    examples = [Example("abcde", "x"), Example("abcdefgh", "xyz"), Example("ab")]
    found = encode_examples(examples, tokenizer, 1, 32, seed=0, canvas=9)
    assert [len(d.ids) - d.prompt_length for d in found] == [9, 9, 3]
    assert [ends(d.ids) for d in found] == [4, 1, 1]
    with pytest.raises(UserError, match="example 1 has 8 tokens and an end .* canvas is 8"):
        encode_examples(examples, tokenizer, 1, 32, seed=0, canvas=8)


def test_eos_is_drawn_by_seed_and_number(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Example("ab", prompt="x")] * 50

    def encoded(seed: int, part: slice = slice(None)) -> list[Document]:
        return encode_examples(examples[part], tokenizer, 1, 32, seed)

    assert encoded(0) == encoded(0) != encoded(1)
    assert encoded(0, slice(10)) == encoded(0)[:10]


@pytest.mark.parametrize("prompt", ["x", "xy", "xyz"])
def test_documents_fill_blocks_counted_from_their_start(
    tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    examples = [Example("abcde", prompt)] * 20
    found = encode_examples(examples, tokenizer, 4, 64, 0, block_origin="sequence")
    assert {len(d.ids) % 4 for d in found} == {0}
    ours = encode_examples(examples, tokenizer, 4, 64, 0)
    # The text and the EOS tokens that teach are the same; only the filling differs.
    for theirs, own in zip(found, ours, strict=True):
        assert abs(len(theirs.ids) - len(own.ids)) < 4


def test_an_example_longer_than_a_row(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Example("ab"), Example("abcdefgh")]
    with pytest.raises(UserError, match=r"example 1 has 12 tokens, but row_length is 8"):
        encode_examples(examples, tokenizer, 4, 8, seed=0)


# Packing


def test_first_fit_by_hand() -> None:
    documents = [document(n) for n in (5, 4, 3, 2, 2)]
    # 5 opens row 0; 4 does not fit: row 1; 3 fits row 0 (full); 2 and 2 fill row 1.
    lengths = [[len(d.ids) for d in row] for row in pack(documents, 8)]
    assert lengths == [[5, 3], [4, 2, 2]]


def test_packing_loses_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 30, (500,), generator=generator).tolist()
    documents = [document(size, first=number) for number, size in enumerate(sizes)]
    rows = pack(documents, 64)
    assert all(sum(len(d.ids) for d in row) <= 64 for row in rows)
    packed = [d for row in rows for d in row]
    assert Counter(packed) == Counter(documents)
    assert sum(sizes) / (64 * len(rows)) > 0.9  # and wastes little


def test_rows_by_hand() -> None:
    # A: plain, 4 tokens, blocks of two. B: prompt of 3 (blocks -2 -1 -1), completion of 2.
    rows = to_tensors([[document(4), document(5, prompt=3, first=20)], [document(2)]], 11, 2)
    assert rows.tokens[0].tolist() == [10, 11, 12, 13, 20, 21, 22, 23, 24, 0, 0]
    assert rows.document[0].tolist() == [0] * 4 + [1] * 5 + [0] * 2
    assert rows.position[0].tolist() == [0, 1, 2, 3] + [0, 1, 2, 3, 4] + [0, 0]
    assert rows.block[0].tolist() == [0, 0, 1, 1] + [-2, -1, -1, 0, 0] + [0, 0]
    # Numbered along the row; pads have a number of their own.
    assert rows.segment[0].tolist() == [0, 0, 1, 1] + [2, 3, 3, 4, 4] + [5, 5]
    assert rows.supervised[0].int().tolist() == [1] * 4 + [0, 0, 0, 1, 1] + [0, 0]
    assert rows.valid[0].int().tolist() == [1] * 9 + [0] * 2
    assert rows.tokens[1].tolist() == [10, 11] + [0] * 9
    assert rows.segment[1].tolist() == [0, 0] + [1] * 9


def test_rows_from_the_documents_start_by_hand() -> None:
    # A: plain. B: prompt of 3, completion of 3: blocks p p | p c | c c, the second is learned.
    rows = to_tensors([[document(4), document(6, prompt=3)]], 12, 2, "sequence")
    assert rows.block[0].tolist() == [0, 0, 1, 1] + [-1, -1, 0, 0, 1, 1] + [0, 0]
    assert rows.segment[0].tolist() == [0, 0, 1, 1] + [2, 2, 3, 3, 4, 4] + [5, 5]
    assert rows.supervised[0].int().tolist() == [1] * 4 + [0, 0, 0, 1, 1, 1] + [0, 0]


def test_a_slice_of_rows() -> None:
    rows = to_tensors([[document(4, first=n)] for n in (10, 20, 30)], 4, 2)
    assert rows.rows(1, 3).tokens[:, 0].tolist() == [20, 30]


# Streams


def stream(seed: int = 0, count: int = 30, batch: int = 4) -> RowStream:
    documents = [document(3 + n % 5, first=100 * (n + 1)) for n in range(count)]
    return RowStream(documents, 16, 1, batch, seed)


def same(ours: PackedRows, theirs: PackedRows) -> bool:
    return all(
        torch.equal(getattr(ours, name), getattr(theirs, name))
        for name in ours.__dataclass_fields__
    )


def test_stream_is_a_function_of_seed_and_step() -> None:
    long, short = list(stream().batches(12)), list(stream().batches(5))
    assert all(same(a, b) for a, b in zip(long, short, strict=False))
    other = list(stream(seed=1).batches(5))
    assert not any(same(a, b) for a, b in zip(other, short, strict=True))
    assert all(batch.tokens.shape == (4, 16) for batch in long)


def test_every_epoch_holds_every_document_once() -> None:
    whole = stream(batch=1)
    starts = [
        int(batch.tokens[0, place])
        for batch in whole.batches(40)
        for place in (batch.valid[0] & (batch.position[0] == 0)).nonzero()[:, 0].tolist()
    ]
    first, second = starts[:30], starts[30:60]
    assert sorted(first) == sorted(second) == [100 * (n + 1) for n in range(30)]
    assert first != second  # reshuffled


def test_a_batch_larger_than_an_epoch() -> None:
    (batch,) = stream(count=2, batch=7).batches(1)
    assert batch.tokens.shape[0] == 7 and bool(batch.valid.any(1).all())


def test_nothing_to_learn_from() -> None:
    with pytest.raises(UserError, match="training data is empty"):
        RowStream([], 16, 1, 4, 0)

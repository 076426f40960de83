"""What the first passes saw, against what the decoder recorded while it decoded."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from common.records import Completion
from diffusion.layout import Sequence
from diffusion.views import completion_blocks
from models.certainty import first_passes
from models.decoding import Decoder
from models.denoiser import Denoiser
from models.request import DecodingConfig, Request

LENGTH, PASSES = 12, 3
Prompts = list[tuple[int, ...]]


@pytest.mark.parametrize(
    ("attention", "shift", "block", "origin"),
    [
        ("block_causal", False, 4, "prompt"),
        ("block_causal", True, 4, "prompt"),
        ("block_causal", False, 4, "sequence"),  # the first block is short
        ("bidirectional", True, None, "prompt"),
        ("bidirectional", False, 4, "prompt"),  # blocks over a canvas whose rest stays masked
    ],
)
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_chosen_places_are_as_sure_as_the_decoder_said(
    make_denoiser: Callable[..., Denoiser],
    word_tokenizer: PreTrainedTokenizerFast,
    prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
    attention: str,
    shift: bool,
    block: int | None,
    origin: str,
    chunk: int,
) -> None:
    monkeypatch.setattr("models.certainty.LOGIT_NUMBERS", chunk)
    denoiser = make_denoiser(attention, shift)
    denoiser.spec = replace(denoiser.spec, block_origin=origin)  # type: ignore[arg-type]
    config = DecodingConfig(
        gen_length=LENGTH, block_size=block, temperature=0.0, remasking="low_confidence"
    )
    requests = [Request(prompt, 0) for prompt in prompts]
    for request, completion in zip(
        requests, Decoder(denoiser, word_tokenizer).decode(requests, config), strict=True
    ):
        sequence = sequence_of(request, completion)
        seen = first_passes(denoiser, sequence, PASSES)
        places = {(step, place): sure for step, place, _, sure, _ in seen.rows()}
        blocks = completion_blocks(sequence, denoiser.spec.block_size, denoiser.spec.block_origin)
        first_clock = {
            number: min(torch.tensor(completion.step_map)[blocks == number].tolist())
            for number in blocks.unique().tolist()
        }
        checked = 0
        for place, clock in enumerate(completion.step_map):
            step = clock - first_clock[int(blocks[place])]
            if step < PASSES:
                expected = completion.confidences[place]
                assert places[step, place] == pytest.approx(expected, rel=1e-4, abs=1e-5)
                checked += 1
        sizes = blocks.bincount().tolist()  # one token a pass
        assert checked == sum(min(PASSES, size) for size in sizes)


def sequence_of(request: Request, completion: Completion) -> Sequence:
    ids = completion.token_ids + completion.tail_ids
    return Sequence(request.prompt_ids, ids, len(ids), completion.step_map, LENGTH - len(ids))


def test_every_masked_place_is_there_with_its_distance(
    make_denoiser: Callable[..., Denoiser],
) -> None:
    """Two blocks of four; the step map says which places each pass still hides."""
    sequence = Sequence((5, 6), tuple(range(3, 11)), 8, step_map=(1, 0, 2, 3, 4, 6, 5, 7))
    seen = first_passes(make_denoiser(), sequence, 2)
    rows = [(step, place, distance) for step, place, distance, *_ in seen.rows()]
    first = [(0, place, place % 4) for place in range(8)]
    # Place 1 of the first block and place 4 (the first of the second) are decided by then.
    second = [(1, 0, 0), (1, 2, 2), (1, 3, 3), (1, 5, 0), (1, 6, 1), (1, 7, 2)]
    assert rows == first + second
    assert torch.all((seen.confidence > 0) & (seen.confidence <= 1) & (seen.entropy >= 0))


def test_without_a_step_map(make_denoiser: Callable[..., Denoiser]) -> None:
    with pytest.raises(ValueError, match="step map"):
        first_passes(make_denoiser(), Sequence((5,), (3, 4, 5, 6), 4), 2)

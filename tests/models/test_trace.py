"""The `trace` estimator against the decoder: the probabilities it sampled from, token by token."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.records import Rollout
from diffusion.layout import Sequence, TokenRows
from diffusion.likelihood import estimate_logps
from diffusion.views import EstimatorConfig
from models.decoding import Decoder, DecodingConfig, Request
from models.denoiser import Denoiser
from rl.batch import sequence_of

MakeDenoiser = Callable[..., Denoiser]
MASK = 2
LENGTH = 16


def sampled_from(denoiser: Denoiser) -> Callable[[TokenRows], Tensor]:
    """Scores under the sampler's distribution: the decoder never draws the mask token."""

    def score(rows: TokenRows) -> Tensor:
        of_mask = denoiser(replace(rows, targets=torch.full_like(rows.targets, MASK)))
        return denoiser(rows) - torch.log1p(-of_mask.exp())

    return score


@pytest.mark.parametrize(
    ("attention", "shift", "decoding"),
    [
        ("block_causal", False, {}),
        ("block_causal", True, {}),
        ("block_causal", False, {"steps_per_block": 2}),
        ("block_causal", False, {"threshold": 0.6}),
        ("causal", True, {}),
        ("bidirectional", True, {}),
        ("bidirectional", False, {"steps_per_block": 5}),
        ("bidirectional", False, {"block_size": 4}),
        ("bidirectional", True, {"block_size": 8, "threshold": 0.6}),
    ],
)
def test_trace_is_what_the_decoder_recorded(
    make_denoiser: MakeDenoiser,
    word_tokenizer: PreTrainedTokenizerFast,
    prompts: list[tuple[int, ...]],
    attention: str,
    shift: bool,
    decoding: dict[str, float],
) -> None:
    denoiser = make_denoiser(attention, shift)
    # The confidence of this order is the probability of the drawn token.
    config = DecodingConfig(
        gen_length=LENGTH,
        remasking="low_confidence",
        **decoding,  # type: ignore[arg-type]
    )
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    done = Decoder(denoiser, word_tokenizer).decode(requests, config)
    sequences = [
        sequence_of(Rollout("p", 0, request.prompt_ids, found, 0, request.seed))
        for request, found in zip(requests, done, strict=True)
    ]
    for sequence in sequences:
        canvas = len(sequence.completion_ids) + sequence.undecided
        assert canvas == LENGTH if attention == "bidirectional" else not sequence.undecided
    assert any(sequence.undecided for sequence in sequences) or decoding.get("block_size") != 4
    with torch.no_grad():
        logps = estimate_logps(
            sampled_from(denoiser),
            denoiser.spec,
            sequences,
            [0] * len(sequences),
            EstimatorConfig(kind="trace"),
        )
    for row, (sequence, found) in enumerate(zip(sequences, done, strict=True)):
        expected = [math.log(c) for c in found.confidences[: sequence.supervised]]
        assert logps[row, : sequence.supervised].tolist() == pytest.approx(expected, abs=2e-4)
        assert not logps[row, sequence.supervised :].any()


@pytest.mark.parametrize("kind", ["full_mask", "coupled", "uncoupled", "elbo", "trace"])
@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
def test_neighbours_and_padding_change_nothing(
    make_denoiser: MakeDenoiser, attention: str, kind: str
) -> None:
    denoiser = make_denoiser(attention)
    gen = torch.Generator().manual_seed(4)

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 24, (count,), generator=gen).tolist())

    sequences = [
        Sequence(words(prompt), words(length), length - length % 3, tuple(range(length)))
        for prompt, length in ((1, 4), (9, 6), (4, 12))
    ]
    config = EstimatorConfig(kind=kind)  # type: ignore[arg-type]
    with torch.no_grad():
        batch = estimate_logps(denoiser, denoiser.spec, sequences, [5, 6, 7], config)
        for row, sequence in enumerate(sequences):
            alone = estimate_logps(denoiser, denoiser.spec, [sequence], [5 + row], config)[0]
            torch.testing.assert_close(batch[row, : len(alone)], alone, rtol=1e-4, atol=2e-5)

"""The decoder's own log-probabilities: the learner's estimate, under the weights that decoded."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from diffusion.layout import Sequence
from diffusion.likelihood import EstimatorConfig, estimate_logps
from models.decoding import Decoder
from models.denoiser import Denoiser
from models.request import DecodingConfig, Request

Prompts = list[tuple[int, ...]]


@pytest.mark.parametrize("kind", [("block_causal", False), ("bidirectional", True)], ids=str)
def test_as_the_learner_would_score_them(
    make_denoiser: Callable[..., Denoiser],
    word_tokenizer: PreTrainedTokenizerFast,
    prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
    kind: tuple[str, bool],
) -> None:
    monkeypatch.setattr("models.scoring.CPU_SCORE_TOKENS", 150)  # several passes
    denoiser, estimator = make_denoiser(*kind), EstimatorConfig(num_pairs=2)
    seeds = [(), (7,), (8, 9)]
    requests = [
        Request(prompt, number, mask_seeds=seeds[number % 3])
        for number, prompt in enumerate(prompts)
    ]
    decoder = Decoder(denoiser, word_tokenizer)
    config = DecodingConfig(gen_length=24, block_size=4)
    found = decoder.decode(requests, config, estimator=estimator)
    assert kind[0] != "bidirectional" or any(completion.undecided for completion in found)
    for request, completion in zip(requests, found, strict=True):
        assert len(completion.behaviour_logps) == len(request.mask_seeds)
        whole = completion.token_ids + completion.tail_ids
        sequence = Sequence(
            request.prompt_ids,
            whole,
            len(completion.token_ids),
            undecided=24 - len(whole) if kind[0] == "bidirectional" else 0,
        )
        for seed, logps in zip(request.mask_seeds, completion.behaviour_logps, strict=True):
            with torch.no_grad():
                expected = estimate_logps(denoiser, denoiser.spec, [sequence], [seed], estimator)
            assert list(logps) == pytest.approx(expected[0].tolist(), rel=1e-4, abs=1e-5)


def test_masks_without_an_estimator(
    make_denoiser: Callable[..., Denoiser], word_tokenizer: PreTrainedTokenizerFast
) -> None:
    decoder = Decoder(make_denoiser(), word_tokenizer)
    with pytest.raises(ValueError, match="need an estimator"):
        decoder.decode([Request((5,), 0, mask_seeds=(1,))], DecodingConfig(gen_length=4))


def test_early_exit_has_no_context_to_score_in(
    make_denoiser: Callable[..., Denoiser], word_tokenizer: PreTrainedTokenizerFast
) -> None:
    decoder = Decoder(make_denoiser("bidirectional"), word_tokenizer)
    config = DecodingConfig(gen_length=4, early_exit=True)
    with pytest.raises(ValueError, match="early_exit keeps no tail"):
        decoder.decode(
            [Request((5,), 0, mask_seeds=(1,))], config, estimator=EstimatorConfig(num_pairs=1)
        )

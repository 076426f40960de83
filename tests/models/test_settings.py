"""Settings of a request: what they do, what the result says of them, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from common.errors import UserError
from diffusion.arness import global_ar_ness, local_ar_ness
from models.decoding import Decoder
from models.request import DecodingConfig, Request

MakeDecoder = Callable[..., Decoder]

EOS, MASK = 1, 2
BLOCK, CANVAS = ("block_causal", False), ("bidirectional", False)
CAUSAL = ("causal", True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", [BLOCK, CANVAS], ids=str)
def test_the_mask_token_is_never_sampled(
    make_decoder: MakeDecoder,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    kind: tuple[str, bool],
    temperature: float,
) -> None:
    decoder = make_decoder(*kind)
    logits = decoder.denoiser.logits

    def fond_of_masks(hidden: Tensor) -> Tensor:
        found = logits(hidden)
        found[..., MASK] += 1000
        return found

    monkeypatch.setattr(decoder.denoiser, "logits", fond_of_masks)
    config = DecodingConfig(gen_length=12, temperature=temperature)
    for found in decoder.decode(requests, config):
        assert MASK not in found.token_ids + found.tail_ids


# Threshold


def test_threshold_acts_on_every_row(make_decoder: MakeDecoder, requests: list[Request]) -> None:
    """Defect 10: only row 0 of the batch was updated."""
    decoder = make_decoder()
    everything = DecodingConfig(gen_length=8, threshold=-1.0)
    nothing = DecodingConfig(gen_length=8, threshold=2.0)
    for found in decoder.decode(requests, everything):  # one pass a block
        assert found.step_map == (0,) * 4 + (1,) * 4 or found.step_map == (0,) * 4
    for found in decoder.decode(requests, nothing):  # one token a pass
        assert sorted(found.step_map) == list(range(len(found.step_map)))


def test_steps_are_counted_without_gaps(make_decoder: MakeDecoder, requests: list[Request]) -> None:
    """tokens / (last step + 1) is the tokens per step, whatever the neighbours needed."""
    config = DecodingConfig(gen_length=16, threshold=0.5, temperature=0.5)
    for found in make_decoder().decode(requests, config):
        assert set(found.step_map) == set(range(max(found.step_map) + 1))
        first = [min(found.step_map[b : b + 4]) for b in range(0, len(found.step_map), 4)]
        last = [max(found.step_map[b : b + 4]) for b in range(0, len(found.step_map), 4)]
        assert all(after == before + 1 for before, after in zip(last[:-1], first[1:], strict=True))


def test_a_high_threshold_is_one_token_a_step(
    make_decoder: MakeDecoder, requests: list[Request]
) -> None:
    decoder = make_decoder()
    config = DecodingConfig(gen_length=12, threshold=2.0)
    plain = decoder.decode(requests, DecodingConfig(gen_length=12))
    assert decoder.decode(requests, config) == plain


# The record


@pytest.mark.parametrize("kind", [BLOCK, CANVAS, CAUSAL], ids=str)
def test_what_a_completion_says(
    make_decoder: MakeDecoder, requests: list[Request], kind: tuple[str, bool]
) -> None:
    decoder = make_decoder(*kind)
    block = {"causal": 1, "block_causal": 4, "bidirectional": 24}[kind[0]]
    for found in decoder.decode(requests, DecodingConfig(gen_length=24)):
        whole = found.token_ids + found.tail_ids
        assert len(whole) % block == 0 and len(whole) <= 24
        assert len(found.step_map) == len(found.confidences) == len(whole)
        assert len(found.tail_ids) < block
        if found.finish_reason == "eos":
            assert found.token_ids.index(EOS) == len(found.token_ids) - 1
        else:
            assert EOS not in whole and len(whole) == 24 and found.tail_ids == ()
        words = [f"w{token}" for token in found.token_ids if token >= 3]
        assert found.text.split() == words


def test_every_block_is_decoded_in_its_steps(
    make_decoder: MakeDecoder, requests: list[Request]
) -> None:
    config = DecodingConfig(gen_length=12, steps_per_block=3)
    for found in make_decoder().decode(requests, config):
        for number, start in enumerate(range(0, len(found.step_map), 4)):
            counts = [found.step_map[start : start + 4].count(3 * number + s) for s in range(3)]
            assert counts == [2, 1, 1]  # ceil(4/3), ceil(2/2), 1


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_an_ar_decode_has_ar_ness_one(
    make_decoder: MakeDecoder, requests: list[Request], k: int
) -> None:
    for found in make_decoder(*CAUSAL).decode(requests, DecodingConfig(gen_length=12)):
        assert found.step_map == tuple(range(len(found.token_ids)))
        assert local_ar_ness(found.step_map, k) == 1.0
        assert global_ar_ness(found.step_map, k) == 1.0


# Bad input


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (BLOCK, {"gen_length": 10}, "gen_length 10 is not a multiple of block_size 4"),
        (BLOCK, {"gen_length": 16, "block_size": 8}, "block_size 8: the checkpoint was trained"),
        (CAUSAL, {"gen_length": 16, "block_size": 4}, "block_size 4: the checkpoint was trained"),
        (CANVAS, {"gen_length": 10, "block_size": 4}, "not a multiple"),
        (BLOCK, {"gen_length": 8, "steps_per_block": 5}, "steps_per_block 5 exceeds block_size 4"),
        (BLOCK, {"gen_length": 8, "cache": "dual"}, "decoding.cache dual is for bidirectional"),
        (CAUSAL, {"gen_length": 8, "early_exit": True}, "decoding.early_exit true is for bidir"),
    ],
)
def test_sizes_that_do_not_fit(
    make_decoder: MakeDecoder, kind: tuple[str, bool], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make_decoder(*kind).decode([Request((5,), 0)], DecodingConfig(**options))
    assert "\n" not in str(raised.value)


def test_empty_prompt(make_decoder: MakeDecoder) -> None:
    with pytest.raises(UserError, match="empty prompt"):
        make_decoder().decode([Request((5,), 0), Request((), 0)], DecodingConfig(gen_length=4))


@pytest.mark.parametrize(
    "bad",
    [
        {"gen_length": 0},
        {"steps_per_block": 0},
        {"steps_per_block": -1},
        {"block_size": 0},
        {"max_rows": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"order_temperature": -0.5},
        {"cache_mib": 0},
        {"threshold": 0.9, "remasking": "left_to_right"},
    ],
)
def test_impossible_config(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DecodingConfig(**{"gen_length": 8, **bad})

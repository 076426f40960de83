"""The engine: who shares a batch, what a pass costs, weights and onlookers. Not what is decoded."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from common.errors import InfrastructureError, UserError
from models.decoding import Decoder, Snapshot
from models.request import DecodingConfig, Request

MakeDecoder = Callable[..., Decoder]
Prompts = list[tuple[int, ...]]

MASK = 2
BLOCK, SHIFTED = ("block_causal", False), ("block_causal", True)
CANVAS, CANVAS_SHIFTED = ("bidirectional", False), ("bidirectional", True)
ENTROPY = {"remasking": "entropy", "temperature": 1.2, "top_p": 0.95}


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, ENTROPY], ids=str)
@pytest.mark.parametrize("kind", [BLOCK, SHIFTED, CANVAS], ids=str)
def test_batch_of_one_equals_batch_of_eight(
    make_decoder: MakeDecoder,
    requests: list[Request],
    kind: tuple[str, bool],
    options: dict[str, Any],
) -> None:
    decoder = make_decoder(*kind)
    eight = decoder.decode(requests, DecodingConfig(gen_length=24, block_size=4, **options))
    # The batch must be worth comparing: rows that end early beside rows that do not.
    assert {completion.finish_reason for completion in eight} == {"eos", "length"}
    for max_rows in (1, 3):
        config = DecodingConfig(gen_length=24, block_size=4, max_rows=max_rows, **options)
        for ours, theirs in zip(decoder.decode(requests, config), eight, strict=True):
            assert ours.token_ids == theirs.token_ids and ours.tail_ids == theirs.tail_ids
            assert ours.step_map == theirs.step_map
            assert ours.confidences == pytest.approx(theirs.confidences, rel=1e-3, abs=1e-4)


def test_whole_canvases_of_two_lengths(make_decoder: MakeDecoder) -> None:
    """Block sizes differ: two batches, one call."""
    decoder = make_decoder(*CANVAS)
    short, long = DecodingConfig(gen_length=6), DecodingConfig(gen_length=10)
    found = decoder.decode([Request((5, 6), 1, short), Request((7,), 2), Request((8,), 3)], long)
    assert found[0] == decoder.decode([Request((5, 6), 1)], short)[0]
    assert found[1:] == decoder.decode([Request((7,), 2), Request((8,), 3)], long)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, ENTROPY, {"threshold": 0.3}], ids=str)
@pytest.mark.parametrize("kind", [BLOCK, SHIFTED, CANVAS], ids=str)
def test_alone_as_among_31_others(
    make_decoder: MakeDecoder, kind: tuple[str, bool], options: dict[str, Any]
) -> None:
    """Tokens and step map bit for bit, whatever the batch, the slot and the time of admission."""
    decoder, lengths = make_decoder(*kind), torch.Generator().manual_seed(3)
    requests = [
        Request(tuple(torch.randint(3, 24, (1 + (n * 7) % 17,), generator=lengths).tolist()), n)
        for n in range(32)
    ]
    config = DecodingConfig(gen_length=16, block_size=4, **options)
    among = decoder.decode(requests, config)
    narrow = decoder.decode(requests[::-1], replace(config, max_rows=5))[::-1]
    for number in range(32):
        alone = decoder.decode([requests[number]], config)[0]
        for found in (among[number], narrow[number]):
            assert found.token_ids + found.tail_ids == alone.token_ids + alone.tail_ids
            assert found.step_map == alone.step_map
            assert found.text == alone.text


def test_order_of_requests_does_not_matter(
    make_decoder: MakeDecoder, requests: list[Request]
) -> None:
    decoder = make_decoder()
    config = DecodingConfig(gen_length=12)
    forward = decoder.decode(requests, config)
    backward = decoder.decode(requests[::-1], config)[::-1]
    assert [c.token_ids for c in forward] == [c.token_ids for c in backward]


def test_a_request_is_its_seed(make_decoder: MakeDecoder) -> None:
    decoder, config = make_decoder(), DecodingConfig(gen_length=16)
    prompt = (5, 6, 7)
    seeds = [1, 2, 1, 3]
    ids = [c.token_ids for c in decoder.decode([Request(prompt, s) for s in seeds], config)]
    assert ids[0] == ids[2] and len(set(ids)) == 3


def test_global_randomness_is_untouched(make_decoder: MakeDecoder, requests: list[Request]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    make_decoder().decode(requests, DecodingConfig(gen_length=8))
    assert torch.equal(torch.get_rng_state(), before)


# Cost


def test_logits_only_where_masked(
    make_decoder: MakeDecoder, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token a step: 4 + 3 + 2 + 1 places of each block, and none of the prompt."""
    decoder = make_decoder()
    logits, counts = decoder.denoiser.logits, []

    def counted(hidden: Tensor) -> Tensor:
        counts.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(decoder.denoiser, "logits", counted)
    found = decoder.decode(requests, DecodingConfig(gen_length=16))
    blocks = sum(len(completion.step_map) // 4 for completion in found)
    assert sum(counts) == 10 * blocks
    counts.clear()
    monkeypatch.setattr("models.decoding.LOGIT_NUMBERS", 24 * 3)  # three places at a time
    again = decoder.decode(requests, DecodingConfig(gen_length=16))
    # Confidences may differ in the last bits: a product's rounding depends on its shape.
    assert [c.token_ids for c in again] == [c.token_ids for c in found]
    assert sum(counts) == 10 * blocks and max(counts) == 3


def passes(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the rows of every denoising pass."""
    hidden, rows = decoder.denoiser.hidden, []

    def counted(ids: Tensor, *rest: Any) -> Tensor:
        rows.append(len(ids))
        return hidden(ids, *rest)

    monkeypatch.setattr(decoder.denoiser, "hidden", counted)
    return rows


def test_a_free_slot_is_filled_at_once(
    make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths 4, 16, 4, 4, 4 blocks of one pass in two slots: 16 tokens of passes, not 24."""
    decoder = make_decoder()
    rows = passes(decoder, monkeypatch)
    lengths = (4, 16, 4, 4, 4)
    decoder.decode(
        [
            Request((5,), n, DecodingConfig(gen_length=g, steps_per_block=1))
            for n, g in enumerate(lengths)
        ],
        DecodingConfig(gen_length=4, max_rows=2),
    )
    assert len(rows) <= 4 and sum(rows) <= 8 and max(rows) == 2


def test_memory_bounds_the_rows(
    make_decoder: MakeDecoder, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder()
    config = DecodingConfig(gen_length=8, cache_mib=1)
    expected = decoder.decode(requests, config)
    monkeypatch.setattr("models.cache.MIB", 3 * 2 * 2 * 2 * 8 * 4 * (9 + 8 + 1))  # three slots
    rows = passes(decoder, monkeypatch)
    assert [c.token_ids for c in decoder.decode(requests, config)] == [
        c.token_ids for c in expected
    ]
    assert max(rows) == 3
    with pytest.raises(UserError, match="decoding.cache_mib 1: one request of 109 tokens"):
        decoder.decode([*requests, Request((5,) * 101, 0)], config)


# Approximate caches and early exit


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_that_is_never_used_is_exact(
    make_decoder: MakeDecoder, requests: list[Request], cache: Literal["prefix", "dual"]
) -> None:
    """With one pass a block every pass is a full one."""
    decoder = make_decoder(*CANVAS_SHIFTED)
    exact = DecodingConfig(gen_length=12, block_size=4, steps_per_block=1, max_rows=3)
    expected = decoder.decode(requests, exact)
    found = decoder.decode(requests, replace(exact, cache=cache))
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_approximate_caches_do_not_depend_on_the_batch(
    make_decoder: MakeDecoder, requests: list[Request], cache: Literal["prefix", "dual"]
) -> None:
    decoder = make_decoder(*CANVAS_SHIFTED)
    config = DecodingConfig(
        gen_length=12, block_size=4, threshold=0.4, temperature=0.5, cache=cache
    )
    together = decoder.decode(requests, config)
    for request, found in zip(requests, together, strict=True):
        alone = decoder.decode([request], config)[0]
        assert (found.token_ids, found.step_map) == (alone.token_ids, alone.step_map)


def test_early_exit_has_the_same_text(
    make_decoder: MakeDecoder,
    prompts: Prompts,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = make_decoder(*CANVAS)
    config = DecodingConfig(gen_length=24, temperature=0.8)
    expected = decoder.decode(requests, config)
    rows = passes(decoder, monkeypatch)
    found = decoder.decode(requests, replace(config, early_exit=True))
    assert sum(rows) < 24 * len(prompts)  # some rows did leave
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.text) == (theirs.token_ids, theirs.text)
        assert ours.tail_ids in ((), theirs.tail_ids) and MASK not in ours.tail_ids
        assert len(ours.step_map) == len(ours.token_ids + ours.tail_ids)


# Weights and onlookers


def test_weights_change_between_calls_only(
    make_decoder: MakeDecoder, requests: list[Request]
) -> None:
    decoder = make_decoder()
    config = DecodingConfig(gen_length=8)
    waiting = threading.Event()

    def change() -> None:
        waiting.set()
        with decoder.updating(), torch.no_grad():
            decoder.denoiser.model.lm_head.weight.neg_()

    before = decoder.decode(requests, config)
    thread = threading.Thread(target=change)

    def start(_: Snapshot) -> None:
        if not waiting.is_set():
            thread.start()
            assert waiting.wait(10)

    try:
        during = decoder.decode(requests, config, watch=start)
        thread.join(10)
        after = decoder.decode(requests, config)
    finally:
        with torch.no_grad():  # the model is shared between tests
            decoder.denoiser.model.lm_head.weight.neg_()
    assert during == before and after != before


def test_a_mixture_of_two_versions_is_no_answer(
    make_decoder: MakeDecoder, requests: list[Request]
) -> None:
    """Somebody who does not ask: the call fails, nothing of it is returned."""
    decoder = make_decoder()

    def meddle(_: Snapshot) -> None:
        with torch.no_grad():
            decoder.denoiser.model.lm_head.weight.mul_(1.0)

    with pytest.raises(InfrastructureError, match="weights changed"):
        decoder.decode(requests, DecodingConfig(gen_length=8), watch=meddle)


def test_a_watcher_sees_tokens_appear_and_stay(
    make_decoder: MakeDecoder, requests: list[Request]
) -> None:
    decoder = make_decoder()
    seen: dict[int, list[Snapshot]] = {}
    config = DecodingConfig(gen_length=12, max_rows=3)
    found = decoder.decode(
        requests, config, watch=lambda s: seen.setdefault(s.request, []).append(s)
    )
    for number, completion in enumerate(found):
        whole = completion.token_ids + completion.tail_ids
        views = seen[number]
        assert len(views) == len(whole)  # one token a pass
        assert views[-1].final == len(whole) and views[-1].ids[: len(whole)] == whole
        for step, view in enumerate(views):
            known = [i for i, token in enumerate(view.ids) if token != MASK]
            assert known == [i for i, s in enumerate(completion.step_map) if s <= step]
            assert all(view.ids[i] == whole[i] for i in known)
            assert view.final == (step + 1) // 4 * 4


def test_progress_counts_requests(make_decoder: MakeDecoder, requests: list[Request]) -> None:
    told: list[int] = []
    config = DecodingConfig(gen_length=4, max_rows=3)
    make_decoder().decode(requests, config, on_progress=told.append)
    assert told == [3, 3, 2]


def test_no_requests(make_decoder: MakeDecoder) -> None:
    assert make_decoder().decode([], DecodingConfig(gen_length=4)) == []

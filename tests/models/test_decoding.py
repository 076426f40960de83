"""The decoder against an independent reference: one row, no cache, a full pass in every step."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import InfrastructureError, UserError
from common.records import Completion
from diffusion.arness import global_ar_ness, local_ar_ness
from models.decoding import Decoder, Snapshot
from models.denoiser import Denoiser
from models.request import DecodingConfig, Request

MakeDenoiser = Callable[..., Denoiser]
Prompts = list[tuple[int, ...]]
EOS, MASK = 1, 2


def filtered(logits: list[float], config: DecodingConfig) -> list[float]:
    """Mask token out, temperature, top-k, softmax, top-p: in plain Python."""
    values = [-math.inf if token == MASK else value for token, value in enumerate(logits)]
    if config.temperature > 0:
        values = [value / config.temperature for value in values]
    if config.top_k:
        least = sorted(values, reverse=True)[config.top_k - 1]
        values = [value if value >= least else -math.inf for value in values]
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    probs = [weight / sum(weights) for weight in weights]
    if config.top_p < 1:
        kept, mass = set(), 0.0
        for token in sorted(range(len(probs)), key=lambda t: -probs[t]):
            if mass >= config.top_p:
                break
            kept.add(token)
            mass += probs[token]
        probs = [p / mass if token in kept else 0.0 for token, p in enumerate(probs)]
    return probs


def drawn(probs: list[float], uniform: float, temperature: float) -> int:
    if temperature == 0:
        return probs.index(max(probs))
    mass = 0.0
    for token, p in enumerate(probs):
        mass += p
        if uniform < mass:
            return token
    raise AssertionError("the probabilities do not reach 1")


def sureness(probs: list[float], token: int, uniform: float, remasking: str) -> float:
    if remasking == "entropy":
        return sum(p * math.log(p) for p in probs if p > 0)
    if remasking == "margin":
        first, second = sorted(probs, reverse=True)[:2]
        return first - second
    return uniform if remasking == "random" else probs[token]


class Reference:
    """Decodes one request; keeps what a `Completion` must say."""

    def __init__(self, denoiser: Denoiser, config: DecodingConfig) -> None:
        self.denoiser, self.config = denoiser, config
        self.size = config.block_size or denoiser.spec.block_size or config.gen_length
        self.steps = config.steps_per_block or self.size
        if config.threshold is not None:
            self.steps = self.size

    def decode(
        self, prompt: tuple[int, ...], seed: int
    ) -> tuple[list[int], list[int], list[float]]:
        """All tokens up to the end of the last block, their steps, and their confidences."""
        length = self.config.gen_length
        uniform = torch.rand(
            2, length, self.steps, generator=torch.Generator().manual_seed(seed)
        ).tolist()
        tokens, order, sure = [MASK] * length, [-1] * length, [0.0] * length
        done = 0
        for start in range(0, length, self.size):
            for step in range(self.steps):
                open_ = [p for p in range(start, start + self.size) if order[p] < 0]
                if not open_:
                    break
                logits = self._logits(prompt, tokens)
                found = {}
                for place in open_:
                    row = logits[len(prompt) + place - int(self.denoiser.spec.logit_shift)]
                    probs = filtered(row.tolist(), self.config)
                    token = drawn(probs, uniform[0][place][step], self.config.temperature)
                    order_noise = uniform[1][place][step]
                    found[place] = (
                        sureness(probs, token, order_noise, self.config.remasking),
                        token,
                    )
                score = {p: self._score(p, found[p][0], uniform[1][p][step]) for p in open_}
                ranked = sorted(open_, key=lambda p: (-score[p], p))
                for place in self._chosen(ranked, found, step):
                    sure[place], tokens[place] = found[place]
                    order[place] = done
                done += 1
            if EOS in tokens[start : start + self.size]:
                end = start + self.size
                return tokens[:end], order[:end], sure[:end]
        return tokens, order, sure

    def _score(self, place: int, sure: float, uniform: float) -> float:
        if self.config.remasking == "left_to_right":
            sure = float(-place)
        return sure - self.config.order_temperature * math.log(-math.log(uniform))

    def _chosen(
        self, ranked: list[int], found: dict[int, tuple[float, int]], step: int
    ) -> list[int]:
        if self.config.threshold is None:
            return ranked[: math.ceil(len(ranked) / (self.steps - step))]
        first, *rest = ranked
        return [first, *(p for p in rest if found[p][0] > self.config.threshold)]

    def _logits(self, prompt: tuple[int, ...], tokens: list[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *tokens]])
        spec = self.denoiser.spec
        blocks = [(place - len(prompt)) // (spec.block_size or 1) for place in range(ids.shape[1])]
        everyone = spec.attention == "bidirectional"
        mask = torch.tensor([[everyone or k <= q for k in blocks] for q in blocks])
        with torch.no_grad():
            return self.denoiser.model(ids, attention_mask=mask[None, None]).logits[0]


@pytest.fixture
def make_decoder(
    make_denoiser: MakeDenoiser, word_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Decoder]:
    def make(*args: Any, **options: Any) -> Decoder:
        return Decoder(make_denoiser(*args, **options), word_tokenizer)

    return make


MakeDecoder = Callable[..., Decoder]


def requests_of(prompts: Prompts) -> list[Request]:
    return [Request(prompt, seed=100 + number) for number, prompt in enumerate(prompts)]


def assert_equals_reference(found: Completion, expected: tuple[list, list, list]) -> None:
    tokens, order, sure = expected
    assert list(found.token_ids + found.tail_ids) == tokens
    assert list(found.step_map) == order
    assert list(found.confidences) == pytest.approx(sure, rel=1e-3, abs=1e-4)


BLOCK, SHIFTED = ("block_causal", False), ("block_causal", True)
CANVAS, CANVAS_SHIFTED = ("bidirectional", False), ("bidirectional", True)
CAUSAL = ("causal", True)
ENTROPY = {"remasking": "entropy", "temperature": 1.2, "top_p": 0.95}
CASES: list[tuple[tuple[str, bool], dict[str, Any]]] = [
    (BLOCK, {"temperature": 0.0}),
    (BLOCK, {}),
    (BLOCK, ENTROPY),
    (BLOCK, {"remasking": "margin", "top_k": 5}),
    (BLOCK, {"remasking": "random"}),
    (BLOCK, {"steps_per_block": 1}),
    (BLOCK, {"steps_per_block": 3, "temperature": 0.7}),
    (BLOCK, {"threshold": 0.4, "temperature": 0.0}),
    (BLOCK, {"threshold": 0.5, "temperature": 0.5}),
    (BLOCK, {"threshold": -1.5, "remasking": "entropy"}),
    (BLOCK, {"threshold": 0.9, "steps_per_block": 1}),  # the threshold decides alone
    (BLOCK, {"remasking": "left_to_right", "steps_per_block": 2}),
    (BLOCK, {"order_temperature": 0.5}),
    (BLOCK, {"order_temperature": 0.2, "temperature": 0.0, "remasking": "margin"}),
    (BLOCK, {"threshold": 0.4, "order_temperature": 0.3}),
    (SHIFTED, {"temperature": 0.0}),
    (SHIFTED, {"steps_per_block": 2}),
    (SHIFTED, {"threshold": 0.5, "temperature": 0.5}),
    (CAUSAL, {}),
    (("causal", False), {}),
    (CANVAS, {"temperature": 0.0}),
    (CANVAS, ENTROPY),
    (CANVAS, {"steps_per_block": 5}),
    (CANVAS, {"block_size": 4, "steps_per_block": 2}),
    (CANVAS, {"threshold": 0.5, "temperature": 0.5}),
    (CANVAS_SHIFTED, {"temperature": 0.0}),
    (CANVAS_SHIFTED, {"block_size": 6}),
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_cached_batch_equals_the_reference(
    make_decoder: MakeDecoder, prompts: Prompts, kind: tuple[str, bool], options: dict[str, Any]
) -> None:
    """Cached = uncached, batch of 8 = batch of 1, shift, pads and EOS, all in one."""
    decoder = make_decoder(*kind)
    config = DecodingConfig(gen_length=12, **options)
    requests = requests_of(prompts)
    reference = Reference(decoder.denoiser, config)
    for request, found in zip(requests, decoder.decode(requests, config), strict=True):
        assert_equals_reference(found, reference.decode(request.prompt_ids, request.seed))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, ENTROPY], ids=str)
@pytest.mark.parametrize("kind", [BLOCK, SHIFTED, CANVAS], ids=str)
def test_batch_of_one_equals_batch_of_eight(
    make_decoder: MakeDecoder, prompts: Prompts, kind: tuple[str, bool], options: dict[str, Any]
) -> None:
    decoder, requests = make_decoder(*kind), requests_of(prompts)
    eight = decoder.decode(requests, DecodingConfig(gen_length=24, block_size=4, **options))
    # The batch must be worth comparing: rows that end early beside rows that do not.
    assert {completion.finish_reason for completion in eight} == {"eos", "length"}
    for max_rows in (1, 3):
        config = DecodingConfig(gen_length=24, block_size=4, max_rows=max_rows, **options)
        for ours, theirs in zip(decoder.decode(requests, config), eight, strict=True):
            assert ours.token_ids == theirs.token_ids and ours.tail_ids == theirs.tail_ids
            assert ours.step_map == theirs.step_map
            assert ours.confidences == pytest.approx(theirs.confidences, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", [BLOCK, SHIFTED, CANVAS, CANVAS_SHIFTED], ids=str)
def test_requests_with_settings_of_their_own_share_a_batch(
    make_decoder: MakeDecoder, prompts: Prompts, kind: tuple[str, bool]
) -> None:
    """Every order, filter, threshold, number of steps and length beside each other."""
    decoder = make_decoder(*kind)
    configs = [
        DecodingConfig(gen_length=length, block_size=4, **options)
        for length, options in [
            (12, {"temperature": 0.0}),
            (20, ENTROPY),
            (8, {"remasking": "margin", "top_k": 5}),
            (12, {"remasking": "random", "steps_per_block": 2}),
            (16, {"remasking": "left_to_right", "top_p": 0.7}),
            (12, {"threshold": 0.4, "temperature": 0.5}),
            (24, {"order_temperature": 0.5, "top_k": 3}),
            (4, {"steps_per_block": 1, "temperature": 1.7}),
        ]
    ]
    requests = [
        Request(prompt, 100 + number, config)
        for number, (prompt, config) in enumerate(zip(prompts, configs, strict=True))
    ]
    call = DecodingConfig(gen_length=4, block_size=4, max_rows=3)
    found = decoder.decode(requests, call)
    for request, config, ours in zip(requests, configs, found, strict=True):
        expected = Reference(decoder.denoiser, config).decode(request.prompt_ids, request.seed)
        assert_equals_reference(ours, expected)


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


def test_order_of_requests_does_not_matter(make_decoder: MakeDecoder, prompts: Prompts) -> None:
    decoder, requests = make_decoder(), requests_of(prompts)
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


def test_global_randomness_is_untouched(make_decoder: MakeDecoder, prompts: Prompts) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    make_decoder().decode(requests_of(prompts), DecodingConfig(gen_length=8))
    assert torch.equal(torch.get_rng_state(), before)


def test_causal_greedy_equals_transformers_generate(
    make_decoder: MakeDecoder, prompts: Prompts
) -> None:
    decoder = make_decoder(*CAUSAL)
    config = DecodingConfig(gen_length=20, temperature=0.0)
    found = decoder.decode(requests_of(prompts), config)
    for prompt, completion in zip(prompts, found, strict=True):
        stock = decoder.denoiser.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=EOS,
            pad_token_id=0,
            suppress_tokens=[MASK],
        )
        assert list(completion.token_ids) == stock[0, len(prompt) :].tolist()
        assert completion.tail_ids == ()


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_an_ar_decode_has_ar_ness_one(make_decoder: MakeDecoder, prompts: Prompts, k: int) -> None:
    for found in make_decoder(*CAUSAL).decode(requests_of(prompts), DecodingConfig(gen_length=12)):
        assert found.step_map == tuple(range(len(found.token_ids)))
        assert local_ar_ness(found.step_map, k) == 1.0
        assert global_ar_ness(found.step_map, k) == 1.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", [BLOCK, CANVAS], ids=str)
def test_the_mask_token_is_never_sampled(
    make_decoder: MakeDecoder,
    prompts: Prompts,
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
    for found in decoder.decode(requests_of(prompts), config):
        assert MASK not in found.token_ids + found.tail_ids


# Threshold


def test_threshold_acts_on_every_row(make_decoder: MakeDecoder, prompts: Prompts) -> None:
    """Defect 10: only row 0 of the batch was updated."""
    decoder, requests = make_decoder(), requests_of(prompts)
    everything = DecodingConfig(gen_length=8, threshold=-1.0)
    nothing = DecodingConfig(gen_length=8, threshold=2.0)
    for found in decoder.decode(requests, everything):  # one pass a block
        assert found.step_map == (0,) * 4 + (1,) * 4 or found.step_map == (0,) * 4
    for found in decoder.decode(requests, nothing):  # one token a pass
        assert sorted(found.step_map) == list(range(len(found.step_map)))


def test_steps_are_counted_without_gaps(make_decoder: MakeDecoder, prompts: Prompts) -> None:
    """tokens / (last step + 1) is the tokens per step, whatever the neighbours needed."""
    config = DecodingConfig(gen_length=16, threshold=0.5, temperature=0.5)
    for found in make_decoder().decode(requests_of(prompts), config):
        assert set(found.step_map) == set(range(max(found.step_map) + 1))
        first = [min(found.step_map[b : b + 4]) for b in range(0, len(found.step_map), 4)]
        last = [max(found.step_map[b : b + 4]) for b in range(0, len(found.step_map), 4)]
        assert all(after == before + 1 for before, after in zip(last[:-1], first[1:], strict=True))


def test_a_high_threshold_is_one_token_a_step(make_decoder: MakeDecoder, prompts: Prompts) -> None:
    decoder, requests = make_decoder(), requests_of(prompts)
    config = DecodingConfig(gen_length=12, threshold=2.0)
    plain = decoder.decode(requests, DecodingConfig(gen_length=12))
    assert decoder.decode(requests, config) == plain


# Cost


def test_logits_only_where_masked(
    make_decoder: MakeDecoder, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token a step: 4 + 3 + 2 + 1 places of each block, and none of the prompt."""
    decoder = make_decoder()
    logits, counts = decoder.denoiser.logits, []

    def counted(hidden: Tensor) -> Tensor:
        counts.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(decoder.denoiser, "logits", counted)
    found = decoder.decode(requests_of(prompts), DecodingConfig(gen_length=16))
    blocks = sum(len(completion.step_map) // 4 for completion in found)
    assert sum(counts) == 10 * blocks
    counts.clear()
    monkeypatch.setattr("models.decoding.LOGIT_NUMBERS", 24 * 3)  # three places at a time
    again = decoder.decode(requests_of(prompts), DecodingConfig(gen_length=16))
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
    make_decoder: MakeDecoder, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder()
    config = DecodingConfig(gen_length=8, cache_mib=1)
    expected = decoder.decode(requests_of(prompts), config)
    monkeypatch.setattr("models.cache.MIB", 3 * 2 * 2 * 2 * 8 * 4 * (9 + 8 + 1))  # three slots
    rows = passes(decoder, monkeypatch)
    assert [c.token_ids for c in decoder.decode(requests_of(prompts), config)] == [
        c.token_ids for c in expected
    ]
    assert max(rows) == 3
    with pytest.raises(UserError, match="decoding.cache_mib 1: one request of 109 tokens"):
        decoder.decode([*requests_of(prompts), Request((5,) * 101, 0)], config)


# Approximate caches and early exit


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_that_is_never_used_is_exact(
    make_decoder: MakeDecoder, prompts: Prompts, cache: Literal["prefix", "dual"]
) -> None:
    """With one pass a block every pass is a full one."""
    decoder = make_decoder(*CANVAS_SHIFTED)
    exact = DecodingConfig(gen_length=12, block_size=4, steps_per_block=1, max_rows=3)
    expected = decoder.decode(requests_of(prompts), exact)
    found = decoder.decode(requests_of(prompts), replace(exact, cache=cache))
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_approximate_caches_do_not_depend_on_the_batch(
    make_decoder: MakeDecoder, prompts: Prompts, cache: Literal["prefix", "dual"]
) -> None:
    decoder = make_decoder(*CANVAS_SHIFTED)
    config = DecodingConfig(
        gen_length=12, block_size=4, threshold=0.4, temperature=0.5, cache=cache
    )
    together = decoder.decode(requests_of(prompts), config)
    for request, found in zip(requests_of(prompts), together, strict=True):
        alone = decoder.decode([request], config)[0]
        assert (found.token_ids, found.step_map) == (alone.token_ids, alone.step_map)


def test_early_exit_has_the_same_text(
    make_decoder: MakeDecoder, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(*CANVAS)
    config = DecodingConfig(gen_length=24, temperature=0.8)
    expected = decoder.decode(requests_of(prompts), config)
    rows = passes(decoder, monkeypatch)
    found = decoder.decode(requests_of(prompts), replace(config, early_exit=True))
    assert sum(rows) < 24 * len(prompts)  # some rows did leave
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.text) == (theirs.token_ids, theirs.text)
        assert ours.tail_ids in ((), theirs.tail_ids) and MASK not in ours.tail_ids
        assert len(ours.step_map) == len(ours.token_ids + ours.tail_ids)


# Weights and onlookers


def test_weights_change_between_calls_only(make_decoder: MakeDecoder, prompts: Prompts) -> None:
    decoder = make_decoder()
    config = DecodingConfig(gen_length=8)
    waiting = threading.Event()

    def change() -> None:
        waiting.set()
        with decoder.updating(), torch.no_grad():
            decoder.denoiser.model.lm_head.weight.neg_()

    before = decoder.decode(requests_of(prompts), config)
    thread = threading.Thread(target=change)

    def start(_: Snapshot) -> None:
        if not waiting.is_set():
            thread.start()
            assert waiting.wait(10)

    try:
        during = decoder.decode(requests_of(prompts), config, watch=start)
        thread.join(10)
        after = decoder.decode(requests_of(prompts), config)
    finally:
        with torch.no_grad():  # the model is shared between tests
            decoder.denoiser.model.lm_head.weight.neg_()
    assert during == before and after != before


def test_a_mixture_of_two_versions_is_no_answer(
    make_decoder: MakeDecoder, prompts: Prompts
) -> None:
    """Somebody who does not ask: the call fails, nothing of it is returned."""
    decoder = make_decoder()

    def meddle(_: Snapshot) -> None:
        with torch.no_grad():
            decoder.denoiser.model.lm_head.weight.mul_(1.0)

    with pytest.raises(InfrastructureError, match="weights changed"):
        decoder.decode(requests_of(prompts), DecodingConfig(gen_length=8), watch=meddle)


def test_a_watcher_sees_tokens_appear_and_stay(make_decoder: MakeDecoder, prompts: Prompts) -> None:
    decoder = make_decoder()
    seen: dict[int, list[Snapshot]] = {}
    config = DecodingConfig(gen_length=12, max_rows=3)
    found = decoder.decode(
        requests_of(prompts), config, watch=lambda s: seen.setdefault(s.request, []).append(s)
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


# The record


@pytest.mark.parametrize("kind", [BLOCK, CANVAS, CAUSAL], ids=str)
def test_what_a_completion_says(
    make_decoder: MakeDecoder, prompts: Prompts, kind: tuple[str, bool]
) -> None:
    decoder = make_decoder(*kind)
    block = {"causal": 1, "block_causal": 4, "bidirectional": 24}[kind[0]]
    for found in decoder.decode(requests_of(prompts), DecodingConfig(gen_length=24)):
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


def test_every_block_is_decoded_in_its_steps(make_decoder: MakeDecoder, prompts: Prompts) -> None:
    config = DecodingConfig(gen_length=12, steps_per_block=3)
    for found in make_decoder().decode(requests_of(prompts), config):
        for number, start in enumerate(range(0, len(found.step_map), 4)):
            counts = [found.step_map[start : start + 4].count(3 * number + s) for s in range(3)]
            assert counts == [2, 1, 1]  # ceil(4/3), ceil(2/2), 1


def test_progress_counts_requests(make_decoder: MakeDecoder, prompts: Prompts) -> None:
    told: list[int] = []
    config = DecodingConfig(gen_length=4, max_rows=3)
    make_decoder().decode(requests_of(prompts), config, on_progress=told.append)
    assert told == [3, 3, 2]


def test_no_requests(make_decoder: MakeDecoder) -> None:
    assert make_decoder().decode([], DecodingConfig(gen_length=4)) == []


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

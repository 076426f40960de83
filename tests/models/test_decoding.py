"""The decoder against an independent reference: one row, no cache, a full pass in every step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from common.records import Completion
from diffusion.arness import global_ar_ness, local_ar_ness
from models.decoding import Decoder, DecodingConfig, Request
from models.denoiser import Denoiser

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
    return probs[token] if remasking == "low_confidence" else uniform


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
                ranked = sorted(open_, key=lambda p: (-found[p][0], p))
                for place in ranked[: self._count(ranked, found, step)]:
                    sure[place], tokens[place] = found[place]
                    order[place] = done
                done += 1
            if EOS in tokens[start : start + self.size]:
                end = start + self.size
                return tokens[:end], order[:end], sure[:end]
        return tokens, order, sure

    def _count(self, ranked: list[int], found: dict[int, tuple[float, int]], step: int) -> int:
        if self.config.threshold is not None:
            return max(1, sum(found[p][0] > self.config.threshold for p in ranked))
        return math.ceil(len(ranked) / (self.steps - step))

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
    ],
)
def test_sizes_that_do_not_fit(
    make_decoder: MakeDecoder, kind: tuple[str, bool], options: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make_decoder(*kind).decode([Request((5,), 0)], DecodingConfig(**options))  # type: ignore[arg-type]
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
    ],
)
def test_impossible_config(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DecodingConfig(**{"gen_length": 8, **bad})

"""The decoder against an independent reference: one row, no cache, a full pass in every step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common.records import Completion
from models.decoding import Decoder
from models.denoiser import Denoiser
from models.request import DecodingConfig, Request

MakeDecoder = Callable[..., Decoder]
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
    make_decoder: MakeDecoder,
    requests: list[Request],
    kind: tuple[str, bool],
    options: dict[str, Any],
) -> None:
    """Cached = uncached, batch of 8 = batch of 1, shift, pads and EOS, all in one."""
    decoder = make_decoder(*kind)
    config = DecodingConfig(gen_length=12, **options)
    reference = Reference(decoder.denoiser, config)
    for request, found in zip(requests, decoder.decode(requests, config), strict=True):
        assert_equals_reference(found, reference.decode(request.prompt_ids, request.seed))


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


def test_causal_greedy_equals_transformers_generate(
    make_decoder: MakeDecoder, prompts: Prompts, requests: list[Request]
) -> None:
    decoder = make_decoder(*CAUSAL)
    config = DecodingConfig(gen_length=20, temperature=0.0)
    found = decoder.decode(requests, config)
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

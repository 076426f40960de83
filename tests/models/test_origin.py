"""Blocks counted from the sequence's start (`block_origin`), against a loop written from SDAR's.

The reference (github.com/JetAstra/SDAR generate.py, what it computes): the canvas is the prompt and
masks up to a whole block; blocks are cut from place 0; decoding starts with the block that holds
the prompt's end. No cache here, a full pass in every step, and ours where SDAR's loop leaves the
choice open: orders, noise by name, the mask token never drawn.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import diffusion.objective as objective
from common.records import Completion
from diffusion.layout import Sequence, TokenRows, build_rows
from diffusion.likelihood import estimate_logps, forward_tokens
from diffusion.masking import Corruption
from diffusion.objective import Noise, block_diffusion_rows
from diffusion.views import EstimatorConfig
from models.decoding import Decoder, Snapshot
from models.denoiser import Denoiser
from models.request import DecodingConfig, Request
from pretrain.data import Document, to_tensors

MakeDenoiser = Callable[..., Denoiser]
EOS, MASK, BLOCK, LENGTH = 1, 2, 4, 12
PROMPTS = range(1, 2 * BLOCK + 2)


@pytest.fixture
def make_decoder(
    make_denoiser: MakeDenoiser, word_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Decoder]:
    def make(shift: bool = False, block_size: int = BLOCK, origin: str = "sequence") -> Decoder:
        denoiser = make_denoiser("block_causal", shift, block_size)
        denoiser.spec = replace(denoiser.spec, block_origin=origin)  # type: ignore[arg-type]
        return Decoder(denoiser, word_tokenizer)

    return make


MakeDecoder = Callable[..., Decoder]


def words(length: int, seed: int = 0) -> tuple[int, ...]:
    drawn = torch.randint(3, 24, (length,), generator=torch.Generator().manual_seed(seed))
    return tuple(drawn.tolist())


def requests_of(**decoding: Any) -> list[Request]:
    """Two prompts of every length, the second greedy or not as `decoding` says."""
    config = DecodingConfig(gen_length=LENGTH, **decoding)
    return [Request(words(n, n), 50 + n, config) for n in PROMPTS]


def full_logits(denoiser: Denoiser, ids: list[int], size: int, origin: int = 0) -> Tensor:
    """Logits [S, V] of stock transformers; blocks are cut from `origin`."""
    block = [(place - origin) // size for place in range(len(ids))]
    mask = torch.tensor([[k <= q for k in block] for q in block])
    with torch.no_grad():
        return denoiser.model(torch.tensor([ids]), attention_mask=mask[None, None]).logits[0]


def published(denoiser: Denoiser, request: Request, size: int) -> tuple[list[int], ...]:
    """Completion up to the end of its last block, and the pass and confidence of each token."""
    config, prompt = request.decoding, len(request.prompt_ids)
    assert config is not None
    blocks = math.ceil((prompt + LENGTH) / size)
    total = blocks * size
    steps = config.steps_per_block or size
    uniform = torch.rand(
        2, total - prompt, steps, generator=torch.Generator().manual_seed(request.seed)
    )
    ids = [*request.prompt_ids, *[MASK] * (total - prompt)]
    when, sure, clock = [-1] * total, [0.0] * total, 0
    for start in range(prompt // size * size, total, size):
        for step in range(steps):
            left = [p for p in range(max(start, prompt), start + size) if when[p] < 0]
            if not left:
                break
            logits = full_logits(denoiser, ids[: start + size], size)
            found = {}
            for place in left:
                row = logits[place - int(denoiser.spec.logit_shift)].clone()
                row[MASK] = -math.inf
                probs = (row / (config.temperature or 1.0)).softmax(-1)
                token = int(probs.argmax())
                if config.temperature:
                    below = probs.double().cumsum(-1) <= float(uniform[0, place - prompt, step])
                    token = int(below.sum())
                found[place] = float(probs[token]), token
            ranked = sorted(left, key=lambda p: (-found[p][0], p))
            if config.remasking == "left_to_right":
                ranked = left
            if config.remasking == "random":
                ranked = sorted(left, key=lambda p: -float(uniform[1, p - prompt, step]))
            number = math.ceil(len(left) / (steps - step))
            if config.threshold is not None:
                number = max(1, sum(found[p][0] > config.threshold for p in left))
            for place in ranked[:number]:
                sure[place], ids[place] = found[place]
                when[place] = clock
            clock += 1
        if EOS in ids[prompt : start + size]:
            total = start + size
            break
    return ids[prompt:total], when[prompt:total], sure[prompt:total]  # type: ignore[return-value]


def assert_is_published(found: Completion, expected: tuple[list[int], ...], order: str) -> None:
    tokens, steps, sure = expected
    assert list(found.token_ids + found.tail_ids) == tokens
    assert list(found.step_map) == steps
    if order == "low_confidence":
        assert list(found.confidences) == pytest.approx(sure, rel=1e-3, abs=1e-4)
    within = tokens[:LENGTH]
    ends = within.index(EOS) + 1 if EOS in within else LENGTH
    assert list(found.token_ids) == tokens[:ends]
    assert found.finish_reason == ("eos" if EOS in within else "length")


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    "decoding",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.0, "steps_per_block": 2},
        {"threshold": 0.4},
        {"remasking": "left_to_right", "steps_per_block": 3},
        {"remasking": "random", "temperature": 0.7},
    ],
)
def test_decoding_is_the_published_loop(
    make_decoder: MakeDecoder, shift: bool, decoding: dict[str, Any]
) -> None:
    decoder = make_decoder(shift)
    requests = requests_of(**decoding)
    # Few slots: prompts of all lengths follow each other through the same ones.
    call = DecodingConfig(gen_length=LENGTH, max_rows=4)
    for request, found in zip(requests, decoder.decode(requests, call), strict=True):
        expected = published(decoder.denoiser, request, BLOCK)
        assert_is_published(found, expected, decoding.get("remasking", "low_confidence"))


@pytest.mark.parametrize("size", [1, 3])
def test_other_block_sizes(make_decoder: MakeDecoder, size: int) -> None:
    decoder = make_decoder(block_size=size)
    requests = requests_of()
    for request, found in zip(
        requests, decoder.decode(requests, DecodingConfig(gen_length=LENGTH)), strict=True
    ):
        assert_is_published(found, published(decoder.denoiser, request, size), "low_confidence")


@pytest.mark.parametrize("shift", [False, True])
def test_alone_as_among_others(make_decoder: MakeDecoder, shift: bool) -> None:
    decoder = make_decoder(shift)
    requests = requests_of() + requests_of(remasking="random", temperature=0.5)
    call = DecodingConfig(gen_length=LENGTH, max_rows=5)
    together = decoder.decode(requests, call)
    for request, found in zip(requests, together, strict=True):
        alone = decoder.decode([request], call)[0]
        assert replace(found, confidences=()) == replace(alone, confidences=())
        assert found.confidences == pytest.approx(alone.confidences, rel=1e-3, abs=1e-4)


def test_whole_prompts_have_no_origin(make_decoder: MakeDecoder) -> None:
    """Where the prompt fills its blocks both origins are one; elsewhere they are not."""
    ours, theirs = make_decoder(origin="prompt"), make_decoder()
    call = DecodingConfig(gen_length=LENGTH)
    requests = requests_of()
    pairs = list(zip(ours.decode(requests, call), theirs.decode(requests, call), strict=True))
    same = [replace(a, confidences=()) == replace(b, confidences=()) for a, b in pairs]
    assert [n for n, equal in zip(PROMPTS, same, strict=True) if equal] == [4, 8]
    for n, (a, b) in zip(PROMPTS, pairs, strict=True):
        if n % BLOCK == 0:
            assert a.confidences == pytest.approx(b.confidences, rel=1e-3)


def test_a_completion_has_gen_length_tokens_at_most(make_decoder: MakeDecoder) -> None:
    """The last block is decoded whole: what lies beyond gen_length is the tail, never text."""
    decoder = make_decoder()
    found = decoder.decode(requests_of(), DecodingConfig(gen_length=LENGTH))
    cut = {n: c for n, c in zip(PROMPTS, found, strict=True) if c.finish_reason == "length"}
    assert any(n % BLOCK for n in cut)
    for number, completion in cut.items():
        assert len(completion.token_ids) == LENGTH
        assert len(completion.tail_ids) == -number % BLOCK
        assert completion.text == " ".join(f"w{token}" for token in completion.token_ids)


def test_given_tokens_are_never_touched(make_decoder: MakeDecoder) -> None:
    """Mask and EOS tokens in the prompt's tail are neither filled in nor the end."""
    decoder = make_decoder()
    request = Request((5, 6, 7, 8, EOS, MASK), 3, DecodingConfig(gen_length=LENGTH, temperature=0))
    shown: list[Snapshot] = []
    found = decoder.decode([request], DecodingConfig(gen_length=LENGTH), watch=shown.append)[0]
    assert_is_published(found, published(decoder.denoiser, request, BLOCK), "low_confidence")
    assert len(found.step_map) > BLOCK


def test_snapshots_end_where_the_completion_may(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder()
    shown: list[Snapshot] = []
    requests = requests_of()
    found = decoder.decode(requests, DecodingConfig(gen_length=LENGTH), watch=shown.append)
    for number, completion in enumerate(found):
        mine = [snapshot for snapshot in shown if snapshot.request == number]
        assert all(len(snapshot.ids) == LENGTH for snapshot in mine)
        assert mine[0].final in (0, BLOCK - len(requests[number].prompt_ids) % BLOCK)
        last = mine[-1]
        whole = completion.token_ids + completion.tail_ids
        assert last.final == min(len(whole), LENGTH)
        assert last.ids[: last.final] == whole[:LENGTH]
        assert last.text == len(completion.token_ids) - (completion.finish_reason == "eos")
        for earlier, later in zip(mine, mine[1:], strict=False):
            assert earlier.final <= later.final
            assert later.ids[: earlier.final] == earlier.ids[: earlier.final]


SHAPES = [(1, 1), (1, 3), (3, 1), (3, 2), (5, 8), (6, 5), (7, 9), (8, 6), (9, 3)]


def straight(denoiser: Denoiser, sequence: Sequence, hidden: list[bool]) -> list[float]:
    """Log-probability of each hidden token: block after block, all before it clean."""
    prompt, shift = len(sequence.prompt_ids), int(denoiser.spec.logit_shift)
    text = [*sequence.prompt_ids, *sequence.completion_ids]
    noisy = [*sequence.prompt_ids]
    noisy += [MASK if h else t for t, h in zip(sequence.completion_ids, hidden, strict=True)]
    found = []
    for start in range(0, len(text), BLOCK):
        ids = text[:start] + noisy[start : start + BLOCK]
        logps = full_logits(denoiser, ids, BLOCK).log_softmax(-1)
        for place in range(max(start, prompt), len(ids)):
            if hidden[place - prompt]:
                found.append(float(logps[place - shift, text[place]]))
    return found


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("prompt", "length"), SHAPES)
def test_block_rows_are_the_straight_line(
    make_decoder: MakeDecoder, shift: bool, prompt: int, length: int
) -> None:
    denoiser = make_decoder(shift).denoiser
    sequence = Sequence(words(prompt), words(length, 1), length)
    drawn = torch.rand(3, length, generator=torch.Generator().manual_seed(2)) < 0.5
    masks = torch.cat([drawn, torch.ones(1, length, dtype=torch.bool)])
    rows = build_rows(
        [sequence],
        [masks],
        mask_token_id=MASK,
        block_size=BLOCK,
        logit_shift=shift,
        block_origin="sequence",
    )
    with torch.no_grad():
        found = denoiser(rows)
    expected = [logp for mask in masks for logp in straight(denoiser, sequence, mask.tolist())]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shift", [False, True])
def test_training_rows_are_the_straight_line(
    make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch, shift: bool
) -> None:
    """SFT shows a prompted document as decoding does: the prompt's tail clean beside masks."""
    denoiser = make_decoder(shift).denoiser
    documents = [Document(words(n + 7, n), n) for n in (0, 3, 5, 4)]
    row = to_tensors([documents], 44, BLOCK, "sequence")
    hidden = torch.rand(1, 44, generator=torch.Generator().manual_seed(1)) < 0.6
    hidden &= row.supervised & (row.position > 0)
    drawn = Corruption(hidden, torch.ones(hidden.shape), 0.0)
    monkeypatch.setattr(objective, "corrupt_blocks", lambda *_: drawn)
    noise = Noise(torch.Generator(), BLOCK, MASK, logit_shift=shift)
    with torch.no_grad():
        found = denoiser(block_diffusion_rows(row, noise).rows)
    expected, start = [], 0
    for document in documents:
        prompt, stop = document.prompt_length, start + len(document.ids)
        sequence = Sequence(document.ids[:prompt], document.ids[prompt:], stop)
        expected += straight(denoiser, sequence, hidden[0, start + prompt : stop].tolist())
        start = stop
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["full_mask", "coupled", "elbo", "trace"])
@pytest.mark.parametrize(("prompt", "length"), SHAPES)
def test_forward_tokens_are_those_built(
    make_decoder: MakeDecoder, kind: str, prompt: int, length: int
) -> None:
    denoiser = make_decoder().denoiser
    sequence = Sequence(words(prompt), words(length), length, tuple(range(length)))
    config = EstimatorConfig(kind=kind)  # type: ignore[arg-type]
    built: list[int] = []

    def count(rows: TokenRows) -> Tensor:
        built.append(rows.input_ids.numel())
        return torch.zeros(len(rows.select))

    estimate_logps(count, denoiser.spec, [sequence], [0], config)
    assert built == [forward_tokens(denoiser.spec, sequence, config)]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("decoding", [{}, {"steps_per_block": 2}, {"threshold": 0.6}])
def test_trace_is_what_the_decoder_recorded(
    make_decoder: MakeDecoder, shift: bool, decoding: dict[str, Any]
) -> None:
    decoder = make_decoder(shift)
    denoiser, requests = decoder.denoiser, requests_of(**decoding)
    done = decoder.decode(requests, DecodingConfig(gen_length=LENGTH))

    def score(rows: TokenRows) -> Tensor:  # as sampled from: the mask token is never drawn
        of_mask = denoiser(replace(rows, targets=torch.full_like(rows.targets, MASK)))
        return denoiser(rows) - torch.log1p(-of_mask.exp())

    sequences = [
        Sequence(r.prompt_ids, c.token_ids + c.tail_ids, len(c.token_ids), step_map=c.step_map)
        for r, c in zip(requests, done, strict=True)
    ]
    assert any(c.finish_reason == "length" and c.tail_ids for c in done)
    with torch.no_grad():
        config = EstimatorConfig(kind="trace")
        logps = estimate_logps(score, denoiser.spec, sequences, [0] * len(sequences), config)
    for row, found in zip(logps, done, strict=True):
        supervised = len(found.token_ids)
        expected = [math.log(c) for c in found.confidences[:supervised]]
        assert row[:supervised].tolist() == pytest.approx(expected, abs=2e-4)


def test_behaviour_logps_are_the_learners(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder()
    config = EstimatorConfig(kind="coupled")
    requests = [replace(r, mask_seeds=(7, 8)) for r in requests_of()]
    done = decoder.decode(requests, DecodingConfig(gen_length=LENGTH), estimator=config)
    for request, found in zip(requests, done, strict=True):
        whole = found.token_ids + found.tail_ids
        sequence = Sequence(request.prompt_ids, whole, len(found.token_ids))
        with torch.no_grad():
            pair = [sequence, sequence]
            logps = estimate_logps(decoder.denoiser, decoder.denoiser.spec, pair, [7, 8], config)
        for ours, theirs in zip(found.behaviour_logps, logps.tolist(), strict=True):
            assert list(ours) == pytest.approx(theirs, abs=1e-4)

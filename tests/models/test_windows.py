"""What the network is shown while decoding: blocks as in training, pads invisible, cache exact."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from diffusion.layout import Sequence, build_rows
from diffusion.masking import generator
from diffusion.objective import Noise, block_diffusion_rows
from models.cache import SlotCache
from models.denoiser import Denoiser
from models.request import DecodingConfig, Request
from models.slots import Slots
from models.windows import BlockWindow, CachedCanvasWindow, CanvasWindow, Window
from pretrain.data import Document, to_tensors

MakeDenoiser = Callable[..., Denoiser]
Prompts = list[tuple[int, ...]]
MASK = 2
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
LENGTH = 12


class Recorder(nn.Module):
    """A denoiser that remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.spec = SimpleNamespace(logit_shift=False)
        self.calls: list[dict[str, Any]] = []

    def hidden(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache) -> Tensor:
        call = {"ids": ids, "positions": positions, "mask": mask[:, 0], "dump": cache.dump}
        self.calls.append(call | {"slots": cache.row_index, "places": cache.places})
        return torch.zeros(*ids.shape, 1)


def canvas(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 24, (rows, LENGTH), generator=generator(seed))


def span_of(prompt: tuple[int, ...]) -> tuple[int, int]:
    return len(prompt), len(prompt) + LENGTH


def slots_of(prompts: Prompts, spare: int = 0) -> Slots:
    """A slot for each prompt, admitted, nothing decided; `spare` more places than are needed."""
    places = max(len(prompt) for prompt in prompts) + LENGTH + spare
    slots = Slots.make(len(prompts), places, (0, 0), 4, MASK, torch.device("cpu"))
    config = DecodingConfig(gen_length=LENGTH, temperature=0.0)
    for number, prompt in enumerate(prompts):
        slots.admit(number, number, Request(prompt, 0), config, 4, span_of(prompt))
    slots.active = len(prompts)
    return slots


def window_of(denoiser: Any, slots: Slots) -> Window:
    """The exact window for a denoiser, with its requests admitted."""
    if getattr(denoiser.spec, "attention", "") == "bidirectional":
        return CanvasWindow(denoiser, slots)
    window = BlockWindow(denoiser, slots, SlotCache(len(slots.ids), slots.places))
    window.admit(range(slots.active))
    return window


def decide(slots: Slots, tokens: Tensor, upto: int) -> None:
    """Columns [0, upto) of every row are known."""
    for row in range(slots.active):
        prompt = int(slots.prompt[row])
        slots.ids[row, prompt : prompt + upto] = tokens[row, :upto]


def walk(window: Window, slots: Slots, tokens: Tensor) -> list[Tensor]:
    """States of every block in two passes: all masked, then half of it known; then it is final."""
    states = []
    everyone = torch.arange(slots.active)
    for start in range(0, LENGTH, 4):
        states.append(window.hidden())
        decide(slots, tokens, start + 2)
        slots.step[: slots.active] += 1
        states.append(window.hidden())
        decide(slots, tokens, start + 4)
        slots.next_block(everyone)
    return states


def walked(denoiser: Any, prompts: Prompts, tokens: Tensor, spare: int = 0) -> list[Tensor]:
    slots = slots_of(prompts, spare)
    with torch.no_grad():
        return walk(window_of(denoiser, slots), slots, tokens)


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 5, 8, 9])
def test_blocks_are_the_same_in_training_likelihood_and_decoding(prompt: int) -> None:
    """The completion starts on a block boundary wherever its prompt ends, in all three."""
    ids = tuple(range(3, 3 + prompt + LENGTH))
    total = len(ids)
    # Decoding: rebuild "who sees whom" from the cached passes; each adds rows to the matrix. A
    # longer neighbour makes every pass wider than this row needs.
    recorder = Recorder()
    walked(recorder, [ids[:prompt], tuple(range(11))], torch.tensor([ids[prompt:]] * 2))
    decoded = torch.zeros(total, total, dtype=torch.bool)
    for call in recorder.calls:
        for line in (call["slots"] == 0).nonzero()[:, 0].tolist():
            for column, place in enumerate(call["places"][line].tolist()):
                if place < call["dump"]:
                    seen = call["mask"][line, column, :total]
                    decoded[place] = False
                    decoded[place, : len(seen)] = seen
    # Training: the clean half of [x_t ; x_0].
    rows = to_tensors([[Document(ids, prompt)]], total, block_size=4)
    noise = Noise(generator=generator(0), block_size=4, mask_token_id=MASK, logit_shift=False)
    trained = block_diffusion_rows(rows, noise).rows.attention_mask[0, 0, total:, total:]
    assert torch.equal(decoded, trained)
    # Likelihood: the clean part, which lacks only the last block.
    sequence = Sequence(ids[:prompt], ids[prompt:], LENGTH)
    views = torch.ones(1, LENGTH, dtype=torch.bool)
    scored = build_rows([sequence], [views], mask_token_id=MASK, block_size=4, logit_shift=False)
    clean = total - 4
    assert torch.equal(scored.attention_mask[0, 0, :clean, :clean], decoded[:clean, :clean])


def test_passes_are_fused_and_short() -> None:
    """A block costs one pass over itself; its first pass carries the clean tokens before it."""
    recorder = Recorder()
    walked(recorder, [(5, 6, 7)], canvas(1))
    assert [call["ids"].shape[1] for call in recorder.calls] == [3 + 4, 4, 4 + 4, 4, 4 + 4, 4]
    positions = [call["positions"][0].tolist() for call in recorder.calls]
    assert positions[:3] == [list(range(7)), [3, 4, 5, 6], list(range(3, 11))]


def test_a_long_prompt_goes_through_once() -> None:
    """Admission takes what lies before its last block; the first pass takes that block along."""
    recorder = Recorder()
    walked(recorder, [tuple(range(3, 13))], canvas(1))
    assert [call["positions"][0].tolist() for call in recorder.calls[:3]] == [
        list(range(6)),
        list(range(6, 14)),
        list(range(10, 14)),
    ]


def test_rows_need_not_be_at_the_same_block() -> None:
    """One is at its second block, one starts: right-aligned, padding goes to the dump."""
    recorder, tokens = Recorder(), canvas(2)
    slots = slots_of([(5, 6, 7), (8,)])
    window = window_of(recorder, slots)
    window.hidden()
    decide(slots, tokens, 4)
    slots.next_block(torch.tensor([0]))  # row 0 goes on, row 1 stays
    window.hidden()
    call = recorder.calls[-1]
    assert call["positions"].tolist()[0] == list(range(3, 11))
    assert call["places"].tolist() == [list(range(3, 11)), [15, 15, 15, 15, 1, 2, 3, 4]]
    assert call["mask"][1, 4:, :5].all() and not call["mask"][1, 4:, 5:].any()


KINDS = [("block_causal", False), ("block_causal", True)]
KINDS += [("bidirectional", False), ("bidirectional", True)]


@pytest.mark.parametrize(("attention", "shift"), KINDS)
def test_hidden_states_equal_a_full_pass(
    make_denoiser: MakeDenoiser, attention: str, shift: bool, prompts: Prompts
) -> None:
    """Every pass of a batch with a cache against one uncached row under the written-out mask."""
    denoiser = make_denoiser(attention, shift)
    tokens = canvas(len(prompts))
    found = walked(denoiser, prompts, tokens)
    for row, prompt in enumerate(prompts):
        for number, states in enumerate(found):
            start = number // 2 * 4
            known = start + 2 * (number % 2)
            shown = torch.full((LENGTH,), MASK)
            shown[:known] = tokens[row, :known]
            expected = _full_pass(denoiser, prompt, shown, start)
            torch.testing.assert_close(states[row], expected, **CLOSE)


def _full_pass(denoiser: Denoiser, prompt: tuple[int, ...], shown: Tensor, start: int) -> Tensor:
    ids = torch.cat([torch.tensor(prompt), shown])
    blocks = [(place - len(prompt)) // 4 for place in range(len(ids))]
    everyone = denoiser.spec.attention == "bidirectional"
    mask = torch.tensor([[everyone or k <= q for k in blocks] for q in blocks])
    with torch.no_grad():
        states = denoiser.model.model(ids[None], attention_mask=mask[None, None])[0][0]
    first = len(prompt) + start - int(denoiser.spec.logit_shift)
    return states[first : first + 4]


@pytest.mark.parametrize(("attention", "shift"), KINDS)
def test_padding_is_invisible(
    make_denoiser: MakeDenoiser, attention: str, shift: bool, prompts: Prompts
) -> None:
    """Defect 4: passes without the mask of the rollout. A pad's embedding may be anything."""
    denoiser, tokens = make_denoiser(attention, shift), canvas(len(prompts))
    embedding = denoiser.model.model.embed_tokens.weight.data
    before = embedding[0].clone()
    runs = []
    try:
        for value in (0.0, 50.0):
            embedding[0] = value  # token 0 pads, and stands nowhere else
            runs.append(walked(denoiser, prompts, tokens))
    finally:
        embedding[0] = before
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("attention", "shift"), KINDS)
def test_a_slot_forgets_who_was_there(
    make_denoiser: MakeDenoiser, attention: str, shift: bool, prompts: Prompts
) -> None:
    """Refilled and moved slots against fresh ones: nothing is wiped, nothing of it is seen."""
    denoiser, tokens = make_denoiser(attention, shift), canvas(len(prompts))
    expected = walked(denoiser, prompts, tokens)
    slots = slots_of(prompts[::-1])
    config = DecodingConfig(gen_length=LENGTH, temperature=0.0)
    with torch.no_grad():
        window = window_of(denoiser, slots)
        walk(window, slots, tokens)
        for slot, prompt in enumerate(prompts):
            slots.admit(slot, slot, Request(prompt, 0), config, 4, span_of(prompt))
        window.admit(range(len(prompts)))
        window.hidden()
        pair = torch.tensor([6, 7]), torch.tensor([1, 2])
        slots.move(*pair), window.move(*pair)
        slots.active = 6
        order = torch.tensor([0, 6, 7, 3, 4, 5])
        found = walk(window, slots, tokens[order])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs[order], **CLOSE)


# The approximate caches


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dual", [False, True])
def test_cached_canvas_equals_its_definition(
    make_denoiser: MakeDenoiser, prompts: Prompts, dual: bool, shift: bool
) -> None:
    """A short pass by hand: queries of the window, keys of the last full pass outside of it.

    Attention over a mixture of two passes is written with the stock model and one cache of
    transformers' own, a row at a time.
    """
    denoiser = make_denoiser("bidirectional", shift)
    tokens = canvas(len(prompts))
    slots = slots_of(prompts)
    cache = SlotCache(len(prompts), slots.places)
    with torch.no_grad():
        found = walk(CachedCanvasWindow(denoiser, slots, cache, dual), slots, tokens)
        for row, prompt in enumerate(prompts):
            for number, states in enumerate(found):
                expected = _mixed_pass(denoiser, prompt, tokens[row], number, dual)
                torch.testing.assert_close(states[row], expected, **CLOSE)


def _mixed_pass(
    denoiser: Denoiser, prompt: tuple[int, ...], tokens: Tensor, number: int, dual: bool
) -> Tensor:
    start, late = number // 2 * 4, number % 2
    shown = torch.full((LENGTH,), MASK)
    shown[:start] = tokens[:start]
    if not late:
        return _full_pass(denoiser, prompt, shown, start)
    ids = torch.cat([torch.tensor(prompt), shown])
    everyone = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool)
    memory = DynamicCache()
    denoiser.model.model(ids[None], attention_mask=everyone, past_key_values=memory, use_cache=True)
    first = len(prompt) + start - int(denoiser.spec.logit_shift)
    stop = len(prompt) + start + 4 if dual else len(ids)
    # Take the window's own places out of the memory; keys carry their positions already.
    mixed = DynamicCache()
    outside = torch.tensor([p for p in range(len(ids)) if not first <= p < stop], dtype=torch.int64)
    for layer, old in enumerate(memory.layers):
        mixed.update(old.keys[:, :, outside], old.values[:, :, outside], layer)
    ids[len(prompt) + start : len(prompt) + start + 2] = tokens[start : start + 2]
    states = denoiser.model.model(
        ids[None, first:stop],
        position_ids=torch.arange(first, stop)[None],
        attention_mask=everyone[:, :, : stop - first],
        past_key_values=mixed,
        use_cache=True,
    ).last_hidden_state
    return states[0, :4]


def test_a_neighbour_at_its_first_step_changes_nothing(
    make_denoiser: MakeDenoiser, prompts: Prompts
) -> None:
    """Rows out of step: full and short passes in one batch, each as if alone."""
    denoiser, tokens = make_denoiser("bidirectional"), canvas(2)
    both, alone = slots_of(prompts[:2]), slots_of(prompts[:1])
    windows = [
        CachedCanvasWindow(denoiser, slots, SlotCache(2, slots.places), True)
        for slots in (both, alone)
    ]
    with torch.no_grad():
        for slots, window in zip((both, alone), windows, strict=True):
            window.hidden()
            decide(slots, tokens, 2)
        both.step[0], alone.step[0] = 1, 1  # row 1 stays at its first step
        together, single = windows[0].hidden(), windows[1].hidden()
    torch.testing.assert_close(together[:1], single, **CLOSE)

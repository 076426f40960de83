"""What the network is shown while decoding: blocks as in training, pads invisible, cache exact."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion.layout import Sequence, build_rows
from diffusion.masking import generator
from diffusion.objective import Noise, block_diffusion_rows
from models.denoiser import Denoiser
from models.windows import BlockWindow, CanvasWindow, Window
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

    def hidden(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        self.calls.append({"ids": ids, "positions": positions, "mask": mask[:, 0]})
        return torch.zeros(*ids.shape, 1)


def canvas(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 24, (rows, LENGTH), generator=generator(seed))


def window_of(denoiser: Any, prompts: Prompts) -> Window:
    bidirectional = getattr(denoiser.spec, "attention", "") == "bidirectional"
    kind = CanvasWindow if bidirectional else BlockWindow
    return kind(denoiser, prompts, LENGTH, 4)


def walk(window: Window, tokens: Tensor) -> list[Tensor]:
    """States of every block in two passes: all masked, then half of it known; then it is final."""
    states = []
    for start in range(0, LENGTH, 4):
        shown = torch.full_like(tokens, MASK)
        shown[:, :start] = tokens[:, :start]
        states.append(window.hidden(shown, start))
        shown[:, start : start + 2] = tokens[:, start : start + 2]
        states.append(window.hidden(shown, start))
        window.finish_block(tokens, start)
    return states


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 5, 8, 9])
def test_blocks_are_the_same_in_training_likelihood_and_decoding(prompt: int) -> None:
    """The completion starts on a block boundary wherever its prompt ends, in all three."""
    ids = tuple(range(3, 3 + prompt + LENGTH))
    total = len(ids)
    # Decoding: rebuild "who sees whom" from the cached passes; each adds rows to the matrix. A
    # longer neighbour pads the row on the left.
    recorder = Recorder()
    window = BlockWindow(recorder, [ids[:prompt], tuple(range(11))], LENGTH, 4)  # type: ignore[arg-type]
    walk(window, torch.tensor([ids[prompt:], ids[prompt:]]))
    pad = 11 - prompt if prompt < 11 else 0
    decoded = torch.zeros(total, total, dtype=torch.bool)
    final = 0
    for call in recorder.calls:
        mask, fresh = call["mask"][0], call["mask"].shape[1] - 4
        for row in range(mask.shape[0]):
            query = final + row - pad
            if query >= 0:
                decoded[query] = False
                decoded[query, : mask.shape[1] - pad] = mask[row, pad:]
        final += fresh
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
    window = BlockWindow(recorder, [(5, 6, 7)], LENGTH, 4)  # type: ignore[arg-type]
    walk(window, canvas(1))
    assert [call["ids"].shape[1] for call in recorder.calls] == [3 + 4, 4, 4 + 4, 4, 4 + 4, 4]
    positions = [call["positions"][0].tolist() for call in recorder.calls]
    assert positions[:3] == [list(range(7)), [3, 4, 5, 6], list(range(3, 11))]


def test_positions_ignore_left_pads() -> None:
    recorder = Recorder()
    window = BlockWindow(recorder, [(5, 6, 7), (8,)], LENGTH, 4)  # type: ignore[arg-type]
    window.hidden(canvas(2), 0)
    call = recorder.calls[0]
    assert call["ids"][1].tolist()[:3] == [0, 0, 8]
    assert call["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]]
    assert not call["mask"][1, 2:, :2].any()  # no token sees a pad


KINDS = [("block_causal", False), ("block_causal", True)]
KINDS += [("bidirectional", False), ("bidirectional", True)]


@pytest.mark.parametrize(("attention", "shift"), KINDS)
def test_hidden_states_equal_a_full_pass(
    make_denoiser: MakeDenoiser, attention: str, shift: bool, prompts: Prompts
) -> None:
    """Every pass of a batch with a cache against one uncached row under the written-out mask."""
    denoiser = make_denoiser(attention, shift)
    tokens = canvas(len(prompts))
    with torch.no_grad():
        found = walk(window_of(denoiser, prompts), tokens)
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
def test_left_pads_are_invisible(
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
            with torch.no_grad():
                runs.append(walk(window_of(denoiser, prompts), tokens))
    finally:
        embedding[0] = before
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("attention", "shift"), KINDS)
def test_dropping_rows_does_not_disturb_the_others(
    make_denoiser: MakeDenoiser, attention: str, shift: bool, prompts: Prompts
) -> None:
    denoiser, tokens = make_denoiser(attention, shift), canvas(len(prompts))
    kept = torch.tensor([0, 3, 4, 7])
    with torch.no_grad():
        whole, part = window_of(denoiser, prompts), window_of(denoiser, prompts)
        whole.hidden(tokens, 0), part.hidden(tokens, 0)
        part.keep_rows(kept)
        whole.finish_block(tokens, 0), part.finish_block(tokens[kept], 0)
        for _ in range(2):
            expected = whole.hidden(tokens, 4)[kept]
            torch.testing.assert_close(part.hidden(tokens[kept], 4), expected, **CLOSE)

"""The packed forward passes against straight-line computations that pack nothing.

`straight` feeds one sequence whose attention is written out as loops over the definition, and
reads one hidden token after the other: nothing of `diffusion.layout` or `diffusion.attention`.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import diffusion.objective as objective
from diffusion.layout import Sequence, TokenRows, build_rows
from diffusion.likelihood import estimate_logps
from diffusion.masking import Corruption, coupled_masks, generator
from diffusion.objective import Noise, Packing, block_diffusion_rows, canvas_rows, next_token_rows
from diffusion.views import EstimatorConfig
from models.denoiser import Denoiser
from pretrain.data import Document, PackedRows, to_tensors

MakeDenoiser = Callable[..., Denoiser]
VOCABULARY, MASK = 24, 2
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
# Prompts and completions around the block size of 4: shorter, equal, longer, not a multiple.
SHAPES = [(1, 1), (3, 4), (4, 6), (5, 8), (9, 11)]


def words(count: int, seed: int) -> tuple[int, ...]:
    drawn = torch.randint(3, VOCABULARY, (count,), generator=generator(seed))
    return tuple(drawn.tolist())


def sequence_of(prompt: int, completion: int, seed: int = 0) -> Sequence:
    return Sequence(words(prompt, seed), words(completion, seed + 1), completion)


def logps_under(denoiser: Denoiser, ids: list[int], sees: Callable[[int, int], bool]) -> Tensor:
    """Log-probabilities [S, V] of stock transformers on one row; `sees(query, key)`."""
    mask = torch.tensor([[sees(q, k) for k in range(len(ids))] for q in range(len(ids))])
    with torch.no_grad():
        logits = denoiser.model(torch.tensor([ids]), attention_mask=mask[None, None]).logits
    return logits[0].log_softmax(-1)


def straight(denoiser: Denoiser, sequence: Sequence, hidden: list[bool]) -> list[float]:
    """Log-probability of each hidden token, block by block, over clean earlier blocks only."""
    spec, prompt = denoiser.spec, list(sequence.prompt_ids)
    completion = list(sequence.completion_ids)
    size = spec.block_size or len(completion)
    found = []
    for start in range(0, len(completion), size):
        block = completion[start : start + size]
        noisy = [MASK if hidden[start + i] else token for i, token in enumerate(block)]
        ids = prompt + completion[:start] + noisy
        if spec.attention == "bidirectional":
            ids = prompt + [MASK if h else t for t, h in zip(completion, hidden, strict=True)]

        def sees(q: int, k: int) -> bool:
            if spec.attention == "bidirectional":
                return True
            return (k - len(prompt)) // size <= (q - len(prompt)) // size

        table = logps_under(denoiser, ids, sees)
        for i, token in enumerate(block):
            if hidden[start + i]:
                place = len(prompt) + start + i - int(spec.logit_shift)
                found.append(float(table[place, token]))
    return found


def rows_of(denoiser: Denoiser, sequences: list[Sequence], masks: list[Tensor]) -> TokenRows:
    spec = denoiser.spec
    return build_rows(
        sequences,
        masks,
        mask_token_id=spec.mask_token_id,
        block_size=spec.block_size,
        logit_shift=spec.logit_shift,
    )


def score(denoiser: Denoiser, rows: TokenRows) -> Tensor:
    with torch.no_grad():
        return denoiser(rows)


def random_masks(views: int, length: int, seed: int) -> Tensor:
    masks = torch.rand(views, length, generator=generator(seed)) < 0.5
    return torch.cat([masks, torch.ones(1, length, dtype=torch.bool)])


KINDS = [("block_causal", False), ("block_causal", True)]
KINDS += [("bidirectional", False), ("bidirectional", True), ("causal", True), ("causal", False)]


@pytest.mark.parametrize(("attention", "shift"), KINDS)
@pytest.mark.parametrize(("prompt", "completion"), SHAPES)
def test_packed_views_equal_the_straight_line(
    make_denoiser: MakeDenoiser, attention: str, shift: bool, prompt: int, completion: int
) -> None:
    denoiser = make_denoiser(attention, shift)
    sequence = sequence_of(prompt, completion)
    masks = random_masks(3, completion, seed=5)
    found = score(denoiser, rows_of(denoiser, [sequence], [masks]))
    expected = [v for mask in masks for v in straight(denoiser, sequence, mask.tolist())]
    torch.testing.assert_close(found, torch.tensor(expected), **CLOSE)


@pytest.mark.parametrize("shift", [False, True])
def test_packed_views_equal_a_plain_noisy_and_clean_row_each(
    make_denoiser: MakeDenoiser, shift: bool
) -> None:
    """One view in the textbook `[x_t ; x_0]` of length 2L, prompt in both halves."""
    denoiser, sequence = make_denoiser(shift=shift), sequence_of(5, 10)
    masks = random_masks(3, 10, seed=6)
    found = score(denoiser, rows_of(denoiser, [sequence], [masks])).tolist()
    clean = list(sequence.prompt_ids + sequence.completion_ids)
    length, first = len(clean), len(sequence.prompt_ids)

    def sees(q: int, k: int) -> bool:
        q_noisy, k_noisy = q < length, k < length
        q_block, k_block = ((place % length - first) // 4 for place in (q, k))
        if q_noisy and k_noisy:
            return q_block == k_block
        if q_noisy:
            return k_block < q_block
        return not k_noisy and k_block <= q_block

    expected = []
    for mask in masks:
        hidden = [False] * first + mask.tolist()
        noisy = [MASK if h else token for token, h in zip(clean, hidden, strict=True)]
        ids = torch.tensor([noisy + clean])
        allowed = torch.tensor([[sees(q, k) for k in range(2 * length)] for q in range(2 * length)])
        positions = torch.arange(length).repeat(2)[None]
        with torch.no_grad():
            logits = denoiser.model(
                ids, position_ids=positions, attention_mask=allowed[None, None]
            ).logits[0]
        table = logits.log_softmax(-1)
        for place, token in enumerate(clean):
            if not hidden[place]:
                continue
            source = place
            if shift:  # a block's first token: from the clean half
                opens = (place - first) % 4 == 0
                source = place - 1 + (length if opens else 0)
            expected.append(float(table[source, token]))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **CLOSE)


@pytest.mark.parametrize(("attention", "shift"), KINDS)
def test_batching_and_padding_change_nothing(
    make_denoiser: MakeDenoiser, attention: str, shift: bool
) -> None:
    denoiser = make_denoiser(attention, shift)
    sequences = [sequence_of(*shape, seed=n) for n, shape in enumerate(SHAPES)]
    sequences[3] = replace(sequences[3], supervised=5)  # with a tail
    config, seeds = EstimatorConfig(num_pairs=2), [10, 11, 12, 13, 14]
    with torch.no_grad():
        batch = estimate_logps(denoiser, denoiser.spec, sequences, seeds, config)
        for row, (sequence, seed) in enumerate(zip(sequences, seeds, strict=True)):
            alone = estimate_logps(denoiser, denoiser.spec, [sequence], [seed], config)[0]
            torch.testing.assert_close(batch[row, : len(alone)], alone, **CLOSE)
            assert not batch[row, len(alone) :].any()


@pytest.mark.parametrize(("attention", "shift"), KINDS[:4])
def test_estimate_is_the_mean_of_straight_lines(
    make_denoiser: MakeDenoiser, attention: str, shift: bool
) -> None:
    """The whole coupled estimator, normalised and parity, from unpacked parts."""
    denoiser, length = make_denoiser(attention, shift), 10
    sequence = replace(sequence_of(5, length), supervised=7)
    masks, ratios = coupled_masks(length, (0.2, 0.8), 1, seed=3)
    full = straight(denoiser, sequence, [True] * length)
    normalised, parity = [], []
    parts = [
        dict(zip(_places(m), straight(denoiser, sequence, m.tolist()), strict=True)) for m in masks
    ]
    for place in range(7):
        view = 0 if masks[0, place] else 1
        coupled = parts[view][place]
        normalised.append((full[place] + coupled) / 2)
        parity.append((full[place] + coupled / float(ratios[view])) / 2)
    for mode, expected in (("normalised", normalised), ("parity", parity)):
        config = EstimatorConfig(mode=mode)  # type: ignore[arg-type]
        with torch.no_grad():
            found = estimate_logps(denoiser, denoiser.spec, [sequence], [3], config)
        torch.testing.assert_close(found[0], torch.tensor(expected), **CLOSE)


def _places(mask: Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def test_causal_likelihood_is_the_language_models(make_denoiser: MakeDenoiser) -> None:
    """Causal with shift: every view gives the log-probability of stock next-token prediction."""
    denoiser, sequence = make_denoiser("causal", shift=True), sequence_of(4, 9)
    ids = torch.tensor([sequence.prompt_ids + sequence.completion_ids])
    with torch.no_grad():
        table = denoiser.model(ids).logits[0].log_softmax(-1)  # transformers' own causal mask
        found = estimate_logps(denoiser, denoiser.spec, [sequence], [1], EstimatorConfig())[0]
    expected = table[3:-1].gather(1, ids[0, 4:, None])[:, 0]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_later_blocks_and_other_views_are_invisible(make_denoiser: MakeDenoiser) -> None:
    denoiser, one = make_denoiser(), sequence_of(3, 8)
    other = replace(one, completion_ids=one.completion_ids[:4] + words(4, seed=99))
    masks = random_masks(2, 8, seed=1)
    early = masks.clone()
    early[:, 4:] = False  # score the first block only
    torch.testing.assert_close(
        score(denoiser, rows_of(denoiser, [one], [early])),
        score(denoiser, rows_of(denoiser, [other], [early])),
        **CLOSE,
    )
    # Another companion view leaves the first view's values alone.
    first = int(masks[0].sum())
    companion = torch.cat([masks[:1], ~masks[1:]])
    torch.testing.assert_close(
        score(denoiser, rows_of(denoiser, [one], [masks]))[:first],
        score(denoiser, rows_of(denoiser, [one], [companion]))[:first],
        **CLOSE,
    )


# Pretraining rows: packing changes nothing

DOCUMENTS = [
    Document(words(8, 1), 0),
    Document(words(9, 2), 5),
    Document(words(4, 3), 0),
    Document(words(11, 4), 3),
]


def packed(documents: list[Document], length: int = 36) -> PackedRows:
    return to_tensors([documents], length, block_size=4)


def noise(packing: Packing = "per_document", shift: bool = False) -> Noise:
    return Noise(
        generator=generator(0),
        block_size=4,
        mask_token_id=MASK,
        logit_shift=shift,
        packing=packing,
    )


def hide(monkeypatch: pytest.MonkeyPatch, masked: Tensor) -> None:
    drawn = Corruption(masked, torch.ones(masked.shape), 0.0)
    monkeypatch.setattr(objective, "corrupt_blocks", lambda *_: drawn)
    monkeypatch.setattr(objective, "corrupt_canvas", lambda *_: drawn)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", ["block_causal", "bidirectional", "causal"])
def test_a_packed_row_is_its_documents_one_by_one(
    make_denoiser: MakeDenoiser, monkeypatch: pytest.MonkeyPatch, kind: str, shift: bool
) -> None:
    """Each document scored as a completion behind its prompt, by `straight`."""
    denoiser = make_denoiser(kind, shift)
    rows = packed(DOCUMENTS)
    masked = (torch.rand(1, 36, generator=generator(9)) < 0.6) & rows.supervised
    if shift:
        masked &= rows.position > 0
    hide(monkeypatch, masked)
    if kind == "block_causal":
        training = block_diffusion_rows(rows, noise(shift=shift))
    else:
        training = canvas_rows(rows, noise(shift=shift), causal=kind == "causal")
    found = score(denoiser, training.rows)
    expected, start = [], 0
    for document in DOCUMENTS:
        stop = start + len(document.ids)
        expected += _document(denoiser, document, masked[0, start:stop].tolist())
        start = stop
    torch.testing.assert_close(found, torch.tensor(expected), **CLOSE)


def _document(denoiser: Denoiser, document: Document, hidden: list[bool]) -> list[float]:
    prompt = document.prompt_length
    if denoiser.spec.attention == "causal":  # noise stays visible, unlike in decoding
        ids = [MASK if h else token for token, h in zip(document.ids, hidden, strict=True)]
        table = logps_under(denoiser, ids, lambda q, k: k <= q)
        shift = int(denoiser.spec.logit_shift)
        return [float(table[p - shift, document.ids[p]]) for p, h in enumerate(hidden) if h]
    sequence = Sequence(document.ids[:prompt], document.ids[prompt:], len(document.ids) - prompt)
    return straight(denoiser, sequence, hidden[prompt:])


def test_packed_next_token_rows_are_stock_language_modelling(make_denoiser: MakeDenoiser) -> None:
    denoiser = make_denoiser("causal", shift=True)
    found = score(denoiser, next_token_rows(packed(DOCUMENTS)).rows)
    expected = []
    for document in DOCUMENTS:
        ids = torch.tensor([document.ids])
        with torch.no_grad():
            table = denoiser.model(ids).logits[0, :-1].log_softmax(-1)
        values = table.gather(1, ids[0, 1:, None])[:, 0]
        expected.append(values[max(document.prompt_length, 1) - 1 :])
    torch.testing.assert_close(found, torch.cat(expected), **CLOSE)


def test_mutually_visible_rows_are_one_long_document(
    make_denoiser: MakeDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain documents that fill whole blocks: packed and visible, they are one text."""
    denoiser = make_denoiser()
    parts = [Document(words(8, 1), 0), Document(words(4, 2), 0), Document(words(12, 3), 0)]
    whole = Document(tuple(token for part in parts for token in part.ids), 0)
    hide(monkeypatch, torch.rand(1, 24, generator=generator(9)) < 0.6)
    together = block_diffusion_rows(packed(parts, 24), noise("mutually_visible"))
    long = block_diffusion_rows(packed([whole], 24), noise("per_document"))
    assert torch.equal(together.rows.attention_mask, long.rows.attention_mask)
    torch.testing.assert_close(score(denoiser, together.rows), score(denoiser, long.rows), **CLOSE)


def test_pads_of_training_rows_change_nothing(
    make_denoiser: MakeDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = make_denoiser()
    masked = torch.rand(1, 32, generator=generator(9)) < 0.6
    values = []
    for length in (32, 48):
        rows = packed(DOCUMENTS, length)
        wide = torch.nn.functional.pad(masked, (0, length - 32)) & rows.supervised
        hide(monkeypatch, wide)
        values.append(score(denoiser, block_diffusion_rows(rows, noise()).rows))
    torch.testing.assert_close(*values, **CLOSE)

"""Attention back-ends against dense masks: what each is told, and what comes out.

FlexAttention runs uncompiled here (and compiled once, forward only: torch has no backward of it on
a CPU). flash-attn needs a GPU; what it is given is checked with a stand-in of the same signature.
"""

import copy
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

import models.attention
import models.kernels
from common.errors import UserError
from diffusion.attention import Pattern, may_see
from diffusion.layout import Sequence, TokenRows, build_rows
from diffusion.masking import generator
from diffusion.objective import Noise, block_diffusion_rows, canvas_rows, next_token_rows
from models.attention import (
    TILE,
    AttentionChoice,
    check_attention,
    choose_attention,
)
from models.checkpoint import new_model
from models.denoiser import Denoiser
from models.engine import EngineConfig, OptimConfig, make_engine
from models.kernels import block_mask, segments
from models.spec import DiffusionSpec
from pretrain.data import Document, PackedRows, to_tensors

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MASK = 2


def denoiser_of(attention: str, **changes: Any) -> Denoiser:
    """Two layers with heads of 16; random, and large enough that attention really looks."""
    architecture = {
        "model_type": "qwen2", "vocab_size": 24, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": False, "initializer_range": 0.3,
    } | changes  # fmt: skip
    block = {"block_causal": 4, "causal": 1, "bidirectional": None}[attention]
    spec = DiffusionSpec(
        mask_token_id=MASK, logit_shift=False, attention=attention, block_size=block
    )  # type: ignore[arg-type]
    return Denoiser(new_model(architecture, 0).eval(), spec)


def words(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 24, (count,), generator=generator(seed)).tolist())


def completions(block_size: int | None, scale: int = 1) -> TokenRows:
    """Three completions of three lengths in two views each: padded rows."""
    shapes = [(5 * scale, 9 * scale), (2, 4 * scale), (11 * scale, 17 * scale)]
    sequences = [Sequence(words(p, n), words(c, n + 9), c) for n, (p, c) in enumerate(shapes)]
    masks = [torch.rand(2, c, generator=generator(n)) < 0.6 for n, (_, c) in enumerate(shapes)]
    return build_rows(
        sequences, masks, mask_token_id=MASK, block_size=block_size, logit_shift=False
    )


def documents() -> PackedRows:
    """Two rows of 76 places; the second is half padding."""
    parts = [Document(words(n, n), n // 3) for n in (20, 8, 41)]
    return to_tensors([parts, parts[:2]], 76, block_size=4)


def noise(packing: str) -> Noise:
    return Noise(
        generator=generator(3),
        block_size=4,
        mask_token_id=MASK,
        logit_shift=False,
        packing=packing,  # type: ignore[arg-type]
    )


BIDIRECTIONAL: dict[str, Callable[[], TokenRows]] = {
    "canvas": lambda: completions(None),
    "packed canvas": lambda: canvas_rows(documents(), noise("per_document"), False).rows,
    "visible canvas": lambda: canvas_rows(documents(), noise("mutually_visible"), False).rows,
}
ROWS: dict[str, Callable[[], TokenRows]] = BIDIRECTIONAL | {
    "prompt, clean, two views": lambda: completions(4),
    "several tiles": lambda: completions(4, scale=6),
    "noisy and clean": lambda: block_diffusion_rows(documents(), noise("per_document")).rows,
    "visible documents": lambda: block_diffusion_rows(documents(), noise("mutually_visible")).rows,
    "next token": lambda: next_token_rows(documents()).rows,
}


class Largest(TorchDispatchMode):
    """Elements of the largest new tensor."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, list | tuple) else [out]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


# What the kernels are told


@pytest.mark.parametrize("kind", ROWS)
def test_block_mask_is_torchs_own(kind: str) -> None:
    """Tile by tile what `create_block_mask` makes of the dense answers."""
    pattern = ROWS[kind]().padded(TILE).pattern
    facts = pattern.view, pattern.block, pattern.document, pattern.valid
    rows, length = pattern.view.shape

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_see(*facts, row, query, key)

    theirs = create_block_mask(rule, rows, None, length, length, device="cpu")
    ours = block_mask(pattern)
    assert ours.shape == theirs.shape == (rows, 1, length, length)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_tiles_by_hand() -> None:
    """Two blocks of two tiles each: the earlier is seen whole, the later not at all."""
    block = torch.arange(4 * TILE)[None] // (2 * TILE)
    pattern = Pattern(torch.zeros_like(block), block, None, torch.ones_like(block).bool())
    tiles = block_mask(pattern)
    assert tiles.full_kv_num_blocks.tolist() == [[[2, 2, 4, 4]]]
    assert tiles.kv_num_blocks.tolist() == [[[0, 0, 0, 0]]]
    assert tiles.full_kv_indices[0, 0, 1, :2].tolist() == [0, 1]


def test_no_square_of_the_length_is_ever_made() -> None:
    """Of 8192 tokens in 2 rows: less than a tenth of a dense mask."""
    zeros = torch.zeros(2, 8192, dtype=torch.int64)
    pattern = Pattern(zeros, torch.arange(8192).expand(2, -1) // 4, zeros, zeros == 0)
    with Largest() as made:
        block_mask(pattern)
    assert made.elements == 2 * TILE * 8192
    with Largest() as made:
        segments(Pattern(zeros, zeros, torch.arange(8192).expand(2, -1) // 1000, zeros == 0))
    assert made.elements == 2 * 8192


def test_segments_by_hand() -> None:
    rows = torch.tensor([[5, 5, 6, 6, 6, 0, 0], [6, 6, 6, 6, 6, 6, 6]])
    zeros = torch.zeros_like(rows)
    valid = torch.ones_like(rows).bool()
    valid[0, 5:] = False
    found = segments(Pattern(zeros, zeros, rows, valid))
    assert found.bounds.tolist() == [0, 2, 5, 7, 14]
    assert (found.bounds.dtype, found.longest) == (torch.int32, 7)
    assert segments(Pattern(zeros, zeros, None, valid)).bounds.tolist() == [0, 5, 7, 14]


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind not in BIDIRECTIONAL])
def test_segments_refuse_what_is_not_bidirectional(kind: str) -> None:
    with pytest.raises(ValueError, match="whole document"):
        segments(ROWS[kind]().pattern)


def test_padding_moves_no_answer() -> None:
    rows = completions(4)
    wide = rows.padded(TILE)
    assert wide.input_ids.shape == (3, TILE)
    for name in ("input_ids", "position_ids"):
        before, after = getattr(rows, name), getattr(wide, name)
        assert torch.equal(after.flatten()[wide.select], before.flatten()[rows.select])
    length = rows.input_ids.shape[1]
    assert torch.equal(wide.attention_mask[:, :, :length, :length], rows.attention_mask)
    assert not wide.attention_mask[:, :, :length, length:].any()
    assert wide.padded(TILE) is wide


# What comes out


def two_of(kind: str, attention: str, backend: str) -> tuple[Tensor, Tensor]:
    """The same rows scored with `sdpa` and with `backend`."""
    plain = denoiser_of(attention)
    other = copy.deepcopy(plain).use(backend)  # type: ignore[arg-type]
    rows = ROWS[kind]()
    with torch.no_grad():
        return other(rows), plain(rows)


@pytest.mark.parametrize("kind", ROWS)
def test_flex_equals_sdpa(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(models.kernels, "_flex_kernel", lambda: flex_attention)
    torch.testing.assert_close(*two_of(kind, "block_causal", "flex"), **CLOSE)


@pytest.mark.slow
def test_compiled_flex_equals_sdpa_and_is_compiled_a_few_times() -> None:
    """Lengths and numbers of rows that differ from pass to pass are no reason to compile."""
    from torch._dynamo.utils import counters

    models.kernels._flex_kernel.cache_clear()
    plain = denoiser_of("block_causal", num_hidden_layers=1)
    flex = copy.deepcopy(plain).use("flex")
    before, graphs = counters["stats"]["unique_graphs"], []
    for scale in (1, 6, 8, 10, 12, 14, 16):
        rows = completions(4, scale)
        with torch.no_grad():
            torch.testing.assert_close(flex(rows), plain(rows), **CLOSE)
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert graphs[1] <= 3
    assert graphs[1:] == [graphs[1]] * 6


def by_hand(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **options: Any) -> Tensor:
    """flash_attn_varlen_func as its documentation has it, one segment and head at a time."""
    bounds, key_bounds, longest, key_longest = lengths
    assert bounds is key_bounds and longest == key_longest
    assert options.keys() == {"softmax_scale", "causal"} and options["causal"] is False
    assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}
    share, out = q.shape[1] // k.shape[1], torch.empty_like(q)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert 0 < stop - start <= longest
        for head in range(q.shape[1]):
            mine, part = slice(start, stop), head // share
            scores = q[mine, head].float() @ k[mine, part].float().T * options["softmax_scale"]
            out[mine, head] = (scores.softmax(-1) @ v[mine, part].float()).to(q.dtype)
    return out


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = by_hand  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_flash_is_given_what_equals_sdpa(stand_in: None, kind: str) -> None:
    # The kernel's inputs are rounded to bfloat16: hence the tolerance.
    ours, theirs = two_of(kind, "bidirectional", "flash_attention_2")
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)


def test_the_tolerance_of_flash_tells_documents_apart(stand_in: None) -> None:
    """The same tokens with documents in sight of each other are further off than rounding."""
    rows = {kind: BIDIRECTIONAL[kind]() for kind in ("packed canvas", "visible canvas")}
    flash = denoiser_of("bidirectional").use("flash_attention_2")
    with torch.no_grad():
        apart, together = (flash(row) for row in rows.values())
    assert (apart - together).abs().max() > 0.5


def engine_gradients(attention: str, backend: str, precision: str) -> Tensor:
    """All gradients of one micro-batch, flat, with gradient checkpointing."""
    config = EngineConfig(kind="torch", precision=precision, gradient_checkpointing=True)  # type: ignore[arg-type]
    optim = OptimConfig(lr=1e-2, schedule="constant", grad_clip=0.0, weight_decay=0.0)
    denoiser = denoiser_of(attention).use(backend)  # type: ignore[arg-type]
    engine = make_engine(denoiser, config, optim)
    loss = engine.score(completions(denoiser.spec.block_size)).mean()
    engine.backward(loss, last=True)
    grads = [value.grad for value in denoiser.parameters() if value.grad is not None]
    assert len(grads) == len(list(denoiser.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def similar(ours: Tensor, theirs: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(ours.float(), theirs.float(), dim=0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_trains_through_flash(stand_in: None, precision: str) -> None:
    """Autocast and gradient checkpointing; float32 models are rounded in the kernel."""
    ours = engine_gradients("bidirectional", "flash_attention_2", precision)
    assert similar(ours, engine_gradients("bidirectional", "sdpa", precision)) > 0.99


def test_a_window_may_show_dense_masks_whatever_scores(stand_in: None) -> None:
    """The decoder hands the same model its own masks."""
    ids = torch.randint(3, 24, (2, 6), generator=generator(0))
    mask = torch.rand(2, 1, 6, 6, generator=generator(1)) < 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    plain = denoiser_of("bidirectional")
    for backend in ("flex", "flash_attention_2"):
        other = copy.deepcopy(plain).use(backend)  # type: ignore[arg-type]
        with torch.no_grad():
            assert torch.equal(other.hidden(ids, ids, mask), plain.hidden(ids, ids, mask))
            with pytest.raises(ValueError, match="no mask"):
                other.hidden(ids, ids, None)


def test_the_choice_is_not_saved_with_the_model() -> None:
    saved = denoiser_of("causal").use("flex").model.config.to_json_string()
    assert '"unmask' not in saved and "attn_impl" not in saved


# Which one it is


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, bool], None]:
    """A machine with or without CUDA and flash-attn."""

    def pretend(cuda: bool, flash: bool) -> None:
        found = SimpleNamespace() if flash else None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(models.attention, "find_spec", lambda name: found)

    return pretend


HEADS = SimpleNamespace(hidden_size=64, num_attention_heads=4)
SMALL = SimpleNamespace(hidden_size=64, num_attention_heads=16, head_dim=None)


@pytest.mark.parametrize(
    ("cuda", "flash", "visible", "precision", "config", "expected"),
    [
        (False, True, "bidirectional", "bf16", HEADS, "sdpa"),
        (True, True, "bidirectional", "bf16", HEADS, "flash_attention_2"),
        (True, True, "bidirectional", "fp32", HEADS, "flex"),
        (True, False, "bidirectional", "bf16", HEADS, "flex"),
        (True, True, "block_causal", "bf16", HEADS, "flex"),
        (True, True, "causal", "bf16", HEADS, "flex"),
        (True, True, "block_causal", "bf16", SMALL, "sdpa"),
    ],
)
def test_auto(
    machine: Callable[[bool, bool], None],
    cuda: bool,
    flash: bool,
    visible: Any,
    precision: str,
    config: Any,
    expected: str,
) -> None:
    machine(cuda, flash)
    assert choose_attention("auto", visible, precision, config) == expected


@pytest.mark.parametrize(
    ("choice", "cuda", "flash", "visible", "precision", "config", "message"),
    [
        ("flex", False, True, "causal", "fp32", HEADS, "without a GPU; set engine.attention=sdpa"),
        ("flex", True, True, "causal", "fp32", SMALL, "heads of 16 numbers or more.* have 4"),
        ("flash_attention_2", True, False, "bidirectional", "bf16", HEADS, r"\.\[flash-attn\]"),
        ("flash_attention_2", False, True, "bidirectional", "bf16", HEADS, "without a GPU"),
        ("flash_attention_2", True, True, "bidirectional", "fp32", HEADS, "precision=bf16"),
        ("flash_attention_2", True, True, "block_causal", "bf16", HEADS, "model's is block_causal"),
    ],
)
def test_choices_that_cannot_work(
    machine: Callable[[bool, bool], None],
    choice: AttentionChoice,
    cuda: bool,
    flash: bool,
    visible: Any,
    precision: str,
    config: Any,
    message: str,
) -> None:
    machine(cuda, flash)
    with pytest.raises(UserError, match=message) as raised:
        choose_attention(choice, visible, precision, config)
    assert str(raised.value).startswith(f"engine.attention={choice}")
    assert "\n" not in str(raised.value)


def test_another_machine_is_not_judged_by_this_one(machine: Callable[[bool, bool], None]) -> None:
    machine(False, False)
    check_attention("flex", "block_causal", "fp32", here=False)
    check_attention("flash_attention_2", "bidirectional", "bf16", here=False)
    with pytest.raises(UserError, match="block_causal"):
        check_attention("flash_attention_2", "block_causal", "bf16", here=False)


# On a GPU


def on_a_gpu(
    backend: str, kind: str, dtype: torch.dtype, checkpointing: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and all gradients."""
    attention = "bidirectional" if kind in BIDIRECTIONAL else "block_causal"
    denoiser = denoiser_of(attention).to("cuda", dtype).use(backend)  # type: ignore[arg-type]
    if checkpointing:
        denoiser.train()
        denoiser.model.gradient_checkpointing_enable({"use_reentrant": False})
    logps = denoiser(ROWS[kind]().to(torch.device("cuda")))
    (logps * torch.linspace(0, 1, len(logps), device="cuda")).sum().backward()
    grads = [value.grad.flatten() for value in denoiser.parameters() if value.grad is not None]
    return logps.detach(), torch.cat(grads)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ROWS)
def test_flex_equals_sdpa_on_a_gpu(kind: str, checkpointing: bool) -> None:
    ours = on_a_gpu("flex", kind, torch.float32, checkpointing)
    theirs = on_a_gpu("sdpa", kind, torch.float32)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-2, atol=1e-2)  # TF32 in the kernel
    assert similar(ours[1], theirs[1]) > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_trains_through_flex_on_a_gpu(precision: str) -> None:
    ours = engine_gradients("block_causal", "flex", precision)
    assert similar(ours, engine_gradients("block_causal", "sdpa", precision)) > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_flash_equals_sdpa_on_a_gpu(kind: str) -> None:
    pytest.importorskip("flash_attn", reason="needs the flash-attn extra")
    ours = on_a_gpu("flash_attention_2", kind, torch.bfloat16)
    theirs = on_a_gpu("sdpa", kind, torch.bfloat16)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0.1, atol=0.2)
    assert similar(ours[1], theirs[1]) > 0.99
